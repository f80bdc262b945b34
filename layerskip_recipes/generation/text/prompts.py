"""The prompts of a generation config, from the config, a text or JSONL file, or stdin, and their tokens."""

import inspect
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from torchtune import utils
from torchtune.data import Message
from torchtune.modules import TransformerDecoder

from layerskip_recipes.checkpoint.answers import LEAD
from layerskip_recipes.config.components import Component
from layerskip_recipes.config.schema import check
from layerskip_recipes.data.chat_template import END_OF_THINKING
from layerskip_recipes.data.json_lines import bad_line_message, parse_json_lines
from layerskip_recipes.errors import ConfigError, mistakes_of
from layerskip_recipes.model.limits import check_prompt_lengths

INTERACTIVE = "interactive"  # the value of `prompt` for a conversation

SURROGATE = re.compile("[\ud800-\udfff]")
HALF_A_PAIR = "has half of a surrogate pair. Allowed: valid UTF-8 text"
Prediction = str | Sequence[str] | None  # texts that an answer may repeat

log = utils.get_logger("INFO")


@dataclass(frozen=True)
class Example:
    """A prompt, its reference answer, and predictions of its answer."""

    prompt: str | dict[str, str]  # raw text, or roles for the chat template: {"user": ..., "system": ...}
    response: str | None = None
    prediction: Prediction = None
    line: int | None = field(default=None, compare=False)  # in a JSONL file, from 1
    error: str | None = None  # why it cannot be answered


def try_examples(prompt: Any = None, prompts: Component | None = None, prompt_file: str | None = None) -> list[Example]:
    """The prompts of `prompt_file`, else of `prompt`, else of the component `prompts`. Bad ones carry their error."""
    if prompt_file is not None:
        return _read_prompt_file(prompt_file)
    if prompt is None:
        items = prompts.build()
        if not isinstance(items, list | tuple):
            raise ConfigError(f"prompts: {prompts.path} returns a {type(items).__name__}. Allowed: a list")
        return [_example(item, f"prompts: item {at}") for at, item in enumerate(items, 1)]
    if prompts is not None:
        log.info("prompt: is used instead of prompts; to use prompts set prompt=null")
    return [_example(item, "prompt") for item in (prompt if isinstance(prompt, list) else [prompt])]


def refuse_bad(examples: Sequence[Example], hint: str = "") -> None:
    """Raise a ConfigError with the errors of the first bad examples; `hint` is added if some examples are good."""
    bad = [example.error for example in examples if example.error is not None]
    if bad:
        more = f" (and {len(bad) - 5} more prompts)" if len(bad) > 5 else ""
        *others, last = bad[:5]
        raise ConfigError(*others, f"{last}{more}{hint if len(bad) < len(examples) else ''}")


def encode(
    examples: Sequence[Example], tokenizer: Any, model: TransformerDecoder, max_new_tokens: int
) -> tuple[list[Example], list[list[int]]]:
    """The examples, with errors for prompts that the model cannot take, and the tokens of each prompt."""
    check = partial(check_prompt_lengths, model, max_generated_tokens=max_new_tokens, key="max_new_tokens")
    if not examples:
        check([])
    checked, tokens = [], []
    for example in examples:
        made: list[int] = []
        if example.error is None:
            try:
                made = to_tokens(example.prompt, tokenizer, END_OF_THINKING in (example.response or ""))
                check([len(made)])
            except ValueError as e:
                where = "" if example.line is None else f" (prompt_file line {example.line})"
                example = replace(example, error=f"{e}{where}")
        checked.append(example)
        tokens.append(made)
    return checked, tokens


def _read_prompt_file(name: str) -> list[Example]:
    lines = name.endswith((".jsonl", ".ndjson"))
    if name.endswith(".json"):
        raise ConfigError(
            f"prompt_file: {name!r} is neither a text nor JSON lines. Allowed: a text file, or a .jsonl file with a "
            f"JSON object on each line; for example prompt_file={name}l"
        )
    try:
        # In JSONL, a byte that is not UTF-8 is an error of its line only.
        errors = "surrogateescape" if lines else "strict"
        content = sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8", errors=errors)
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(
            f"prompt_file: {name!r} cannot be read ({e}). Give a text or JSONL file, or - for stdin"
        ) from e
    content = content.removeprefix("\ufeff")  # a byte order mark
    if not lines:
        return [_example(content, "prompt_file")]
    by_number = parse_json_lines(content)
    if not by_number:
        raise ConfigError(f"prompt_file: {name!r} holds no prompt")
    return [_example(line, f"prompt_file line {number}", number) for number, line in by_number.items()]


