"""`LLM`: the object that decodes. It owns model, tokenizer, plans of drafts, compiled steps, caches and rules.

Recipes, the server and Python programs decode through `LLM.start`, which makes a `Generation`; `generate` and `stream`
add texts and the choice of how to decode.
"""

import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Literal, cast, overload

import torch
from torchtune import training, utils
from torchtune.data import Message
from typing_extensions import Self

from layerskip_recipes.checkpoint.drafts import read_draft
from layerskip_recipes.checkpoint.hf_checkpointer import HFCheckpointer
from layerskip_recipes.checkpoint.weights import load_decoder, quantise_decoder
from layerskip_recipes.config.auto import best_device
from layerskip_recipes.config.components import Component
from layerskip_recipes.config.schema import AUTO, DeviceName, Text, checked_arguments
from layerskip_recipes.data.tokenizer import hf_tokenizer
from layerskip_recipes.distributed.loading import make_position_tables
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.families.hf_decoder import hf_decoder
from layerskip_recipes.folders.model_folder import named_folder
from layerskip_recipes.generation.config import DecodingConfig, GenerateConfig
from layerskip_recipes.generation.drafting.planner import DraftPlanner
from layerskip_recipes.generation.drafting.section import SelfSpeculation
from layerskip_recipes.generation.drafting.speculation import Speculation
from layerskip_recipes.generation.engine import Generation
from layerskip_recipes.generation.kernels.when_to_compile import compiling_pays
from layerskip_recipes.generation.parallel import load_sharded_decoder
from layerskip_recipes.generation.sampling import Sampler
from layerskip_recipes.generation.state import ModelState
from layerskip_recipes.generation.stats import GenerationStats
from layerskip_recipes.generation.text.prompts import to_tokens
from layerskip_recipes.generation.text.text_stream import TextStream, follow
from layerskip_recipes.model.decoder import LayerSkipDecoder, layerskip_decoder
from layerskip_recipes.model.draft import Draft
from layerskip_recipes.model.limits import most_positions
from layerskip_recipes.processes import num_processes

log = utils.get_logger("INFO")

CALLS = 10  # expected number of calls in a session, to decide whether compiling pays

