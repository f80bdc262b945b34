"""`LLM`: the object that decodes. It owns model, tokenizer, plans of drafts, compiled steps, caches and rules.

Recipes, the server and Python programs decode through `LLM.start`, which makes a `Generation`; `generate` and `stream`
add texts and the choice of how to decode.
"""

import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast, get_args, overload

import torch
from torchtune import training, utils
from torchtune.data import Message, Role
from typing_extensions import Self, TypedDict, Unpack

from layerskip_recipes.checkpoint.hf_checkpointer import HFCheckpointer
from layerskip_recipes.checkpoint.weights import load_decoder, quantise_decoder
from layerskip_recipes.config.auto import best_device, computes_in_bf16
from layerskip_recipes.config.components import Component
from layerskip_recipes.config.schema import AUTO, DeviceName, PositiveInt, Text, check, checked_arguments, nearest
from layerskip_recipes.data.tokenizer import hf_tokenizer
from layerskip_recipes.distributed.loading import make_position_tables
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.families.hf_decoder import hf_decoder
from layerskip_recipes.folders.model_folder import named_folder
from layerskip_recipes.generation.config import DecodingConfig, GenerateConfig
from layerskip_recipes.generation.drafting.planner import Chosen, DraftPlanner
from layerskip_recipes.generation.drafting.section import SelfSpeculation
from layerskip_recipes.generation.drafting.speculation import Speculation
from layerskip_recipes.generation.engine import Generation
from layerskip_recipes.generation.parallel import load_sharded_decoder
from layerskip_recipes.generation.sampling import Sampler
from layerskip_recipes.generation.state import MOST_DRAFTS, ModelState
from layerskip_recipes.generation.stats import GenerationStats
from layerskip_recipes.generation.text.prompts import (
    Prediction,
    check_prediction,
    predicted_tokens,
    prompt_mistake,
    to_tokens,
)
from layerskip_recipes.generation.text.text_stream import TextStream, follow
from layerskip_recipes.model.decoder import LayerSkipDecoder, layerskip_decoder
from layerskip_recipes.model.limits import most_positions
from layerskip_recipes.processes import num_processes

log = utils.get_logger("INFO")

CALLS = 10  # expected number of calls in a session, to decide whether compiling pays

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


