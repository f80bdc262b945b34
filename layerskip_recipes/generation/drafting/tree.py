"""Trees of drafted tokens: several candidates for each of the next tokens, from an exit, verified in one pass."""

from dataclasses import replace
from typing import Any

import torch

from layerskip_recipes.generation.drafting.chain import ChainDrafter, outcome, state_of
from layerskip_recipes.generation.drafting.drafter import DraftedTokens, DraftStrategy, RoundStart
from layerskip_recipes.generation.drafting.tree_shape import DraftTree, accept_greedy_tree, accept_sampled_tree
from layerskip_recipes.generation.sampling import exponential_race_scores
from layerskip_recipes.generation.steps import Step, StepContext
from layerskip_recipes.model.decoder import on_device
from layerskip_recipes.model.kv_cache import visible_tree


class TreeDrafter(ChainDrafter):
    """Drafts several candidates for each of the next tokens from exit E; also verifies chains that were looked up.

    Args:
        context: of the steps.
        exit_layer: E.
        tree: the shape; rounds that need fewer levels cut its depth.
    """

    def __init__(self, context: StepContext, exit_layer: int, tree: DraftTree) -> None:
        super().__init__(context, exit_layer, tree.depth)
        self.tree, self.strategy = tree, DraftStrategy("tree")
        self.trees: dict[int, DraftTree] = {}  # by their depth
        self.tables: dict[DraftTree, tuple[torch.Tensor, ...]] = {}

    def propose(self, now: RoundStart) -> DraftedTokens:
        context, depth = self.context, now.depth(self.context, self.longest)
        if depth == 0:
            return DraftedTokens(self.strategy, context.cache.slots[: now.last_slot + 1], now.last[:, None])
        tree = self.trees.setdefault(depth, replace(self.tree, depth=depth))
        slots = context.cache.slots[: now.last_slot + tree.nodes]
        noise = context.noise(len(tree.expanded), draft=True)
        step = Step(context, draft_tree, self.exit_layer, tree)
        tokens, hidden, q, *nodes = step(slots, now.last, now.start, noise, now.seen, self.before)
        return DraftedTokens(self.strategy, slots, tokens, hidden, q, tree, *nodes)

    def verify(self, draft: DraftedTokens, now: RoundStart) -> torch.Tensor:
        context, tree = self.context, draft.tree
        if tree is None:
            return super().verify(draft, now)
        if tree not in self.tables:
            places = tree.expanded + tree.leaves
            order = [places.index(node) for node in range(tree.nodes)]
            lists = (order, tree.leaves, tree.levels, tree.draft_rows)
            self.tables[tree] = tuple(on_device(numbers, context.device) for numbers in lists)
        *tables, draft_rows = self.tables[tree]
        uniform = context.sampler.uniform((context.cache.rows, tree.depth, tree.candidates(1)), context.device)
        noise = context.noise()
        step = Step(context, tree_logits, self.exit_layer, choice=False)
        nodes = (draft.tokens, draft.parents, draft.ranks, draft.ancestors)
        at = (draft.tokens, draft.hidden, draft.parents, draft.ancestors, now.start)
        logits, states = step(draft.slots, *at, *tables, self.before)
        step = Step(context, accept_tree, tree)
        others = (draft.q, draft_rows, now.start, uniform, noise, now.seen, states)
        return self.after(*step(None, logits, *nodes, *others))


