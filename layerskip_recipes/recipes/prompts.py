"""The prompts of a generation config: from the config, a text or JSONL file, or standard input; and their tokens."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from torchtune.data import Message

from layerskip_recipes.settings import build

INTERACTIVE = "interactive"  # the value of `prompt` for a conversation


def read_prompts(cfg: DictConfig) -> list[str | dict[str, str]]:
    """The prompts of a config: plain strings are raw text, mappings of roles are for the chat template.

    `prompt_file` (a text, JSONL with {"prompt": ...} per line, or "-" for standard input) replaces `prompt` (a string,
    a mapping with `user` and perhaps `system`, or a list of these), and that replaces `prompts` (a component that
    returns them).

    Raises:
        ValueError: if a file is missing or a line of it is broken (its number), or a prompt has another form.
    """
    if cfg.get("prompt_file") is not None:
        return _read_prompt_file(cfg.prompt_file)
    if cfg.get("prompt") is None:
        return [_check_prompt(prompt, "prompts") for prompt in build(cfg.prompts, "prompts")]
    prompt = cfg.prompt
    prompts = OmegaConf.to_container(prompt) if isinstance(prompt, DictConfig | ListConfig) else prompt
    return [_check_prompt(p, "prompt") for p in (prompts if isinstance(prompts, list) else [prompts])]


def _read_prompt_file(name: str) -> list[str | dict[str, str]]:
    try:
        content = sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise ValueError(
            f"prompt_file: {name!r} cannot be read ({e}). Give a text or JSONL file, or - for stdin"
        ) from e
    if not name.endswith(".jsonl"):
        return [_check_prompt(content, "prompt_file")]
    prompts, broken = [], []
    for at, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            prompts.append(_check_prompt(json.loads(line)["prompt"], f"prompt_file line {at}"))
        except (json.JSONDecodeError, KeyError, TypeError):
            broken.append((at, line))
    if broken:
        at, line = broken[0]
        others = f" (also lines {', '.join(str(at) for at, _ in broken[1:9])})" if len(broken) > 1 else ""
        raise ValueError(f'prompt_file line {at}: {line[:60]!r} is not of the form {{"prompt": "text"}}{others}')
    if not prompts:
        raise ValueError(f"prompt_file: {name!r} holds no prompt")
    return prompts


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
    try:
        if isinstance(prompt, str):
            return tokenizer.encode(prompt, add_bos=True, add_eos=False)
        messages = prompt
        if isinstance(prompt, Mapping):
            messages = [Message(role=role, content=prompt[role]) for role in ("system", "user") if role in prompt]
            messages.append(Message(role="assistant", content=""))
        return tokenizer({"messages": messages}, inference=True)["tokens"]
    except Exception as e:
        raise ValueError(f"prompt: the tokenizer refuses {prompt!r}: {e}") from e
