"""The backends of decoding steps: torch's modules, compiled graphs, or C++. `choose_backend` picks one per generation.

A step (steps.py) is written once, in the operations of `TorchBackend`, which are the interface of all backends.
Shapes: b rows, s tokens, v vocabulary, d width. `at` [b or 1, s] are the cache slots of the tokens that run. `slots` is
0 .. end-1, the slots that attention sees; in a graph there may be more, up to the whole cache.
"""

import copy
import weakref
from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext
from functools import cached_property, partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torchtune.utils import get_logger
from torchtune.utils._logging import log_once

from layerskip_recipes.generation.drafting.draft_weights import DraftHead
from layerskip_recipes.generation.kernels.compiling import rounded_length
from layerskip_recipes.generation.kernels.cpp_decoder import (
    Parts,
    UnknownPartError,
    embedding_parts,
    head_parts,
    layer_parts,
    load_library,
    require,
)
from layerskip_recipes.generation.kernels.huge_pages import use_huge_pages
from layerskip_recipes.generation.sampling import choose_tokens
from layerskip_recipes.model.changes import plain_tensors
from layerskip_recipes.model.decoder import LayerSkipDecoder, is_plain_attention
from layerskip_recipes.model.head import head_of
from layerskip_recipes.model.kv_cache import BLOCK_SLOTS, BlockAttention, causal_mask

if TYPE_CHECKING:
    from layerskip_recipes.generation.steps import StepContext

log = get_logger("INFO")

CHUNK = 512  # tokens per prefill pass behind cached tokens, which limits the size of the mask
CPP_CHUNK = 128  # tokens per prefill pass in C++


def choose_backend(context: "StepContext", user_code: str | None) -> "TorchBackend":
    """C++ on a CPU for models that it knows, else graphs; torch if nothing is to be or can be compiled.

    A model with `user_code` (the name of a module with hooks or the like) runs in torch too: C++ does not call hooks,
    and a graph keeps those that it was made with.
    """
    compiled = context.compiled
    if compiled is not None and user_code is not None:
        log_once(log, f"compile: steps run uncompiled, as the model has hooks or parametrisations ({user_code})")
    elif compiled is not None and not compiled.failed:
        try:
            if compiled.device.type == "cpu":
                in_cpp = CppBackend(context)
                if compiled.prepare(in_cpp.load):
                    return in_cpp
        except UnknownPartError as e:
            log_once(log, f"compile: steps become graphs, as the C++ does not know a part of the model ({e})")
        if not compiled.failed:
            return GraphBackend(context)
    return TorchBackend(context)


class TorchBackend:
    """Runs the model's own modules, operation by operation."""

    fixed_shapes = False  # whether each round must draft equally many tokens
    exact_splits = False  # whether a text's keys and values depend neither on its batch nor on its prefill's passes
    packs_int4 = False  # whether it reads half a byte for each int4 weight, and not the byte that torchao keeps

    def __init__(self, context: "StepContext") -> None:
        # Not the context: a cycle would delay freeing the cache.
        self.model, self.cache, self.dtype = context.model, context.cache, context.dtype
        self.draft_decoder, self.draft_head = context.draft_decoder, context.draft_head
        self.last_position = self.model.max_seq_len - 1
        # With a window, attention over a whole text needs a mask of all its tokens.
        has_window = any(getattr(layer.attn, "window", None) for layer in self.model.layers)
        self.is_plain = not has_window and all(is_plain_attention(layer) for layer in self.model.layers)

    # ---- calling steps ----

    def begin_round(self) -> None:
        """Results of the last round may be overwritten from now on."""

    def call(self, step: Any, slots: torch.Tensor | None, *args: torch.Tensor | None) -> Any:
        """The results of a `Step`."""
        return step.run(slots, *args)

    def call_round(self, step: Any, slots: torch.Tensor, *args: torch.Tensor | None) -> Any:
        """The results of a `Step` of steps as one CUDA graph, whose next call overwrites them; None: call its steps."""
        return None

    def draft_chain(
        self,
        last: torch.Tensor,
        start: torch.Tensor,
        num_to_draft: int,
        num_slots: int,
        exit_layer: int,
        keys: torch.Tensor | None,
        temperature: float,
        confident: torch.Tensor,
        min_confidence: float,
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """`draft_tokens` in one call, if temperature is the only sampling setting; None: draft token by token.

        Takes the last tokens [b], their slots [b], the noise's keys [b, 2], and the confidence [b] of an empty draft.
        Returns tokens [b, 1 + n] and x_E [b, n, d].
        """
        return None

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
        rows: Sequence[int] | None = None,
        unembed: bool = False,
        only_cache: bool = False,
    ) -> torch.Tensor:
        """`layers` of the model or the draft decoder over tokens [b, s] or hidden states [b, s, d] -> [b, s, d].

        `rows`: in a prefill, the texts' rows of the cache, which are one row or all; it is never part of a graph.
        `unembed`: the result is logits [b, s, v] instead. `only_cache`: the result is not needed, only the keys and
        values in the cache.
        """
        # Plain causal attention needs no mask over whole texts.
        mask = None if rows is not None and self.is_plain and at.shape[1] == len(slots) else self.mask(at, slots)
        row = None if rows is None or len(rows) == self.cache.num_rows else rows[0]
        tokens, hidden = (x, None) if x.dim() == 2 else (None, x)
        self.cache.seek(at, slots.shape[0])
        with nullcontext() if row is None else self.cache.only(row):
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

    def chunk(self, width: int, reused: int) -> int:
        """The most tokens per prefill pass over `width` tokens, of which the first `reused` are in the cache."""
        return width if self.is_plain and reused == 0 else CHUNK


