"""Requests in OpenAI's form. Each mistake, and each field that is not supported, is refused in one line by name."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field
from pydantic_core import from_json
from torchtune.data import Message

from layerskip_recipes.config.recipe_config import Seed
from layerskip_recipes.config.schema import PositiveInt, Section, Text
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.generation.sampling import Temperature, TopP

S = TypeVar("S", bound=Section)
StopText = Annotated[str, Field(min_length=1, max_length=256)]

# Fields that change nothing here.
IGNORED = ("user", "metadata", "service_tier", "safety_identifier", "prompt_cache_key")
# Values with which fields that are not supported ask for nothing, besides null, false and empty ones.
NEUTRAL = {
    "n": 1,
    "best_of": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "parallel_tool_calls": True,
    "response_format": {"type": "text"},
    "modalities": ["text"],
    "tool_choice": "none",
}


class Prediction(Section):
    type: Literal["content"]
    content: str | list[Any]


class StreamOptions(Section):
    include_usage: bool = False


class Request(Section):
    model: Text | None = None
    max_tokens: PositiveInt | None = None
    max_completion_tokens: PositiveInt | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    seed: Seed | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=4)] = Field([], examples=["END"])
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    prediction: Prediction | None = None


class CompletionRequest(Request):
    prompt: Text


class ChatRequest(Request):
    messages: Annotated[list[Any], Field(min_length=1, max_length=256)]  # rendering takes time with their square


class ChatMessage(Section):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Any]


class TextPart(Section):
    type: Literal["text"]
    text: str


@dataclass
class Ending:
    """What a response says behind its text."""

    finish_reason: Literal["stop", "length"]
    usage: dict[str, Any]  # numbers of tokens by OpenAI's names, and `drafted_tokens` and `accepted_tokens`


def parse(request_class: type[S], body: bytes) -> S:
    try:
        content = from_json(body)  # refuses deep nesting
    except ValueError as e:
        raise ConfigError(f"body: no JSON ({e}). Allowed: a JSON object, with at most 200 levels") from e
    return _checked(request_class, content)


def _checked(request_class: type[S], content: Any, key: str = "") -> S:
    if not isinstance(content, Mapping):
        raise ConfigError(f"{key or 'body'}: {content!r} is not allowed. Allowed: a JSON object")
    for name, value in content.items():
        is_known = name in request_class.model_fields or name in IGNORED
        if not is_known and not _asks_nothing(name, value):
            raise ConfigError(f"{key and key + '.'}{name}: is not supported by this server. Leave it out")
    fields = {name: content[name] for name in request_class.model_fields if content.get(name) is not None}
    return request_class.parse(fields, key)


def _asks_nothing(name: str, value: Any) -> bool:
    """Whether a field that is not supported has a value that changes nothing."""
    if value is None or value is False or value == [] or value == {}:
        return True
    return name in NEUTRAL and value == NEUTRAL[name]


def messages_of(request: ChatRequest) -> list[Message]:
    """The conversation. A message of several parts joins their texts."""
    messages = []
    for i, content in enumerate(request.messages):
        message = _checked(ChatMessage, content, f"messages[{i}]")
        text = message.content
        if not isinstance(text, str):
            text = "\n".join(_texts_of(text, f"messages[{i}].content"))
        role = "system" if message.role == "developer" else message.role
        messages.append(Message(role=role, content=text))
    return messages


def predictions_of(request: Request) -> list[str]:
    """Texts that the answer may repeat. Each part of a prediction is one."""
    content = [] if request.prediction is None else request.prediction.content
    return [content] if isinstance(content, str) else _texts_of(content, "prediction.content")


def _texts_of(parts: Sequence[Any], key: str) -> list[str]:
    """The texts of a content's parts."""
    texts = []
    for i, part in enumerate(parts):
        if isinstance(part, Mapping) and part.get("type") != "text":
            raise ConfigError(f"{key}[{i}]: type {part.get('type')!r} is not supported by this server. Allowed: text")
        texts.append(_checked(TextPart, part, f"{key}[{i}]").text)
    return texts
