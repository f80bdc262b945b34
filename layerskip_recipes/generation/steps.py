"""What one step of decoding computes, in tensors only: a plain step, a draft, a verification.

Nothing here looks at values on the host, so each step can be compiled as a whole (compiling.py).
Shapes: b rows, n drafted tokens, k nodes of the draft tree (n + 1 in a chain), v vocabulary, d width.
`start` [b] is the slot of each row's last token, the root of the draft; `slots` is 0 .. end-1, what attention sees.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torchtune.modules import TiedLinear

from layerskip_recipes.errors import ConfigError
from layerskip_recipes.generation.drafting.tree import DraftTree, accept_greedy_tree, accept_sampled_tree
from layerskip_recipes.generation.sampling import Sampler, Settings, accept_greedy, accept_sampled, lots
from layerskip_recipes.model.decoder import LayerSkipDecoder, on_device
from layerskip_recipes.model.families import capped
from layerskip_recipes.model.kv_cache import DecodingCache, visible, visible_tree


class Draft(NamedTuple):
    """What a draft leaves for its verification."""

    tokens: torch.Tensor  # [b, k], the root first
    hidden: torch.Tensor | None  # [b, expanded nodes, d], x_E; None: verification starts from the tokens
    q: torch.Tensor | None  # [b, expanded nodes, v or draft vocabulary]; None when greedy
    parents: torch.Tensor | None = None  # [b, k], trees only, as the next two
    ranks: torch.Tensor | None = None  # [b, k]
    ancestors: torch.Tensor | None = None  # [b, k, k] bool


def head_of(model: LayerSkipDecoder) -> nn.Module:
    """The module that holds the head's matrix: of a tied head the embedding."""
    return model.output.tied_module if isinstance(model.output, TiedLinear) else model.output


