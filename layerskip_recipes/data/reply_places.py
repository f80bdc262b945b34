"""Find each message and each reply in the text of a conversation that a chat template renders."""

import re
from bisect import bisect_right
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TypeVar

from jinja2 import TemplateError

from layerskip_recipes.data.chat_template import END_OF_THINKING, MARK, THINK, ChatTemplate, Turn
from layerskip_recipes.errors import ConfigError

T = TypeVar("T")

REPLY_FIELDS = ("tool_calls", "reasoning_content")  # of a message, and also written by the model


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


@dataclass
class _Contents:
    """Where the contents of messages are in a rendered text; None for a message that the template leaves out."""

    look_up: Callable[[int], tuple[int, int] | None]  # renders the conversation once more
    spans: dict[int, tuple[int, int] | None] = field(default_factory=dict)
    places: dict[int, Hashable] = field(default_factory=dict)

    def span(self, i: int) -> tuple[int, int] | None:
        if i not in self.spans:
            self.spans[i] = self.look_up(i)
        return self.spans[i]

    def end(self, i: int) -> int:
        span = self.spans.get(i)
        return span[1] if span else 0

    def place(self, i: int) -> Hashable:
        """Equal for messages between which the template writes the same: it then also writes the same prompts there."""
        return self.places.get(i, i)


@dataclass(frozen=True)
class ConversationRenderer:
    """Renders conversations with a template, and finds the places of their messages."""

    template: ChatTemplate

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
        asked, prompt = self._history(turns[:i], True, thinking), self.template.render(turns[:i], True, thinking)
        text = self.template.render(turns, False, thinking)
        span = self._content_span(turns, i, text, False, thinking)
        if span is None:
            raise ConfigError(
                "tokenizer.chat_template: writes no last reply, so there is none to learn. Give another one"
            )
        start, end = span
        begin = _begin_of_reply(prompt, text[:start])
        written = text[begin:end]
        if reasons([turns[i]]):  # the template may drop the reasoning
            wanted = _without_opening(turns[i]["content"], prompt)
            after_prompt = text[len(prompt) : end] if text.startswith(prompt) else ""
            if wanted.strip() in after_prompt:
                written = after_prompt
            elif "tool_calls" not in turns[i]:
                written = wanted
        footer = self.template.special_pattern.search(text[end:])
        first = len(asked.text)
        last = first + len(written)
        reply = Reply(first, last, last + (footer.end() if footer else len(text) - end))
        written = asked.text + written + text[end:]
        return Rendered(written, [*asked.message_ends, (len(written), i)], {**asked.replies, i: reply})

    def _history(self, turns: Sequence[Turn], is_prompt: bool, thinking: bool) -> Rendered:
        """A conversation that ends before a reply, with the prompt of each earlier reply before it."""
        text = self.template.render(turns, is_prompt, thinking)
        contents = self._contents(turns, text, is_prompt, thinking)
        message_ends = self._message_ends(turns, text, contents, thinking)
        end_of = {i: end for end, i in message_ends}
        spans = {}
        for i, turn in enumerate(turns):
            span = contents.span(i) if _is_reply(turn) else None
            # Without its reasoning, a reply is no longer what the model wrote.
            if span is not None and not (reasons([turn]) and END_OF_THINKING not in text[slice(*span)]):
                spans[i] = span

        def opening(i: int) -> tuple[int, int, str]:
            """Where reply i begins, how much of the text its prompt shares, and how the prompt ends.

            Both positions count from the reply's content.
            """
            start = spans[i][0]
            prompt = self.template.render(turns[:i], True, thinking) if i else text[:start]
            begin = _begin_of_reply(prompt, text[:start])
            same = min(begin, len(prompt))
            if prompt[:same] == text[:same]:
                return begin - start, same - start, prompt[same:]
            return begin - start, begin - start, ""  # such as Mistral's templates, which move the system message

        openings = _measured({i: contents.place(i) for i in spans}, opening)
        written: list[str] = []
        length = done = 0  # of the new text, and how much of the template's text it covers
        replies: dict[int, Reply] = {}
        moved, ahead_of = [0], [0]  # positions in the template's text, and how far the new text is ahead from there on
        for i, (start, end) in spans.items():
            begin, same, ending = openings[i]
            written += [text[done : start + same], ending]
            length += start + same - done + len(ending)
            done = start + begin
            ahead = length - done
            footer = self.template.special_pattern.search(text, end, end_of[i])
            replies[i] = Reply(length, end + ahead, (footer.end() if footer else end_of[i]) + ahead)
            moved.append(done)
            ahead_of.append(ahead)
        message_ends = [(end + ahead_of[bisect_right(moved, end) - 1], i) for end, i in message_ends]
        return Rendered("".join([*written, text[done:]]), message_ends, replies)

    def _message_ends(
        self, turns: Sequence[Turn], text: str, contents: _Contents, thinking: bool
    ) -> list[tuple[int, int]]:
        """[(end of a message in characters, index of the message)], in the order of the rendered text.

        Usually the text starts with the rendering of the first i messages; its length is the end of message i.
        """

        def footer(i: int) -> int:
            """The end of message i - 1, from the end of its content."""
            prefix = self.template.render(turns[:i], False, thinking)
            if not text.startswith(prefix):
                raise TemplateError("a message changes what is before it")
            return len(prefix) - contents.end(i - 1)

        try:
            footers = _measured({i: contents.place(i) for i in range(1, len(turns))}, footer)
        except TemplateError:  # some templates reject incomplete conversations
            return self._message_ends_by_content(turns, text, contents)
        ends = [contents.end(i - 1) + length for i, length in footers.items()]
        if any(before > end for before, end in pairwise(ends)):
            return self._message_ends_by_content(turns, text, contents)
        return [(end, i) for i, end in enumerate([*ends, len(text)])]

    def _message_ends_by_content(self, turns: Sequence[Turn], text: str, contents: _Contents) -> list[tuple[int, int]]:
        """`_message_ends` for templates that move or drop texts: the special token after its content ends a message."""
        spans = sorted((span, i) for i in range(len(turns)) if (span := contents.span(i)) is not None)
        ends = []
        for ((_, end), i), ((start, _), other) in pairwise(spans):
            if start < end:
                raise self._mixed_up(turns, min(i, other))
            footer = re.match(rf".*?(?:{self.template.special_pattern.pattern})\n*", text[end:start], flags=re.DOTALL)
            ends.append((end + footer.end() if footer else end, i))
        return [*ends, (len(text), spans[-1][1] if spans else 0)]

    def _contents(self, turns: Sequence[Turn], text: str, *mode: bool) -> _Contents:
        """Find the messages' contents with one more rendering, in which marks replace all of them.

        The texts between the marks are looked up in `text`, one after the other. A content that changes the text around
        it, such as a reply with reasoning, is looked up alone.
        """
        contents = _Contents(lambda i: self._content_span(turns, i, text, *mode))
        # Templates read settings from a system message, so leave that.
        marked = [
            turn if turn["role"] == "system" else _with_content(turn, f"{MARK}{i}{MARK}")
            for i, turn in enumerate(turns)
        ]
        try:
            parts = re.split(rf"{MARK}(\d+){MARK}", self.template.render(marked, *mode))
        except TemplateError:
            return contents
        gaps, order = parts[::2], [int(number) for number in parts[1::2]]
        if len({*order}) < len(order):
            return contents
        position = 0
        for i, (before, after) in zip(order, pairwise(gaps), strict=True):
            start = position + len(before)
            end = self._content_end(text, start, turns[i], after, is_last=i == order[-1])
            if end is not None and text.startswith(before, position):
                contents.spans[i] = start, end
            elif _is_reply(turns[i]):
                with suppress(ConfigError):
                    contents.span(i)
            if (span := contents.spans.get(i)) is not None:
                position = span[1]
        for (first, second), gap in zip(pairwise(order), gaps[1:-1], strict=True):
            if second == first + 1 and contents.spans.get(first) and contents.spans.get(second):
                contents.places[second] = (gap, *((turns[i]["role"], *turns[i]) for i in (first, second)))
        return contents

    def _content_end(self, text: str, start: int, turn: Turn, after: str, is_last: bool) -> int | None:
        """The end of the content that begins at `start`, if the template's text `after` follows it; None if unclear."""
        if is_last:
            end = len(text) - len(after)
            return end if end >= start and text.endswith(after) else None
        if "tool_calls" not in turn:
            content = turn["content"] or ""
            if text.startswith(content + after, start):
                return start + len(content)
            # The template may strip it.
            core = content.strip()
            core_start = re.compile(r"\s*").match(text, start).end()  # type: ignore[union-attr]
            if core and text.startswith(core, core_start):
                core_end = core_start + len(core)
                end = text.find(after, core_end)
                if end >= 0 and not text[core_end:end].strip():
                    return end
        # The template may change it otherwise. It then has no special token, but `after` has one.
        if not self.template.special_pattern.search(after):
            return None
        end = text.find(after, start)
        return None if end < 0 or self.template.special_pattern.search(text, start, end) else end

    def _content_span(self, turns: Sequence[Turn], index: int, text: str, *mode: bool) -> tuple[int, int] | None:
        """The part of the text that changes with the content of one message; None if nothing does."""
        changed = [_with_content(turn, MARK) if i == index else turn for i, turn in enumerate(turns)]
        marked = self.template.render(changed, *mode)
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


