"""Prompts and replies as training data."""

from collections.abc import Sequence
from typing import Any

from torch.utils.data import Dataset
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX, Message

Example = dict[str, Any]  # {"prompt": text or {"user": text}, "response": text}


class ReplyDataset(Dataset):
    """Examples of a `prompts` component in the tokenizer's chat template; the loss counts the replies."""

    def __init__(self, tokenizer: Any, examples: Sequence[Example]) -> None:
        self.tokenizer, self.examples = tokenizer, examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        prompt, reply = self.examples[index]["prompt"], self.examples[index]["response"]
        turns = prompt if isinstance(prompt, dict) else {"user": prompt}
        messages = [
            Message(role=role, content=turns[role], masked=True) for role in ("system", "user") if role in turns
        ]
        tokens, mask = self.tokenizer.tokenize_messages([*messages, Message(role="assistant", content=reply)])
        labels = [CROSS_ENTROPY_IGNORE_IDX if hidden else token for token, hidden in zip(tokens, mask, strict=True)]
        return {"tokens": tokens, "labels": labels}
