"""`ModelState`: what the generations of one model share, so that later ones do no work again."""

import threading
from collections.abc import Hashable
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from torch import nn
from torchtune.modules import TransformerDecoder

from layerskip_recipes.checkpoint.drafts import DraftDescription, read_draft
from layerskip_recipes.generation.drafting.draft_weights import DraftHead, DraftWeights, draft_weights, renewed
from layerskip_recipes.generation.drafting.drafter import longest_draft
from layerskip_recipes.generation.drafting.rule import DraftRule
from layerskip_recipes.generation.drafting.speculation import SECTION_KEY, Speculation
from layerskip_recipes.generation.kernels.compiling import CompiledSteps
from layerskip_recipes.model.changes import weights_key
from layerskip_recipes.model.decoder import LayerSkipDecoder
from layerskip_recipes.model.draft import Draft

MOST_DRAFTS = 2  # draft weights that are kept for a model without an `LLM`: those of the last plans


@dataclass
class BuiltDraft:
    """The weights that draft by a plan, and the key of the model's weights that they come from."""

    decoder: LayerSkipDecoder | None  # None: the model itself, which a state must not keep alive
    head: DraftHead | None
    source: Hashable


class ModelState:
    """The compiled steps of a model and their caches, the weights that draft, and the rules of when to draft.

    `most`: how many draft weights are kept; None: all.
    """

    def __init__(self, most: int | None = None) -> None:
        self.most = most
        self.trained_drafts: dict[str, Draft] = {}  # that have been read, by folder
        self.in_use = threading.Lock()  # held by the generation that decodes; a second one is refused
        self.compiled: CompiledSteps | None = None
        self.drafts: dict[Hashable, BuiltDraft] = {}  # the last used one last
        self.rules: dict[Hashable, DraftRule] = {}
        # Around a plain decoder: its modules, and our decoder.
        self.around: tuple[list[nn.Module], LayerSkipDecoder] | None = None

    def decoder(self, model: TransformerDecoder) -> LayerSkipDecoder:
        """The model itself, or the `LayerSkipDecoder` around a plain decoder, the same at each call."""
        if isinstance(model, LayerSkipDecoder):
            return model
        modules = [model.tok_embeddings, model.layers, model.norm, model.output]
        if self.around is None or any(a is not b for a, b in zip(self.around[0], modules, strict=True)):
            self.around = modules, LayerSkipDecoder(model)
        decoder = self.around[1]
        decoder.training = model.training
        return decoder

    def compiled_steps(self, model: LayerSkipDecoder) -> CompiledSteps:
        """The compiled steps of the model; new ones if it has moved, or if its weights are of another kind."""
        device = model.tok_embeddings.weight.device
        weight_types = tuple((name, type(p), p.dtype, p.shape) for name, p in model.named_parameters())
        if self.compiled is None or (self.compiled.device, self.compiled.weights) != (device, weight_types):
            self.compiled = CompiledSteps(device, weight_types)
        return self.compiled

    def draft_weights(self, plan: Speculation, model: LayerSkipDecoder, key: str = SECTION_KEY) -> DraftWeights:
        """What drafts by a plan; `key` names the plan's section in messages. Plans with the same weights share them.

        If the model's weights have changed, heads and int8 copies of layers get their numbers.
        """
        source = weights_key(model.parameters()) if plan.draft_int8 or plan.draft_vocabulary is not None else None
        built = self.drafts.pop(plan.weights_key, None)
        copies_changed = built is not None and built.source != source and plan.draft_int8 and plan.draft is None
        if built is None or copies_changed:
            trained = None if plan.draft is None else self.trained_draft(plan.draft, model, f"{key}.draft")
            decoder, head = draft_weights(plan, model, trained, key)
            if built is not None:
                decoder, head = renewed((built.decoder or model, built.head), (decoder, head))
            built = BuiltDraft(None if decoder is model else decoder, head, source)
        elif built.source != source and built.head is not None:
            built.head.refresh(built.decoder or model)
            built.source = source
        while self.most is not None and len(self.drafts) >= self.most:
            del self.drafts[next(iter(self.drafts))]  # the oldest
        self.drafts[plan.weights_key] = built
        return built.decoder or model, built.head

    def trained_draft(self, description: DraftDescription, model: LayerSkipDecoder, key: str) -> Draft:
        """A trained draft of the model, which is read once. `key` names it in messages."""
        if description.folder not in self.trained_drafts:
            self.trained_drafts[description.folder] = read_draft(description, model, key)
        return self.trained_drafts[description.folder]

    def rule(self, plan: Speculation, max_new_tokens: int, batch_rows: int, compiled: bool) -> DraftRule:
        """The rule of earlier generations whose rounds cost the same."""
        length = longest_draft(plan.num_speculations, max_new_tokens)
        return self.rules.setdefault((plan.rule_key, length, batch_rows, compiled), DraftRule())


# The states of models that callers pass to `generate` and `Generation`. These callers hold a model and no object of
# ours, and a second call must not compile the model again.
_STATES: WeakKeyDictionary[TransformerDecoder, ModelState] = WeakKeyDictionary()


def state_of(model: TransformerDecoder) -> ModelState:
    return _STATES.setdefault(model, ModelState(most=MOST_DRAFTS))
