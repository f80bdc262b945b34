"""The backends of decoding steps: torch's modules, compiled graphs, or C++. `choose_backend` picks one per generation.

A step (steps.py) is written once, in the operations of `TorchBackend`, which are the interface of all backends.
Shapes: b rows, s tokens, v vocabulary, d width. `at` [b or 1, s] are the cache slots of the tokens that run. `slots` is
0 .. end-1, the slots that attention sees; in a graph there may be more, up to the whole cache.
"""

from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torchtune.models.gemma.gemma_norm_embedding import GemmaNormEmbeddings
from torchtune.utils import get_logger
from torchtune.utils._logging import log_once

from layerskip_recipes.families.multipliers import ScaledEmbedding
from layerskip_recipes.generation.drafting.draft_weights import DraftHead
from layerskip_recipes.generation.kernels.compiling import CompiledSteps
from layerskip_recipes.generation.kernels.cpp_decoder import (
    Parts,
    UnknownPartError,
    head_parts,
    layer_parts,
    load_library,
    require,
)
from layerskip_recipes.generation.kernels.huge_pages import use_huge_pages
from layerskip_recipes.generation.sampling import Sampler, choose_tokens
from layerskip_recipes.model.decoder import LayerSkipDecoder, is_plain_attention
from layerskip_recipes.model.head import head_of
from layerskip_recipes.model.kv_cache import BLOCK_SLOTS, BlockAttention, DecodingCache, causal_mask

log = get_logger("INFO")

CHUNK = 512  # tokens per prefill pass behind cached tokens, which limits the size of the mask
CPP_CHUNK = 128  # tokens per prefill pass in C++


def choose_backend(
    model: LayerSkipDecoder,
    cache: DecodingCache,
    draft_decoder: LayerSkipDecoder,
    draft_head: DraftHead | None,
    sampler: Sampler,
    num_layers: int,
    compiled: CompiledSteps | None,
    user_code: str | None,
) -> "TorchBackend":
    """C++ on a CPU for models that it knows, else graphs; torch without `compiled`, or where nothing can be compiled.

    A model with `user_code` (the name of a module with hooks or the like) runs in torch too: C++ does not call hooks,
    and a graph keeps those that it was made with. `num_layers`: how many of the model's layers will run.
    """
    if compiled is not None and user_code is not None:
        log_once(log, f"compile: steps run uncompiled, as the model has hooks or parametrisations ({user_code})")
    elif compiled is not None and not compiled.failed:
        try:
            if compiled.device.type == "cpu":
                in_cpp = CppBackend(model, cache, draft_decoder, draft_head, num_layers)
                if compiled.prepare(in_cpp.load):
                    return in_cpp
        except UnknownPartError as e:
            log_once(log, f"compile: steps become graphs, as the C++ does not know a part of the model ({e})")
        if not compiled.failed:
            return GraphBackend(model, cache, draft_decoder, draft_head, sampler, compiled)
    return TorchBackend(model, cache, draft_decoder, draft_head)