def _is_reply(turn: Turn) -> bool:
    return turn["role"] == "assistant"


def reasons(turns: Sequence[Turn]) -> bool:
    return any(END_OF_THINKING in (turn["content"] or "") for turn in turns if _is_reply(turn))


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


def _with_content(turn: Turn, content: str) -> Turn:
    """The turn with another content, which also replaces the reasoning and the calls that are part of a reply."""
    return {key: turn[key] for key in turn if key not in REPLY_FIELDS} | {"content": content}


def _shared(a: str, b: str) -> int:
    """The length of the common prefix."""
    same, differ = 0, min(len(a), len(b)) + 1
    while same + 1 < differ:
        middle = (same + differ) // 2
        same, differ = (middle, differ) if a[same:middle] == b[same:middle] else (same, middle)
    return same


def _measured(places: Mapping[int, Hashable], measure: Callable[[int], T]) -> dict[int, T]:
    """`measure(i)` for each i, measured only for the first and the last i of a place if these two agree.

    The whole conversation has the same text around all messages of a place. What `measure` reads besides is the
    rendering of the messages before i, of which a later i has more. A template that writes something else from some
    message on, such as after the first call, so tells the first i from the last.
    """
    at: dict[Hashable, list[int]] = {}
    for i, place in places.items():
        at.setdefault(place, []).append(i)
    values: dict[int, T] = {}
    for indices in at.values():
        ends = {i: measure(i) for i in (indices[0], indices[-1])}
        first, last = ends[indices[0]], ends[indices[-1]]
        values |= {i: ends[i] if i in ends else first if first == last else measure(i) for i in indices}
    return {i: values[i] for i in places}
