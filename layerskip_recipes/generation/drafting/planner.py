"""Where it is chosen how to decode: `DraftPlanner.plan` turns a section with `auto` keys into a `Speculation`.
`DraftPlanner.choose` also says whether to compile."""

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch

from layerskip_recipes.acceptance.tokens_per_round import ASSUMED, MIN_CONFIDENCE
from layerskip_recipes.acceptance.trained_exits import DESCRIPTION, TrainedExits, read_trained_exits
from layerskip_recipes.checkpoint.answers import Answers, answers_beside, has_answers, read_answers
from layerskip_recipes.checkpoint.checkpointers import described_folder
from layerskip_recipes.checkpoint.drafts import DraftDescription, own_draft, read_description
from layerskip_recipes.config.components import Component
from layerskip_recipes.config.layer_strings import default_exit
from layerskip_recipes.config.recipe_config import RecipeConfig
from layerskip_recipes.config.schema import AUTO
from layerskip_recipes.distributed.tensor_parallel import ranks_per_matrix
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.generation.drafting.prediction import (
    LEAST_GAIN,
    Costs,
    Option,
    estimated_costs,
    known_options,
    ranked,
    variants,
)
from layerskip_recipes.generation.drafting.section import SPLITS, SelfSpeculation
from layerskip_recipes.generation.drafting.speculation import SECTION_KEY, SPECULATION_DEFAULTS, Speculation
from layerskip_recipes.generation.kernels.when_to_compile import compiling_pays
from layerskip_recipes.model.decoder import LayerSkipDecoder, layerskip_decoder
from layerskip_recipes.processes import num_processes

LOOKUP = 1  # the least length of a match in the text


class Chosen(NamedTuple):
    """How a model decodes, and a log line for each choice."""

    plan: Speculation | None  # None: without drafts
    compiled: bool
    reasons: list[str]


