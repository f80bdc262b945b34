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
from layerskip_recipes.config.schema import Flag, PositiveInt, Section, Text
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.generation.draft_head import DraftHead
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


class SelfSpeculation(Section):
    """How tokens are drafted. The output is always that of the whole model.

    `layerskip_generate` chooses missing keys by the acceptance that training stored in layerskip.json and the estimated
    costs on this machine.
    """

    exit_layer: Annotated[int, Field(examples=[8])] | None = None
    """E: the number of layers that draft, 1 to L. With `draft`, null means the exit of that draft. Without `draft`,
    null decodes without drafts, and a missing key chooses the draft beside the model, or else a trained exit. With
    `prompt_lookup`, L means look-ups alone."""
    draft: Annotated[Text, Field(examples=["/tmp/draft/epoch_0"])] | None = None
    """A draft trained for this model, which drafts instead of the model's early layers: the checkpoint folder of a
    training with a section `draft`. Where the recipe chooses, a missing key means the draft beside the model, if there
    is one; null: none."""
    num_speculations: NumSpeculations = 6
    """The most tokens drafted per round."""
    min_confidence: Confidence = 0.0
    """Ends a draft early, on a CPU and in one process: after a token at which the product of the draft's largest
    probabilities is below this, as further tokens would probably be rejected. 0: drafts always have `num_speculations`
    tokens. Where the recipe chooses, a missing key means 0.4 if that should be faster by the measured acceptance."""
    draft_vocabulary: Annotated[PositiveInt, Field(examples=[4096])] | list[int] | None = None
    """The tokens that can be drafted: their ids, or a number of the most frequent tokens in the training data (listed
    in layerskip.json) or else in the prompts. null: all tokens, or the draft vocabulary of `draft`."""
    prompt_lookup: PromptLookup | None = None
    """N of prompt look-up: drafts what followed an earlier occurrence of the last N tokens, where that is faster. Where
    the recipe chooses an exit or a draft for one prompt at a time, a missing key means 3."""
    draft_int8: Flag = False
    """Draft with int8 copies of the layers and the head (for a trained draft, of its own layers). Verification stays
    in full precision. Where the recipe chooses, a missing key means true if that should be faster."""

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
        if self.draft is not None and self.exit_layer is not None:
            raise ConfigError(
                f"{key}.exit_layer: {self.exit_layer} is set, but draft has its own exit. Set "
                f"{key}.exit_layer=null or {key}.draft=null"
            )
        if self.exit_layer is not None:
            model.check_exit(self.exit_layer, f"{key}.exit_layer")
        if isinstance(self.draft_vocabulary, list):
            check_draft_vocabulary(self.draft_vocabulary, model, f"{key}.draft_vocabulary")
        if quantizer is not None and self.draft_int8 and self.draft is None:
            raise ConfigError(
                f"{key}.draft_int8: True has no effect with quantizer, which also packs the layers that draft. "
                f"Set quantizer=null or {key}.draft_int8=false"
            )
        if self.draft is not None and parallel > 1:
            raise ConfigError(
                f"{key}.draft: does not go with tensor parallelism, which splits the layers that it copies. Set "
                f"{key}.draft=null or tensor_parallel_dim=1"
            )
        # A draft vocabulary needs rows of the head; a tied one is the embedding, which no quantizer packs.
        packed, split = quantizer is not None and not isinstance(model.output, TiedLinear), parallel > 1
        if (packed or split) and (
            self.draft_vocabulary or (self.draft and read_description(self.draft, f"{key}.draft").vocabulary)
        ):
            name = "draft" if self.draft_vocabulary is None else "draft_vocabulary"
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
        self, model: LayerSkipDecoder, prompts: Sequence[Sequence[int]], key: str = "self_speculation"
    ) -> "SelfSpeculation":
        """The section with the exit and vocabulary of `draft`, and with the most frequent tokens of the prompts instead
        of their number."""
        changes: dict[str, Any] = {}
        vocabulary = self.draft_vocabulary
        if self.draft is not None and self.exit_layer is None:
            description = read_description(self.draft, f"{key}.draft")
            changes["exit_layer"] = description.exit_layer
            vocabulary = description.vocabulary if vocabulary is None else vocabulary
        if isinstance(vocabulary, int):
            counts = Counter(token for prompt in prompts for token in prompt)
            vocabulary = [token for token, _ in counts.most_common(vocabulary)]
        if vocabulary != self.draft_vocabulary:
            check_draft_vocabulary(vocabulary or [], model, f"{key}.draft_vocabulary")
            changes["draft_vocabulary"] = vocabulary
        return self.model_copy(update=changes)

    def only_looks_up(self, num_layers: int) -> bool:
        """Whether look-ups draft alone, as the exit is the whole model."""
        own = self.draft is not None or self.draft_int8
        return self.prompt_lookup is not None and self.exit_layer == num_layers and not own

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
            quantised = (self.own_layers() or self.exit_layer or 0) * layer
            quantised += 0 if rows else model.tok_embeddings.weight.numel()
        return count * dtype.itemsize + quantised

    def layers_of_model(self) -> int:
        """The number of the model's first layers that draft, after `with_vocabulary`; 0 if a trained copy drafts."""
        if self.draft is not None and read_description(self.draft, "self_speculation.draft").kind == "copy":
            return 0
        return self.exit_layer or 0

    def build(
        self, model: LayerSkipDecoder, key: str = "self_speculation", trained: Draft | None = None
    ) -> Speculation:
        """The speculation for a loaded model, after `with_vocabulary`; `trained` is the draft of `draft`, if read."""
        assert self.exit_layer is not None and not isinstance(self.draft_vocabulary, int)
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


def _off_without_exit(value: Any) -> Any:
    off = isinstance(value, Mapping) and value.get("exit_layer", ...) is None and value.get("draft") is None
    return None if off else value


OptionalSpeculation = Annotated[SelfSpeculation | None, BeforeValidator(_off_without_exit)]


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