Question = str | Mapping[str, str] | Sequence[Mapping[str, str]]  # a text, its user and system part, or messages


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

    One object decodes one call at a time; a call from another thread waits. Two objects share nothing.

    Args:
        model: in eval mode.
        tokenizer: None: for `start` alone.
        planner: None: drafts only by explicit plans.
        stop_tokens: end a text, besides the tokenizer's own.
        trained_draft: a draft of this model that has been read.

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
        trained_draft: Draft | None = None,
    ) -> None:
        self.model, self.tokenizer, self.planner = model, tokenizer, planner
        self.device = model.tok_embeddings.weight.device
        self.stop_tokens = [*getattr(tokenizer, "stop_tokens", []), *stop_tokens]
        self.state = ModelState(trained_draft)
        self.draft: str | None = AUTO  # the folder of a draft, which `generate` uses
        self.lock = threading.Lock()
        self.decided: dict[str, tuple[Speculation | None, bool]] = {}  # by the arguments of `generate`
        self.said: set[str] = set()

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
            dtype: "fp32" or "bf16"; None is fp32 on a CPU and bf16 elsewhere.
        """
        folder = named_folder(path, weights=True)
        torch_device = torch.device(device or best_device())
        dtype = dtype or ("fp32" if torch_device.type == "cpu" else "bf16")
        torch_dtype = torch.float32 if dtype == "fp32" else torch.bfloat16
        # Build on the meta device: the weights are initialised only once, by the checkpoint.
        with training.set_default_dtype(torch_dtype), torch.device("meta"):
            model = layerskip_decoder(hf_decoder(str(folder)))
        model.to_empty(device=torch_device)
        make_position_tables(model, torch_device, torch_dtype)
        model.load_state_dict(HFCheckpointer(str(folder)).load_checkpoint()[training.MODEL_KEY])
        model.requires_grad_(False).eval()
        draft_folder = AUTO if draft is None else str(named_folder(draft, "draft", weights=True))
        planner = DraftPlanner(model, folder, torch_device.type, torch_dtype, HFCheckpointer)
        description, _ = planner.trained_draft(SelfSpeculation(draft=draft_folder), "generate")
        trained_draft = None if description is None else read_draft(description, model, "draft")
        llm = cls(model, hf_tokenizer(str(folder)), planner, trained_draft=trained_draft)
        llm.draft = draft_folder
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
        return cls(model, tokenizer, stop_tokens=cfg.stop_tokens or [], trained_draft=trained_draft)

    def prepare(self, plans: Mapping[str, Speculation | None], quantizer: Component | None = None) -> None:
        """Build what drafts by these plans, by the keys of their sections, and then quantise the model."""
        for key, plan in plans.items():
            if plan is not None:
                self.state.draft_weights(plan, self.model, key)
        if quantizer is not None:
            self.model = quantise_decoder(self.model, quantizer)

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
        **arguments: Any,
    ) -> Generation:
        """A `Generation` of this model that has not started, with what earlier ones have built and learned.

        Args:
            plan: how to draft; None: without drafts.
            always_draft: there is a draft in each round that can have one, whether it pays or not.
            usual_new_tokens: outputs with this limit and shorter ones share a rule; None: `max_new_tokens`.
            **arguments: of `Generation`.
        """
        rule = None
        if plan is not None and not always_draft:
            batch_rows = min(arguments.get("rows") or len(prompts), len(prompts))
            rule = self.state.rule(plan, usual_new_tokens or max_new_tokens, batch_rows, compile)
        return Generation(
            self.model,
            prompts,
            max_new_tokens,
            speculation=plan,
            compile=compile,
            rule=rule,
            shared=num_processes() > 1,
            state=self.state,
            **{"stop_tokens": self.stop_tokens} | arguments,
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
    def generate(self, prompt: str | Mapping[str, str], max_new_tokens: int = 300, **arguments: Any) -> Output: ...
    @overload
    def generate(self, prompt: Sequence[Any], max_new_tokens: int = 300, **arguments: Any) -> Output | list[Output]: ...
    def generate(
        self,
        prompt: Question | Sequence[Question],
        max_new_tokens: int = 300,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        batch_size: int = 8,
        draft: Literal["auto"] | None = "auto",
        compile: bool | None = None,
        **settings: Any,
    ) -> Output | list[Output]:
        """Answer a prompt, or a list of prompts.

        Args:
            prompt: a question (without a chat template: the beginning of a text), {"user": .., "system": ..}, or
                messages [{"role": .., "content": ..}, ..]; or a list of these.
            max_new_tokens: the most new tokens of an answer.
            temperature: 0 is greedy.
            top_k, top_p, min_p, repetition_penalty: see `token_scores` and `penalise`.
            seed: decides sampled tokens, together with the model, the prompt and these settings. Drafts and other
                prompts do not matter. None: a seed drawn from torch's global generator.
            stop: an answer ends before the first of these texts.
            batch_size: how many of several prompts decode together.
            draft: "auto" drafts where that should pay; None never drafts. The answer is the same.
            compile: None: if a session of ten such calls gains by it.
            **settings: keys of `self_speculation` that are not to be chosen, such as num_speculations=4.

        Returns:
            An `Output`, or a list of them for a list of prompts.
        """
        is_list = not isinstance(prompt, str | Mapping) and not _are_messages(prompt)
        questions = cast(Sequence[Question], prompt if is_list else [prompt])
        prompts = [self._tokens(question) for question in questions]
        sampler = Sampler(temperature, top_k, top_p, min_p, repetition_penalty, seed)
        num_rows = min(batch_size, len(prompts))
        with self.lock:
            plan, compiled = self._decide(prompts, max_new_tokens, temperature, num_rows, draft, compile, settings)
            reuse = len(prompts[0]) if len(prompts) == 1 else 0
            generation = self.start(
                prompts, max_new_tokens, plan, compile=compiled, sampler=sampler, rows=num_rows, reuse=reuse
            )
            texts = self._texts(prompts, stop)
            follow(generation, texts)
        speedup = None if plan is None else generation.drafters.rule.speedup(generation.stats)
        outputs = [
            Output(text.text(tokens), tokens, generation.stats, speedup)
            for text, tokens in zip(texts, generation.generated, strict=True)
        ]
        return outputs if is_list else outputs[0]

    def stream(
        self,
        prompt: Question,
        max_new_tokens: int = 300,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        draft: Literal["auto"] | None = "auto",
        compile: bool | None = None,
        **settings: Any,
    ) -> Iterator[str]:
        """The answer to one prompt as pieces of text, as they become final; arguments as in `generate`.

        Until the iterator ends or is closed, other calls wait.
        """
        tokens = self._tokens(prompt)
        sampler = Sampler(temperature, top_k, top_p, min_p, repetition_penalty, seed)
        with self.lock:
            plan, compiled = self._decide([tokens], max_new_tokens, temperature, 1, draft, compile, settings)
            generation = self.start(
                [tokens], max_new_tokens, plan, compile=compiled, sampler=sampler, reuse=len(tokens)
            )
            yield from filter(None, pieces(generation, self._texts([tokens], stop)[0]))

    def _tokens(self, question: Question) -> list[int]:
        """The tokens of a prompt, up to the start of its answer."""
        has_template = getattr(self.tokenizer, "has_chat_template", False)
        if isinstance(question, str):
            return to_tokens({"user": question} if has_template else question, self.tokenizer)
        if isinstance(question, Mapping):
            return to_tokens(dict(question), self.tokenizer)
        messages = [Message(role=cast(Any, message["role"]), content=message["content"]) for message in question]
        return to_tokens([*messages, Message(role="assistant", content="")], self.tokenizer)

    def _texts(self, prompts: Sequence[Sequence[int]], stop: str | Sequence[str]) -> list[TextStream]:
        strings = [stop] if isinstance(stop, str) else [*stop]
        continues = not getattr(self.tokenizer, "has_chat_template", False)
        return [self.text_stream(prompt if continues else (), strings) for prompt in prompts]

    def _decide(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        temperature: float,
        batch_rows: int,
        draft: Literal["auto"] | None,
        compile: bool | None,
        settings: Mapping[str, Any],
    ) -> tuple[Speculation | None, bool]:
        """How to draft and whether to compile; decided once for equal arguments."""
        if settings and draft is None:
            name = next(iter(settings))
            raise ConfigError(f"{name}: is for drafts, and draft=None decodes without. Leave one of them out")
        if compile is None and self.state.compiled is not None and not self.state.compiled.failed:
            compile = True  # an earlier call has compiled the steps
        key = repr((max_new_tokens, temperature, batch_rows, draft, compile, sorted(settings.items())))
        if key not in self.decided:
            self.decided[key] = self._decision(
                prompts, max_new_tokens, temperature, batch_rows, draft, compile, settings
            )
        return self.decided[key]

    def _decision(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        temperature: float,
        batch_rows: int,
        draft: Literal["auto"] | None,
        compile: bool | None,
        settings: Mapping[str, Any],
    ) -> tuple[Speculation | None, bool]:
        section = None
        if draft is not None:
            # An exit of the caller's own drafts instead of a trained draft.
            folder = {} if settings.get("exit_layer", AUTO) != AUTO else {"draft": self.draft}
            section = SelfSpeculation.parse(dict(settings) | folder, "generate")
            section.check_against(self.model, "generate")
        if self.planner is None:
            raise ConfigError("draft: this object has no planner. Load it with LLM.load, or give draft=None")
        asked = section is not None and section.num_speculations != AUTO
        plans = {
            compiled: self.planner.plan(
                section, temperature, compiled, prompts, batch_rows, key="generate", asked=asked
            )
            for compiled in (False, True)
        }
        if compile is None:
            eager_s, compiled_s = (self.planner.token_s(plans[c][0], c, batch_rows) for c in (False, True))
            compile, why = compiling_pays(eager_s, compiled_s, CALLS * max_new_tokens, self.device)
            self._say(why)
        plan, why_plan = plans[compile]
        if why_plan is not None:
            self._say(why_plan)
        return plan, compile

    def _say(self, what: str) -> None:
        if what not in self.said:
            self.said.add(what)
            log.info(what)


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