@dataclass
class DraftPlanner:
    """Plans how a model drafts on its device, before or after its weights are loaded.

    It ranks the exits, or the trained draft, by the acceptance that training noted in layerskip.json and by the costs
    that prediction.py estimates. Each layerskip.json is read once.
    """

    model: LayerSkipDecoder  # may be on the meta device
    folder: Path | None  # of the weights or adapters; it may lack layerskip.json
    device: str
    dtype: torch.dtype  # of the weights before a quantizer packs them
    checkpointer: Any = None  # the class that reads the weights
    quantizer: Component | None = None  # leaves a trained draft as it is
    unusable_draft: str | None = None  # the reason why a draft beside the model cannot be used
    split: bool = False  # over several processes
    make_tokenizer: Callable[[], Any] | None = None  # for answers; None: drafts are looked up in none
    descriptions: dict[str, DraftDescription] = field(default_factory=dict)  # by folder
    read: dict[Hashable, Answers | None] = field(default_factory=dict)  # by the section's value and the draft's folder

    @classmethod
    def of_config(cls, cfg: RecipeConfig, quantizer: Component | None) -> "DraftPlanner":
        """The planner of a config's model."""
        dim, plan = getattr(cfg, "tensor_parallel_dim", None), getattr(cfg, "tensor_parallel_plan", None)
        parallel = ranks_per_matrix(dim, plan)
        return cls(
            layerskip_decoder(cfg.meta_model),
            described_folder(cfg.checkpointer),
            cfg.device,
            cfg.torch_dtype,
            cfg.checkpointer.target,
            quantizer,
            f"does not go with {SPLITS}" if parallel > 1 else None,
            split=num_processes() > 1,
            make_tokenizer=None if cfg.tokenizer is None else cfg.tokenizer.build,
        )

    @cached_property
    def exits(self) -> TrainedExits | None:
        """What layerskip.json says of the model's exits."""
        if self.folder is None:
            return None
        return read_trained_exits(self.folder, self.model.num_layers, self.model.tok_embeddings.num_embeddings)

    def find_description(
        self, section: SelfSpeculation, key: str = SECTION_KEY
    ) -> tuple[DraftDescription | None, str | None]:
        """The section's trained draft, or else the one beside the model, or why that cannot be used."""
        folder, is_named, key = section.draft, section.draft != AUTO, f"{key}.draft"
        if not is_named:
            folder, key = own_draft(self.folder) if section.exit_layer == AUTO else None, "draft"
        if folder is None:
            return None, None
        reason = None if is_named else self.unusable_draft
        if reason is None:
            if folder not in self.descriptions:
                self.descriptions[folder] = read_description(folder, key)
            if is_named or self.descriptions[folder].is_for(self.checkpointer):
                return self.descriptions[folder], None
            reason = "was trained for weights that another checkpointer reads"
        return None, f"the draft in {folder} {reason}"

    def answers(
        self, section: SelfSpeculation, draft: DraftDescription | None = None, key: str = SECTION_KEY
    ) -> Answers | None:
        """The section's answers, or else those beside the model or the draft."""
        if section.answers is None or self.make_tokenizer is None:
            return None
        source = (section.answers, draft and draft.folder)
        if source not in self.read:
            num_tokens = self.model.tok_embeddings.num_embeddings
            if section.answers != AUTO:
                self.read[source] = read_answers(section.answers, self.make_tokenizer(), num_tokens, f"{key}.answers")
            else:
                folders = [self.folder, None if draft is None else Path(draft.folder)]
                folder = next((folder for folder in folders if folder is not None and has_answers(folder)), None)
                self.read[source] = None
                if folder is not None:
                    self.read[source] = answers_beside(folder, self.make_tokenizer(), num_tokens)
        return self.read[source]

    def costs(self, compiled: bool, batch_rows: int = 1, draft: DraftDescription | None = None) -> Costs:
        """Estimated seconds of the parts of a round."""
        is_copy = draft is not None and draft.kind == "copy"  # an adapter also runs layers of the model
        dtype = self.dtype if self.quantizer is None else torch.int8
        draft_dtype = self.dtype if is_copy else dtype
        return estimated_costs(self.model, dtype, not self._on_cpu, compiled, batch_rows, draft_dtype)

    @property
    def _on_cpu(self) -> bool:
        return self.device.startswith("cpu")

    def choose(
        self,
        section: SelfSpeculation | None,
        temperature: float,
        compile: bool | None,
        num_tokens: int,
        prompts: Sequence[Sequence[int]] = (),
        batch_rows: int = 1,
        key: str = SECTION_KEY,
        has_predictions: bool = False,
    ) -> Chosen:
        """How to decode. `compile` None: if that pays for up to `num_tokens` steps. The rest is as in `plan`."""
        plans = {
            compiled: self.plan(section, temperature, compiled, prompts, batch_rows, key, has_predictions)
            for compiled in ((False, True) if compile is None else (compile,))
        }
        reasons = []
        if compile is None:
            compile = False
            if not self.split:
                eager_s, compiled_s = (self._token_s(plan, c, batch_rows) for c, (plan, _) in plans.items())
                compile, why = compiling_pays(eager_s, compiled_s, num_tokens, torch.device(self.device))
                reasons.append(why)
        plan, why_plan = plans[compile]
        return Chosen(plan, compile, [*reasons, *filter(None, [why_plan])])

    def _token_s(self, plan: Speculation | None, compiled: bool, batch_rows: int) -> float:
        """Estimated seconds per token with a plan."""
        speedup = 1.0 if plan is None or plan.speedup is None else plan.speedup
        return self.costs(compiled, batch_rows).plain_step_s / max(speedup, 1.0)

    def plan(
        self,
        section: SelfSpeculation | None,
        temperature: float,
        compiled: bool,
        prompts: Sequence[Sequence[int]] = (),
        batch_rows: int = 1,
        key: str = SECTION_KEY,
        has_predictions: bool = False,
    ) -> tuple[Speculation | None, str | None]:
        """How to draft in batches of `batch_rows` prompts (None: not at all), and a log line if anything was chosen.

        In order: the user's keys stand; without any measurement, open keys have defaults; else the fastest of the
        known options is taken, if it should pay or the user asked for drafts by an exit or a draft.
        `key` is the section's name in messages. Predictions of answers are a reason to look drafts up in the text, of
        which they are a part.
        """
        if section is None:
            return None, None
        if has_predictions and section.prompt_lookup == AUTO:
            section = section.model_copy(update={"prompt_lookup": LOOKUP})
        given = section.given
        has_exit = given.get("exit_layer") is not None
        draft, unusable = self.find_description(section, key)
        if self.quantizer is not None and draft is None:
            section.check_quantised(key)
        answers = self.answers(section, draft, key)
        if "exit_layer" in given and not has_exit:
            return self._look_ups_alone(given, answers, compiled, batch_rows), None
        exits = None if given.get("draft") else self.exits
        if draft is None and has_exit and not (exits and exits.measured):
            least = None if answers is None else LOOKUP
            plan = Speculation(given["exit_layer"], prompt_lookup=least, answers=answers)
            return self._filled(plan, section, prompts, key), None
        if draft is None:
            options = known_options(exits, self.model.num_layers, given.get("exit_layer"))
        else:
            trained = Speculation(draft.exit_layer, draft_vocabulary=draft.vocabulary, draft=draft)
            options = [(trained, (draft.measured and draft.measured.draft) or ASSUMED)]
        if not options:
            return self._without_layers(given, answers, unusable or self._untrained(key), compiled, batch_rows)
        best = self._fastest(options, section, draft, temperature, compiled, prompts, batch_rows, key)
        # Draft if it should pay, or if the user asked for it.
        assert best.speedup is not None
        described = self._described(best, assumed=any(rates is ASSUMED for _, rates in options))
        described += f"; {unusable}" if unusable else ""
        if best.speedup < LEAST_GAIN and not (has_exit or given.get("draft")):
            which = "no exit should pay" if draft is None else "the trained draft should not pay"
            why = f"{which}. The best would be {described}"
            return self._without_layers(given, answers, why, compiled, batch_rows)
        # Rows of a batch rarely have a match in their texts. If the whole model drafts, look-ups never pay beside it.
        if best.model_layers < self.model.num_layers:
            least = LOOKUP if batch_rows == 1 or answers is not None else None
            best = replace(best, prompt_lookup=least, answers=answers)
        plan = self._filled(best, section, prompts, key)
        also = f"; {plan.lookups}" if plan.looks_up else ""
        can_choose = SPECULATION_DEFAULTS.keys() - {"draft"} | ({"exit_layer"} if draft is None else set())
        return plan, f"Drafts: {described}{also}" if can_choose - given.keys() else None

    def _fastest(
        self,
        options: list[Option],
        section: SelfSpeculation,
        draft: DraftDescription | None,
        temperature: float,
        compiled: bool,
        prompts: Sequence[Sequence[int]],
        batch_rows: int,
        key: str,
    ) -> Speculation:
        """The fastest of the options, with every vocabulary, precision, end and length that the user left open."""
        exits = None if section.given.get("draft") else self.exits
        can_end = self._on_cpu and not self.split
        if section.draft_vocabulary != AUTO:
            options = self._with_vocabulary(options, section, prompts, key)
        elif draft is None and (self.split or not (exits and exits.vocabulary)):
            options = [(plan, rates) for plan, rates in options if plan.draft_vocabulary is None]
        min_confidences = [0.0, MIN_CONFIDENCE] if can_end and batch_rows == 1 else [0.0]
        if section.min_confidence != AUTO and len(min_confidences) > 1:
            min_confidences = [section.min_confidence]
        full_precision = self.quantizer is None or draft is not None  # of the layers that draft
        precisions = [False, True] if can_end and compiled and full_precision else [False]
        if section.draft_int8 != AUTO:
            precisions = [section.draft_int8]
        lengths = None if section.num_speculations == AUTO else [section.num_speculations]
        costs = self.costs(compiled, batch_rows, draft)
        return ranked(variants(options, temperature, min_confidences, precisions), costs, lengths)[0]

    def _filled(
        self, plan: Speculation, section: SelfSpeculation, prompts: Sequence[Sequence[int]], key: str
    ) -> Speculation:
        """The plan with all keys that the user gave."""
        as_objects = ("draft", "draft_vocabulary", "answers")  # of which the section has a folder, a size and a file
        names = SPECULATION_DEFAULTS.keys() - as_objects
        given = {name: section.given[name] for name in names & section.given.keys()}
        if section.draft_vocabulary != AUTO:
            given["draft_vocabulary"] = self._vocabulary(section, plan.draft, prompts, key)
        return replace(plan, **given)

    def _vocabulary(
        self,
        section: SelfSpeculation,
        draft: DraftDescription | None,
        prompts: Sequence[Sequence[int]],
        key: str,
    ) -> Sequence[int] | None:
        """The ids of the user's draft vocabulary.

        Of a number of tokens they are those of the draft, if it has as many, or the first frequent ones of the
        checkpoint, or else of the prompts.
        """
        size = section.draft_vocabulary
        if not isinstance(size, int):
            return size
        if draft is not None and draft.vocabulary and size == len(draft.vocabulary):
            return draft.vocabulary
        exits = None if section.given.get("draft") else self.exits
        frequent = (exits and exits.vocabulary) or most_frequent(prompts)
        if not frequent:
            raise ConfigError(
                f"{key}.draft_vocabulary: {size} tokens are counted in the prompts, and a conversation has none yet. "
                f"Set {key}.draft_vocabulary=null"
            )
        return frequent[:size]

    def _with_vocabulary(
        self, options: Iterable[Option], section: SelfSpeculation, prompts: Sequence[Sequence[int]], key: str
    ) -> list[Option]:
        """Each exit with the user's vocabulary, and the acceptance measured for the next smaller vocabulary."""
        by_exit: dict[int | None, Option] = {}
        for plan, rates in sorted(options, key=lambda option: _size(option[0])):
            ids = self._vocabulary(section, plan.draft, prompts, key)
            wanted = replace(plan, draft_vocabulary=ids)
            if _size(plan) <= _size(wanted) or plan.exit_layer not in by_exit:
                by_exit[plan.exit_layer] = wanted, rates
        return [*by_exit.values()]

    def _without_layers(
        self, given: dict[str, Any], answers: Answers | None, reason: str, compiled: bool, batch_rows: int
    ) -> tuple[Speculation | None, str]:
        """Look-ups alone if there are answers or the user asked for them, else no drafts; and the log line."""
        if not given.get("prompt_lookup") and answers is None:
            return None, f"No drafts: {reason}"
        plan = self._look_ups_alone(given, answers, compiled, batch_rows)
        return plan, f"Drafts: {plan} alone, because {reason}"

    def _look_ups_alone(
        self, given: dict[str, Any], answers: Answers | None, compiled: bool, batch_rows: int
    ) -> Speculation:
        # A look-up ends where it is not sure, so it may be as long as this machine verifies well.
        length = given.get("num_speculations", self.costs(compiled, batch_rows).longest)
        return Speculation(None, length, prompt_lookup=given.get("prompt_lookup", LOOKUP), answers=answers)

    def _untrained(self, key: str) -> str:
        if self.exits is None:
            reason = f"{self.folder or 'the model'} has no {DESCRIPTION}, so no exit is known to be trained"
        else:
            reason = f"{DESCRIPTION} in {self.folder} names no trained exit before the last one"
        return f"{reason}. To draft anyway: {key}.exit_layer={default_exit(self.model.num_layers)}"

    @staticmethod
    def _described(plan: Speculation, assumed: bool) -> str:
        assert plan.tokens_per_round is not None and plan.speedup is not None
        return (
            f"{plan}, {'up to ' if plan.ends_early else ''}{plan.num_speculations} drafted tokens per round; "
            f"expected speed-up {plan.speedup:.2f}x ({plan.tokens_per_round:.1f} tokens per round, which costs "
            f"{plan.tokens_per_round / plan.speedup:.2f} plain steps; acceptance "
            f"{'assumed' if assumed else 'as in training'}, costs estimated)"
        )


def _size(plan: Speculation) -> float:
    return float("inf") if plan.num_draft_tokens is None else plan.num_draft_tokens


def most_frequent(prompts: Sequence[Sequence[int]]) -> list[int]:
    return [token for token, _ in Counter(chain.from_iterable(prompts)).most_common()]