class GraphBackend(TorchBackend):
    """Calls steps as compiled graphs, which are CUDA graphs on a GPU; prefill runs in torch."""

    fixed_shapes = True

    def __init__(self, context: "StepContext") -> None:
        super().__init__(context)
        assert context.compiled is not None
        self.compiled, self.on_gpu = context.compiled, context.compiled.device.type == "cuda"
        # Graphs may use FlexAttention over the whole cache instead of masks, see `BlockAttention`. Its kernel needs
        # head_dim >= 16, and a cache of whole blocks.
        layers = [*self.model.layers, *self.draft_decoder.layers]
        fits_layers = all(is_plain_attention(layer) and layer.attn.head_dim >= 16 for layer in layers)
        self.fits_flex = self.on_gpu and fits_layers and self.cache.max_len % BLOCK_SLOTS == 0
        # The parts of a graph's key: for steps that run layers, and for steps that choose tokens.
        draft_decoder, head = self.draft_decoder, self.draft_head
        draft = draft_decoder is self.model or weakref.ref(draft_decoder)
        self.layers_key = (self.cache.max_len, self.cache.draft_layers, draft)
        self.sampler_key = (context.sampler.constants, head and len(head.vocabulary))
        # With several ranks a capture would hold their collectives.
        self.captures_rounds = self.on_gpu and not context.shared

    def begin_round(self) -> None:
        self.compiled.begin_round()

    def call(self, step: Any, slots: torch.Tensor | None, *args: torch.Tensor | None) -> Any:
        return self.compiled(step, self.key(step, args), self.fits_flex, slots, *args)

    def call_round(self, step: Any, slots: torch.Tensor, *args: torch.Tensor | None) -> Any:
        if not (self.captures_rounds and self.compiled.whole_rounds):
            return None
        context, numbers = copy.copy(step.context), step.context.sampler_tensors

        def function(*inputs: Any) -> Any:
            context.sampler_tensors = dict(zip(numbers, inputs[len(args) :], strict=True))
            return step.function(context, *step.constants, slots, *inputs[: len(args)])

        sees_all = self.fits_flex and not self.compiled.masked
        length = None if sees_all else rounded_length(len(slots), self.compiled.device)
        key = (self.key(step, args), length)
        return self.compiled.round(key, self.addresses, function, *args, *numbers.values())

    @property
    def read_by_steps(self) -> list[torch.Tensor]:
        """All tensors that steps read besides their arguments."""
        modules = {self.model, self.draft_decoder, *filter(None, [self.draft_head])}
        tensors = [*chain.from_iterable(chain(module.parameters(), module.buffers()) for module in modules)]
        tensors += [tensor for layer in self.cache.layers for tensor in (layer.k, layer.v) if tensor is not None]
        return [self.cache.slots, *tensors, *([self.draft_head.vocabulary] if self.draft_head else [])]

    @cached_property
    def addresses(self) -> tuple[int, ...]:
        return tuple(part.data_ptr() for tensor in self.read_by_steps for part in plain_tensors(tensor))

    def key(self, step: Any, args: Sequence[torch.Tensor | None]) -> Hashable:
        """What the step's graph depends on, except for values of tensors and the length of slots."""
        parts = (step.layers and self.layers_key, step.samples and self.sampler_key)
        return step.function, step.constants, *parts, *(arg is not None and arg.shape for arg in args)

    def keep(self, results: Sequence[Any]) -> Sequence[Any]:
        # The next replay of a step's CUDA graph overwrites its outputs.
        if not self.on_gpu or self.compiled.in_round:
            return results
        return [None if result is None else result.clone() for result in results]

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

    def __init__(self, context: "StepContext") -> None:
        super().__init__(context)
        model, draft_decoder, draft_head = self.model, self.draft_decoder, self.draft_head
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
        self.cache.allocate(model, context.output_exit)
        self.cache.allocate(draft_decoder, context.trained_layers.stop)

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
        self.draft_in_cpp = self._draft_in_cpp()
        return moved

    def run(
        self,
        model: LayerSkipDecoder,
        x: torch.Tensor,
        at: torch.Tensor,
        slots: torch.Tensor,
        layers: range,
        *,
        rows: Sequence[int] | None = None,
        unembed: bool = False,
        only_cache: bool = False,
    ) -> torch.Tensor:
        in_cpp = self._layers_in_cpp(model, layers, unembed)
        if in_cpp is None:
            x, run = x if x.dim() == 2 else x.to(self.dtype), super().run
            if rows is None:
                return run(model, x, at, slots, layers, unembed=unembed)
            # One row at a time, so that no text depends on the others.
            return torch.cat([run(model, x[i : i + 1], at, slots, layers, rows=[row]) for i, row in enumerate(rows)])
        x, rows = model.tok_embeddings(x) if x.dim() == 2 else x, range(len(x)) if rows is None else rows
        x = in_cpp.run(x, at, [*rows], slots.shape[0], layers.start, layers.stop, only_cache)
        return self.cpp_heads[model].logits(x) if unembed else x

    def draft_chain(self, *args: Any) -> tuple[torch.Tensor, torch.Tensor] | None:
        return None if self.draft_in_cpp is None else self.draft_in_cpp(*args)

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
        if self.unknown:
            return None
        try:
            weight, factor = embedding_parts(self.draft_decoder.tok_embeddings)
        except UnknownPartError:
            return None
        return partial(
            self.cpp_layers[self.draft_decoder].draft,
            self.cpp_heads[self.draft_head or self.draft_decoder],
            weight,
            factor,
            self.draft_head and self.draft_head.vocabulary,
        )
