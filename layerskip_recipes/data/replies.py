"""Prompts and replies as training data, and what a chat template writes around a reply."""

import re
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch.utils.data import Dataset
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX, Message

from layerskip_recipes.config.schema import PositiveInt, Text, checked_arguments
from layerskip_recipes.data.json_lines import JsonLines
from layerskip_recipes.errors import ConfigError

ANSWER_FIRST = (
    ". To let a model answer first: tune run layerskip_generate --config qa/answers model_dir=MODEL data_dir={folder}, "
    "and then dataset.path={folder}/answers.jsonl dataset_val=null"
)
PromptAndReply = dict[str, Any]  # {"prompt": text or {"user": text}, "response": text}, and maybe "prediction"


class ReplyDataset(Dataset):
    """Examples of a `prompts` component in the tokenizer's chat template; the loss counts the replies."""

    def __init__(self, tokenizer: Any, examples: Sequence[PromptAndReply]) -> None:
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
        path: a .jsonl or .jsonl.gz file, also an `output_file` of layerskip_generate, which has a model's own answers.
        question: the field of a line that holds the question as text, or as {"user": text, "system": text}.
        answer: the field that holds the answer.
        count: read only this number of lines. None: all.
    """
    return ReplyDataset(tokenizer, _read_pairs(path, question, answer, count))


@checked_arguments()
def qa_prompts(
    path: Annotated[Text, Field(examples=["test.jsonl"])],
    question: Annotated[Text, Field(examples=["input"])] = "input",
    answer: Annotated[Text, Field(examples=["output"])] | None = "output",
    count: Annotated[PositiveInt, Field(examples=[24])] | None = None,
) -> list[PromptAndReply]:
    """The questions of `qa_dataset`'s files as prompts, with the answers as references; `answer` None: without.

    Drafts are looked up in a line's field `prediction` too, a text or a list of texts.
    """
    return [*_read_pairs(path, question, answer, count)]


def _read_pairs(path: str, question: str, answer: str | None, count: int | None) -> Sequence[PromptAndReply]:
    answer_field = answer or "output"

    def example(number: int, line: dict[str, Any]) -> PromptAndReply:
        if {"prompt", "text"} <= line.keys() and not {question, answer} & line.keys():  # an output_file
            line = {question: line["prompt"], answer_field: line["text"]}
        asked = line.get(question)
        is_chat = isinstance(asked, dict) and {"user"} <= asked.keys() <= {"user", "system"}
        turns = asked if is_chat else {"user": asked}
        texts = [(question, text) for text in turns.values()]
        if answer is not None:
            texts.append((answer, line.get(answer)))
        for name, text in texts:
            if not isinstance(text, str) or re.search("[\ud800-\udfff]", text) or not (text or name == answer):
                fault = f"{name} is {line[name]!r:.60}" if name in line else f"no field {name}, but {', '.join(line)}"
                advice = ANSWER_FIRST.format(folder=Path(path).parent) if name == answer not in line else ""
                raise ConfigError(
                    f"path: {path!r} line {number}: {fault}. Allowed: a question and an answer as text in UTF-8, for "
                    f'example {{"{question}": "wake me at 7", "{answer_field}": "alarm 07:00"}}{advice}'
                )
        pair = {"prompt": turns, "response": None if answer is None else line[answer]}
        return pair | ({"prediction": line["prediction"]} if "prediction" in line else {})

    examples = JsonLines(path, "path", example, count)
    if not len(examples):
        raise ConfigError(f"path: {path!r} holds no lines. Give a file with a JSON object on each line")
    return examples


@dataclass(frozen=True)
class ReplyFormat:
    """The labels around a reply that decoding never generates: it is prompted with the header, and stops before the
    footer."""

    header: tuple[int, ...] = ()
    footer: tuple[int, ...] = ()  # after the stop token
    stop_tokens: tuple[int, ...] = ()

    @classmethod
    def of(cls, tokenizer: Any) -> "ReplyFormat":
        """Compare a conversation as it is trained with its prompt; without a header for a tokenizer of plain text."""
        stops = tuple(getattr(tokenizer, "stop_tokens", ()))
        tokenizer = copy(tokenizer)
        tokenizer.max_seq_len = None  # the training limit may cut the reply off

        def rendered(question: str, reply: str) -> Any:
            turn = [Message(role="user", content=question, masked=True), Message(role="assistant", content=reply)]
            return tokenizer({"messages": turn}, inference=not reply)

        try:
            # Two replies, as the first token of one may have a space of the header in it.
            prompt, other, trained = (rendered("?", reply) for reply in ("", "a", "!"))
            other_prompt = rendered("!", "")["tokens"]
            tokens, first = list(trained["tokens"]), list(trained["mask"]).index(False)
        except Exception:  # torchtune's tokenizers raise whatever they like
            return cls(stop_tokens=stops)
        each = zip(tokens, other["tokens"], prompt["tokens"], strict=False)
        reply = next((i for i, at in enumerate(each) if len({*at}) > 1), len(prompt["tokens"]))
        end = next((i + 1 for i in range(reply, len(tokens)) if tokens[i] in stops), len(tokens))
        # Where the loss leaves out the header, it is what all prompts end with.
        ends = zip(reversed(prompt["tokens"]), reversed(other_prompt), strict=False)
        shared = next((i for i, (a, b) in enumerate(ends) if a != b), 0)
        return cls(tuple(tokens[min(first, reply - shared) : reply]), tuple(tokens[end:]), stops)

    def generated(self, labels: torch.Tensor) -> torch.Tensor:
        """Whether decoding generates each label: [b, s] -> bool [b, s]."""
        in_reply = torch.zeros_like(labels, dtype=torch.bool)
        for row, tokens in enumerate(labels.tolist()):
            counts = [token != CROSS_ENTROPY_IGNORE_IDX for token in tokens]
            for counted, run in groupby(range(len(tokens)), counts.__getitem__):
                if counted:
                    for reply in self._replies(tokens, [*run]):
                        in_reply[row, reply] = True
        return in_reply

    def _replies(self, tokens: list[int], run: list[int]) -> list[slice]:
        """The replies in a run of labels; without any header, its texts."""
        first, end = run[0], run[-1] + 1
        after = [i + 1 for i in run if tokens[i] in self.stop_tokens]  # each stop token

        def behind(part: tuple[int, ...], i: int) -> int:
            return i + len(part) if tuple(tokens[i : i + len(part)]) == part else i

        starts = [behind(self.header, i) for i in run if behind(self.header, i) > i]
        starts = starts or [first, *(behind(self.footer, i) for i in after)]
        return [
            slice(start, min((i for i in after if i > start), default=end))
            for start, end in pairwise([*(min(start, end) for start in starts), end])
        ]
