"""`LLM`: the object that decodes. It owns model, tokenizer, plans of drafts, compiled steps, caches and rules.

Recipes, the server and Python programs decode through `LLM.start`, which makes a `Generation`; `generate` and `stream`
add texts and the choice of how to decode.
"""

import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from functools import partial
from typing import Any, Literal, cast, overload

import torch
from torchtune import training, utils
from typing_extensions import Self, Unpack

from layerskip_recipes.checkpoint.hf_checkpointer import HFCheckpointer
from layerskip_recipes.checkpoint.weights import load_decoder, quantise_decoder
from layerskip_recipes.config.auto import best_device, computes_in_bf16
from layerskip_recipes.config.components import Component
from layerskip_recipes.config.schema import AUTO, DeviceName, PositiveInt, Text, check, checked_arguments
from layerskip_recipes.data.tokenizer import hf_tokenizer
from layerskip_recipes.distributed.loading import make_position_tables
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.families.hf_decoder import hf_decoder
from layerskip_recipes.folders.model_folder import named_folder
from layerskip_recipes.generation.calls import Call, CallSettings, Output, Question, are_messages, read_call
from layerskip_recipes.generation.config import DecodingConfig, GenerateConfig
from layerskip_recipes.generation.drafting.planner import Chosen, DraftPlanner
from layerskip_recipes.generation.drafting.section import SelfSpeculation
from layerskip_recipes.generation.drafting.speculation import Speculation
from layerskip_recipes.generation.engine import Generation
from layerskip_recipes.generation.parallel import load_sharded_decoder
from layerskip_recipes.generation.state import MOST_DRAFTS, ModelState
from layerskip_recipes.generation.text.text_stream import TextStream, follow
from layerskip_recipes.model.decoder import LayerSkipDecoder, layerskip_decoder
from layerskip_recipes.model.limits import check_prompt_lengths, most_positions
from layerskip_recipes.processes import num_processes

log = utils.get_logger("INFO")

CALLS = 10  # expected number of calls in a session, to decide whether compiling pays


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
        quantizer: str | Mapping[str, Any] | None = None,
    ) -> Self:
        """Load a model in eval mode, its tokenizer, and its trained draft if it has one.

        Args:
            path: a run of layerskip_finetune (loads its newest checkpoint), a checkpoint, a Hugging Face folder, or a
                name on the hub. A trained draft also loads the model that it was trained for, and a folder of PEFT's
                LoRA its base model, into which it is merged.
            draft: a run or a checkpoint with a draft trained for this model; None takes one that was trained beside it.
            device: such as "cpu" or "cuda:1"; None chooses the best device.
            dtype: "fp32" or "bf16"; None is bf16 on a GPU that computes in it, else fp32.
            quantizer: packs the weights after loading, as a config's key of this name does. The dotted path of a
                torchao config, or a section {"_component_": path, argument: value}.
        """
        packing = None if quantizer is None else Component.of_argument(quantizer, "quantizer")
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
        planner = DraftPlanner(model, folder, torch_device.type, torch_dtype, HFCheckpointer, packing)
        planner.make_tokenizer = partial(hf_tokenizer, str(folder))
        description, _ = planner.find_description(SelfSpeculation(draft=draft_folder), "generate")
        llm = cls(model, hf_tokenizer(str(folder)), planner)
        if description is not None:
            llm.state.trained_draft(description, model, "draft")
        if packing is not None:
            llm.model = planner.model = quantise_decoder(model, packing)
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
        drafts = {key: plan.draft for key, plan in plans.items() if plan is not None and plan.draft is not None}
        # A trained draft is checked against unquantised weights.
        model = load_decoder(cfg, device, None if drafts else cfg.quantizer)
        llm = cls(model, tokenizer, stop_tokens=cfg.stop_tokens or [])
        for key, draft in drafts.items():
            llm.state.trained_draft(draft, model, f"{key}.draft")
        if drafts and cfg.quantizer is not None:
            llm.model = quantise_decoder(model, cfg.quantizer)
        llm.prepare(plans)
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

    def prepare(self, plans: Mapping[str, Speculation | None]) -> None:
        """Build what drafts by these plans, by the keys of their sections."""
        for key, plan in plans.items():
            if plan is not None:
                self.state.draft_weights(plan, self.model, key)

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
        is_list = isinstance(prompt, Sequence) and not isinstance(prompt, str) and not are_messages(prompt)
        questions = cast(Sequence[Question], prompt if is_list else [prompt])
        if not questions:
            return []
        check("batch_size", batch_size, PositiveInt)
        predictions = settings.get("prediction") if is_list else [settings.get("prediction")]
        num_rows = min(batch_size, len(questions))
        with self._turn():
            call = read_call(
                questions, predictions, max_new_tokens, num_rows, settings, self.tokenizer, self.draft_folder
            )
            generation, texts = self._prepared(call)
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
            predictions = [settings.get("prediction")]
            call = read_call([prompt], predictions, max_new_tokens, 1, settings, self.tokenizer, self.draft_folder)
            generation, (text,) = self._prepared(call)
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

    def _prepared(self, call: Call) -> tuple[Generation, list[TextStream]]:
        """A generation that has not started, and the text of each prompt's output."""
        check_prompt_lengths(self.model, [*map(len, call.prompts)], call.max_new_tokens, "max_new_tokens")
        plan, compiled, reasons = self._choose(call)
        for reason in reasons:
            self._log_once(reason)
        generation = self.start(
            call.prompts,
            call.max_new_tokens,
            plan,
            compile=compiled,
            sampler=call.sampler,
            rows=call.num_rows,
            reuse=len(call.prompts[0]) if len(call.prompts) == 1 else 0,
            predictions=call.predictions,
        )
        continues = not getattr(self.tokenizer, "has_chat_template", False)
        return generation, [self.text_stream(prompt if continues else (), call.stop) for prompt in call.prompts]

    def _choose(self, call: Call) -> Chosen:
        """How to decode. Equal calls choose once."""
        section, compile = call.section, call.compile
        if section is not None:
            section.check_against(self.model, "generate")
        if self.planner is None:
            if section is not None:
                raise ConfigError("draft: this object has no planner. Load it with LLM.load, or give draft=None")
            return Chosen(None, bool(compile), [])
        if compile is None and self.state.compiled is not None and not self.state.compiled.failed:
            compile = True  # an earlier call has compiled the steps
        temperature, num_tokens = call.sampler.temperature, CALLS * call.max_new_tokens
        has_predictions = any(call.predictions)
        key = repr((section, temperature, call.num_rows, num_tokens if compile is None else compile, has_predictions))
        # A number of tokens without a stored list is counted in the prompts of each call.
        stored = self.planner.exits is not None and self.planner.exits.vocabulary
        counted = section is not None and isinstance(section.draft_vocabulary, int) and not stored
        if key not in self.chosen or counted:
            self.chosen[key] = self.planner.choose(
                section, temperature, compile, num_tokens, call.prompts, call.num_rows, "generate", has_predictions
            )
        return self.chosen[key]

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
