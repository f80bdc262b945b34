"""The `self_speculation` section: its keys, their checks, and the `Speculation` that it builds."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated, Any

import torch
from pydantic import BeforeValidator, Field
from torchtune.modules import TiedLinear

from layerskip_recipes.checkpoint.drafts import read_description, read_draft
from layerskip_recipes.checkpoint.weights import linear_head, quantise, quantised_bytes
from layerskip_recipes.config.components import Component
from layerskip_recipes.config.schema import AUTO, Auto, Flag, PositiveInt, Section, Text
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.generation.drafting.draft_head import DraftHead
from layerskip_recipes.generation.drafting.speculation import (
    Confidence,
    NumSpeculations,
    PromptLookup,
    Speculation,
    check_draft_vocabulary,
)
from layerskip_recipes.model.decoder import LayerSkipDecoder
from layerskip_recipes.model.draft import Draft
from layerskip_recipes.model.memory import check_cache_fits, row_bytes

# What `auto` means where nothing was measured.
PLAIN: dict[str, Any] = {
    "draft": None,
    "num_speculations": 6,
    "min_confidence": 0.0,
    "draft_vocabulary": None,
    "prompt_lookup": None,
    "draft_int8": False,
}


class SelfSpeculation(Section):
    """How tokens are drafted. The output is always that of the whole model.

    `auto` keys are chosen by the acceptance that training stored in layerskip.json and the estimated costs on this
    machine. Without such a measurement they have plain values.
    """

    exit_layer: Annotated[int, Auto(), Field(examples=[8])] = AUTO
    """E: the number of layers that draft, 1 to L. auto: the exit of `draft`, if there is one, or else a trained exit.
    With `prompt_lookup`, L means look-ups alone."""
    draft: Annotated[Text, Auto(), Field(examples=["/tmp/draft/epoch_0"])] | None = AUTO
    """A draft trained for this model, which drafts instead of the model's early layers: the checkpoint folder of a
    training with a section `draft`. auto: the draft beside the model, if there is one and no exit is given; null:
    none."""
    num_speculations: Annotated[NumSpeculations, Auto()] = AUTO
    """The most tokens drafted per round. Plain value: 6."""
    min_confidence: Annotated[Confidence, Auto()] = AUTO
    """Ends a draft early, on a CPU and in one process: after a token at which the product of the draft's largest
    probabilities is below this, as further tokens would probably be rejected. 0: drafts always have `num_speculations`
    tokens. auto: 0.4 if that should be faster by the measured acceptance, or else 0."""
    draft_vocabulary: Annotated[PositiveInt, Auto(), Field(examples=[4096])] | list[int] | None = AUTO
    """The tokens that can be drafted: their ids, or a number of the most frequent tokens in the training data (listed
    in layerskip.json) or else in the prompts. auto: those of `draft`, or for an exit a measured number; null: all
    tokens."""
    prompt_lookup: Annotated[PromptLookup, Auto()] | None = AUTO
    """N of prompt look-up: drafts what followed an earlier occurrence of the last N tokens, where that is faster. auto:
    3 beside a measured exit or draft, for one prompt at a time; null: no look-ups."""
    draft_int8: Annotated[Flag, Auto()] = AUTO
    """Draft with int8 copies of the layers and the head (for a trained draft, of its own layers). Verification stays
    in full precision. auto: if that should be faster."""

    def settled(self) -> "SelfSpeculation":
        """The section with plain values in place of `auto`, except for the exit; those of `draft` stay."""
        own = () if self.draft in (None, AUTO) else ("draft_vocabulary",)
        plain = {name: PLAIN[name] for name in PLAIN if getattr(self, name) == AUTO and name not in own}
        return self.model_copy(update=plain)

    @property
    def is_open(self) -> bool:
        """Whether something is left to choose."""
        return any(value == AUTO and (name != "exit_layer" or self.draft is None) for name, value in self)

    def check_against(
        self,
        model: LayerSkipDecoder,
        key: str = "self_speculation",
        quantizer: Component | None = None,
        parallel: int = 1,
    ) -> None:
        """Raise a ConfigError if the section does not fit the model, quantised or split over `parallel` ranks.

        `key` names the section in messages.
        """
        given = self.settled()
        if given.draft is not None and self.exit_layer != AUTO:
            raise ConfigError(
                f"{key}.exit_layer: {self.exit_layer} is set, but draft has its own exit. Set "
                f"{key}.exit_layer=auto or {key}.draft=null"
            )
        if self.exit_layer != AUTO:
            model.check_exit(self.exit_layer, f"{key}.exit_layer")
        if isinstance(self.draft_vocabulary, list):
            check_draft_vocabulary(self.draft_vocabulary, model, f"{key}.draft_vocabulary")
        if quantizer is not None and given.draft_int8 and given.draft is None:
            raise ConfigError(
                f"{key}.draft_int8: True has no effect with quantizer, which also packs the layers that draft. "
                f"Set quantizer=null or {key}.draft_int8=false"
            )
        if given.draft is not None and parallel > 1:
            raise ConfigError(
                f"{key}.draft: does not go with tensor parallelism, which splits the layers that it copies. Set "
                f"{key}.draft=null or tensor_parallel_dim=1"
            )
        # A draft vocabulary needs rows of the head; a tied one is the embedding, which no quantizer packs.
        packed, split = quantizer is not None and not isinstance(model.output, TiedLinear), parallel > 1
        vocabulary, name = given.draft_vocabulary, "draft_vocabulary"
        if (packed or split) and vocabulary == AUTO:
            vocabulary, name = read_description(str(given.draft), f"{key}.draft").vocabulary, "draft"
        if (packed or split) and vocabulary:
            other, how = (
                ("tensor_parallel_dim=1", "tensor parallelism splits")
                if split
                else ("quantizer=null", "quantizer packs")
            )
            raise ConfigError(
                f"{key}.{name}: has a draft vocabulary, which needs rows of the head, and {how} them. Set "
                f"{key}.{name}=null or {other}"
            )

    def with_vocabulary(
        self,
        model: LayerSkipDecoder,
        prompts: Sequence[Sequence[int]],
        stored: Sequence[int] | None = None,
        key: str = "self_speculation",
    ) -> "SelfSpeculation":
        """The settled section with the exit of `draft`, and with token ids instead of their number.

        These are the tokens of the draft, if it has as many, or the first of `stored`, or the most frequent ones in the
        prompts.
        """
        section = self.settled()
        changes: dict[str, Any] = {}
        vocabulary = section.draft_vocabulary
        if section.draft is not None:
            description = read_description(section.draft, f"{key}.draft")
            changes["exit_layer"] = description.exit_layer
            own = description.vocabulary
            vocabulary = own if vocabulary in (AUTO, own and len(own)) else vocabulary
        if isinstance(vocabulary, int) and not (stored or prompts):
            raise ConfigError(
                f"{key}.draft_vocabulary: {vocabulary} tokens are counted in the prompts, and a conversation has none "
                f"yet. Set {key}.draft_vocabulary=null"
            )
        if isinstance(vocabulary, int):
            counts = Counter(token for prompt in prompts for token in prompt)
            vocabulary = list((stored or [token for token, _ in counts.most_common()])[:vocabulary])
        if vocabulary is not None:
            check_draft_vocabulary(vocabulary, model, f"{key}.draft_vocabulary")
        return section.model_copy(update=changes | {"draft_vocabulary": vocabulary})

    def only_looks_up(self, num_layers: int) -> bool:
        """Whether look-ups draft alone, as the exit is the whole model."""
        given = self.settled()
        own = given.draft is not None or given.draft_int8
        return given.prompt_lookup is not None and self.exit_layer == num_layers and not own

    def own_layers(self) -> int:
        """The number of a trained draft's layers, which have their own caches."""
        return 0 if self.draft is None else read_description(self.draft, "self_speculation.draft").num_layers

    def own_weights(self, model: LayerSkipDecoder, dtype: torch.dtype) -> int:
        """Bytes of the draft's own weights, after `with_vocabulary`; int8 copies are one byte for each weight."""
        layer = sum(parameter.numel() for parameter in model.layers[0].parameters())
        rows = len(self.draft_vocabulary) if isinstance(self.draft_vocabulary, list) else 0
        count = self.own_layers() * layer + rows * model.tok_embeddings.embedding_dim
        quantised = 0
        if self.draft_int8:
            quantised = (self.own_layers() or self.exit_layer) * layer
            quantised += 0 if rows else model.tok_embeddings.weight.numel()
        return count * dtype.itemsize + quantised

    def layers_of_model(self) -> int:
        """The number of the model's first layers that draft, after `with_vocabulary`; 0 if a trained copy drafts."""
        if self.draft is not None and read_description(self.draft, "self_speculation.draft").kind == "copy":
            return 0
        return self.exit_layer

    def build(
        self, model: LayerSkipDecoder, key: str = "self_speculation", trained: Draft | None = None
    ) -> Speculation:
        """The speculation for a loaded model, after `with_vocabulary`; `trained` is the draft of `draft`, if read."""
        assert self.exit_layer != AUTO and not isinstance(self.draft_vocabulary, int)
        drafter, head, layers = None, None, range(self.exit_layer)
        if self.draft is not None:
            drafter = (trained or read_draft(self.draft, model, f"{key}.draft")).decoder(model)
            layers = drafter.own_layers
        if self.draft_vocabulary is not None:
            head = DraftHead(drafter or model, self.draft_vocabulary)
        if self.draft_int8:
            int8 = Component({"_component_": "torchao.quantization.Int8WeightOnlyConfig"}, f"{key}.draft_int8")
            head = None if head is None else quantise(head, int8)
            drafter = quantised_drafter(drafter or model, layers, int8, head is None)
        return Speculation(
            self.exit_layer,
            self.num_speculations,
            draft_vocabulary=self.draft_vocabulary,
            prompt_lookup=self.prompt_lookup,
            min_confidence=self.min_confidence,
            drafter=drafter,
            draft_head=head,
        )


