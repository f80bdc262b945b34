"""Prompts and replies as training data."""

import re
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field
from torch.utils.data import Dataset
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX, Message

from layerskip_recipes.config.schema import PositiveInt, Text, checked_arguments
from layerskip_recipes.data.json_lines import read_json_lines
from layerskip_recipes.errors import ConfigError

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


@checked_arguments()
def qa_dataset(
    tokenizer: Any,
    path: Annotated[Text, Field(examples=["train.jsonl"])],
    question: Annotated[Text, Field(examples=["input"])] = "input",
    answer: Annotated[Text, Field(examples=["output"])] = "output",
    count: Annotated[PositiveInt, Field(examples=[100])] | None = None,
) -> ReplyDataset:
    """Questions and answers of a JSONL file in the tokenizer's chat template; the loss counts the answers.

    Args:
        tokenizer: the model's.
        path: a .jsonl or .jsonl.gz file.
        question: the field of a line that holds the question.
        answer: the field that holds the answer.
        count: read only this number of lines. None: all.

    Raises:
        ConfigError: for the first line without a question and an answer as text, with its number.
    """
    examples = []
    for number, line in read_json_lines(path, "path").items():
        for field in (question, answer):
            text = line.get(field)
            if not isinstance(text, str) or re.search("[\ud800-\udfff]", text) or not (text or field == answer):
                given = f"{field} is {text!r:.60}" if field in line else f"no field {field}, but {', '.join(line)}"
                raise ConfigError(
                    f"path: {path!r} line {number}: {given}. Allowed: a question and an answer as text in UTF-8, for "
                    f'example {{"{question}": "wake me at 7", "{answer}": "alarm 07:00"}}'
                )
        examples.append({"prompt": {"user": line[question]}, "response": line[answer]})
    if not examples:
        raise ConfigError(f"path: {path!r} holds no lines. Give a file with a JSON object on each line")
    return ReplyDataset(tokenizer, examples[:count])
