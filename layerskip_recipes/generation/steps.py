"""What one step of decoding computes, in tensors only, and what its compiled graph depends on.

A compiled step is one graph (kernels/compiling.py); on a CPU its layers and heads run in C++ (kernels/cpp_decoder.py).
Here are the context that all steps of a generation share and the steps of plain decoding; those of drafts and of their
verification are in drafting/chain.py.

Shapes: b rows, n drafted tokens, v vocabulary, v' draft vocabulary, d width.
`start` [b] is the slot of each row's last token, the root of the draft; `slots` is 0 .. end-1, what attention sees, and
in a graph some more, up to the whole cache.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torchtune.utils import get_logger
from torchtune.utils._logging import log_once

from layerskip_recipes.generation.draft_head import DraftHead
from layerskip_recipes.generation.kernels.compiling import CompiledSteps
from layerskip_recipes.generation.kernels.cpp_decoder import CppDecoder, UnknownPartError
from layerskip_recipes.generation.sampling import Sampler
from layerskip_recipes.model.decoder import LayerSkipDecoder, is_plain_attention
from layerskip_recipes.model.kv_cache import BLOCK, BlockAttention, DecodingCache, causal_mask
from layerskip_recipes.processes import broadcast_from_rank0

log = get_logger("INFO")


class StepContext:
    """What all steps of one generation share.

    Args:
        model: the decoder.
        cache: its cache, of b rows.
        sampler: how tokens are chosen.
        compiled: the compiled steps of the model; None: steps run as they are.
        draft_model: whose early layers and head draft. If its early layers are the model's own, verification goes on
            from their hidden states; else it runs all layers of the model.
        draft_head: the head of drafts; None: that of the draft model.
        shared: all ranks of torchrun decode the same, and rank 0 says what came out.

    Attributes:
        cpp: the layers and heads in C++, from `load_cpp` on; None: steps do not run in C++.
        graphs: `compiled`, if steps run as graphs.
        fits_flex: graphs may have FlexAttention over the whole cache in place of masks, see `BlockAttention`.
    """

    def __init__(
        self,
        model: LayerSkipDecoder,
        cache: DecodingCache,
        sampler: Sampler,
        compiled: CompiledSteps | None = None,
        draft_model: LayerSkipDecoder | None = None,
        draft_head: DraftHead | None = None,
        shared: bool = False,
    ) -> None:
        self.model, self.cache, self.sampler, self.compiled = model, cache, sampler, compiled
        self.draft_model, self.draft_head = draft_model or model, draft_head
        self.own_layers = self.draft_model.own_layers
        # An adapter goes on from the model's first layers, and from its last states.
        self.has_adapter = self.own_layers.start > 0
        # Verification goes on from the draft's hidden states if they are the model's.
        self.shares_layers = self.draft_model is model or self.has_adapter
        self.shared = shared
        self.device, self.dtype = model.tok_embeddings.weight.device, model.tok_embeddings.weight.dtype
        self.settings = sampler.settings(self.device)
        self.vocabulary_size = model.tok_embeddings.num_embeddings
        self.last_position = model.max_seq_len - 1
        self._in_cpp = self._decoder_in_cpp()
        self.cpp: CppDecoder | None = None
        self.graphs = None if self._in_cpp else compiled
        # FlexAttention's kernel needs heads of at least 16 numbers, and whole blocks of the cache.
        layers = [*model.layers, *self.draft_model.layers]
        plain = all(is_plain_attention(layer) and layer.attn.head_dim >= 16 for layer in layers)
        on_gpu = self.graphs is not None and self.graphs.device.type == "cuda"
        self.fits_flex = on_gpu and plain and cache.max_len % BLOCK == 0
        # What the graphs depend on: of steps that run layers, and of steps that choose tokens.
        self.layers_key = (cache.max_len, cache.draft_layers, self.draft_model is model or self.draft_model)
        self.choice_key = (sampler.kind, draft_head and len(draft_head.vocabulary))

    @property
    def compile_s(self) -> float:
        """Seconds that compilation took so far, in all generations of this model."""
        return self.compiled.seconds if self.compiled else 0.0

    def _decoder_in_cpp(self) -> CppDecoder | None:
        if self.compiled is None or self.compiled.failed or self.device.type != "cpu":
            return None
        try:
            return CppDecoder(self.cache, self.model, self.draft_model, self.draft_head)
        except UnknownPartError as e:
            log_once(log, f"compile: steps become graphs, as the C++ does not know a part of the model ({e})")
            return None

    @property
    def has_cpp(self) -> bool:
        """Whether there is C++ for the models, see `load_cpp`."""
        return self._in_cpp is not None

    def load_cpp(self, depth: int | None = None) -> bool:
        """Let steps run in C++ from here on, if they can.

        Args:
            depth: how many layers are going to read the text; None: it has been read, and they have their caches.

        Returns:
            Whether they do.
        """
        if self.cpp is None and self._in_cpp is not None and self.compiled.prepare(self._in_cpp.compile):
            if depth is not None:
                self.allocate(depth)
            self._in_cpp.load()
            self.cpp = self._in_cpp
        return self.cpp is not None

    def allocate(self, depth: int) -> None:
        """Make the caches of the layers that read the text."""
        self.cache.allocate(self.model, depth)
        self.cache.allocate(self.draft_model, self.own_layers.stop)

    def begin_round(self) -> None:
        """The results of the last round's graphs are no longer needed."""
        if self.graphs is not None:
            self.graphs.begin_round()

    def noise(self) -> torch.Tensor | None:
        """Noise of the model's choice in each row, [b, v]; None when greedy."""
        return self.sampler.noise((self.cache.rows, self.vocabulary_size), self.device)

    def draft_noise(self, depth: int) -> torch.Tensor | None:
        """Noise of `depth` choices of the draft, [b, depth, v']; None when greedy."""
        size = self.vocabulary_size if self.draft_head is None else len(self.draft_head.vocabulary)
        return self.sampler.noise((self.cache.rows, depth, size), self.device)

    def broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        """Rank 0's tensor on all ranks."""
        return broadcast_from_rank0(tensor) if self.shared else tensor

    # ---- pieces of steps ----

    def run(
        self,
        model: LayerSkipDecoder,
        tokens: torch.Tensor | None,
        at: torch.Tensor,
        slots: torch.Tensor,
        *,
        hidden: torch.Tensor | None = None,
        start_layer: int = 0,
        exit_layer: int | None = None,
        unembed: bool = True,
        rows: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """Run layers over tokens, or over x_{start_layer} of them, that stand at the slots `at` [b, s].

        In C++ they may be those of some rows of the cache only.
        """
        if self.cpp is not None:
            layers = range(start_layer, model.num_layers if exit_layer is None else exit_layer)
            x: Any = tokens if hidden is None else hidden
            x = self.cpp.run(model, x, at, slots.shape[0], layers, rows)
            return self.cpp.logits(model, x) if unembed else x
        self.cache.seek(at, slots.shape[0])
        mask: Any
        if torch.compiler.is_compiling() and self.fits_flex and len(slots) == self.cache.max_len:
            mask = BlockAttention(at, len(slots))
        else:
            mask = causal_mask(at, slots, self.dtype)
        # Drafts beyond a row's limit are cut later; any position that the model knows will do for them.
        at = at.clamp(max=self.last_position)
        part: Any = {"start_layer": start_layer, "exit_layer": exit_layer, "unembed": unembed}
        out = model(tokens, hidden=hidden, input_pos=at, mask=mask, **part)
        self.cache.cursor[0] = None  # a graph would have to return the tensor
        return out

    def scores(self, logits: torch.Tensor, seen: torch.Tensor | None) -> torch.Tensor:
        """What the sampler chooses by, [..., v] -> [..., v]."""
        return self.sampler.scores(logits, seen, self.settings)

    def read_by_draft(
        self, x: torch.Tensor, before: torch.Tensor | None, at: torch.Tensor, slots: torch.Tensor
    ) -> torch.Tensor:
        """What the draft's head unembeds of x_E, before the draft's norm: x_E itself unless an adapter drafts.

        Args:
            x: x_E, [b, s, d].
            before: for an adapter, the normed state of the token before each, [b, s, d]; None without one.
            at, slots: as of `run`.
        """
        if before is None:
            return x
        own = self.own_layers
        part: Any = {"hidden": torch.cat([x, before], -1), "start_layer": own.start, "exit_layer": own.stop}
        return self.run(self.draft_model, None, at, slots, unembed=False, **part)

    def unembed(self, x: torch.Tensor) -> Any:
        """The model's logits of x_L: [b, s, d] -> [b, s, v]."""
        if self.cpp is not None:
            return self.cpp.logits(self.model, x)
        return self.model(hidden=x, start_layer=self.model.num_layers)  # a call, by which a sharded model is gathered

    def draft_scores(self, x: torch.Tensor, seen: torch.Tensor | None) -> torch.Tensor:
        """What the draft chooses by: x [b, s, d], seen [b, s or 1, v] -> [b, s, v']."""
        if self.cpp is not None:
            logits = self.cpp.logits(self.draft_head or self.draft_model, x)
        elif self.draft_head is None:
            logits = self.draft_model(hidden=x, start_layer=self.draft_model.num_layers)
        else:
            logits = self.draft_head(x)
        if self.draft_head is not None and seen is not None:
            seen = seen[..., self.draft_head.vocabulary]
        return self.scores(logits, seen)

    def in_full_vocabulary(self, tokens: torch.Tensor) -> torch.Tensor:
        """Token ids of places in the draft vocabulary."""
        return tokens if self.draft_head is None else self.draft_head.vocabulary[tokens]

    def full_q(self, q: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """[b, s, v'] -> [b, s, v]: tokens outside of the draft vocabulary have probability 0."""
        if self.draft_head is None:
            return q
        return scores.new_zeros(*q.shape[:2], scores.shape[-1]).index_copy(2, self.draft_head.vocabulary, q)

    @staticmethod
    def seen_at(seen: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """The tokens seen up to each of `tokens` [b, k], those of the text, `seen` [b, v], included -> [b, k, v]."""
        counts = torch.zeros(*tokens.shape, seen.shape[-1], device=seen.device)
        return seen[:, None] | (counts.scatter_(2, tokens[..., None], 1).cumsum(1) > 0)


class Step:
    """A function of tensors, and the key of its graph where steps are graphs.

    Args:
        context: that all steps of the generation share.
        function: called with the context, the settings, `slots` and tensors; returns tensors. It never looks at values
            on the host. `slots` is what attention sees, None for a function without attention.
        *settings: of the function, constants of its graph.
        layers: the function runs layers or writes into the cache.
        choice: the function chooses or accepts tokens by the sampler.
    """

    def __init__(
        self,
        context: StepContext,
        function: Callable,
        *settings: Hashable,
        layers: bool = True,
        choice: bool = True,
    ) -> None:
        self.context, self.function, self.settings = context, function, settings
        self.own_key: Hashable = (function, settings, layers and context.layers_key, choice and context.choice_key)

    def key(self, *args: torch.Tensor | None) -> Hashable:
        """All that the graph depends on but the values of tensors and the length of slots."""
        return self.own_key, *(arg is not None and arg.shape for arg in args)

    def __call__(self, slots: torch.Tensor | None, *args: torch.Tensor | None) -> Any:
        graphs = self.context.graphs
        return self.run(slots, *args) if graphs is None else graphs(self, slots, *args)

    def run(self, slots: torch.Tensor | None, *args: torch.Tensor | None) -> Any:
        """The function as it is, without its graph."""
        return self.function(self.context, *self.settings, slots, *args)


# ---- the steps of plain decoding ----


def next_logits(context: StepContext, exit_layer: int, slots, last, start):
    """Logits of each row's next token from exit E; last, start [b] -> [b, v]."""
    return context.run(context.model, last[:, None], start[:, None], slots, exit_layer=exit_layer)[:, -1]


def choose_token(context: StepContext, slots, logits, noise, seen):
    """A token of each row; logits, noise, seen [b, v] -> [b]. Greedy choices have no noise."""
    return context.sampler.choose(context.scores(logits, seen), noise)
