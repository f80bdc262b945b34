"""The context that all steps of a generation share, and the steps of plain decoding.

A compiled step is one graph (kernels/compiling.py); on a CPU its layers and heads run in C++ (kernels/cpp_decoder.py).
Shapes: b rows, n drafted tokens, v vocabulary, v' draft vocabulary, d width. A token's slot in
the KV cache is its position in the text. `start` [b] is the slot of each row's last token, `at` the slots of the tokens
that run. `slots` is 0 .. end-1, the slots that attention sees; in a graph there may be more, up to the whole cache.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torchtune.utils import get_logger
from torchtune.utils._logging import log_once

from layerskip_recipes.generation.drafting.draft_weights import DraftHead
from layerskip_recipes.generation.kernels.compiling import CompiledSteps
from layerskip_recipes.generation.kernels.cpp_decoder import CppDecoder, UnknownPartError
from layerskip_recipes.generation.sampling import Sampler, choose_tokens
from layerskip_recipes.model.changes import user_code_in
from layerskip_recipes.model.decoder import LayerSkipDecoder, is_plain_attention
from layerskip_recipes.model.kv_cache import BLOCK, BlockAttention, DecodingCache, causal_mask
from layerskip_recipes.processes import broadcast_from_rank0

log = get_logger("INFO")


class StepContext:
    """State shared by all steps of one generation.

    Without `compiled` steps run eagerly, and also while a model has hooks or the like: C++ does not call them, and a
    graph keeps those that it was made with. The draft decoder is the model by default, and the draft head is the draft
    decoder's head. `depth`: the number of layers whose tokens are final; None: all. With `shared`, all ranks decode the
    same prompts and rank 0 decides the tokens.
    """

    def __init__(
        self,
        model: LayerSkipDecoder,
        cache: DecodingCache,
        sampler: Sampler,
        compiled: CompiledSteps | None = None,
        draft_decoder: LayerSkipDecoder | None = None,
        draft_head: DraftHead | None = None,
        depth: int | None = None,
        shared: bool = False,
    ) -> None:
        self.model, self.cache, self.sampler, self.compiled = model, cache, sampler, compiled
        self.draft_decoder, self.draft_head = draft_decoder or model, draft_head
        self.own_layers, self.depth = self.draft_decoder.own_layers, depth or model.num_layers
        user_code = user_code_in(model, self.draft_decoder, *([draft_head] if draft_head else []))
        cache.forget_other_weights(model, self.draft_decoder, user_code is not None, shared)
        if compiled and user_code:
            log_once(log, f"compile: steps run uncompiled, as the model has hooks or parametrisations ({user_code})")
            compiled = None
        # An adapter reads the model's early hidden states and its final states.
        self.has_adapter = self.own_layers.start > 0
        # Verification can start from the draft's hidden states if the model's own layers computed them.
        self.shares_layers = self.draft_decoder is model or self.has_adapter
        self.shared = shared
        self.device, self.dtype = model.tok_embeddings.weight.device, model.tok_embeddings.weight.dtype
        self.sampler_tensors = sampler.tensors(self.device)
        self.vocabulary_size = model.tok_embeddings.num_embeddings
        self.last_position = model.max_seq_len - 1
        self.before_chunk: Callable[[], None] = lambda: None  # is called before each chunk of a prompt
        self.cpp = self._load_cpp(compiled)
        if cache.in_cpp != (self.cpp is not None):
            cache.keep_first(0)
            cache.in_cpp = self.cpp is not None
        self.graphs = None if self.cpp or (compiled and compiled.failed) else compiled
        # Graphs may use FlexAttention over the whole cache instead of masks, see `BlockAttention`. Its kernel needs
        # head_dim >= 16, and a cache of whole blocks.
        layers = [*model.layers, *self.draft_decoder.layers]
        fits_layers = all(is_plain_attention(layer) and layer.attn.head_dim >= 16 for layer in layers)
        on_gpu = self.graphs is not None and self.graphs.device.type == "cuda"
        self.fits_flex = on_gpu and fits_layers and cache.max_len % BLOCK == 0
        # The parts of a graph's key: for steps that run layers, and for steps that choose tokens.
        self.layers_key = (cache.max_len, cache.draft_layers, self.draft_decoder is model or self.draft_decoder)
        self.sampler_key = (sampler.constants, draft_head and len(draft_head.vocabulary))

    @property
    def compile_s(self) -> float:
        """Seconds that compilation took so far, in all generations of this model."""
        return self.compiled.seconds if self.compiled else 0.0

    def _load_cpp(self, compiled: CompiledSteps | None) -> CppDecoder | None:
        """Layers and heads in C++; None if it does not support the model, or cannot be compiled."""
        if compiled is None or compiled.failed or self.device.type != "cpu":
            return None
        try:
            found = CppDecoder(self.cache, self.model, self.draft_decoder, self.draft_head)
        except UnknownPartError as e:
            log_once(log, f"compile: steps become graphs, as the C++ does not know a part of the model ({e})")
            return None
        if found.unknown:
            log_once(log, f"compile: drafts run in torch, as the C++ does not know a part of them ({found.unknown})")
        # Allocate the caches of the layers that read the text.
        self.cache.allocate(self.model, self.depth)
        self.cache.allocate(self.draft_decoder, self.own_layers.stop)
        return found if compiled.prepare(found.load) else None

    def begin_round(self) -> None:
        """Let graphs overwrite the results of the last round."""
        if self.graphs is not None:
            self.graphs.begin_round()

    def broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
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
        only_cache: bool = False,
        rows: Sequence[int] | None = None,
        whole: bool = False,
    ) -> torch.Tensor:
        """Run layers over tokens, or their x_{start_layer}, at slots `at` [b, s]; `rows`: the cache rows, with C++.

        `only_cache`: the result is not needed, only the keys and values in the cache. `whole`: the tokens are whole
        texts, so that plain causal attention needs no mask.
        """
        if self.cpp is not None:
            layers = range(start_layer, model.num_layers if exit_layer is None else exit_layer)
            if layers.stop <= self.own_layers.start and not unembed:
                model = self.model  # the layers below an adapter are the model's
            if model in self.cpp.models:
                x: Any = tokens if hidden is None else hidden
                x = self.cpp.run(model, x, at, slots.shape[0], layers, rows, only_cache)
                return self.cpp.logits(model, x) if unembed else x
            hidden = None if hidden is None else hidden.to(self.dtype)  # fp32 from C++
        part: Any = {"start_layer": start_layer, "exit_layer": exit_layer, "unembed": unembed}
        if rows is not None:  # in torch, one at a time
            outs = []
            for i, row in enumerate(rows):
                of_row = [None if inputs is None else inputs[i : i + 1] for inputs in (tokens, hidden)]
                with self.cache.only(row):
                    outs.append(self.run(model, of_row[0], at, slots, hidden=of_row[1], **part))
            return torch.cat(outs)
        self.cache.seek(at, slots.shape[0])
        mask: Any
        if torch.compiler.is_compiling() and self.fits_flex and len(slots) == self.cache.max_len:
            mask = BlockAttention(at, len(slots))
        else:
            mask = None if whole else causal_mask(at, slots, self.dtype)
        # Drafted tokens beyond a row's limit are cut later, so any valid position is fine for them.
        at = at.clamp(max=self.last_position)
        out = model(tokens, hidden=hidden, input_pos=at, mask=mask, **part)
        self.cache.cursor[0] = None  # otherwise a graph would have to return the tensor
        return out

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
        """The hidden state for the draft's head: x_E [b, s, d], or the adapter's output; `only_cache` as in `run`.

        `last_states` [b, s, d] are the normed states of the previous tokens for an adapter; None without an adapter.
        """
        if last_states is None:
            return x
        own = self.own_layers
        part: Any = {"hidden": torch.cat([x, last_states], -1), "start_layer": own.start, "exit_layer": own.stop}
        return self.run(self.draft_decoder, None, at, slots, unembed=False, only_cache=only_cache, **part)

    def unembed(self, x: torch.Tensor) -> Any:
        """The model's logits of x_L: [b, s, d] -> [b, s, v]."""
        if self.cpp is not None:
            return self.cpp.logits(self.model, x)
        return self.model(hidden=x, start_layer=self.model.num_layers)  # not `unembed`: a call gathers a sharded model

    def draft_scores(self, x: torch.Tensor, seen: torch.Tensor | None) -> torch.Tensor:
        """The sampler's scores for the draft: x [b, s, d], seen [b, s or 1, v] -> [b, s, v']."""
        head = self.draft_head or self.draft_decoder
        if self.cpp is not None and head in self.cpp.heads:
            logits = self.cpp.logits(head, x)
        elif self.draft_head is None:
            logits = self.draft_decoder(hidden=x.to(self.dtype), start_layer=self.draft_decoder.num_layers)
        else:
            logits = self.draft_head(x.to(self.dtype))
        if self.draft_head is not None and seen is not None:
            seen = seen[..., self.draft_head.vocabulary]
        return self.scores(logits, seen)

    def choose_tokens(
        self, scores: torch.Tensor, keys: torch.Tensor | None, positions: torch.Tensor, ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`sampling.choose_tokens`, [b, s, v'] -> [b, s]; in C++ it costs one pass over the scores."""
        if self.cpp is None or keys is None:
            return choose_tokens(scores, keys, positions, ids)
        return self.cpp.choose_tokens(scores, keys, positions, ids)

    @staticmethod
    def seen_at(seen: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """The tokens `seen` in the text [b, v], and those of `tokens` [b, k] up to each position -> bool [b, k, v]."""
        counts = torch.zeros(*tokens.shape, seen.shape[-1], device=seen.device)
        return seen[:, None] | (counts.scatter_(2, tokens[..., None], 1).cumsum(1) > 0)


class Step:
    """`function(context, *constants, slots, *tensors)`, run eagerly or as a graph, and the key of that graph.

    The function returns tensors and never reads their values on the host. `constants` become constants of the graph.
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
        self.own_key: Hashable = (function, constants, layers and context.layers_key, samples and context.sampler_key)

    def key(self, *args: torch.Tensor | None) -> Hashable:
        """What the graph depends on, except for values of tensors and the length of slots."""
        return self.own_key, *(arg is not None and arg.shape for arg in args)

    def __call__(self, slots: torch.Tensor | None, *args: torch.Tensor | None) -> Any:
        graphs = self.context.graphs
        return self.run(slots, *args) if graphs is None else graphs(self, slots, *args)

    def run(self, slots: torch.Tensor | None, *args: torch.Tensor | None) -> Any:
        return self.function(self.context, *self.constants, slots, *args)


# ---- the steps of plain decoding ----


def next_logits(context: StepContext, exit_layer: int, slots, last, start):
    """Logits of each row's next token from exit E; last, start [b] -> [b, v]."""
    return context.run(context.model, last[:, None], start[:, None], slots, exit_layer=exit_layer)[:, -1]


def choose_token(context: StepContext, slots, logits, keys, positions, seen):
    """A token for each row at `positions` [b] of its text; logits, seen [b, v], keys [b, 2] (None if greedy) -> [b]."""
    return context.choose_tokens(context.scores(logits, seen)[:, None], keys, positions[:, None])[:, 0]
