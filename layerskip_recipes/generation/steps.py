"""The context that all steps of a generation share, and the steps of plain decoding.

The backend (backends.py) runs a step in torch, as a compiled graph, or on a CPU with its layers and heads in C++.
Shapes: b rows, n drafted tokens, v vocabulary, v' draft vocabulary, d width. A token's slot in
the KV cache is its position in the text. `start` [b] is the slot of each row's last token, `at` the slots of the tokens
that run. `slots` is 0 .. end-1, the slots that attention sees; in a graph there may be more, up to the whole cache.
"""

from collections.abc import Callable, Hashable
from typing import Any

import torch

from layerskip_recipes.generation.backends import choose_backend
from layerskip_recipes.generation.drafting.draft_weights import DraftHead
from layerskip_recipes.generation.kernels.compiling import CompiledSteps
from layerskip_recipes.generation.sampling import Sampler
from layerskip_recipes.model.changes import user_code_in
from layerskip_recipes.model.decoder import LayerSkipDecoder
from layerskip_recipes.model.kv_cache import DecodingCache
from layerskip_recipes.processes import broadcast_from_rank0


class StepContext:
    """State shared by all steps of one generation; the `backend` runs them.

    The draft decoder is the model by default, and the draft head is the draft decoder's head. `output_exit`: the exit
    whose tokens are the output; None: the last one, L. With `shared`, all ranks decode the same prompts and rank 0
    decides the tokens.
    """

    def __init__(
        self,
        model: LayerSkipDecoder,
        cache: DecodingCache,
        sampler: Sampler,
        compiled: CompiledSteps | None = None,
        draft_decoder: LayerSkipDecoder | None = None,
        draft_head: DraftHead | None = None,
        output_exit: int | None = None,
        shared: bool = False,
    ) -> None:
        self.model, self.cache, self.sampler, self.compiled = model, cache, sampler, compiled
        self.draft_decoder, self.draft_head = draft_decoder or model, draft_head
        self.trained_layers = self.draft_decoder.trained_layers
        self.output_exit = output_exit or model.num_layers
        # An adapter reads the model's early hidden states and its final states.
        self.has_adapter = self.trained_layers.start > 0
        # Verification can start from the draft's hidden states if the model's own layers computed them.
        self.shares_layers = self.draft_decoder is model or self.has_adapter
        self.shared = shared
        self.device, self.dtype = model.tok_embeddings.weight.device, model.tok_embeddings.weight.dtype
        self.sampler_tensors = sampler.tensors(self.device)
        self.vocabulary_size = model.tok_embeddings.num_embeddings
        self.before_chunk: Callable[[], None] = lambda: None  # is called before each chunk of a prompt
        self.user_code = user_code_in(model, self.draft_decoder, *([draft_head] if draft_head else []))
        self.backend = choose_backend(self, self.user_code)

    def forget_stale_tokens(self) -> None:
        """Forget the cache's tokens that other weights or another kind of backend computed."""
        self.cache.forget_other_weights(self.model, self.draft_decoder, self.user_code is not None, self.shared)
        if self.cache.exact_splits != self.backend.exact_splits:  # C++ and torch round differently
            self.cache.keep_first(0)
            self.cache.exact_splits = self.backend.exact_splits

    @property
    def compile_s(self) -> float:
        """Seconds that compilation took so far, in all generations of this model."""
        return self.compiled.seconds if self.compiled else 0.0

    def broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        return broadcast_from_rank0(tensor) if self.shared else tensor

    # ---- pieces of steps ----

    def scores(self, logits: torch.Tensor, seen: torch.Tensor | None) -> torch.Tensor:
        return self.sampler.scores(logits, seen, self.sampler_tensors)

    def read_by_draft(
        self,
        x: torch.Tensor,
        last_states: torch.Tensor | None,
        at: torch.Tensor,
        slots: torch.Tensor,
        only_cache: bool = False,
    ) -> torch.Tensor:
        """The hidden state for the draft's head: x_E [b, s, d], or the adapter's output.

        `last_states` [b, s, d] are the normed states of the previous tokens for an adapter; None without an adapter.
        """
        if last_states is None:
            return x
        both = torch.cat([x, last_states], -1)
        return self.backend.run(self.draft_decoder, both, at, slots, self.trained_layers, only_cache=only_cache)

    def draft_scores(self, x: torch.Tensor, seen: torch.Tensor | None) -> torch.Tensor:
        """The sampler's scores for the draft: x [b, s, d], seen [b, s or 1, v] -> [b, s, v']."""
        logits = self.backend.logits(self.draft_head or self.draft_decoder, x)
        if self.draft_head is not None and seen is not None:
            seen = seen[..., self.draft_head.vocabulary]
        return self.scores(logits, seen)

    @staticmethod
    def seen_at(seen: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """The tokens `seen` in the text [b, v], and those of `tokens` [b, k] up to each position -> bool [b, k, v]."""
        counts = torch.zeros(*tokens.shape, seen.shape[-1], device=seen.device)
        return seen[:, None] | (counts.scatter_(2, tokens[..., None], 1).cumsum(1) > 0)


class Step:
    """`function(context, *constants, slots, *tensors)`, which the context's backend calls.

    The function returns tensors and never reads their values on the host. `constants` become constants of a graph.
    `slots` is None without attention. `layers`: it runs layers or writes to the cache; `samples`: it uses the sampler.
    """

    def __init__(
        self,
        context: StepContext,
        function: Callable,
        *constants: Hashable,
        layers: bool = True,
        samples: bool = True,
    ) -> None:
        self.context, self.function, self.constants = context, function, constants
        self.layers, self.samples = layers, samples

    def __call__(self, slots: torch.Tensor | None, *args: torch.Tensor | None) -> Any:
        return self.context.backend.call(self, slots, *args)

    def run(self, slots: torch.Tensor | None, *args: torch.Tensor | None) -> Any:
        """Call the function as it is."""
        return self.function(self.context, *self.constants, slots, *args)


# ---- the steps of plain decoding ----


def next_logits(context: StepContext, exit_layer: int, slots, last, start):
    """Logits of each row's next token from exit E; last, start [b] -> [b, v]."""
    backend, layers = context.backend, range(exit_layer)
    return backend.run(context.model, last[:, None], start[:, None], slots, layers, unembed=True)[:, -1]


def choose_token(context: StepContext, slots, logits, keys, positions, seen):
    """A token for each row at `positions` [b] of its text; logits, seen [b, v], keys [b, 2] (None if greedy) -> [b]."""
    return context.backend.choose_tokens(context.scores(logits, seen)[:, None], keys, positions[:, None])[:, 0]
