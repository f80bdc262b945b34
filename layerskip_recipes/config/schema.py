"""Config sections as pydantic models, with one line per mistake.

The message is `key: value is not allowed. Allowed: ...; for example key=value`. It describes the allowed values from
the field's annotation, so each range, choice and default is written down once.
"""

import difflib
import inspect
import re
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache, wraps
from typing import Annotated, Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, MaxLen
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    TypeAdapter,
    ValidationError,
    ValidatorFunctionWrapHandler,
)
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, core_schema
from typing_extensions import Self

from layerskip_recipes.config.layer_strings import Selection
from layerskip_recipes.errors import ConfigError

P = ParamSpec("P")
R = TypeVar("R")

PositiveInt = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Text = Annotated[str, Field(min_length=1)]
Picture = Annotated[str, Field(pattern=r"\.(png|pdf|svg)$", examples=["picture.png"])]
DeviceName = Annotated[str, Field(pattern=r"^(cpu|cuda|mps|xpu)(:\d+)?$", examples=["cpu"])]
# null means false, as in torchtune
Flag = Annotated[bool, BeforeValidator(lambda value: value is not None and value, json_schema_input_type=bool | None)]
Layers = Annotated[Selection, Field(examples=[":"])]
Exits = Layers
LM_EVAL = (
    "removed, since lm-eval's own command runs its tasks. Write `lm_eval --model hf --model_args "
    "pretrained=out/epoch_0 --tasks arc_easy`, with its options --include_path, --num_fewshot, --limit and so on"
)
# What the error messages of removed keys say.
REMOVED = {
    "draft_quantizer": "replaced by draft_int8, since no other quantizer paid. Write draft_int8=true",
    "layers": "replaced by exits, which count from 1: the output of layer 3 is exit 4. For example exits=4",
    "layers_val": "replaced by exits_val, which counts from 1. For example exits_val=4",
    "peers": "removed, since a script compares with other engines. Write `python tools/compare_engines.py CONFIG "
    "--engine torchtune --engine transformers`",
    **dict.fromkeys(("tasks", "task_path", "num_fewshot", "limit", "apply_chat_template"), LM_EVAL),
    **dict.fromkeys(("confirm_run_unsafe_code", "human_eval"), LM_EVAL),
}


AUTO: Any = "auto"


class Auto:
    """Annotation: the value may be "auto", and the recipe then chooses it (see auto.py)."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        def validate(value: Any, inner: ValidatorFunctionWrapHandler) -> Any:
            return AUTO if isinstance(value, str) and value == AUTO else inner(value)

        return core_schema.no_info_wrap_validator_function(validate, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"anyOf": [{"const": AUTO}, handler(schema)]}


class Section(BaseModel):
    """A section of a config. Fields are keys; their docstrings become docs/configuration.md."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        allow_inf_nan=False,
        arbitrary_types_allowed=True,
        use_attribute_docstrings=True,
    )

    @classmethod
    def parse(cls, content: Any, key: str = "") -> Self:
        """Check plain YAML values. `key` is the section's key, for error messages."""
        try:
            return cls.model_validate(content)
        except ValidationError as e:
            raise ConfigError(*_mistakes(e, cls, content, key)) from e

    @property
    def given(self) -> dict[str, Any]:
        """The keys that are not `auto`."""
        return {name: value for name, value in self if not (isinstance(value, str) and value == AUTO)}

    def __repr__(self) -> str:
        return repr({name: getattr(self, name) for name in type(self).model_fields if name in self.model_fields_set})


# ---- descriptions of allowed values ----


def allowed(annotation: Any, field: FieldInfo | None = None) -> tuple[str, str]:
    """Describe what an annotation allows, and give a valid example. `field` adds its own constraints and examples."""
    phrases, example, others = [], None, set()
    for value_type, rules in alternatives(annotation, [field] if field else []):
        if value_type is type(None):
            others.add("null")
            continue
        if any(isinstance(rule, Auto) for rule in _flat(rules)):
            others.add(AUTO)
        phrase, valid = _phrase(value_type, rules)
        phrases.append(phrase)
        examples = [rule.examples[0] for rule in rules if isinstance(rule, FieldInfo) and rule.examples]
        example = example or str(examples[0] if examples else valid)
    other = f" (or {' or '.join(sorted(others))})" if others else ""
    return " or ".join(dict.fromkeys(phrases)) + other, example or "null"