class DraftHead(nn.Module):
    """g of the draft on a part of the vocabulary: the head matrix's rows of those tokens, copied once.

    Args:
        model: whose norm and output are used.
        vocabulary: [v'] token ids.

    Raises:
        ValueError: if the output is no plain linear layer.
    """

    def __init__(self, model: LayerSkipDecoder, vocabulary: torch.Tensor | Sequence[int]) -> None:
        super().__init__()
        output = head_of(model)
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

    @staticmethod
    def of(model: LayerSkipDecoder, vocabulary: torch.Tensor | Sequence[int]) -> "DraftHead":
        """As the constructor; but the model's last one again if it has that vocabulary, with the weights of now.

        It stays where it is in memory, by which CUDA graphs know it.
        """
        output, wanted = head_of(model), torch.as_tensor(vocabulary).long().unique().cpu()
        (kept,) = getattr(model, "draft_head", (None,))
        if (
            kept is None
            or type(output.weight) is not nn.Parameter
            or (kept.weight.device, kept.weight.dtype) != (output.weight.device, output.weight.dtype)
            or not torch.equal(kept.vocabulary.cpu(), wanted)
        ):
            model.draft_head = (DraftHead(model, wanted),)  # in a tuple: it is no part of the model
        else:
            kept.weight.copy_(output.weight[kept.vocabulary])
            if kept.bias is not None:
                kept.bias.copy_(output.bias[kept.vocabulary])
        return model.draft_head[0]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[b, s, d] -> [b, s, v'] logits in fp32."""
        return capped(F.linear(self.norm(hidden), self.weight, self.bias).float(), self.cap)


class Steps:
    """The steps of one way of decoding.

    Args:
        model: the decoder.
        cache: its cache.
        sampler: how tokens are chosen.
        settings: of the sampler, on the model's device.
        exit_layer: E of the draft, or of a plain step.
        tree: the draft's shape; None for plain steps.
        drafter: whose early layers and head draft; other than the model, verification runs all layers itself.
        draft_head: the head of drafts, None: the drafter's.
    """

    def __init__(
        self,
        model: LayerSkipDecoder,
        cache: DecodingCache,
        sampler: Sampler,
        settings: Settings,
        exit_layer: int,
        tree: DraftTree | None = None,
        drafter: LayerSkipDecoder | None = None,
        draft_head: DraftHead | None = None,
    ) -> None:
        self.model, self.cache, self.sampler, self.exit_layer, self.tree = model, cache, sampler, exit_layer, tree
        self.settings = settings
        self.drafter = drafter or model
        self.shares = self.drafter is model
        self.draft_head = draft_head
        self.dtype = model.tok_embeddings.weight.dtype
        self.last_position = model.max_seq_len - 1
        device = cache.slots.device
        self.count = cache.slots
        if tree is not None and not tree.is_chain:
            nodes = tree.expanded + tree.leaves
            self.node_order = on_device([nodes.index(node) for node in range(tree.nodes)], device)
            self.levels = on_device(tree.levels, device)
            self.leaves = on_device(tree.leaves, device)
            self.draft_rows = on_device(tree.draft_rows, device)
            self.eye = torch.eye(tree.nodes, dtype=torch.bool, device=device)

    # ---- a plain step ----

    def plain_logits(self, last, start, slots):
        """Logits of each row's next token from exit E; last, start [b] -> [b, v]."""
        return self._run(self.model, last[:, None], start[:, None], slots, exit_layer=self.exit_layer)[:, -1]

    def choose(self, logits, noise, seen):
        """A token of each row; logits [b, v], noise [b, v] or None, seen [b, v] or None -> [b]."""
        return self.sampler.choose(self._scores(logits, seen), noise)

    # ---- drafts ----

    def draft_chain(self, last, start, slots, noise, seen) -> Draft:
        """`tree.depth` tokens one after the other; noise [b, n, v'] or None."""
        tokens, hidden, q = [last], [], []
        for i in range(self.tree.depth):
            step = self.draft_one(tokens[-1], start + i, slots, None if noise is None else noise[:, i], seen)
            token, x, probs, _, seen = step
            tokens.append(token)
            hidden.append(x)
            q.append(probs)
        return Draft(torch.stack(tokens, 1), torch.cat(hidden, 1), None if noise is None else torch.stack(q, 1))

    def draft_one(self, last, start, slots, noise, seen, confidence: bool = False):
        """One drafted token [b], its x_E [b, 1, d], q [b, v'] or None, q(token) [b] or None, and `seen` with it."""
        x = self._run(self.drafter, last[:, None], start[:, None], slots, exit_layer=self.exit_layer, unembed=False)
        scores = self._draft_scores(x, None if seen is None else seen[:, None])[:, -1]
        token = self.sampler.choose(scores, noise)
        sure = None
        if confidence:
            sure = (scores.softmax(-1) if noise is None else scores).gather(-1, token[:, None])[:, 0]
        token = self._in_full_vocabulary(token)
        if seen is not None:
            seen = seen.scatter(1, token[:, None], True)
        return token, x, None if noise is None else scores, sure, seen

    def draft_tree(self, last, start, slots, noise, seen) -> Draft:
        """`tree.depth` levels of candidates; noise [b, expanded nodes, v'] or None."""
        tree = self.tree
        b = last.shape[0]
        root = torch.zeros_like(last)[:, None]
        tokens, parents, ranks, hidden, q = [last[:, None]], [root - 1], [root], [], []
        ancestors = [self.eye[None, :1].expand(b, -1, -1)]
        frontier, score, seen = last[:, None], torch.zeros_like(last, dtype=torch.float32)[:, None], seen
        path_seen = None if seen is None else seen[:, None]
        done = 0
        for level in range(1, tree.depth + 1):
            width, drawn = frontier.shape[1], tree.candidates(level)
            first = tree.offsets[level - 1]
            on_path = ancestors[-1][:, :width]
            x = self._run(
                self.drafter,
                frontier,
                start[:, None] + first + self.count[:width],
                slots,
                exit_layer=self.exit_layer,
                unembed=False,
                positions=(start + level - 1)[:, None].expand(-1, width),
                mask=visible_tree(slots, start, on_path, self.dtype),
            )
            hidden.append(x)
            scores = self._draft_scores(x, path_seen)
            if noise is None:
                values, candidates = scores.log_softmax(-1).topk(drawn, -1)
            else:
                # The order of an exponential race is that of draws without replacement.
                candidates = lots(scores, noise[:, done : done + width]).topk(drawn, -1).indices
                values = scores.gather(-1, candidates).log()
                q.append(scores)
            done += width
            size = tree.level_size(level)
            total = (score[..., None] + values).flatten(1)
            # Node 0 of a level goes on from node 0 by its likeliest token, whatever the others promise: so the tree
            # holds what a chain would draft, and is never worse, however little the draft's confidence means.
            order = total.index_fill(1, root[0], torch.inf).topk(size, -1).indices
            score = total.gather(1, order)
            new = self._in_full_vocabulary(candidates.flatten(1).gather(1, order))
            parent = order // drawn
            tokens.append(new)
            parents.append(first + parent)
            ranks.append(order % drawn)
            offset = tree.offsets[level]
            inherited = on_path.gather(1, parent[..., None].expand(-1, -1, tree.nodes))
            ancestors.append(inherited | self.eye[offset : offset + size])
            frontier, score = new[:, : tree.width], score[:, : tree.width]
            if path_seen is not None:
                parent = parent[:, : tree.width, None].expand(-1, -1, path_seen.shape[-1])
                path_seen = path_seen.gather(1, parent).scatter(2, frontier[..., None], True)
        return Draft(
            torch.cat(tokens, 1),
            torch.cat(hidden, 1),
            torch.cat(q, 1) if q else None,
            torch.cat(parents, 1),
            torch.cat(ranks, 1),
            torch.cat(ancestors, 1),
        )

    # ---- verification: the model's logits, which no sampling setting changes, and what is accepted by them ----

    def chain_logits(self, tokens, hidden, start, slots):
        """The full model on all drafted tokens in one pass.

        Args:
            tokens: [b, n + 1], the root first.
            hidden: [b, n, d], x_E of all but the last; None: they run from the start.
            start, slots: as everywhere here.

        Returns:
            [b, n + 1, v].
        """
        at = start[:, None] + self.count[: tokens.shape[1]]
        if hidden is None or not self.shares:
            return self._run(self.model, tokens, at, slots)
        x = self._run(self.model, tokens[:, -1:], at[:, -1:], slots, exit_layer=self.exit_layer, unembed=False)
        return self._run(self.model, None, at, slots, hidden=torch.cat([hidden, x], 1))

    def accept_chain(self, logits, draft: Draft, start, uniform, noise, seen):
        """uniform [b, n], noise [b, v]; None when greedy.

        Returns:
            [b, 2 + n]: how many drafted tokens stand, the next token, the drafted tokens.
        """
        tokens = draft.tokens
        ancestors = self._tril(tokens.shape[1]) if seen is not None else None
        scores = self._scores(logits, self._seen_at(seen, tokens, ancestors))
        drafted = tokens[:, 1:]
        if self.sampler.greedy:
            accepted, following = accept_greedy(drafted, scores)
        else:
            q = F.one_hot(drafted, scores.shape[-1]).to(scores) if draft.q is None else self._full_q(draft.q, scores)
            accepted, following = accept_sampled(drafted, q, scores, uniform, noise)
        return torch.cat([accepted[:, None], following[:, None], drafted], 1)

    def verify_greedily(self, tokens, hidden, start, slots):
        """`chain_logits` and `accept_chain` in one, for one graph: there is no setting in a greedy choice."""
        logits = self.chain_logits(tokens, hidden, start, slots)
        return self.accept_chain(logits, Draft(tokens, hidden, None), start, None, None, None)

    def tree_logits(self, tokens, hidden, ancestors, start, slots):
        """As `chain_logits`, for the nodes of a tree: tokens [b, k], hidden [b, expanded, d], ancestors [b, k, k]."""
        at, positions = start[:, None] + self.count[: self.tree.nodes], start[:, None] + self.levels
        mask = visible_tree(slots, start, ancestors, self.dtype)
        if not self.shares:
            return self._run(self.model, tokens, at, slots, positions=positions, mask=mask)
        x = self._run(
            self.model,
            tokens[:, self.leaves],
            at[:, self.leaves],
            slots,
            exit_layer=self.exit_layer,
            unembed=False,
            positions=positions[:, self.leaves],
            mask=mask[:, self.leaves],
        )
        x = torch.cat([hidden, x], 1)[:, self.node_order]
        return self._run(self.model, None, at, slots, hidden=x, positions=positions, mask=mask)

    def accept_tree(self, logits, draft: Draft, start, uniform, noise, seen):
        """As `accept_chain` for a tree, whose accepted path also moves to its place in the cache.

        Returns:
            [b, 2 + n]: how many tokens of the path stand, the next token, the tokens of the path.
        """
        tree, tokens = self.tree, draft.tokens
        scores = self._scores(logits, self._seen_at(seen, tokens, draft.ancestors))
        if self.sampler.greedy:
            accepted, following, path = accept_greedy_tree(tree, tokens, draft.parents, scores)
        else:
            accepted, following, path = accept_sampled_tree(
                tree, tokens, draft.parents, draft.ranks, self._full_q(draft.q, scores), self.draft_rows, scores,
                uniform, noise,
            )  # fmt: skip
        level = self.count[1 : tree.depth + 1]
        # Behind the accepted path nothing counts, so those slots stay as they are.
        source = torch.where(level <= accepted[:, None], path, level)
        self.cache.move(start[:, None] + source, start[:, None] + level)
        return torch.cat([accepted[:, None], following[:, None], tokens.gather(1, path)], 1)

    # ---- pieces ----

    def _run(self, model, tokens, at, slots, *, hidden=None, exit_layer=None, unembed=True, positions=None, mask=None):
        """A walk of tokens, or of x_E to the end, that stand at the slots `at` [b, s]."""
        self.cache.seek(at, slots.shape[0])
        positions = at if positions is None else positions
        out = model(
            tokens,
            hidden=hidden,
            start_layer=0 if hidden is None else self.exit_layer,
            exit_layer=exit_layer,
            unembed=unembed,
            mask=visible(slots, at, self.dtype) if mask is None else mask,
            # Drafts behind a row's limit are cut later; a position that the model knows is good enough for them.
            input_pos=positions.clamp(max=self.last_position),
        )
        self.cache.cursor.at = None
        return out

    def _draft_scores(self, x, seen):
        """[b, s, d] -> [b, s, v'], what the draft chooses by; seen [b, s or 1, v]."""
        if self.draft_head is None:
            logits = self.drafter(hidden=x, start_layer=self.drafter.num_layers)
        else:
            logits = self.draft_head(x)
            seen = None if seen is None else seen[..., self.draft_head.vocabulary]
        return self._scores(logits, seen)

    def _scores(self, logits, seen):
        return self.sampler.scores(logits, seen, self.settings)

    def _in_full_vocabulary(self, tokens):
        return tokens if self.draft_head is None else self.draft_head.vocabulary[tokens]

    def _full_q(self, q, scores):
        """[b, s, v'] -> [b, s, v]: what the draft cannot propose has probability 0."""
        if self.draft_head is None:
            return q
        return scores.new_zeros(*q.shape[:2], scores.shape[-1]).index_copy(2, self.draft_head.vocabulary, q)

    def _tril(self, n):
        return (self.count[:n] <= self.count[:n, None])[None]

    def _seen_at(self, seen, tokens, ancestors):
        """[b, k, v]: the tokens so far, with those on the way to each node."""
        if seen is None:
            return None
        b, k = tokens.shape
        counts = torch.zeros(b, k, seen.shape[-1], device=seen.device)
        counts.scatter_add_(2, tokens[:, None].expand(-1, k, -1), ancestors.expand(b, -1, -1).float())
        return seen[:, None] | (counts > 0)