def build_all(
    sections: Mapping[str, SelfSpeculation],
    model: LayerSkipDecoder,
    key_of: Callable[[str], str],
    trained: Draft | None = None,
    built: dict[Any, Speculation] | None = None,
) -> dict[str, Speculation]:
    """Build speculations for a loaded model, by name. Those that draft with the same weights share them.

    `trained`: the draft of the sections, if it has been read. `built`: of earlier calls, which share weights too.
    """
    built = {} if built is None else built
    result: dict[str, Speculation] = {}
    for name, section in sections.items():
        weights = (section.draft, section.exit_layer, str(section.draft_vocabulary), section.draft_int8)
        if weights not in built:
            built[weights] = section.build(model, key_of(name), trained)
        own = {key: getattr(section, key) for key in ("num_speculations", "prompt_lookup", "min_confidence")}
        result[name] = replace(built[weights], **own)
    return result


OptionalSpeculation = Annotated[
    SelfSpeculation | None,
    Auto(),
    BeforeValidator(lambda value: {} if isinstance(value, str) and value == AUTO else value),
]


def check_memory(
    cfg: Any,
    model: LayerSkipDecoder,
    device: torch.device,
    drafts: Sequence[SelfSpeculation],
    whole: int,
    rows: int,
    slots: int,
    second_cache: bool,
    **sizes: int,
) -> None:
    """Check that a model on the meta device (its weights are `whole` bytes as loaded), its drafts and `rows` batch rows
    fit into the memory; `sizes` are arguments of `row_bytes`. `second_cache`: beside a trained draft, plain decoding
    has a cache of its own, without the draft's layers."""
    own = [draft.own_weights(model, cfg.torch_dtype) for draft in drafts]
    # Trained drafts are read before the model is quantised.
    loaded = whole + sum(size for draft, size in zip(drafts, own, strict=True) if draft.draft is not None)
    weights = sum(own) + (whole if cfg.quantizer is None else quantised_bytes(model, cfg.quantizer))
    own_layers = max((draft.own_layers() for draft in drafts), default=0)
    sizes["draft_layers"] = own_layers + (len(model.layers) if own_layers and second_cache else 0)
    bytes_of = partial(row_bytes, model, dtype=cfg.torch_dtype, **sizes)
    check_cache_fits(rows, slots, bytes_of, device, weights, loaded)


def quantised_drafter(
    model: LayerSkipDecoder, layers: range, quantizer: Component, with_head: bool = True
) -> LayerSkipDecoder:
    """The model's first layers and its head, with quantised copies of `layers` and, `with_head`, of the head."""
    parts = model.copied_layers(layers)
    if with_head:
        parts.append(linear_head(model))
    packed = quantise(torch.nn.ModuleList(parts), quantizer)
    drafter = model.with_modules(layers=torch.nn.ModuleList([*model.layers[: layers.start], *packed[: len(layers)]]))
    return drafter.with_modules(output=packed[len(layers)]) if with_head else drafter
