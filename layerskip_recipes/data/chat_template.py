"""Render Hugging Face chat templates as transformers does."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from layerskip_recipes.errors import ConfigError

# {"role": ..., "content": text}, and what else a template may read. The content is None in a message of calls alone.
Turn = Mapping[str, Any]

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
class ChatTemplate:
    """A template, the tokens that it may write, and the functions that it offers to the model."""

    source: str
    named_tokens: Mapping[str, str]  # such as {"eos_token": "</s>"}
    special_tokens: Sequence[str]  # all special tokens of the tokenizer
    tools: Sequence[Any] | None = None  # as JSON schemas

    def __post_init__(self) -> None:
        try:
            _compile(self.source)
        except TemplateError as e:
            raise ConfigError(f"tokenizer.chat_template: no valid Jinja template: {e}") from e

    def render(self, turns: Sequence[Turn], add_generation_prompt: bool = False, thinking: bool = False) -> str:
        """The template's own text; `add_generation_prompt` adds the header of the assistant's reply."""
        # transformers passes tools and documents too, so templates may read them.
        variables = dict(self.named_tokens, tools=self.tools, documents=None, enable_thinking=thinking)
        return _compile(self.source).render(variables, messages=turns, add_generation_prompt=add_generation_prompt)

    def end_of_turn(self) -> str | None:
        """The special token directly after an assistant's content; None if there is none."""
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": MARK}]
        try:
            after = self.render(turns).partition(MARK)[2]
        except TemplateError:
            return None
        match = self.special_pattern.match(after.lstrip())
        return match[0] if match else None

    @cached_property
    def writes_calls(self) -> bool:
        """Whether a reply's tool_calls become text; some templates know only contents."""
        call = {"id": "123456789", "type": "function", "function": {"name": MARK, "arguments": {"x": "1"}}}
        try:
            reply = {"role": "assistant", "content": None, "tool_calls": [call]}
            return MARK in self.render([{"role": "user", "content": "?"}, reply])
        except (TemplateError, TypeError):  # of a template that adds the content to a text
            return False

    @cached_property
    def special_pattern(self) -> re.Pattern[str]:
        """Matches any special token, longest first: one may be a prefix of another."""
        by_length = sorted(self.special_tokens, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, by_length)) or r"(?!)")


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
