"""Trees of drafted tokens: their shape, and how verification walks them, greedy or by multi-candidate sampling.

Node 0 is the last token that stands; level i (1 .. depth) holds candidates for the i-th token after it. Each level
expands `width` nodes, the likeliest by the draft, into `children` candidates each. A chain is width 1, children 1.

Greedy drafts keep only the nodes that are expanded further; sampled ones keep every candidate that was drawn, because
dropping some by their probability would change the distribution of those that stay.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from layerskip_recipes.generation.sampling import residual, sample_exponential_race


@dataclass(frozen=True)
class DraftTree:
    """The shape of a round's draft.

    Args:
        depth: levels, each one sequential draft step; `num_speculations`.
        width: nodes that each level expands.
        children: candidates drawn from each expanded node; the root gets at least `width`.
        greedy: whether only expanded nodes are kept.
    """

    depth: int
    width: int = 1
    children: int = 1
    greedy: bool = True

    @property
    def is_chain(self) -> bool:
        """One candidate a level: node i is the i-th drafted token."""
        return self.width == 1 and (self.greedy or self.children == 1)

    @property
    def spare_slots(self) -> int:
        """Cache slots beside those of the text; 0 for a chain, whose drafts stand where text will."""
        return 0 if self.is_chain else self.nodes

    def candidates(self, level: int) -> int:
        """Candidates drawn from each node that level-1 expands."""
        return max(self.width, self.children) if level == 1 else self.children

    def level_size(self, level: int) -> int:
        """Nodes on a level."""
        if level == 0:
            return 1
        drawn = self.candidates(level) * (1 if level == 1 else self.width)
        return self.width if self.greedy else drawn

    @cached_property
    def offsets(self) -> list[int]:
        """The first node of each level, and the number of all nodes at the end."""
        offsets = [0]
        for level in range(self.depth + 1):
            offsets.append(offsets[-1] + self.level_size(level))
        return offsets

    def chain(self, drafted: Sequence[int]) -> list[int]:
        """Of a row's drafted tokens, level by level, the first of each: what a chain would draft."""
        return [drafted[first - 1] for first in self.offsets[1:-1]]

    @property
    def nodes(self) -> int:
        """All nodes, the root too: the positions that verification looks at."""
        return self.offsets[-1]

    @cached_property
    def expanded(self) -> list[int]:
        """The nodes that ran through the early layers while drafting, in that order: the first ones of each level."""
        return [0] + [self.offsets[level] + i for level in range(1, self.depth) for i in range(self.width)]

    @cached_property
    def leaves(self) -> list[int]:
        """The other nodes."""
        return sorted(set(range(self.nodes)) - set(self.expanded))

    @cached_property
    def levels(self) -> list[int]:
        """The level of each node."""
        return [level for level in range(self.depth + 1) for _ in range(self.level_size(level))]

    @cached_property
    def draft_rows(self) -> list[int]:
        """For each node its place in `expanded`; 0 for leaves, whose draft distribution nobody has."""
        places = {node: place for place, node in enumerate(self.expanded)}
        return [places.get(node, 0) for node in range(self.nodes)]


def accept_greedy_tree(
    tree: DraftTree, tokens: torch.Tensor, parents: torch.Tensor, logits: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The longest path of drafted tokens that the full model would have chosen, and its own next token.

    Args:
        tree: the shape.
        tokens: [b, nodes].
        parents: [b, nodes], the node that each came from; the root's is -1.
        logits: [b, nodes, v] of the full model after each node.

    Returns:
        accepted [b]; next token [b]; path [b, depth], the node at each level, meaningful up to `accepted`.
    """
    chosen = logits.argmax(-1)
    current = torch.zeros_like(tokens[:, 0])
    accepted, alive, path = current, torch.ones_like(current, dtype=torch.bool), []
    for level in range(1, tree.depth + 1):
        here = slice(tree.offsets[level], tree.offsets[level + 1])
        want = chosen.gather(1, current[:, None])
        match = (parents[:, here] == current[:, None]) & (tokens[:, here] == want)
        alive = alive & match.any(1)
        current = torch.where(alive, tree.offsets[level] + match.long().argmax(1), current)
        accepted = accepted + alive
        path.append(current)
    return accepted, chosen.gather(1, current[:, None])[:, 0], torch.stack(path, 1)


def accept_sampled_tree(
    tree: DraftTree,
    tokens: torch.Tensor,
    parents: torch.Tensor,
    ranks: torch.Tensor,
    q: torch.Tensor,
    draft_rows: torch.Tensor,
    p: torch.Tensor,
    uniform: torch.Tensor,
    noise: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Multi-candidate speculative sampling: at each node its candidates are tried in the order they were drawn.

    Candidates are drawn without replacement from q. Each is accepted with probability min(1, p(x)/q(x)); a rejection
    leaves p <- norm(max(0, p - q)) and q <- q without x, renormalised. What is accepted has the distribution p
    (recursive rejection: Jeon et al., arXiv 2402.14160; Chen et al., Sequoia, arXiv 2402.12374).

    Args:
        tree: the shape.
        tokens, parents: as in `accept_greedy_tree`.
        ranks: [b, nodes], the place of each node in the order of its parent's draws.
        q: [b, expanded, v] the draft's distribution after each expanded node, in the order of `tree.expanded`.
        draft_rows: [nodes], `tree.draft_rows` as a tensor.
        p: [b, nodes, v] the full model's.
        uniform: [b, depth, candidates of the root] draws of U(0, 1).
        noise: [b, v] `random_bits`.

    Returns:
        As `accept_greedy_tree`.
    """
    rows = torch.arange(tokens.shape[0], device=tokens.device)
    current = torch.zeros_like(tokens[:, 0])
    accepted, alive, path, rest = current, torch.ones_like(current, dtype=torch.bool), [], p[:, 0]
    for level in range(1, tree.depth + 1):
        here = slice(tree.offsets[level], tree.offsets[level + 1])
        p_left, q_left = p[rows, current], q[rows, draft_rows[current]]
        found, following = torch.zeros_like(alive), current
        for rank in range(tree.candidates(level)):
            match = (parents[:, here] == current[:, None]) & (ranks[:, here] == rank)
            node = tree.offsets[level] + match.long().argmax(1)
            x = tokens.gather(1, node[:, None])
            q_x, p_x = q_left.gather(1, x)[:, 0], p_left.gather(1, x)[:, 0]
            # Fewer tokens than candidates can have a probability: then q_x is 0 and the candidate none.
            tried = alive & ~found & match.any(1) & (q_x > 0)
            took = tried & (uniform[:, level - 1, rank] * q_x < p_x)
            following, found = torch.where(took, node, following), found | took
            rejected = (tried & ~took)[:, None]
            without = q_left.scatter(1, x, 0)
            total = without.sum(-1, keepdim=True)
            p_left = torch.where(rejected, residual(p_left, q_left), p_left)
            q_left = torch.where(rejected, torch.where(total > 0, without / total, without), q_left)
        rest = torch.where((alive & ~found)[:, None], p_left, rest)
        alive = alive & found
        current = torch.where(alive, following, current)
        accepted = accepted + alive
        path.append(current)
    rest = torch.where(alive[:, None], p[rows, current], rest)
    return accepted, sample_exponential_race(rest, noise), torch.stack(path, 1)
