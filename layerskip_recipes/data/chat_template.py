"""Render Hugging Face chat templates as transformers does, and find each message in the rendered text."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
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

    def render(self, turns: Sequence[Turn], add_generation_prompt: bool = False) -> str:
        """The text of a conversation; `add_generation_prompt` adds the header of the assistant's reply."""
        # transformers passes tools and documents too, so templates may read them.
        variables = dict(self.named_tokens, tools=None, documents=None, add_generation_prompt=add_generation_prompt)
        return _compile(self.source).render(variables, messages=turns)

    def render_prompt(self, turns: Sequence[Turn]) -> str:
        """The text of a conversation up to the place where the reply starts or continues."""
        if turns[-1]["role"] != "assistant":
            return self.render(turns, add_generation_prompt=True)
        if not turns[-1]["content"]:  # torchtune's form of a prompt
            return self.render(turns[:-1], add_generation_prompt=True)
        text = self.render(turns)
        span = self._content_span(turns, len(turns) - 1, text)
        return text[: span[1]] if span else text

    def end_of_turn(self) -> str | None:
        """The special token directly after an assistant's content; None if there is none."""
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": MARK}]
        try:
            after = self.render(turns).partition(MARK)[2]
        except TemplateError:
            return None
        found = re.match(rf"\s*({self._special_pattern})", after)
        return found[1] if found else None

    def message_ends(self, turns: Sequence[Turn], text: str) -> list[tuple[int, int]]:
        """[(end of a message in characters, index of the message)], in the order of the rendered text.

        Usually the text starts with the rendering of the first i messages; its length is the end of message i.
        """
        ends = [0]
        try:
            for count in range(1, len(turns)):
                prefix = self.render(turns[:count])
                if not text.startswith(prefix) or len(prefix) < ends[-1]:
                    return self._message_ends_by_content(turns, text)
                ends.append(len(prefix))
        except TemplateError:  # some templates reject incomplete conversations
            return self._message_ends_by_content(turns, text)
        return [(end, i) for i, end in enumerate([*ends[1:], len(text)])]

    def _message_ends_by_content(self, turns: Sequence[Turn], text: str) -> list[tuple[int, int]]:
        """`message_ends` for templates that move or drop texts: the special token after its content ends a message."""
        found = ((self._content_span(turns, i, text), i) for i in range(len(turns)))
        spans = sorted((span, i) for span, i in found if span is not None)
        ends = []
        for ((_, end), i), ((start, _), other) in pairwise(spans):
            if start < end:
                raise self._mixed_up(turns, min(i, other))
            footer = re.match(rf".*?(?:{self._special_pattern})\n*", text[end:start], flags=re.DOTALL)
            ends.append((end + footer.end() if footer else end, i))
        return [*ends, (len(text), spans[-1][1] if spans else 0)]

    def _content_span(self, turns: Sequence[Turn], index: int, text: str) -> tuple[int, int] | None:
        """The part of the text that changes with the content of one message; None if nothing does."""
        marked = self.render([{**turn, "content": MARK} if i == index else turn for i, turn in enumerate(turns)])
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

    @property
    def _special_pattern(self) -> str:
        """A regular expression for any special token, longest first: one may be a prefix of another."""
        by_length = sorted(self.special_tokens, key=len, reverse=True)
        return "|".join(map(re.escape, by_length)) or r"(?!)"


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