def alternatives(annotation: Any, rules: Iterable[Any] = ()) -> Iterator[tuple[Any, list[Any]]]:
    """Yield each type of a union with its constraints."""
    rules = list(rules)
    if get_origin(annotation) is Annotated:
        base, *more = get_args(annotation)
        yield from alternatives(base, [*more, *rules])
    elif get_origin(annotation) in (Union, types.UnionType):
        for part in get_args(annotation):
            yield from alternatives(part, rules)
    else:
        yield annotation, rules


def _phrase(value_type: Any, rules: Sequence[Any]) -> tuple[str, Any]:
    """Describe one type of a union, and give a valid example."""
    if get_origin(value_type) is Literal:
        choices = get_args(value_type)
        shown = ["null" if c is None else str(c).lower() if isinstance(c, bool) else str(c) for c in choices]
        return ", ".join(shown), shown[0]
    if value_type is bool:
        return "true, false", "true"
    if value_type in (int, float):
        return _number_phrase(value_type, rules)
    if value_type is str:
        patterns = [rule.pattern for rule in _flat(rules) if getattr(rule, "pattern", None)]
        return "".join(["text", *(f" that matches {p}" for p in patterns), _length(rules, "character")]), "text"
    if get_origin(value_type) in (list, Sequence):
        (item,) = get_args(value_type)
        if words := getattr(next(alternatives(item))[0], "ALLOWED", None):
            return f"{words[0]}, or a list of them", words[1]
        inner, inner_rules = next(alternatives(item))
        each = (
            _phrase(inner, inner_rules)[0] if inner in (int, float, str) or get_origin(inner) is Literal else "values"
        )
        return f"a list of {PLURALS.sub(lambda word: word[0].split()[-1] + 's', each)}{_length(rules, 'item')}", "[...]"
    if words := getattr(value_type, "ALLOWED", None):
        return words
    return "a section of keys and values", "null"


PLURALS = re.compile("^(an integer|a number|text)")


def _length(rules: Sequence[Any], what: str) -> str:
    most = next((rule.max_length for rule in _flat(rules) if isinstance(rule, MaxLen)), None)
    return "" if most is None else f" (up to {most} {what}s)"


def _flat(rules: Sequence[Any]) -> list[Any]:
    """Replace each `Field(...)` by its constraints."""
    return [part for rule in rules for part in (rule.metadata if isinstance(rule, FieldInfo) else [rule])]


def _number_phrase(value_type: type, rules: Sequence[Any]) -> tuple[str, Any]:
    rules = _flat(rules)
    low = next((rule.ge for rule in rules if isinstance(rule, Ge)), None)
    above = next((rule.gt for rule in rules if isinstance(rule, Gt)), None)
    high = next((rule.le for rule in rules if isinstance(rule, Le)), None)
    start = "" if low is None and above is None else f" of {low}" if above is None else f" above {above}"
    end = f" to {high}" if high is not None else " or more" if low is not None else ""
    return f"{'an integer' if value_type is int else 'a number'}{start}{end}", low if low is not None else high or 1


def nearest(key: str, known: Iterable[str]) -> str:
    """The end of an error message: the nearest known key, or all known keys."""
    known = sorted(known)
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    return f"Nearest: {near[0]}" if near else f"Allowed: {', '.join(known)}"


def refusal(key: str, value: Any, annotation: Any, field: FieldInfo | None = None) -> str:
    words, example = allowed(annotation, field)
    if value is None and f"(or {AUTO}" in words:
        example = AUTO
    return f"{key}: {value!r} is not allowed. Allowed: {words}; for example {key}={example}"