class LLM:
    """A model that answers prompts, with the fastest settings that are known for it on this machine.

    One object decodes one call at a time: a call waits until an earlier one of another thread has ended. A stream ends
    when its iterator ends or is closed. Two objects share nothing.

    Args:
        model: in eval mode.
        tokenizer: None: for `start` alone.
        planner: None: drafts only by explicit plans.
        stop_tokens: end a text, besides the tokenizer's own.

    Example:
        >>> llm = LLM.load("quickstart")                                          # doctest: +SKIP
        >>> out = llm.generate("def read_lines(path):", max_new_tokens=128)       # doctest: +SKIP
        >>> print(out.text, out.speedup)                                          # doctest: +SKIP
        >>> for text in llm.stream("def read_lines(path):"):                      # doctest: +SKIP
        ...     print(text, end="", flush=True)
    """

    def __init__(
        self,
        model: LayerSkipDecoder,
        tokenizer: Any = None,
        planner: DraftPlanner | None = None,
        *,
        stop_tokens: Sequence[int] = (),
    ) -> None:
        self.model, self.tokenizer, self.planner = model, tokenizer, planner
        self.device = model.tok_embeddings.weight.device
        self.stop_tokens = [*getattr(tokenizer, "stop_tokens", []), *stop_tokens]
        # A planner may count another draft vocabulary for each call.
        self.state = ModelState(None if planner is None else MOST_DRAFTS)
        self.draft_folder: str | None = AUTO  # of the draft that `generate` uses
        self.lock = threading.Lock()  # held by the call that decodes
        self.thread: int | None = None  # of this call
        self.chosen: dict[str, Chosen] = {}  # by what they depend on
        self.logged: set[str] = set()

    # ---- loading ----

    @classmethod
    @checked_arguments()
    def load(
        cls,
        path: Text,
        *,
        draft: Text | None = None,
        device: DeviceName | None = None,
        dtype: Literal["fp32", "bf16"] | None = None,
    ) -> Self:
        """Load a model in eval mode, its tokenizer, and its trained draft if it has one.

        Args:
            path: a run of layerskip_finetune (loads its newest checkpoint), a checkpoint, a Hugging Face folder, or a
                name on the hub. A trained draft also loads the model that it was trained for, and a folder of PEFT's
                LoRA its base model, into which it is merged.
            draft: a run or a checkpoint with a draft trained for this model; None takes one that was trained beside it.
            device: such as "cpu" or "cuda:1"; None chooses the best device.
            dtype: "fp32" or "bf16"; None is bf16 on a GPU that computes in it, else fp32.
        """
        folder = named_folder(path, weights=True)
        torch_device = torch.device(device or best_device())
        dtype = dtype or ("bf16" if computes_in_bf16(str(torch_device)) else "fp32")
        torch_dtype = torch.float32 if dtype == "fp32" else torch.bfloat16
        # Build on the meta device: the weights are initialised only once, by the checkpoint.
        with training.set_default_dtype(torch_dtype), torch.device("meta"):
            model = layerskip_decoder(hf_decoder(str(folder)))
        model.to_empty(device=torch_device)
        make_position_tables(model, torch_device, torch_dtype)
        model.load_state_dict(HFCheckpointer(str(folder)).load_checkpoint()[training.MODEL_KEY])
        model.requires_grad_(False).eval()
        draft_folder = AUTO if draft is None else str(named_folder(draft, "draft", weights=True))
        planner = DraftPlanner(model, folder, torch_device.type, torch_dtype, torch_dtype, HFCheckpointer)
        planner.make_tokenizer = partial(hf_tokenizer, str(folder))
        description, _ = planner.find_description(SelfSpeculation(draft=draft_folder), "generate")
        llm = cls(model, hf_tokenizer(str(folder)), planner)
        if description is not None:
            llm.state.trained_draft(description, model, "draft")
        llm.draft_folder = draft_folder
        return llm

    @classmethod
    def of_config(
        cls,
        cfg: DecodingConfig,
        device: torch.device,
        tokenizer: Any,
        plans: Mapping[str, Speculation | None],
    ) -> Self:
        """Load the model of a config in one process, and what drafts by plans, by the keys of their sections."""
        # A trained draft is checked against unquantised weights.
        late = any(plan is not None and plan.draft is not None for plan in plans.values())
        llm = cls(
            load_decoder(cfg, device, None if late else cfg.quantizer), tokenizer, stop_tokens=cfg.stop_tokens or []
        )
        llm.prepare(plans, cfg.quantizer if late else None)
        return llm

    @classmethod
    def of_sharded_config(
        cls,
        cfg: GenerateConfig,
        device: torch.device,
        tokenizer: Any,
        plan: Speculation | None,
        kept_layers: int,
        parallel: int,
    ) -> Self:
        """Load the model of a config on several processes, see `load_sharded_decoder`."""
        tp_plan = None if cfg.tensor_parallel_plan is None else cfg.tensor_parallel_plan.build()
        draft = None if plan is None else plan.draft
        model, trained_draft = load_sharded_decoder(cfg, device, kept_layers, parallel, tp_plan, draft)
        llm = cls(model, tokenizer, stop_tokens=cfg.stop_tokens or [])
        if draft is not None and trained_draft is not None:
            llm.state.trained_drafts[draft.folder] = trained_draft
        return llm

    def prepare(self, plans: Mapping[str, Speculation | None], quantizer: Component | None = None) -> None:
        """Build what drafts by these plans, by the keys of their sections, and then quantise the model."""
        for key, plan in plans.items():
            if plan is not None:
                self.state.draft_weights(plan, self.model, key)
        if quantizer is not None:
            self.model = quantise_decoder(self.model, quantizer)

    def forget_draft(self, plan: Speculation) -> None:
        """Free what `prepare` or a generation has built for a plan."""
        self.state.drafts.pop(plan.weights_key, None)

    def restart_rules(self) -> None:
        """Forget what earlier generations taught about when to draft."""
        self.state.rules.clear()

    # ---- tokens ----

    def start(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        plan: Speculation | None = None,
        *,
        compile: bool = False,
        always_draft: bool = False,
        usual_new_tokens: int | None = None,
        rows: int | None = None,
        **arguments: Any,
    ) -> Generation:
        """A `Generation` of this model that has not started, with what earlier ones have built and learned.

        It does not wait: while another one decodes, its iterator raises a RuntimeError.

        Args:
            plan: how to draft; None: without drafts.
            always_draft: there is a draft in each round that can have one, whether it pays or not.
            usual_new_tokens: outputs with this limit and shorter ones share a rule; None: `max_new_tokens`.
            rows, **arguments: of `Generation`.
        """
        rule = None
        if plan is not None and not always_draft:
            batch_rows = min(rows or len(prompts), len(prompts))
            rule = self.state.rule(plan, usual_new_tokens or max_new_tokens, batch_rows, compile)
        return Generation(
            self.model,
            prompts,
            max_new_tokens,
            speculation=plan,
            stop_tokens=self.stop_tokens,
            rows=rows,
            compile=compile,
            rule=rule,
            shared=num_processes() > 1,
            state=self.state,
            **arguments,
        )

    def reserved_slots(self, needed: int, plan: Speculation | None) -> int:
        """Slots of a new cache for a conversation: twice what it needs now, as a new cache would read it all anew."""
        # The model also verifies drafts that reach beyond an answer's limit.
        verified = 1 if plan is None else plan.num_speculations + 1
        return min(max(1024, 2 * needed), most_positions(self.model)[0]) + verified

    def text_stream(self, prompt: Sequence[int] = (), stop: Sequence[str] = ()) -> TextStream:
        """The text of an output while it grows; after a prompt of raw text it continues that text exactly."""
        return TextStream(self.tokenizer, self.stop_tokens, stop, prompt)

    # ---- texts ----

    @overload
    def generate(
        self, prompt: str | Mapping[str, str], max_new_tokens: int = 300, **settings: Unpack[CallSettings]
    ) -> Output: ...
    @overload
    def generate(
        self,
        prompt: Sequence[Any],
        max_new_tokens: int = 300,
        *,
        batch_size: int = 4,
        **settings: Unpack[CallSettings],
    ) -> Output | list[Output]: ...
    def generate(
        self,
        prompt: Question | Sequence[Question],
        max_new_tokens: int = 300,
        *,
        batch_size: int = 4,
        **settings: Unpack[CallSettings],
    ) -> Output | list[Output]:
        """Answer a prompt, or a list of prompts.

        Args:
            prompt: a question (without a chat template: the beginning of a text), {"user": .., "system": ..}, or
                messages [{"role": .., "content": ..}, ..]; or a list of these.
            max_new_tokens: the most new tokens of an answer.
            batch_size: how many of several prompts decode together.
            **settings: temperature, top_k, top_p, min_p, repetition_penalty, seed, stop, prediction, draft and
                compile, see `CallSettings`; and keys of `self_speculation` that are not to be chosen, such as
                num_speculations=4.

        Returns:
            An `Output`, or a list of them for a list of prompts.
        """
        is_list = not isinstance(prompt, str | Mapping) and not _are_messages(prompt)
        questions = cast(Sequence[Question], prompt if is_list else [prompt])
        if not questions:
            return []
        check("batch_size", batch_size, PositiveInt)
        predictions = settings.get("prediction") if is_list else [settings.get("prediction")]
        num_rows = min(batch_size, len(questions))
        with self._turn():
            generation, texts = self._prepared(questions, predictions, max_new_tokens, num_rows, settings)
            follow(generation, texts)
        drafted = generation.stats.plain_share is not None
        speedup = generation.drafters.rule.speedup(generation.stats) if drafted else None
        outputs = [
            Output(text.text(tokens), tokens, generation.stats, speedup)
            for text, tokens in zip(texts, generation.generated, strict=True)
        ]
        return outputs if is_list else outputs[0]

    def stream(self, prompt: Question, max_new_tokens: int = 300, **settings: Unpack[CallSettings]) -> Iterator[str]:
        """The answer to one prompt as pieces of text, as they become final; arguments as in `generate`.

        Until the iterator ends or is closed, calls of other threads wait, and this thread can make none.
        """
        with self._turn():
            generation, (text,) = self._prepared([prompt], [settings.get("prediction")], max_new_tokens, 1, settings)
            yield from filter(None, pieces(generation, text))

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Wait until an earlier call of another thread has ended, and make later ones wait."""
        if self.lock.locked():
            if self.thread == threading.get_ident():
                raise RuntimeError("a stream of this thread has not ended: iterate it to its end, or close() it")
            log.info("A call waits, as an earlier one has not ended. A stream ends when its iterator is closed")
        with self.lock:
            self.thread = threading.get_ident()
            try:
                yield
            finally:
                self.thread = None

    def _prepared(
        self,
        questions: Sequence[Question],
        predictions: Any,
        max_new_tokens: int,
        num_rows: int,
        settings: CallSettings,
    ) -> tuple[Generation, list[TextStream]]:
        """A generation that has not started, and the text of each prompt's output."""
        for name in settings:
            if name not in CallSettings.__annotations__:
                raise ConfigError(f"{name}: unknown. {nearest(name, CallSettings.__annotations__)}")
        check("stop", settings.get("stop", ()), Text | Sequence[Text])
        check("compile", settings.get("compile"), bool | None)
        check("draft", settings.get("draft"), Literal["auto"] | None)
        if predictions is None:
            predictions = [None] * len(questions)
        if not isinstance(predictions, list | tuple) or len(predictions) != len(questions):
            raise ConfigError(
                f"prediction: {predictions!r} is not allowed for a list of {len(questions)} prompts. Allowed: a list "
                "with a text, a list of texts or None for each prompt"
            )
        for prediction in predictions:
            check_prediction(prediction)
        prompts = [self._tokens(question) for question in questions]
        pairs = zip(predictions, prompts, strict=True)
        predicted = [predicted_tokens(prediction, prompt, self.tokenizer) for prediction, prompt in pairs]
        sampler = Sampler(
            settings.get("temperature", 0.0),
            settings.get("top_k"),
            settings.get("top_p"),
            settings.get("min_p"),
            settings.get("repetition_penalty", 1.0),
            settings.get("seed"),
        )
        plan, compiled, reasons = self._choose(prompts, max_new_tokens, num_rows, settings, any(predicted))
        for reason in reasons:
            self._log_once(reason)
        generation = self.start(
            prompts,
            max_new_tokens,
            plan,
            compile=compiled,
            sampler=sampler,
            rows=num_rows,
            reuse=len(prompts[0]) if len(prompts) == 1 else 0,
            predictions=predicted,
        )
        stop = settings.get("stop", ())
        strings = [stop] if isinstance(stop, str) else stop
        continues = not getattr(self.tokenizer, "has_chat_template", False)
        return generation, [self.text_stream(prompt if continues else (), strings) for prompt in prompts]

    def _tokens(self, question: Question) -> list[int]:
        """The tokens of a prompt, up to the start of its answer."""
        has_template = getattr(self.tokenizer, "has_chat_template", False)
        if isinstance(question, str):
            return to_tokens({"user": question} if has_template else question, self.tokenizer)
        if isinstance(question, Mapping):
            if (mistake := prompt_mistake(question)) is not None:
                raise ConfigError(f"prompt: {mistake}")
            return to_tokens(dict(question), self.tokenizer)
        for message in question:
            if message.get("role") not in get_args(Role) or not isinstance(message.get("content"), str):
                raise ConfigError(
                    f"prompt: {message!r} is not allowed. Allowed: a message "
                    '{"role": "user", "content": "Wake me at 7"}, or one of the system or the assistant'
                )
        messages = [Message(role=cast(Any, message["role"]), content=message["content"]) for message in question]
        return to_tokens([*messages, Message(role="assistant", content="")], self.tokenizer)

    def _choose(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        num_rows: int,
        settings: CallSettings,
        has_predictions: bool,
    ) -> Chosen:
        """How to decode. Equal calls choose once."""
        section, compile = self._section(settings), settings.get("compile")
        if self.planner is None:
            if section is not None:
                raise ConfigError("draft: this object has no planner. Load it with LLM.load, or give draft=None")
            return Chosen(None, bool(compile), [])
        if compile is None and self.state.compiled is not None and not self.state.compiled.failed:
            compile = True  # an earlier call has compiled the steps
        temperature, num_tokens = settings.get("temperature", 0.0), CALLS * max_new_tokens
        key = repr((section, temperature, num_rows, num_tokens if compile is None else compile, has_predictions))
        # A number of tokens without a stored list is counted in the prompts of each call.
        stored = self.planner.exits is not None and self.planner.exits.vocabulary
        counted = section is not None and isinstance(section.draft_vocabulary, int) and not stored
        if key not in self.chosen or counted:
            self.chosen[key] = self.planner.choose(
                section, temperature, compile, num_tokens, prompts, num_rows, "generate", has_predictions
            )
        return self.chosen[key]

    def _section(self, settings: CallSettings) -> SelfSpeculation | None:
        """The settings as a section `self_speculation`; None: never draft."""
        keys = {name: value for name, value in settings.items() if name in SelfSpeculation.model_fields}
        if keys.pop("draft", AUTO) is None:
            for name in keys:
                raise ConfigError(f"{name}: is for drafts, and draft=None decodes without. Leave one of them out")
            return None
        if keys.get("exit_layer", AUTO) == AUTO:  # otherwise this exit drafts, and not a trained draft
            keys["draft"] = self.draft_folder
        section = SelfSpeculation.parse(keys, "generate")
        section.check_against(self.model, "generate")
        return section

    def _log_once(self, line: str) -> None:
        if line not in self.logged:
            self.logged.add(line)
            log.info(line)


def pieces(generation: Generation, text: TextStream) -> Generator[str, None, None]:
    """Run a generation of one prompt; yields the text that became final in each round, which may be empty."""
    rounds: Any = iter(generation)
    with closing(rounds):
        for (new,) in rounds:
            num_kept = text.extend(new)
            if num_kept is not None:  # a stop string ends the text
                generation.stop(0, len(generation.generated[0]) - len(new) + num_kept)
            yield text.new_text(last=generation.finished[0])


def _are_messages(prompt: Any) -> bool:
    """Whether a list holds the messages of one conversation, and not several prompts."""
    return bool(prompt) and all(isinstance(part, Mapping) and "role" in part for part in prompt)
