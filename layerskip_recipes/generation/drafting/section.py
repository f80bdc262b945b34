"""The `self_speculation` section: its keys, their checks, and the `Speculation` that it builds."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BeforeValidator, Field
from torchtune import utils
from torchtune.modules import TiedLinear, TransformerDecoder

from layerskip_recipes.checkpoint.drafts import read_description, read_draft
from layerskip_recipes.checkpoint.weights import linear_head, quantise, quantised_bytes
from layerskip_recipes.config.components import Component, Takes
from layerskip_recipes.config.schema import PositiveInt, Section, Text
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.generation.draft_head import DraftHead
from layerskip_recipes.generation.drafting.speculation import (
    NumSpeculations,
    PromptLookup,
    Speculation,
    check_draft_vocabulary,
)
from layerskip_recipes.model.decoder import LayerSkipDecoder

log = utils.get_logger("INFO")


class SelfSpeculation(Section):
    """How tokens are drafted. The output is always that of the whole model.

    `layerskip_generate` chooses a missing `exit_layer`, `num_speculations`, `draft_vocabulary` or `draft_quantizer`, by
    the acceptance that training stored in layerskip.json and the estimated costs on this machine.
    """

    exit_layer: Annotated[int, Field(examples=[8])] | None = None
    """E: the number of layers that draft, 1 to L. With `draft`, null means the exit of that draft. Without `draft`,
    null decodes without drafts, and a missing key chooses a trained exit."""
    draft: Annotated[Text, Field(examples=["/tmp/draft/epoch_0"])] | None = None
    """A draft trained for this model, which drafts instead of the model's early layers: the checkpoint folder of a
    training with a section `draft`."""
    num_speculations: NumSpeculations = 6
    """Tokens drafted per round."""
    draft_vocabulary: Annotated[PositiveInt, Field(examples=[4096])] | list[int] | None = None
    """The tokens that can be drafted: their ids, or a number of the most frequent tokens in the training data (listed
    in layerskip.json) or else in the prompts. null: all tokens, or the draft vocabulary of `draft`."""
    draft_vocabulary_file: Annotated[Text, Field(examples=["corpus.txt"])] | None = None
    """A text file in which to count the most frequent tokens, instead of in the prompts."""
    prompt_lookup: PromptLookup | None = None
    """N of prompt look-up: drafts what followed an earlier occurrence of the last N tokens, if that is faster."""
    draft_quantizer: Annotated[Component, Takes()] | None = None
    """Quantises the layers and the head that draft (of a trained draft, its own layers). Verification stays in full
    precision."""

    def check_against(self, model: LayerSkipDecoder, key: str = "self_speculation") -> None:
        """Raise a ConfigError if the section does not fit the model; `key` names the section in messages."""
        if self.draft is not None and self.exit_layer is not None:
            raise ConfigError(
                f"{key}.exit_layer: {self.exit_layer} is set, but draft has its own exit. Set "
                f"{key}.exit_layer=null or {key}.draft=null"
            )
        vocabulary, file = self.draft_vocabulary, self.draft_vocabulary_file
        if file is not None and not isinstance(vocabulary, int):
            raise ConfigError(
                f"{key}.draft_vocabulary_file: {file!r} needs a number of tokens too, for example "
                f"{key}.draft_vocabulary=4096 {key}.draft_vocabulary_file=corpus.txt"
            )
        if file is not None and not Path(file).is_file():
            raise ConfigError(f"{key}.draft_vocabulary_file: {file!r} is not a file; for example corpus.txt")
        if self.exit_layer is not None:
            model.check_exit(self.exit_layer, f"{key}.exit_layer")
        if isinstance(vocabulary, list):
            check_draft_vocabulary(vocabulary, model, f"{key}.draft_vocabulary")

    def with_vocabulary(
        self, model: LayerSkipDecoder, tokenizer: Any, prompts: Sequence[Sequence[int]], key: str = "self_speculation"
    ) -> "SelfSpeculation":
        """The section with the exit and vocabulary of `draft`, and with token ids instead of their number.

        The most frequent tokens are counted in `prompts` or draft_vocabulary_file.
        """
        if self.draft is not None and self.exit_layer is None:
            description = read_description(self.draft, f"{key}.draft")
            read: dict[str, Any] = {"exit_layer": description.exit_layer}
            if self.draft_vocabulary is None and description.vocabulary is not None:
                check_draft_vocabulary(description.vocabulary, model, f"{key}.draft_vocabulary")
                read["draft_vocabulary"] = description.vocabulary
            return self.model_copy(update=read).with_vocabulary(model, tokenizer, prompts, key)
        if not isinstance(self.draft_vocabulary, int):
            return self
        texts = prompts
        if self.draft_vocabulary_file is not None:
            text = Path(self.draft_vocabulary_file).read_text(encoding="utf-8", errors="replace")
            texts = [tokenizer.encode(text, add_bos=False, add_eos=False)]
        counts = Counter(token for tokens in texts for token in tokens)
        vocabulary = [token for token, _ in counts.most_common(self.draft_vocabulary)]
        check_draft_vocabulary(vocabulary, model, f"{key}.draft_vocabulary")
        return self.model_copy(update={"draft_vocabulary": vocabulary})

    def own_layers(self) -> int:
        """The number of a trained draft's layers, which have their own caches."""
        return 0 if self.draft is None else read_description(self.draft, "self_speculation.draft").num_layers

    def own_weights(self, model: LayerSkipDecoder, dtype: torch.dtype) -> int:
        """Bytes of the draft's own weights (upper bound if quantised: one byte each), after `with_vocabulary`."""
        layer = sum(parameter.numel() for parameter in model.layers[0].parameters())
        rows = len(self.draft_vocabulary) if isinstance(self.draft_vocabulary, list) else 0
        count = self.own_layers() * layer + rows * model.tok_embeddings.embedding_dim
        quantised = 0
        if self.draft_quantizer is not None:
            quantised = (self.own_layers() or self.exit_layer or 0) * layer
            quantised += 0 if rows else model.tok_embeddings.weight.numel()
        return count * dtype.itemsize + quantised

    def build(self, model: LayerSkipDecoder, key: str = "self_speculation", rows: int = 1) -> Speculation:
        """The speculation for a loaded model and batches of `rows`, after `with_vocabulary`."""
        assert self.exit_layer is not None and not isinstance(self.draft_vocabulary, int)
        drafter, head, layers = None, None, range(self.exit_layer)
        if self.draft is not None:
            drafter = read_draft(self.draft, model, f"{key}.draft").decoder(model)
            layers = drafter.own_layers
        if self.draft_quantizer is not None:
            if rows > 1 and model.tok_embeddings.weight.device.type == "cuda":
                log.warning(
                    f"{key}.draft_quantizer: for several rows a GPU writes out each weight in the model's precision "
                    f"first, and drafts get slower. Faster is batch_size=1, or {key}.draft_quantizer=null"
                )
            if self.draft_vocabulary is not None:
                head = quantise(DraftHead(drafter or model, self.draft_vocabulary), self.draft_quantizer)
            drafter = quantised_drafter(drafter or model, layers, self.draft_quantizer, head is None)
        return Speculation(
            self.exit_layer, self.num_speculations, self.draft_vocabulary, self.prompt_lookup, drafter, head
        )


