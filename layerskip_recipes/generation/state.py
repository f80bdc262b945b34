"""`ModelState`: what the generations of one model share, so that later ones do no work again."""

import threading
from collections.abc import Hashable
from weakref import WeakKeyDictionary

from torch import nn
from torchtune.modules import TransformerDecoder

from layerskip_recipes.generation.drafting.draft_weights import DraftHead, DraftWeights, draft_weights
from layerskip_recipes.generation.drafting.drafter import longest_draft
from layerskip_recipes.generation.drafting.rule import DraftRule
from layerskip_recipes.generation.drafting.speculation import KEY, Speculation
from layerskip_recipes.generation.kernels.compiling import CompiledSteps
from layerskip_recipes.model.decoder import LayerSkipDecoder
from layerskip_recipes.model.draft import Draft


class ModelState:
    """The compiled steps of a model and their caches, the weights that draft, and the rules of when to draft.

    `trained_draft`: the draft of all plans with a draft, if it has been read.
    """

    def __init__(self, trained_draft: Draft | None = None) -> None:
        self.trained_draft = trained_draft
        self.in_use = threading.Lock()  # held by the generation that decodes; a second one is refused
        self.compiled: CompiledSteps | None = None
        self.weights: dict[Hashable, tuple[LayerSkipDecoder | None, DraftHead | None]] = {}  # None: the model's layers
        self.rules: dict[Hashable, DraftRule] = {}
        self.around: tuple[list[nn.Module], LayerSkipDecoder] | None = (
            None  # a plain decoder's modules, and its wrapper
        )

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
        kinds = tuple((name, type(p), p.dtype, p.shape) for name, p in model.named_parameters())
        if self.compiled is None or (self.compiled.device, self.compiled.weights) != (device, kinds):
            self.compiled = CompiledSteps(device, kinds)
        return self.compiled

    def draft_weights(self, plan: Speculation, model: LayerSkipDecoder, key: str = KEY) -> DraftWeights:
        """What drafts by a plan; `key` names the plan's section in messages. Plans with the same weights share them."""
        if plan.weights_key in self.weights:
            decoder, head = self.weights[plan.weights_key]
            if head is not None:
                head.refresh(decoder or model)
        else:
            decoder, head = draft_weights(plan, model, self.trained_draft, key)
            # Not the model itself: a state must not keep its model alive.
            self.weights[plan.weights_key] = (None if decoder is model else decoder), head
        return decoder or model, head

    def rule(self, plan: Speculation, max_new_tokens: int, batch_rows: int, compiled: bool) -> DraftRule:
        """The rule of earlier generations whose rounds cost the same."""
        length = longest_draft(plan.num_speculations, max_new_tokens)
        return self.rules.setdefault((plan.rule_key, length, batch_rows, compiled), DraftRule())


# The states of models that callers pass to `generate` and `Generation`. These callers hold a model and no object of
# ours, and a second call must not compile the model again.
_STATES: WeakKeyDictionary[TransformerDecoder, ModelState] = WeakKeyDictionary()


def state_of(model: TransformerDecoder) -> ModelState:
    return _STATES.setdefault(model, ModelState())
