"""The prompts of a generation config: from the config, a text or JSONL file, or standard input; and their tokens."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from torchtune import utils
from torchtune.data import Message

from layerskip_recipes.settings import build
from layerskip_recipes.tasks import json_lines

INTERACTIVE = "interactive"  # the value of `prompt` for a conversation


log = utils.get_logger("INFO")


@dataclass(frozen=True)
class Example:
    """A prompt, and what its answer is compared with.

    Args:
        prompt: raw text, or roles for the chat template: {"user": ..., "system": ...}.
        response: the reference; None if there is none.
    """

    prompt: str | dict[str, str]
    response: str | None = None


def read_examples(cfg: DictConfig) -> list[Example]:
    """The prompts of a config: plain strings are raw text, mappings of roles are for the chat template.

    `prompt_file` (a text, JSONL with {"prompt": ...} per line and perhaps "response": ..., or "-" for standard input)
    replaces `prompt` (a string, a mapping with `user` and perhaps `system`, or a list of these), and that replaces
    `prompts` (a component that returns prompts, or mappings as in the JSONL).

    Raises:
        ValueError: if a file is missing or a line of it is broken (its number), or a prompt has another form.
    """
    if cfg.get("prompt_file") is not None:
        return _read_prompt_file(cfg.prompt_file)
    if cfg.get("prompt") is None:
        items = build(cfg.prompts, "prompts")
        if not isinstance(items, list | tuple):
            raise ValueError(f"prompts: {cfg.prompts._component_} returns a {type(items).__name__}. Allowed: a list")
        return [_example(item, f"prompts: item {at}") for at, item in enumerate(items, 1)]
    prompt = cfg.prompt
    if cfg.get("prompts") is not None:
        log.info("prompt: takes the place of prompts; for those set prompt=null")
    prompts = OmegaConf.to_container(prompt, resolve=True) if isinstance(prompt, DictConfig | ListConfig) else prompt
    return [Example(_check_prompt(p, "prompt")) for p in (prompts if isinstance(prompts, list) else [prompts])]


def read_prompts(cfg: DictConfig) -> list[str | dict[str, str]]:
    """The prompts of `read_examples` without their references."""
    return [example.prompt for example in read_examples(cfg)]


def _read_prompt_file(name: str) -> list[Example]:
    try:
        content = sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise ValueError(
            f"prompt_file: {name!r} cannot be read ({e}). Give a text or JSONL file, or - for stdin"
        ) from e
    if not name.endswith(".jsonl"):
        return [Example(_check_prompt(content, "prompt_file"))]
    lines = json_lines(content, "prompt_file")
    if not lines:
        raise ValueError(f"prompt_file: {name!r} holds no prompt")
    return [_with_reference(line, f"prompt_file line {at}") for at, line in lines.items()]


def _example(item: Any, key: str) -> Example:
    """A component's item: a prompt, or one with its reference."""
    if isinstance(item, Mapping) and {"prompt", "response"} & set(item):
        return _with_reference(item, key)
    return Example(_check_prompt(item, key))


def _with_reference(item: Mapping[str, Any], key: str) -> Example:
    response = item.get("response")
    if "prompt" not in item:
        raise ValueError(f'{key}: {str(item)[:60]} has no field prompt; for example {{"prompt": "text"}}')
    if response is not None and not isinstance(response, str):
        raise ValueError(f'{key}: response {response!r} is no text; for example {{"prompt": "a", "response": "b"}}')
    return Example(_check_prompt(item["prompt"], key), response)


def _check_prompt(prompt: Any, key: str) -> str | dict[str, str]:
    if isinstance(prompt, Mapping):
        unknown = set(prompt) - {"system", "user"}
        if (
            unknown
            or not prompt.get("user")
            or not all(text is None or isinstance(text, str) for text in prompt.values())
        ):
            raise ValueError(f"{key}: {prompt!r} needs user: text, and may have system: text")
        return {role: text for role, text in prompt.items() if text is not None}
    if not isinstance(prompt, str) or not prompt:
        raise ValueError(f"{key}: {prompt!r} is empty or no text; for example prompt.user='Tell me a joke.'")
    return prompt


def to_tokens(prompt: str | dict[str, str] | list[Message], tokenizer: Any) -> list[int]:
    """Raw text by `encode`, a chat by the tokenizer's template with an open assistant turn.

    Args:
        prompt: text, {"user": ..., "system": ...}, or messages of which the last is the assistant's, empty.
        tokenizer: of the model.

    Raises:
        ValueError: if the tokenizer or its template refuses the prompt, such as a system message that it does not know.
    """
    limit = getattr(tokenizer, "max_seq_len", None)
    try:
        if limit is not None:
            tokenizer.max_seq_len = None  # of the training: here a cut would take the question's end, without a word
        if isinstance(prompt, str):
            return tokenizer.encode(prompt, add_bos=True, add_eos=False)
        messages = prompt
        if isinstance(prompt, Mapping):
            messages = [Message(role=role, content=prompt[role]) for role in ("system", "user") if role in prompt]
            messages.append(Message(role="assistant", content=""))
        return tokenizer({"messages": messages}, inference=True)["tokens"]
    except Exception as e:
        raise ValueError(f"prompt: the tokenizer refuses {prompt!r}: {e}") from e
    finally:
        if limit is not None:
            tokenizer.max_seq_len = limit
