"""The steps of one generation: made when a round first needs them, run by their compiled graphs if there are any."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from layerskip_recipes.generation.drafting.speculation import Speculation
from layerskip_recipes.generation.drafting.tree import DraftTree
from layerskip_recipes.generation.kernels.compiling import CompiledSteps, cache_length, rounded
from layerskip_recipes.generation.sampling import Sampler
from layerskip_recipes.generation.steps import DraftHead, Steps
from layerskip_recipes.model.decoder import LayerSkipDecoder, as_layerskip_decoder
from layerskip_recipes.model.kv_cache import DecodingCache


class Runner:
    """Makes and runs the steps of one generation.

    Args:
        model: the decoder.
        rows: b.
        sampler: how tokens are chosen.
        speculation: how to draft; None: plain steps only.
        compiled: the model's graphs; None runs steps eagerly.
    """

    def __init__(
        self,
        model: LayerSkipDecoder,
        rows: int,
        sampler: Sampler,
        speculation: Speculation | None = None,
        compiled: CompiledSteps | None = None,
    ) -> None:
        self.model, self.rows, self.sampler, self.speculation = model, rows, sampler, speculation
        self.compiled = compiled
        self.device = model.tok_embeddings.weight.device
        self.settings = sampler.settings(self.device)
        self.tree: DraftTree | None = None
        self.drafter = model
        if speculation is not None:
            self.tree = DraftTree(
                speculation.num_speculations, speculation.tree_width, speculation.tree_children, greedy=sampler.greedy
            )
            if speculation.drafter is not None:
                self.drafter = as_layerskip_decoder(speculation.drafter)
        self.draft_head: DraftHead | None = None
        self.cache: DecodingCache | None = None
        self._steps: dict[tuple[int, int], Steps] = {}

    @property
    def compile_s(self) -> float:
        """Seconds that compilation took so far, in all generations of this model."""
        return self.compiled.seconds if self.compiled else 0.0

    def take_cache(self, cache: DecodingCache | None, needed: int, reserve: int = 0) -> None:
        """Use this cache if it has the rows and the slots.

        Args:
            cache: of an earlier generation.
            needed: slots.
            reserve: slots to make room for in a new cache, at least.
        """
        least = needed if self.compiled is None else cache_length(needed)
        if cache is None or cache.rows != self.rows or cache.max_len < least:
            room = max(needed, reserve)
            if self.compiled is None:
                cache = DecodingCache(self.model, self.rows, room, self.device)
            else:  # one that the graphs know, as long as it is large enough
                cache = self.compiled.cache(self.model, self.rows, cache_length(room))
        self.cache = cache

    def begin_round(self) -> None:
        """What the last round's graphs gave is needed no more."""
        if self.compiled is not None:
            self.compiled.begin_round()

    def visible(self, end: int) -> torch.Tensor:
        """The slots that attention sees, 0 .. end-1 or, for compiled steps, a few more."""
        if self.compiled is not None:
            end = min(rounded(end, self.device), self.cache.max_len)
        return self.cache.slots[:end]

    def noise(self, *nodes: int, draft: bool = False) -> torch.Tensor | None:
        """Noise of one choice for each row, [b, v], or at each of so many nodes, [b, nodes, v]; None when greedy.

        Args:
            nodes: none, or how many.
            draft: whether the draft's head chooses, over its own vocabulary.
        """
        return self.sampler.noise(
            (self.rows, *nodes, self._vocabulary(self.draft_head if draft else None)), self.device
        )

    def steps(self, exit_layer: int, depth: int = 0) -> Steps:
        """The steps for drafts of that depth from that exit; depth 0: plain steps."""
        if (exit_layer, depth) not in self._steps:
            tree, head = None, None
            if depth:
                tree = replace(self.tree, depth=depth)
                if self.speculation.draft_vocabulary is not None:
                    self.draft_head = self.draft_head or DraftHead.of(self.model, self.speculation.draft_vocabulary)
                    head = self.draft_head
            drafter = self.drafter if depth else None
            self._steps[exit_layer, depth] = Steps(
                self.model, self.cache, self.sampler, self.settings, exit_layer, tree, drafter, head
            )
        return self._steps[exit_layer, depth]

    def run(self, steps: Steps, name: str, slots: torch.Tensor, *args: Any) -> Any:
        """A step, by its compiled graph if there is one for it.

        Args:
            steps: to which it belongs.
            name: of the method.
            slots: what attention sees, which is one of args for steps with attention.
            args: of the method.
        """
        step = getattr(steps, name)
        if self.compiled is None:
            return step(*args)
        key: Sequence[Any] = [name, steps.exit_layer, self.rows, steps.shares or steps.drafter]
        if name not in ("choose", "accept_chain"):
            key += [self.cache.max_len]
        if name in ("chain_logits", "verify_greedily"):  # those for drafts of any length
            key += [args[0].shape[1], args[1] is None]
        elif name != "plain_logits":
            key += [steps.tree]
        if name.startswith(("draft", "accept", "choose")):
            key += [self.sampler.kind, self._vocabulary(steps.draft_head), steps.draft_head is None]
        if name == "accept_chain":
            key += [args[1].tokens.shape[1], args[1].q is None]
        sees_slots = not name.startswith(("accept", "choose"))
        return self.compiled(tuple(key), step, slots if sees_slots else None, *args)

    def _vocabulary(self, head: DraftHead | None) -> int:
        return self.model.tok_embeddings.num_embeddings if head is None else len(head.vocabulary)