class TorchBackend:
    """Runs the model's own modules, operation by operation."""

    fixed_shapes = False  # whether each round must draft equally many tokens
    exact_splits = False  # whether a text's keys and values depend neither on its batch nor on its prefill's passes
    packs_int4 = False  # whether it reads half a byte for each int4 weight, and not the byte that torchao keeps
    # Drafts with an exit in one call, if the temperature is the only sampling setting; None: token by token. It takes
    # the last tokens [b], their slots [b], n, the end of the slots, the exit, the noise's keys, the temperature, the
    # confidence of an empty draft [b] and the least one, and returns tokens [b, 1 + n] and x_E [b, n, d].
    draft_chain: Callable[..., tuple[torch.Tensor, torch.Tensor]] | None = None

    def __init__(
        self,
        model: LayerSkipDecoder,
        cache: DecodingCache,
        draft_decoder: LayerSkipDecoder,
        draft_head: DraftHead | None,
    ) -> None:
        self.model, self.cache, self.draft_decoder, self.draft_head = model, cache, draft_decoder, draft_head
        self.dtype = model.tok_embeddings.weight.dtype
        self.last_position = model.max_seq_len - 1
        # With a window, attention over a whole text needs a mask of all its tokens.
        has_window = any(getattr(layer.attn, "window", None) for layer in model.layers)
        self.is_plain = not has_window and all(is_plain_attention(layer) for layer in model.layers)

    # ---- calling steps ----

    def begin_round(self) -> None:
        """Results of the last round may be overwritten from now on."""

    def call(self, step: Any, slots: torch.Tensor | None, *args: torch.Tensor | None) -> Any:
        """The results of a `Step`."""
        return step.function(step.context, *step.constants, slots, *args)

    def keep(self, results: Sequence[Any]) -> Sequence[Any]:
        """A step's results (tensors or None), or copies if later steps of the round could overwrite them."""
        return results

    # ---- operations of steps ----

    def run(
        self,
        model: LayerSkipDecoder,
        x: torch.Tensor,
        at: torch.Tensor,
        slots: torch.Tensor,
        layers: range,
        *,
        unembed: bool = False,
        only_cache: bool = False,
    ) -> torch.Tensor:
        """`layers` of the model or the draft decoder over tokens [b, s] or hidden states [b, s, d] -> [b, s, d].

        `unembed`: the result is logits [b, s, v] instead. `only_cache`: the result is not needed, only the keys and
        values in the cache.
        """
        return self._forward(model, x, at, slots, layers, self.mask(at, slots), unembed)

    def logits(self, head: LayerSkipDecoder | DraftHead, x: torch.Tensor) -> Any:
        """The logits of a decoder's head or the draft head: hidden states [b, s, d] -> [b, s, v]."""
        x = x.to(self.dtype)
        if isinstance(head, DraftHead):
            return head(x)
        return head(hidden=x, start_layer=head.num_layers)  # not `unembed`: a call gathers a sharded model

    def choose_tokens(
        self, scores: torch.Tensor, keys: torch.Tensor | None, positions: torch.Tensor, ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`sampling.choose_tokens`, [b, s, v] -> [b, s]."""
        return choose_tokens(scores, keys, positions, ids)

    def mask(self, at: torch.Tensor, slots: torch.Tensor) -> Any:
        """What attention adds to scores so that each token sees the slots up to its own, [b or 1, s, end]."""
        return causal_mask(at, slots, self.dtype)

    def _forward(
        self,
        model: LayerSkipDecoder,
        x: torch.Tensor,
        at: torch.Tensor,
        slots: torch.Tensor,
        layers: range,
        mask: Any,
        unembed: bool = False,
    ) -> torch.Tensor:
        self.cache.seek(at, slots.shape[0])
        tokens, hidden = (x, None) if x.dim() == 2 else (None, x)
        out = model(
            tokens,
            hidden=hidden,
            mask=mask,
            # Drafted tokens beyond a row's limit are cut later, so any valid position is fine for them.
            input_pos=at.clamp(max=self.last_position),
            start_layer=layers.start,
            exit_layer=layers.stop,
            unembed=unembed,
        )
        self.cache.cursor[0] = None  # otherwise a graph would have to return the tensor
        return out

    # ---- prefill ----

    def chunk(self, width: int, reused: int) -> int:
        """The most tokens per prefill pass over `width` tokens, of which the first `reused` are in the cache."""
        return width if self.is_plain and reused == 0 else CHUNK

    def prefill(
        self,
        model: LayerSkipDecoder,
        x: torch.Tensor,
        at: torch.Tensor,
        slots: torch.Tensor,
        layers: range,
        rows: Sequence[int],
        *,
        only_cache: bool = False,
    ) -> torch.Tensor:
        """As `run`, for texts in these rows of the cache: one row, or all of them."""
        # Plain causal attention needs no mask over whole texts.
        mask = None if self.is_plain and at.shape[1] == len(slots) else self.mask(at, slots)
        with nullcontext() if len(rows) == self.cache.num_rows else self.cache.only(rows[0]):
            return self._forward(model, x, at, slots, layers, mask)


class GraphBackend(TorchBackend):
    """Calls steps as compiled graphs, which are CUDA graphs on a GPU; prefill runs in torch."""

    fixed_shapes = True

    def __init__(
        self,
        model: LayerSkipDecoder,
        cache: DecodingCache,
        draft_decoder: LayerSkipDecoder,
        draft_head: DraftHead | None,
        sampler: Sampler,
        compiled: CompiledSteps,
    ) -> None:
        super().__init__(model, cache, draft_decoder, draft_head)
        self.compiled, self.on_gpu = compiled, compiled.device.type == "cuda"
        # Graphs may use FlexAttention over the whole cache instead of masks, see `BlockAttention`. Its kernel needs
        # head_dim >= 16, and a cache of whole blocks.
        layers = [*model.layers, *draft_decoder.layers]
        fits_layers = all(is_plain_attention(layer) and layer.attn.head_dim >= 16 for layer in layers)
        self.fits_flex = self.on_gpu and fits_layers and cache.max_len % BLOCK_SLOTS == 0
        # The parts of a graph's key: for steps that run layers, and for steps that choose tokens.
        self.layers_key = (cache.max_len, cache.draft_layers, draft_decoder is model or draft_decoder)
        self.sampler_key = (sampler.constants, draft_head and len(draft_head.vocabulary))

    def begin_round(self) -> None:
        self.compiled.begin_round()

    def call(self, step: Any, slots: torch.Tensor | None, *args: torch.Tensor | None) -> Any:
        return self.compiled(step, self.key(step, args), self.fits_flex, slots, *args)

    def key(self, step: Any, args: Sequence[torch.Tensor | None]) -> Hashable:
        """What the step's graph depends on, except for values of tensors and the length of slots."""
        parts = (step.layers and self.layers_key, step.samples and self.sampler_key)
        return step.function, step.constants, *parts, *(arg is not None and arg.shape for arg in args)

    def keep(self, results: Sequence[Any]) -> Sequence[Any]:
        # The next replay of a CUDA graph overwrites its outputs.
        return [None if result is None else result.clone() for result in results] if self.on_gpu else results

    def mask(self, at: torch.Tensor, slots: torch.Tensor) -> Any:
        if torch.compiler.is_compiling() and self.fits_flex and len(slots) == self.cache.max_len:
            return BlockAttention(at, len(slots))
        return causal_mask(at, slots, self.dtype)


class CppBackend(TorchBackend):
    """Runs layers, heads and the choice of tokens in C++ on a CPU, in fp32, and a draft chain in one call.

    Raises an `UnknownPartError` if the C++ does not support a part of the target model. A draft with an unsupported
    part, `unknown`, runs in torch. Call `load` before anything else.
    """

    exact_splits = packs_int4 = True

    def __init__(
        self,
        model: LayerSkipDecoder,
        cache: DecodingCache,
        draft_decoder: LayerSkipDecoder,
        draft_head: DraftHead | None,
        num_layers: int,
    ) -> None:
        super().__init__(model, cache, draft_decoder, draft_head)
        require(self.dtype in (torch.float32, torch.bfloat16), str(self.dtype))  # the cache's too
        self.layer_parts = {model: [layer_parts(layer) for layer in model.layers]}
        self.head_parts: dict[nn.Module, Parts] = {model: head_parts(model.norm, head_of(model), model.logit_cap)}
        self.unknown: UnknownPartError | None = None
        try:
            if draft_head is not None:
                self.head_parts[draft_head] = head_parts(draft_head.norm, draft_head.output, draft_head.cap)
            if draft_decoder is not model:
                parts = [layer_parts(layer) for layer in draft_decoder.layers]
                head = head_parts(draft_decoder.norm, head_of(draft_decoder), draft_decoder.logit_cap)
                self.layer_parts[draft_decoder], self.head_parts[draft_decoder] = parts, head
        except UnknownPartError as e:
            self.unknown = e
            log_once(log, f"compile: drafts run in torch, as the C++ does not know a part of them ({e})")
        cache.allocate(model, num_layers)
        cache.allocate(draft_decoder, draft_decoder.trained_layers.stop)

    def load(self) -> bool:
        """Compile the C++, move the weights to huge pages (False if both had been done before), and pass them on."""
        load_library()
        modules = [part for layers in self.layer_parts.values() for part in layers] + [*self.head_parts.values()]
        for part in modules:
            part.pack()
        weights = (part.tensors[name] for part in modules for name in part.tensors if name.endswith(".weight"))
        moved = use_huge_pages(weights)
        kernels = torch.classes.layerskip
        self.cpp_heads = {head: kernels.Head(parts.tensors) for head, parts in self.head_parts.items()}
        self.cpp_layers = {decoder: kernels.Layers() for decoder in self.layer_parts}
        for decoder, all_parts in self.layer_parts.items():
            for layer_cache, parts in zip(self.cache.of(decoder), all_parts, strict=True):
                if layer_cache.k is None:  # this generation does not use the layers from here on
                    break
                parts.tensors |= {"k_cache": layer_cache.k, "v_cache": layer_cache.v}
                self.cpp_layers[decoder].append(parts.tensors)
        self.draft_chain = self._draft_in_cpp()
        return moved

    def run(
        self,
        model: LayerSkipDecoder,
        x: torch.Tensor,
        at: torch.Tensor,
        slots: torch.Tensor,
        layers: range,
        *,
        unembed: bool = False,
        only_cache: bool = False,
    ) -> torch.Tensor:
        in_cpp = self._layers_in_cpp(model, layers, unembed)
        if in_cpp is None:
            x = x if x.dim() == 2 else x.to(self.dtype)
            return super().run(model, x, at, slots, layers, unembed=unembed, only_cache=only_cache)
        x = model.tok_embeddings(x) if x.dim() == 2 else x
        x = in_cpp.run(x, at, [*range(len(x))], slots.shape[0], layers.start, layers.stop, only_cache)
        return self.cpp_heads[model].logits(x) if unembed else x

    def prefill(
        self,
        model: LayerSkipDecoder,
        x: torch.Tensor,
        at: torch.Tensor,
        slots: torch.Tensor,
        layers: range,
        rows: Sequence[int],
        *,
        only_cache: bool = False,
    ) -> torch.Tensor:
        in_cpp = self._layers_in_cpp(model, layers)
        if in_cpp is None:  # one row at a time, so that no text depends on the others
            x = x if x.dim() == 2 else x.to(self.dtype)
            prefill = super().prefill
            return torch.cat([prefill(model, x[i : i + 1], at, slots, layers, [row]) for i, row in enumerate(rows)])
        x = model.tok_embeddings(x) if x.dim() == 2 else x
        return in_cpp.run(x, at, [*rows], slots.shape[0], layers.start, layers.stop, only_cache)

    def chunk(self, width: int, reused: int) -> int:
        return CPP_CHUNK

    def logits(self, head: LayerSkipDecoder | DraftHead, x: torch.Tensor) -> Any:
        in_cpp = self.cpp_heads.get(head)
        return super().logits(head, x) if in_cpp is None else in_cpp.logits(x)

    def choose_tokens(
        self, scores: torch.Tensor, keys: torch.Tensor | None, positions: torch.Tensor, ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        """In one pass over the scores."""
        if keys is None:
            return scores.argmax(-1)
        return torch.ops.layerskip.choose_tokens(scores, keys, positions, ids)

    def _layers_in_cpp(self, model: LayerSkipDecoder, layers: range, unembed: bool = False) -> Any:
        """The C++ layers of a decoder; None if it runs in torch."""
        if layers.stop <= self.draft_decoder.trained_layers.start and not unembed:
            model = self.model  # the layers below an adapter are the model's
        return self.cpp_layers.get(model)

    def _draft_in_cpp(self) -> Callable | None:
        """`Layers::draft` of layers.cpp with its first arguments, which are the model's; None if it cannot draft."""
        embeddings = self.draft_decoder.tok_embeddings
        if self.unknown or type(embeddings) not in (nn.Embedding, GemmaNormEmbeddings, ScaledEmbedding):
            return None
        factor = torch.tensor(getattr(embeddings, "factor", 1.0), dtype=torch.float64)
        if type(embeddings) is GemmaNormEmbeddings:  # the root of the width, rounded to the weights' dtype
            factor = torch.tensor(embeddings.embedding_dim**0.5, dtype=embeddings.weight.dtype)
        return partial(
            self.cpp_layers[self.draft_decoder].draft,
            self.cpp_heads[self.draft_head or self.draft_decoder],
            embeddings.weight.detach(),
            factor.item(),
            self.draft_head and self.draft_head.vocabulary,
        )