def _example(item: Any, key: str, line: int | None = None) -> Example:
    """An example from a prompt or a mapping with prompt and response; its `error` says what is wrong with it.

    A line of JSONL must be a mapping; an unparsable line arrives here as its text.
    """
    fields = item
    if line is None and not (isinstance(item, Mapping) and {"prompt", "response"} & set(item)):
        fields = {"prompt": item}
    mistake = _mistake(fields) if isinstance(fields, Mapping) else bad_line_message(fields)
    if mistake is None:
        mistake = next(mistakes_of(check_prediction, fields.get("prediction")), None)
    if mistake is not None:
        return Example("", line=line, error=f"{key}: {mistake}")
    prompt = fields["prompt"]
    if isinstance(prompt, Mapping):
        prompt = {role: text for role, text in prompt.items() if text is not None}
    return Example(prompt, fields.get("response"), fields.get("prediction"), line)


def _mistake(fields: Mapping[str, Any]) -> str | None:
    """What is wrong with the prompt and the response of an example."""
    if "prompt" not in fields:
        return f'{str(fields)[:60]} has no field prompt; for example {{"prompt": "text"}}'
    if not isinstance(response := fields.get("response"), str | None):
        return f'response {response!r} is no text; for example {{"prompt": "a", "response": "b"}}'
    return prompt_mistake(fields["prompt"])


def prompt_mistake(prompt: Any) -> str | None:
    """What is wrong with a prompt: raw text, or the user's part of a chat and maybe the system's."""
    is_chat = isinstance(prompt, Mapping)
    chat = prompt if is_chat else {"user": prompt}
    texts = all(isinstance(text, str | None) for text in chat.values())
    if not texts or not chat.get("user") or set(chat) - {"user", "system"}:
        wanted = "needs user: text, and may have system: text"
        return f"{prompt!r} {wanted if is_chat else 'is empty or no text; for example prompt.user=QUESTION'}"
    if SURROGATE.search("".join(text or "" for text in chat.values())):
        return f"{prompt!r} {HALF_A_PAIR}"
    return None


def check_prediction(prediction: Any) -> None:
    """Raise a ConfigError unless these are texts."""
    check("prediction", prediction, Prediction)
    if SURROGATE.search("".join(prediction or ())):
        raise ConfigError(f"prediction: {prediction!r} {HALF_A_PAIR}")


def predicted_tokens(prediction: Prediction, prompt: Sequence[int], tokenizer: Any) -> list[int]:
    """The tokens of predictions, each behind the prompt's last ones, so that an answer's first token has matches."""
    texts = [prediction] if isinstance(prediction, str) else prediction or []
    encoded = [tokenizer.encode(text, add_bos=False, add_eos=False) for text in texts if text]
    return [token for tokens in encoded for token in (*prompt[-LEAD:], *tokens)]


def _check_open_turn(tokenizer: Any) -> None:
    """Raise a ConfigError unless the tokenizer can leave the answer's turn open.

    Of torchtune's tokenizers only Llama's can; the others ignore `inference=True`.
    """
    tokenize = getattr(tokenizer, "tokenize_messages", None)
    if tokenize is None or "add_end_tokens" not in inspect.signature(tokenize).parameters:
        raise ConfigError(
            f"tokenizer: {type(tokenizer).__name__} closes the turn in which a chat is to be answered. Allowed: "
            "prompts of raw text, or a tokenizer with add_end_tokens; for example "
            'tokenizer={_component_: layerskip_recipes.hf_tokenizer, path: "${checkpointer.checkpoint_dir}"}'
        )


def to_tokens(prompt: str | dict[str, str] | list[Message], tokenizer: Any, thinking: bool = False) -> list[int]:
    """Tokens of raw text, or of a chat by the tokenizer's template with an open assistant turn.

    The last of several messages is the assistant's, and empty. `thinking` asks a reasoning model to think, as training
    does for a reply with reasoning. Raises a ConfigError if the tokenizer fails.
    """
    if not isinstance(prompt, str):
        _check_open_turn(tokenizer)
    limit = getattr(tokenizer, "max_seq_len", None)
    try:
        if limit is not None:
            tokenizer.max_seq_len = None  # a training limit, which would silently cut the question's end here
        if isinstance(prompt, str):
            return tokenizer.encode(prompt, add_bos=True, add_eos=False)
        messages = prompt
        if isinstance(prompt, Mapping):
            messages = [Message(role=role, content=prompt[role]) for role in ("system", "user") if role in prompt]
            messages.append(Message(role="assistant", content=""))
        return tokenizer({"messages": messages, "enable_thinking": thinking}, inference=True)["tokens"]
    except Exception as e:
        raise ConfigError(f"prompt: the tokenizer refuses {prompt!r}: {e}") from e
    finally:
        if limit is not None:
            tokenizer.max_seq_len = limit
