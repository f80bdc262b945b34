"""Render Hugging Face chat templates as transformers does, and find each message in the rendered text."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from layerskip_recipes.errors import ConfigError

Turn = Mapping[str, str]  # {"role": ..., "content": ...}

# For a folder without a chat template: bos, the contents, eos after each assistant message. The dataset's
# `prompt_template` adds separators, as for torchtune's tokenizers of base models.
PLAIN_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)
# Replaces a message's content to find its place in the text. From Unicode's private use area: no text contains it.
MARK = "\U0010fa57"


THINK, END_OF_THINKING = "<think>", "</think>"


@dataclass(frozen=True)
class Reply:
    """What the model writes in an assistant's turn, by its place in the text. All text before `start` is the prompt."""

    start: int
    content_end: int
    end: int  # after the special token that ends the turn


@dataclass(frozen=True)
class Rendered:
    """A conversation as text."""

    text: str
    message_ends: list[tuple[int, int]]  # (end of a message in characters, index of the message), in order of the text
    replies: dict[int, Reply]  # by index of the message


@dataclass(frozen=True)
class ChatTemplate:
    """A template and the tokens that it may write."""

    source: str
    named_tokens: Mapping[str, str]  # such as {"eos_token": "</s>"}
    special_tokens: Sequence[str]  # all special tokens of the tokenizer

    def __post_init__(self) -> None:
        try:
            _compile(self.source)
        except TemplateError as e:
            raise ConfigError(f"tokenizer.chat_template: no valid Jinja template: {e}") from e

    def render(self, turns: Sequence[Turn], add_generation_prompt: bool = False, thinking: bool = False) -> str:
        """The template's own text; `add_generation_prompt` adds the header of the assistant's reply."""
        # transformers passes tools and documents too, so templates may read them.
        variables = dict(self.named_tokens, tools=None, documents=None, enable_thinking=thinking)
        return _compile(self.source).render(variables, messages=turns, add_generation_prompt=add_generation_prompt)

    def prompt(self, turns: Sequence[Turn], thinking: bool = False) -> Rendered:
        """The text of a conversation up to the place where the reply starts or continues."""
        thinking = thinking or reasons(turns)
        if not _is_reply(turns[-1]):
            return self._history(turns, True, thinking)
        if not turns[-1]["content"]:  # torchtune's form of a prompt
            return self._history(turns[:-1], True, thinking)
        begun = self.conversation(turns, thinking)
        reply = begun.replies.get(len(turns) - 1)
        return replace(begun, text=begun.text[: reply.content_end]) if reply else begun

    def conversation(self, turns: Sequence[Turn], thinking: bool = False) -> Rendered:
        """The text of a conversation, in which each reply directly follows the prompt that asks for it.

        Templates of reasoning models write it differently: Qwen3's has an empty think block before the last reply only,
        and that of DeepSeek's distillations opens a think block in prompts alone. Training would not show what
        generation asks. A model thinks if `thinking`, or if a reply has reasoning.
        """
        thinking = thinking or reasons(turns)
        i = len(turns) - 1
        if i == 0 or not _is_reply(turns[i]):
            return self._history(turns, False, thinking)
        asked, prompt = self._history(turns[:i], True, thinking), self.render(turns[:i], True, thinking)
        text = self.render(turns, False, thinking)
        span = self._content_span(turns, i, text, False, thinking)
        if span is None:
            raise ConfigError(
                "tokenizer.chat_template: writes no last reply, so there is none to learn. Give another one"
            )
        start, end = span
        begin = _begin_of_reply(prompt, text[:start])
        written = text[begin:end]
        if END_OF_THINKING in turns[i]["content"]:  # the template may drop the reasoning
            wanted = _without_opening(turns[i]["content"], prompt)
            whole = text[len(prompt) : end] if text.startswith(prompt) else ""
            written = whole if wanted.strip() in whole else wanted
        footer = self.special_pattern.search(text[end:])
        first = len(asked.text)
        last = first + len(written)
        reply = Reply(first, last, last + (footer.end() if footer else len(text) - end))
        written = asked.text + written + text[end:]
        return Rendered(written, [*asked.message_ends, (len(written), i)], {**asked.replies, i: reply})

    def _history(self, turns: Sequence[Turn], is_prompt: bool, thinking: bool) -> Rendered:
        """A conversation that ends before a reply, with the prompt of each earlier reply before it."""
        text = self.render(turns, is_prompt, thinking)
        message_ends = self._message_ends(turns, text, is_prompt, thinking)
        end_of = {i: end for end, i in message_ends}
        written, done = "", 0  # the new text, and how much of the template's text it covers
        replies: dict[int, Reply] = {}
        moved = [(0, 0)]  # (a position in the template's text, how far the new text is ahead of it from there on)
        for i, turn in enumerate(turns):
            span = self._content_span(turns, i, text, is_prompt, thinking) if _is_reply(turn) else None
            if span is None or (reasons([turn]) and END_OF_THINKING not in text[slice(*span)]):
                continue  # without its reasoning, it is no longer what the model wrote
            start, end = span
            prompt = self.render(turns[:i], True, thinking) if i else text[:start]
            begin = _begin_of_reply(prompt, text[:start])
            same = min(begin, len(prompt))
            if prompt[:same] == text[:same]:
                written += text[done:same] + prompt[same:]
            else:  # such as Mistral's templates, which move the system message
                written += text[done:begin]
            footer = self.special_pattern.search(text[end : end_of[i]])
            ahead = len(written) - begin
            stop = end + footer.end() if footer else end_of[i]
            replies[i] = Reply(len(written), end + ahead, stop + ahead)
            moved.append((begin, ahead))
            done = begin
        message_ends = [(end + max(x for x in moved if x[0] <= end)[1], i) for end, i in message_ends]
        return Rendered(written + text[done:], message_ends, replies)

    def end_of_turn(self) -> str | None:
        """The special token directly after an assistant's content; None if there is none."""
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": MARK}]
        try:
            after = self.render(turns).partition(MARK)[2]
        except TemplateError:
            return None
        found = self.special_pattern.match(after.lstrip())
        return found[0] if found else None

    def _message_ends(self, turns: Sequence[Turn], text: str, *mode: bool) -> list[tuple[int, int]]:
        """[(end of a message in characters, index of the message)], in the order of the rendered text.

        Usually the text starts with the rendering of the first i messages; its length is the end of message i.
        """
        ends = [0]
        try:
            for count in range(1, len(turns)):
                prefix = self.render(turns[:count], False, mode[-1])
                if not text.startswith(prefix) or len(prefix) < ends[-1]:
                    return self._message_ends_by_content(turns, text, *mode)
                ends.append(len(prefix))
        except TemplateError:  # some templates reject incomplete conversations
            return self._message_ends_by_content(turns, text, *mode)
        return [(end, i) for i, end in enumerate([*ends[1:], len(text)])]

    def _message_ends_by_content(self, turns: Sequence[Turn], text: str, *mode: bool) -> list[tuple[int, int]]:
        """`_message_ends` for templates that move or drop texts: the special token after its content ends a message."""
        found = ((self._content_span(turns, i, text, *mode), i) for i in range(len(turns)))
        spans = sorted((span, i) for span, i in found if span is not None)
        ends = []
        for ((_, end), i), ((start, _), other) in pairwise(spans):
            if start < end:
                raise self._mixed_up(turns, min(i, other))
            footer = re.match(rf".*?(?:{self.special_pattern.pattern})\n*", text[end:start], flags=re.DOTALL)
            ends.append((end + footer.end() if footer else end, i))
        return [*ends, (len(text), spans[-1][1] if spans else 0)]

    def _content_span(self, turns: Sequence[Turn], index: int, text: str, *mode: bool) -> tuple[int, int] | None:
        """The part of the text that changes with the content of one message; None if nothing does."""
        changed = [{**turn, "content": MARK} if i == index else turn for i, turn in enumerate(turns)]
        marked = self.render(changed, *mode)
        if marked == text:
            return None
        if marked.count(MARK) != 1:
            raise self._mixed_up(turns, index)
        before, _, after = marked.partition(MARK)
        start = _shared(before, text)
        return start, max(start, len(text) - _shared(after[::-1], text[::-1]))

    def _mixed_up(self, turns: Sequence[Turn], index: int) -> ConfigError:
        return ConfigError(
            f"messages: the chat template changes more than the content of message {index} "
            f"({turns[index]['role']}), so its tokens cannot be told from the others"
        )

    @cached_property
    def special_pattern(self) -> re.Pattern[str]:
        """Matches any special token, longest first: one may be a prefix of another."""
        by_length = sorted(self.special_tokens, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, by_length)) or r"(?!)")