def draft_tree(context: StepContext, exit_layer: int, tree: DraftTree, slots, last, start, noise, seen, before):
    """`tree.depth` levels of candidates.

    last, start [b]; noise [b, expanded nodes, v'] or None; seen [b, v] or None; before [b, 1, d] or None -> the tensors
    of a `DraftedTokens`: tokens, hidden, q, parents, ranks, ancestors.
    """
    count, b = context.cache.slots, last.shape[0]
    # torch.eye would be a constant of the graph, which torch 2.13 cannot put into FlexAttention's kernel.
    eye = count[: tree.nodes] == count[: tree.nodes, None]
    root = torch.zeros_like(last)[:, None]
    tokens, parents, ranks, hidden, q = [last[:, None]], [root - 1], [root], [], []
    ancestors = [eye[None, :1].expand(b, -1, -1)]
    frontier, score = last[:, None], torch.zeros_like(last, dtype=torch.float32)[:, None]
    path_seen = None if seen is None else seen[:, None]
    done = 0
    for level in range(1, tree.depth + 1):
        width, drawn = frontier.shape[1], tree.candidates(level)
        first = tree.offsets[level - 1]
        on_path = ancestors[-1][:, :width]
        at = start[:, None] + first + count[:width]
        attention = {
            "positions": (start + level - 1)[:, None].expand(-1, width),
            "mask": context.mask(visible_tree(start, on_path), slots),
        }
        x = context.run(context.draft_model, frontier, at, slots, exit_layer=exit_layer, unembed=False, **attention)
        hidden.append(x)
        h = context.read_by_draft(x, before, at, slots, **attention)
        scores = context.draft_scores(h, path_seen)
        if noise is None:
            values, candidates = scores.log_softmax(-1).topk(drawn, -1)
        else:
            # The order of an exponential race is that of draws without replacement.
            race = exponential_race_scores(scores, noise[:, done : done + width])
            candidates = race.topk(drawn, -1).indices
            values = scores.gather(-1, candidates).log()
            q.append(scores)
        done += width
        size = tree.level_size(level)
        total = (score[..., None] + values).flatten(1)
        # Node 0 of a level goes on from node 0 by its likeliest token, even if other nodes have a better score: so
        # the tree holds the chain's draft, and accepts at least as much however unreliable the confidence is.
        order = total.index_fill(1, root[0], torch.inf).topk(size, -1).indices
        score = total.gather(1, order)
        new = context.in_full_vocabulary(candidates.flatten(1).gather(1, order))
        parent = order // drawn
        tokens.append(new)
        parents.append(first + parent)
        ranks.append(order % drawn)
        offset = tree.offsets[level]
        inherited = on_path.gather(1, parent[..., None].expand(-1, -1, tree.nodes))
        ancestors.append(inherited | eye[offset : offset + size])
        frontier, score, parent = new[:, : tree.width], score[:, : tree.width], parent[:, : tree.width, None]
        if path_seen is not None:
            path_seen = path_seen.gather(1, parent.expand(-1, -1, path_seen.shape[-1]))
            path_seen = path_seen.scatter(2, frontier[..., None], True)
        if before is not None:
            before = context.draft_model.norm(h).gather(1, parent.expand(-1, -1, h.shape[-1]))
    return (
        torch.cat(tokens, 1),
        torch.cat(hidden, 1),
        torch.cat(q, 1) if q else None,
        torch.cat(parents, 1),
        torch.cat(ranks, 1),
        torch.cat(ancestors, 1),
    )


def tree_logits(
    context: StepContext,
    exit_layer: int,
    slots,
    tokens,
    hidden,
    parents,
    ancestors,
    start,
    order,
    leaves,
    levels,
    before,
):
    """The full model on all nodes of a tree. First the early layers run over the leaves, which were not expanded.

    tokens, parents [b, k], hidden [b, expanded, d], ancestors [b, k, k], start [b], before [b, 1, d] or None ->
    [b, k, v], and for an adapter the model's normed states [b, k, d]. order [k]: the place of each node among the
    expanded ones and the leaves; leaves [leaves]; levels [k].
    """
    model, at = context.model, start[:, None] + context.cache.slots[: tokens.shape[1]]
    positions = start[:, None] + levels
    attention = {"positions": positions, "mask": context.mask(visible_tree(start, ancestors), slots)}
    if context.shares_layers or context.own_layers:
        view = visible_tree(start, ancestors[:, leaves])
        of_leaves = {"positions": positions[:, leaves], "mask": context.mask(view, slots)}
        early: dict[str, Any] = {"exit_layer": exit_layer, "unembed": False, **of_leaves}
        x = context.run(context.draft_model, tokens[:, leaves], at[:, leaves], slots, **early)
    if not context.shares_layers:
        return context.run(model, tokens, at, slots, **attention), None
    x = torch.cat([hidden, x], 1)[:, order]
    final = context.run(model, None, at, slots, hidden=x, start_layer=exit_layer, unembed=False, **attention)
    if before is None:
        return context.unembed(final), None
    states = model.norm(final)
    of_parents = states.gather(1, parents[:, 1:, None].expand(-1, -1, states.shape[-1]))
    context.read_by_draft(x, torch.cat([before, of_parents], 1), at, slots, **attention)
    return context.unembed(final), states


def accept_tree(
    context: StepContext,
    tree: DraftTree,
    slots,
    logits,
    tokens,
    parents,
    ranks,
    ancestors,
    q,
    draft_rows,
    start,
    uniform,
    noise,
    seen,
    states,
):
    """The result of `Drafter.verify` and `before` of the next round; the accepted path also moves to its place in the
    cache, behind the text.

    Shapes as in `accept_sampled_tree` and `DraftedTokens`.
    """
    scores = context.scores(logits, None if seen is None else context.seen_at(seen, tokens, ancestors))
    if context.sampler.greedy:
        accepted, following, path = accept_greedy_tree(tree, tokens, parents, scores)
    else:
        full_q = context.full_q(q, scores)
        accepted, following, path = accept_sampled_tree(
            tree, tokens, parents, ranks, full_q, draft_rows, scores, uniform, noise
        )
    level = context.cache.slots[1 : tree.depth + 1]
    # Slots behind the accepted path are never looked at again, so they may keep what they hold.
    source = torch.where(level <= accepted[:, None], path, level)
    (context.cpp or context.cache).move(start[:, None] + source, start[:, None] + level)
    on_path = torch.cat([torch.zeros_like(path[:, :1]), path], 1)  # the root, and a node of each level
    node = on_path.gather(1, accepted[:, None])[:, 0]
    return outcome(accepted, following, tokens.gather(1, path)), state_of(states, node)