# ---- from pydantic's errors to ours ----


def _mistakes(error: ValidationError, model: type[Section], content: Any, key: str) -> list[str]:
    """One message per key, missing keys last. pydantic reports one error per type of a union."""
    by_place: dict[str, list[str]] = {}
    for details in sorted(error.errors(), key=lambda details: details["type"] == "missing"):
        where, messages = _mistake(details, model, content, key)
        by_place.setdefault(where, messages)
    return [message for messages in by_place.values() for message in messages]


def _mistake(details: Any, model: type[Section], content: Any, key: str) -> tuple[str, list[str]]:
    """The dotted key of a pydantic error, and its messages."""
    # Follow the location to the key, its annotation and its value.
    annotation: Any = model
    field = None
    for part in details["loc"]:
        fields = _fields(annotation)
        if fields is None:
            values = [
                get_args(value_type)[1] for value_type, _ in alternatives(annotation) if get_origin(value_type) is dict
            ]
            if not values:
                break  # a list item, or the name of a union's type: report the key of the whole value
            annotation, field = values[0], None
        elif part in fields:
            annotation, field = fields[part].annotation, fields[part]
        elif details["type"] == "extra_forbidden":
            key = _dotted(key, part)
            removed = REMOVED.get(part)
            return key, [f"{key}: {removed or f'unknown key. {nearest(str(part), fields)}'}"]
        else:
            break
        key = _dotted(key, part)
        content = content.get(part) if isinstance(content, Mapping) else None
    # Say what is wrong.
    if from_validators := _own_messages(details, key):
        return key, from_validators
    if details["type"] == "missing":
        words, example = allowed(annotation, field)
        return key, [f"{key}: missing. Allowed: {words}; for example {key}={example}"]
    return key, [refusal(key, content, annotation, field)]


def _own_messages(details: Any, key: str) -> list[str]:
    """The messages of our own validators. The key goes before messages that begin with a dot or colon."""
    cause = details.get("ctx", {}).get("error")
    messages = cause.args if isinstance(cause, ConfigError) else ()
    return [f"{key}{m.replace('{key}', key)}" if m[:1] in (".", ":") else m for m in messages]


def _fields(annotation: Any) -> dict[str, FieldInfo] | None:
    """The fields of a section; None for other types."""
    for value_type, _ in alternatives(annotation):
        if inspect.isclass(value_type) and issubclass(value_type, BaseModel):
            return value_type.model_fields
    return None


def _dotted(key: str, part: Any) -> str:
    return f"{key}.{part}" if key else str(part)


# ---- checked function arguments ----

_CONFIG = ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)


def check(key: str, value: Any, annotation: Any) -> None:
    """Raises a ConfigError if the annotation does not allow the value."""
    try:
        _adapter(annotation).validate_python(value)
    except ValidationError as e:
        raise ConfigError(*(_own_messages(e.errors()[0], key) or [refusal(key, value, annotation)])) from e


@lru_cache
def _adapter(annotation: Any) -> TypeAdapter:
    return TypeAdapter(annotation, config=_CONFIG)


def checked_arguments(prefix: str = "") -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorator: check arguments against their annotations. Messages show `prefix` + the parameter's name."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)
        hints = get_type_hints(function, include_extras=True)
        settings = [name for name in signature.parameters if name in hints and _is_setting(hints[name])]

        @wraps(function)
        def checked(*args: P.args, **kwargs: P.kwargs) -> R:
            for name, value in signature.bind(*args, **kwargs).arguments.items():
                if name in settings:
                    check(prefix + name, value, hints[name])
            return function(*args, **kwargs)

        return checked

    return decorate


def _is_setting(annotation: Any) -> bool:
    """Whether a parameter holds plain config values, and not a model or a tensor."""
    plain = (int, float, str, bool, type(None))
    return all(
        value_type in plain or get_origin(value_type) in (Literal, list, Sequence)
        for value_type, _ in alternatives(annotation)
    )