def _is_reply(turn: Turn) -> bool:
    return turn["role"] == "assistant"


def reasons(turns: Sequence[Turn]) -> bool:
    return any(END_OF_THINKING in turn["content"] for turn in turns if _is_reply(turn))


def _without_opening(reply: str, prompt: str) -> str:
    """A reply with reasoning, without the opening of the think block if the prompt has it."""
    if not (prompt.rstrip().endswith(THINK) and reply.lstrip().startswith(THINK)):
        return reply
    rest = reply.lstrip().removeprefix(THINK)
    return rest.lstrip("\n") if prompt.endswith("\n") else rest


def _begin_of_reply(prompt: str, before: str) -> int:
    """Where a reply begins in a text that has `before` up to its content: after white space that the prompt has too."""
    if before.startswith(prompt):
        return len(prompt) if before[len(prompt) :].isspace() else len(before)
    if prompt.startswith(before):
        return len(before)
    blank = len(before) - len(before.rstrip())
    return len(before) - max(blank - (len(prompt) - len(prompt.rstrip())), 0)


def _shared(one: str, other: str) -> int:
    """The length of the common prefix."""
    differ = (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differ, min(len(one), len(other)))


def default_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The Jinja text of a folder's default template or None; `config` is its tokenizer_config.json."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    templates = config.get("chat_template")
    if isinstance(templates, list):  # several named templates
        return next((entry["template"] for entry in templates if entry["name"] == "default"), None)
    return templates


class _Generation(Extension):
    """`{% generation %}` marks the assistant's text for transformers; we render only its body."""

    tags = {"generation"}  # noqa: RUF012 (Jinja declares an attribute of the instance)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


# Cached here, not in the tokenizer: data loader workers may pickle the tokenizer, and compiled templates cannot be.
@lru_cache
def _compile(source: str) -> Template:
    """Compile a template with the sandbox and the functions of transformers."""

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    # Jinja's own filter escapes HTML characters.
    def tojson(value: Any, ensure_ascii: bool = False, **kwargs: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **kwargs)

    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)
    return env.from_string(source)
