"""The `self_speculation` section: what the user wrote, `auto` included. planner.py makes a plan of it."""

from typing import Annotated

from pydantic import BeforeValidator, Field

from layerskip_recipes.config.schema import AUTO, Auto, Flag, PositiveInt, Section, Text
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.generation.drafting.speculation import (
    SECTION_KEY,
    Confidence,
    NumSpeculations,
    PromptLookup,
    Speculation,
    check_draft_vocabulary,
)
from layerskip_recipes.model.decoder import LayerSkipDecoder

SPLITS = "tensor parallelism, which splits the layers that it copies"


class SelfSpeculation(Section):
    """How tokens are drafted. The output is always that of the whole model.

    `auto` keys are chosen by the acceptance that training stored in layerskip.json and the estimated costs on this
    machine. Without such a measurement they have `Speculation`'s defaults.
    """

    exit_layer: Annotated[int, Auto(), Field(examples=[8])] | None = AUTO
    """E: the number of layers that draft, 1 to L. auto: the exit of `draft`, if there is one, or else a trained exit.
    null: no layers draft, only look-ups."""
    draft: Annotated[Text, Auto(), Field(examples=["/tmp/draft/epoch_0"])] | None = AUTO
    """A draft trained for this model, which drafts instead of the model's early layers: the checkpoint folder of a
    training with a section `draft`. auto: the draft beside the model, if there is one and no exit is given; null:
    none."""
    num_speculations: Annotated[NumSpeculations, Auto()] = AUTO
    """The most tokens drafted per round. auto without a measurement: 6; of look-ups alone 8, or 15 with AMX."""
    min_confidence: Annotated[Confidence, Auto()] = AUTO
    """Ends a draft early, on a CPU and in one process: after a token at which the product of the draft's largest
    probabilities is below this, as further tokens would probably be rejected. 0: drafts always have `num_speculations`
    tokens. auto: 0.4 if that should be faster by the measured acceptance, or else 0."""
    draft_vocabulary: Annotated[PositiveInt, Auto(), Field(examples=[4096])] | list[int] | None = AUTO
    """The tokens that can be drafted: their ids, or a number of the most frequent tokens in the training data (listed
    in layerskip.json) or else in the prompts. auto: those of `draft`, or for an exit a measured number; null: all
    tokens."""
    prompt_lookup: Annotated[PromptLookup, Auto()] | None = AUTO
    """Prompt look-up: drafts what followed the longest earlier occurrence of the text's last tokens, if it has at least
    this many, where that is faster. A prompt's `prediction` is part of its text. auto: 1 for prompts with a
    `prediction`, beside `answers` and without an exit, and beside a measured exit or draft for one prompt at a time;
    null: none."""
    answers: Annotated[Text, Auto(), Field(examples=["my_data/train.jsonl"])] | None = AUTO
    """Answers in which drafts are looked up as in the text: a JSONL file with fields `input` and `output` (or an
    `output_file` of layerskip_generate), or the `answers.npz` of a checkpoint. Nothing needs to be trained. auto: the
    `answers.npz` beside the model or the draft, if there is one; null: none."""
    draft_int8: Annotated[Flag, Auto()] = AUTO
    """Draft with int8 copies of the layers and the head (for a trained draft, of its own layers); on a CPU with AVX-512
    VNNI, inputs are rounded to int8 too. Verification stays in full precision. auto: if that should be faster."""

    def check_against(self, model: LayerSkipDecoder, key: str = SECTION_KEY, parallel: int = 1) -> None:
        """Raise a ConfigError if the section does not fit the model, split over `parallel` ranks.

        `key` names the section in messages. No file is read.
        """
        given = self.given
        has_draft = given.get("draft") is not None
        if self.exit_layer is None and self.prompt_lookup is None and self.answers is None:
            raise ConfigError(
                f"{key}.exit_layer: null leaves only look-ups to draft, and prompt_lookup and answers are null. Set "
                f"{key}.prompt_lookup=1, or {key}=null to decode without drafts"
            )
        if has_draft and self.exit_layer != AUTO:
            raise ConfigError(
                f"{key}.exit_layer: {self.exit_layer} is set, but draft has its own exit. Set "
                f"{key}.exit_layer=auto or {key}.draft=null"
            )
        if isinstance(self.exit_layer, int):
            model.check_exit(self.exit_layer, f"{key}.exit_layer")
        if isinstance(self.draft_vocabulary, list):
            check_draft_vocabulary(self.draft_vocabulary, model, f"{key}.draft_vocabulary")
        if has_draft and parallel > 1:
            raise ConfigError(f"{key}.draft: does not go with {SPLITS}. Set {key}.draft=null or tensor_parallel_dim=1")
        if given.get("draft_vocabulary") is not None and parallel > 1:
            raise ConfigError(
                f"{key}.draft_vocabulary: needs rows of the head, which tensor parallelism splits. "
                f"Set {key}.draft_vocabulary=null"
            )

    def check_quantised(self, key: str = SECTION_KEY) -> None:
        """Raise a ConfigError if the section does not fit a quantised model without a trained draft."""
        if self.given.get("draft_int8"):
            raise ConfigError(
                f"{key}.draft_int8: True has no effect with quantizer, which also packs the layers that draft. "
                f"Set quantizer=null or {key}.draft_int8=false"
            )

    def resolved(self, plan: Speculation | None) -> "SelfSpeculation | None":
        """The section of its plan (None: no drafts): without `auto`, except for the exit beside a draft."""
        if plan is None:
            return None
        ids = self.draft_vocabulary
        return SelfSpeculation(
            exit_layer=plan.exit_layer if plan.draft is None else AUTO,
            draft=None if plan.draft is None else plan.draft.folder,
            num_speculations=plan.num_speculations,
            min_confidence=plan.min_confidence,
            draft_vocabulary=ids if isinstance(ids, list) else plan.num_draft_tokens,
            prompt_lookup=plan.prompt_lookup,
            answers=None if plan.answers is None else plan.answers.source,
            draft_int8=plan.draft_int8,
        )


OptionalSpeculation = Annotated[
    SelfSpeculation | None,
    Auto(),
    BeforeValidator(lambda value: {} if isinstance(value, str) and value == AUTO else value),
]
