"""What one step of decoding computes, in tensors only, and what its compiled graph depends on.

Each step is compiled as one graph (kernels/compiling.py); on a CPU one of many layers runs by graphs of groups of them.
Here are the context that all steps of a generation share and the steps of plain decoding; those of drafts and of their
verification are in drafting/chain.py and drafting/tree.py.

Shapes: b rows, n drafted tokens, k nodes of the draft (n + 1 in a chain), v vocabulary, v' draft vocabulary, d width.
`start` [b] is the slot of each row's last token, the root of the draft; `slots` is 0 .. end-1, what attention sees.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import nn

from layerskip_recipes.errors import ConfigError
from layerskip_recipes.generation.kernels.compiling import CompiledSteps, rounded_length
from layerskip_recipes.generation.kernels.layer_groups import layer_groups
from layerskip_recipes.generation.sampling import Sampler
from layerskip_recipes.model.decoder import LayerSkipDecoder
from layerskip_recipes.model.head import capped, head_of
from layerskip_recipes.model.kv_cache import DecodingCache, visible

Broadcast = Callable[[torch.Tensor], torch.Tensor]


def rows_of_head(model: LayerSkipDecoder) -> nn.Module:
    """The module whose rows a draft head takes: of a tied head the embedding, also where the head is quantised."""
    quantised = model.tied and isinstance(model.output, nn.Linear)
    return model.tok_embeddings if quantised else head_of(model)


class DraftHead(nn.Module):
    """The head g restricted to a draft vocabulary: a copy of the head matrix's rows for these tokens.

    Args:
        model: whose norm and output are used.
        vocabulary: [v'] token ids.

    Raises:
        ConfigError: if the output is no plain linear layer.
    """

    def __init__(self, model: LayerSkipDecoder, vocabulary: torch.Tensor | Sequence[int]) -> None:
        super().__init__()
        output = rows_of_head(model)
        # Quantised and split weights are subclasses of tensors, whose rows cannot be taken.
        if not isinstance(output, nn.Linear | nn.Embedding) or type(output.weight) is not nn.Parameter:
            raise ConfigError(
                f"draft_vocabulary: the head {type(output).__name__} cannot be cut. Allowed: a linear or tied head, "
                "neither quantised nor split over processes; leave draft_vocabulary out"
            )
        self.norm, self.cap = model.norm, model.logit_cap
        self.vocabulary = vocabulary = torch.as_tensor(vocabulary, device=output.weight.device).long().unique()
        self.weight = output.weight.detach()[vocabulary]
        bias = getattr(output, "bias", None)
        self.bias = None if bias is None else bias.detach()[vocabulary]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[b, s, d] -> [b, s, v'] logits in fp32."""
        return capped(F.linear(self.norm(hidden), self.weight, self.bias).float(), self.cap)


_DRAFT_HEADS: WeakKeyDictionary[LayerSkipDecoder, DraftHead] = WeakKeyDictionary()


@torch.inference_mode(False)  # a tensor of inference mode could not be written later, outside of that mode
@torch.no_grad()
def draft_head_of(model: LayerSkipDecoder, vocabulary: torch.Tensor | Sequence[int]) -> DraftHead:
    """The model's draft head with its current weights.

    A head of the same vocabulary is updated in place, since CUDA graphs hold its address.
    """
    output: Any = rows_of_head(model)
    wanted = torch.as_tensor(vocabulary).long().unique().cpu()
    kept = _DRAFT_HEADS.get(model)
    if (
        kept is None
        or type(output.weight) is not nn.Parameter
        or (kept.weight.device, kept.weight.dtype) != (output.weight.device, output.weight.dtype)
        or not torch.equal(kept.vocabulary.cpu(), wanted)
    ):
        kept = _DRAFT_HEADS[model] = DraftHead(model, wanted)
    else:
        kept.weight.copy_(output.weight.index_select(0, kept.vocabulary))
        if kept.bias is not None:
            kept.bias.copy_(output.bias[kept.vocabulary])
    return kept


class StepContext:
    """What all steps of one generation share.

    Args:
        model: the decoder.
        cache: its cache, of b rows.
        sampler: how tokens are chosen.
        graphs: the compiled steps of the model; None: steps run as they are.
        draft_model: whose early layers and head draft. Unless its early layers are the model's own, verification runs
            all layers itself.
        draft_head: the head of drafts; None: that of the draft model.
        broadcast_from_rank0: gives all ranks the tensor of rank 0; None: there is one process.
    """

    def __init__(
        self,
        model: LayerSkipDecoder,
        cache: DecodingCache,
        sampler: Sampler,
        graphs: CompiledSteps | None = None,
        draft_model: LayerSkipDecoder | None = None,
        draft_head: DraftHead | None = None,
        broadcast_from_rank0: Broadcast | None = None,
    ) -> None:
        self.model, self.cache, self.sampler, self.graphs = model, cache, sampler, graphs
        self.draft_model, self.draft_head = draft_model or model, draft_head
        self.own_layers = self.draft_model.own_layers
        # An adapter goes on from the model's first layers, and from its last states.
        self.has_adapter = self.own_layers.start > 0
        # Verification goes on from the draft's hidden states if they are the model's.
        self.shares_layers = self.draft_model is model or self.has_adapter
        self.broadcast_from_rank0 = broadcast_from_rank0
        self.device, self.dtype = model.tok_embeddings.weight.device, model.tok_embeddings.weight.dtype
        self.settings = sampler.settings(self.device)
        self.vocabulary_size = model.tok_embeddings.num_embeddings
        self.last_position = model.max_seq_len - 1
        # What the graphs depend on: of steps that run layers, and of steps that choose tokens.
        self.layers_key = (cache.max_len, cache.draft_layers, self.draft_model is model or self.draft_model)
        self.choice_key = (sampler.kind, draft_head and len(draft_head.vocabulary))

    @property
    def compile_s(self) -> float:
        """Seconds that compilation took so far, in all generations of this model."""
        return self.graphs.seconds if self.graphs else 0.0

    def begin_round(self) -> None:
        """The results of the last round's graphs are no longer needed."""
        if self.graphs is not None:
            self.graphs.begin_round()

    def slots(self, end: int) -> torch.Tensor:
        """The slots that attention sees, 0 .. end-1 or, for compiled steps, a few more."""
        if self.graphs is not None:
            end = min(rounded_length(end, self.device), self.cache.max_len)
        return self.cache.slots[:end]

    def noise(self, *nodes: int, draft: bool = False) -> torch.Tensor | None:
        """Noise of one choice for each row, [b, v], or at each of so many nodes, [b, nodes, v]; None when greedy.

        Args:
            nodes: none, or how many.
            draft: whether the draft's head chooses, over its own vocabulary.
        """
        cut = draft and self.draft_head is not None
        size = len(self.draft_head.vocabulary) if cut else self.vocabulary_size
        return self.sampler.noise((self.cache.rows, *nodes, size), self.device)

    def broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        """Rank 0's tensor on all ranks."""
        return tensor if self.broadcast_from_rank0 is None else self.broadcast_from_rank0(tensor)

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
        positions: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run layers over tokens, or over x_{start_layer} of them, that stand at the slots `at` [b, s]."""
        if not self.in_groups or torch.compiler.is_compiling():
            layers: dict[str, Any] = {"start_layer": start_layer, "exit_layer": exit_layer, "unembed": unembed}
            return self.run_at_once(model, tokens, at, slots, hidden=hidden, **layers, positions=positions, mask=mask)
        drafts = model is not self.model
        x = model.tok_embeddings(tokens) if hidden is None else hidden
        # A graph holds for one layout of its inputs, which nothing checks.
        x, attention = x.contiguous(), [None if t is None else t.contiguous() for t in (at, positions, mask)]
        for first, last in layer_groups(start_layer, model.num_layers if exit_layer is None else exit_layer):
            x = self._group(drafts, first, last)(slots, x, *attention)
        return Step(self, unembed_states, drafts, choice=False)(None, x) if unembed else x

    def run_at_once(
        self,
        model: LayerSkipDecoder,
        tokens: torch.Tensor | None,
        at: torch.Tensor,
        slots: torch.Tensor,
        *,
        positions: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        **layers: Any,
    ) -> torch.Tensor:
        """As `run`, by one call of the model, eagerly or as a part of one graph."""
        self.cache.seek(at, slots.shape[0])
        positions = at if positions is None else positions
        # Drafts beyond a row's limit are cut later; any position that the model knows will do for them.
        inputs = {"input_pos": positions.clamp(max=self.last_position)}
        inputs["mask"] = visible(slots, at, self.dtype) if mask is None else mask
        out = model(tokens, **layers, **inputs)
        self.cache.cursor.at = None
        return out

    @property
    def in_groups(self) -> bool:
        """Whether steps run group by group of layers, each by a graph that other groups use too."""
        return self.graphs is not None and self.device.type == "cpu" and not self.graphs.failed

    def _group(self, drafts: bool, first: int, last: int) -> "Step":
        """The step of the layers first .. last-1."""
        group = (self.draft_model if drafts else self.model, first, last)
        step = Step(self, run_layers, drafts, first, last, choice=False)
        step.group, step.own_key = group, (run_layers, self.graphs.structure(*group), self.cache.max_len)
        return step

    def scores(self, logits: torch.Tensor, seen: torch.Tensor | None) -> torch.Tensor:
        """What the sampler chooses by, [..., v] -> [..., v]."""
        return self.sampler.scores(logits, seen, self.settings)

    def read_by_draft(
        self, x: torch.Tensor, before: torch.Tensor | None, at: torch.Tensor, slots: torch.Tensor, **attention: Any
    ) -> torch.Tensor:
        """What the draft's head unembeds of x_E, before the draft's norm: x_E itself unless an adapter drafts.

        Args:
            x: x_E, [b, s, d].
            before: for an adapter, the normed state of the token before each, [b, s, d]; None without one.
            at, slots: as of `run`.
            **attention: positions and mask.
        """
        if before is None:
            return x
        own = self.own_layers
        part: Any = {"hidden": torch.cat([x, before], -1), "start_layer": own.start, "exit_layer": own.stop}
        return self.run(self.draft_model, None, at, slots, unembed=False, **part, **attention)

    def unembed(self, x: torch.Tensor) -> torch.Tensor:
        """The model's logits of x_L: [b, s, d] -> [b, s, v]."""
        step = Step(self, unembed_states, False, choice=False)
        compiled = self.in_groups and not torch.compiler.is_compiling()
        return step(None, x.contiguous()) if compiled else step.run(None, x)

    def draft_scores(self, x: torch.Tensor, seen: torch.Tensor | None) -> torch.Tensor:
        """What the draft chooses by: x [b, s, d], seen [b, s or 1, v] -> [b, s, v']."""
        if self.draft_head is None:
            logits = self.draft_model(hidden=x, start_layer=self.draft_model.num_layers)
        else:
            logits = self.draft_head(x)
            seen = None if seen is None else seen[..., self.draft_head.vocabulary]
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
    def seen_at(seen: torch.Tensor, tokens: torch.Tensor, ancestors: torch.Tensor) -> torch.Tensor:
        """The tokens seen before each node's next one: those of the text and on the node's path.

        Args:
            seen: [b, v], of the text.
            tokens: [b, k], of the nodes.
            ancestors: [b or 1, k, k], for each node those on its path, itself included.

        Returns:
            [b, k, v].
        """
        b, k = tokens.shape
        counts = torch.zeros(b, k, seen.shape[-1], device=seen.device)
        counts.scatter_add_(2, tokens[:, None].expand(-1, k, -1), ancestors.expand(b, -1, -1).float())
        return seen[:, None] | (counts > 0)


class Step:
    """A function of tensors that runs as one compiled graph, and the key of this graph.

    Args:
        context: that all steps of the generation share.
        function: called with the context, the settings, `slots` and tensors; returns tensors. It never looks at values
            on the host. `slots` is what attention sees, None for a function without attention.
        *settings: of the function, constants of its graph.
        layers: the function runs layers or writes into the cache.
        choice: the function chooses or accepts tokens by the sampler.
        in_groups: the function runs many layers: on a CPU they are compiled in groups, and the rest is not.

    Attributes:
        group: of a step that is a group of layers, the model and the layers first .. last-1.
    """

    group: tuple[LayerSkipDecoder, int, int] | None = None

    def __init__(
        self,
        context: StepContext,
        function: Callable,
        *settings: Hashable,
        layers: bool = True,
        choice: bool = True,
        in_groups: bool = False,
    ) -> None:
        self.in_groups = in_groups
        self.context, self.function, self.settings = context, function, settings
        self.own_key: Hashable = (function, settings, layers and context.layers_key, choice and context.choice_key)

    def key(self, *args: torch.Tensor | None) -> Hashable:
        """All that the graph depends on but the values of tensors and the length of slots."""
        if self.group is not None:
            *others, mask = args  # which is as long as the slots
            return self.own_key, mask is None, *(arg is not None and arg.shape for arg in others)
        return self.own_key, *(arg is not None and arg.shape for arg in args)

    def __call__(self, slots: torch.Tensor | None, *args: torch.Tensor | None) -> Any:
        graphs = self.context.graphs
        return self.run(slots, *args) if graphs is None else graphs(self, slots, *args)

    def run(self, slots: torch.Tensor | None, *args: torch.Tensor | None) -> Any:
        """The function as it is, without its graph."""
        return self.function(self.context, *self.settings, slots, *args)


# ---- pieces of steps on a CPU ----


def run_layers(context: StepContext, drafts: bool, first: int, last: int, slots, x, at, positions, mask):
    """The layers first .. last-1 of the model, or of the one that drafts: x_first [b, s, d] -> x_last."""
    layers: dict[str, Any] = {"hidden": x, "start_layer": first, "exit_layer": last, "unembed": False}
    model = context.draft_model if drafts else context.model
    return context.run_at_once(model, None, at, slots, **layers, positions=positions, mask=mask)


def unembed_states(context: StepContext, drafts: bool, slots, x):
    """g(x): [b, s, d] -> [b, s, v]."""
    return (context.draft_model if drafts else context.model).unembed(x)


# ---- the steps of plain decoding ----


def next_logits(context: StepContext, exit_layer: int, slots, last, start):
    """Logits of each row's next token from exit E; last, start [b] -> [b, v]."""
    return context.run(context.model, last[:, None], start[:, None], slots, exit_layer=exit_layer)[:, -1]


def choose_token(context: StepContext, slots, logits, noise, seen):
    """A token of each row; logits, noise, seen [b, v] -> [b]. Greedy choices have no noise."""
    return context.sampler.choose(context.scores(logits, seen), noise)