def _off_without_exit(value: Any) -> Any:
    off = isinstance(value, Mapping) and value.get("exit_layer", ...) is None and value.get("draft") is None
    return None if off else value


OptionalSpeculation = Annotated[SelfSpeculation | None, BeforeValidator(_off_without_exit)]


def check_draft_fits(
    section: SelfSpeculation | None,
    quantizer: Component | None,
    model: TransformerDecoder,
    parallel: int = 1,
    key: str = "self_speculation",
) -> None:
    """Raise a ConfigError for drafts that do not work with a model quantised, or split over `parallel` ranks."""
    if section is None:
        return
    packed = quantizer is not None and not isinstance(model.output, TiedLinear)
    if packed or parallel > 1:
        why = f"tensor_parallel_dim {parallel} splits" if parallel > 1 else "the quantizer packs"
        other = "tensor_parallel_dim=1" if parallel > 1 else "quantizer=null"
        name = None if section.draft_vocabulary is None else "draft_vocabulary"
        if name is None and section.draft is not None and read_description(section.draft, f"{key}.draft").vocabulary:
            name = "draft"
        if name is not None:
            raise ConfigError(
                f"{key}.{name}: has a draft vocabulary, which needs rows of the model's head, and {why} them. Set "
                f"{key}.{name}=null or {other}"
            )
    if section.draft_quantizer is not None and quantizer is not None and section.draft is None:
        raise ConfigError(
            f"{key}.draft_quantizer: has no effect with quantizer, which also packs the layers that draft. "
            "Set one of them null; for example quantizer=null"
        )


def bytes_of_weights(
    model: LayerSkipDecoder,
    whole: int,
    dtype: torch.dtype,
    quantizer: Component | None,
    drafts: Sequence[SelfSpeculation],
) -> dict[str, int]:
    """The arguments `weights` and `loaded` of `check_cache_fits`, for a model on the meta device.

    `whole` is the bytes of its weights as loaded; `drafts` are the ones in memory at the same time.
    """
    sizes = {"weights": whole if quantizer is None else quantised_bytes(model, quantizer), "loaded": whole}
    for draft in drafts:
        own = draft.own_weights(model, dtype)
        sizes["weights"] += own
        sizes["loaded"] += own if draft.draft is not None else 0  # read before the model is quantised
    return sizes


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
