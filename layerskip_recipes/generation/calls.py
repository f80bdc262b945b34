"""Calls of `LLM.generate` and `LLM.stream`: their settings, from arguments to tokens, and their outputs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

from torchtune.data import Message, Role
from typing_extensions import TypedDict

from layerskip_recipes.config.schema import AUTO, Text, check, nearest
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.generation.drafting.section import SelfSpeculation
from layerskip_recipes.generation.sampling import Sampler
from layerskip_recipes.generation.stats import GenerationStats
from layerskip_recipes.generation.text.prompts import (
    Prediction,
    check_prediction,
    predicted_tokens,
    prompt_mistake,
    to_tokens,
)

Question = str | Mapping[str, str] | Sequence[Mapping[str, str]]  # a text, its user and system part, or messages


class CallSettings(TypedDict, total=False):
    """How one call decodes: keyword arguments of `LLM.generate` and `LLM.stream`."""

    temperature: float  # 0.0, the default, is greedy
    # See `token_scores` and `penalise`. By default, these change nothing.
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float
    # Decides sampled tokens, together with the model, the prompt and these settings. Drafts and other prompts do not
    # matter. None, the default: a seed drawn from torch's global generator.
    seed: int | None
    stop: str | Sequence[str]  # an answer ends before the first of these texts
    # Texts that the answer may repeat, in which drafts are looked up as in the prompt; for a list of prompts, a list
    # with the prediction of each. The answer is the same.
    prediction: Prediction | list[Prediction]
    compile: bool | None  # None, the default: if a session of ten such calls gains by it
    draft: Literal["auto"] | None  # "auto", the default: where that should pay; None: never. The answer is the same
    # Keys of `self_speculation` that are not to be chosen, see `SelfSpeculation`.
    exit_layer: int | None
    num_speculations: int
    min_confidence: float
    draft_vocabulary: int | list[int] | None
    prompt_lookup: int | None
    answers: str | None
    draft_int8: bool


@dataclass
class Output:
    """The answer to one prompt.

    text: without stop tokens and stop strings. tokens: the new tokens, with a stop token. stats: of all prompts of the
    call. speedup: decoding with drafts over the plain steps that were measured; None without drafts.
    """

    text: str
    tokens: list[int]
    stats: GenerationStats
    speedup: float | None = None


@dataclass
class Call:
    """A checked call: the tokens of its prompts, and how they decode."""

    prompts: list[list[int]]
    predictions: list[list[int]]  # of each prompt, see `predicted_tokens`
    max_new_tokens: int
    num_rows: int
    sampler: Sampler
    stop: Sequence[str]
    compile: bool | None  # None: not decided
    section: SelfSpeculation | None  # the keys of drafts; None: never draft


def read_call(
    questions: Sequence[Question],
    predictions: Any,
    max_new_tokens: int,
    num_rows: int,
    settings: CallSettings,
    tokenizer: Any,
    draft_folder: str | None,
) -> Call:
    """Check the arguments of a call. `draft_folder` has the trained draft that drafts if no exit is named.

    Raises:
        ConfigError: an argument is not allowed.
    """
    for name in settings:
        if name not in CallSettings.__annotations__:
            raise ConfigError(f"{name}: unknown. {nearest(name, CallSettings.__annotations__)}")
    stop, compile = settings.get("stop", ()), settings.get("compile")
    check("stop", stop, Text | Sequence[Text])
    check("compile", compile, bool | None)
    sampler = Sampler(
        settings.get("temperature", 0.0),
        settings.get("top_k"),
        settings.get("top_p"),
        settings.get("min_p"),
        settings.get("repetition_penalty", 1.0),
        settings.get("seed"),
    )
    prompts = [question_tokens(question, tokenizer) for question in questions]
    return Call(
        prompts,
        _prediction_tokens(predictions, prompts, tokenizer),
        max_new_tokens,
        num_rows,
        sampler,
        [stop] if isinstance(stop, str) else stop,
        compile,
        _section(settings, draft_folder),
    )


def are_messages(prompt: Any) -> bool:
    """Whether a list holds the messages of one conversation, and not several prompts."""
    return (
        isinstance(prompt, Sequence)
        and bool(prompt)
        and all(isinstance(part, Mapping) and "role" in part for part in prompt)
    )


def question_tokens(question: Question, tokenizer: Any) -> list[int]:
    """The tokens of a prompt, up to the start of its answer."""
    has_template = getattr(tokenizer, "has_chat_template", False)
    if isinstance(question, str):
        return to_tokens({"user": question} if has_template else question, tokenizer)
    if not isinstance(question, Mapping) and not are_messages(question):
        raise ConfigError(
            f"prompt: {question!r} is not allowed. Allowed: a text, "
            '{"user": "Wake me at 7"}, messages [{"role": "user", "content": "Wake me at 7"}], or a list of these'
        )
    if isinstance(question, Mapping):
        if (mistake := prompt_mistake(question)) is not None:
            raise ConfigError(f"prompt: {mistake}")
        return to_tokens(dict(question), tokenizer)
    for message in question:
        if message.get("role") not in get_args(Role) or not isinstance(message.get("content"), str):
            raise ConfigError(
                f"prompt: {message!r} is not allowed. Allowed: a message "
                '{"role": "user", "content": "Wake me at 7"}, or one of the system or the assistant'
            )
    messages = [Message(role=cast(Any, message["role"]), content=message["content"]) for message in question]
    return to_tokens([*messages, Message(role="assistant", content="")], tokenizer)


def _prediction_tokens(predictions: Any, prompts: Sequence[list[int]], tokenizer: Any) -> list[list[int]]:
    if predictions is None:
        predictions = [None] * len(prompts)
    if not isinstance(predictions, list | tuple) or len(predictions) != len(prompts):
        raise ConfigError(
            f"prediction: {predictions!r} is not allowed for a list of {len(prompts)} prompts. Allowed: a list "
            "with a text, a list of texts or None for each prompt"
        )
    for prediction in predictions:
        check_prediction(prediction)
    pairs = zip(predictions, prompts, strict=True)
    return [predicted_tokens(prediction, prompt, tokenizer) for prediction, prompt in pairs]


def _section(settings: CallSettings, draft_folder: str | None) -> SelfSpeculation | None:
    """The settings as a section `self_speculation`; None: never draft."""
    check("draft", settings.get("draft"), Literal["auto"] | None)
    keys = {name: value for name, value in settings.items() if name in SelfSpeculation.model_fields}
    if keys.pop("draft", AUTO) is None:
        for name in keys:
            raise ConfigError(f"{name}: is for drafts, and draft=None decodes without. Leave one of them out")
        return None
    if keys.get("exit_layer", AUTO) == AUTO:  # otherwise this exit drafts, and not a trained draft
        keys["draft"] = draft_folder
    return SelfSpeculation.parse(keys, "generate")
