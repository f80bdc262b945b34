"""Trees of drafts: shapes by hand, acceptance against loops and exact probabilities, drafts against plain walks."""

import math

import pytest
import torch
from helpers.decoding import PROMPT, greedy, model_of
from helpers.sampling import N, V, distributions, p_value, penalised, rng
from helpers.walks import walk

from layerskip_recipes.generation.drafting.speculation import Speculation
from layerskip_recipes.generation.drafting.tree_shape import DraftTree, accept_greedy_tree, accept_sampled_tree
from layerskip_recipes.generation.engine import Generation
from layerskip_recipes.generation.sampling import Sampler, next_token_probs, random_bits
from layerskip_recipes.model.kv_cache import DecodingCache, visible, visible_tree

CPU = torch.device("cpu")

# ---- the shape ----


@pytest.mark.parametrize(
    ("shape", "sizes", "expanded", "draft_rows"),
    [
        # depth, width, children, greedy; nodes of each level
        ((3, 1, 1, True), [1, 1, 1, 1], [0, 1, 2], [0, 1, 2, 0]),
        ((3, 1, 1, False), [1, 1, 1, 1], [0, 1, 2], [0, 1, 2, 0]),
        ((2, 2, 3, True), [1, 2, 2], [0, 1, 2], [0, 1, 2, 0, 0]),
        ((2, 2, 3, False), [1, 3, 6], [0, 1, 2], [0, 1, 2, 0, 0, 0, 0, 0, 0, 0]),
        ((3, 3, 1, True), [1, 3, 3, 3], [0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 5, 6, 0, 0, 0]),
        ((3, 3, 1, False), [1, 3, 3, 3], [0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 5, 6, 0, 0, 0]),
        ((1, 4, 2, False), [1, 4], [0], [0, 0, 0, 0, 0]),
        ((2, 1, 2, True), [1, 1, 1], [0, 1], [0, 1, 0]),
        ((2, 1, 2, False), [1, 2, 2], [0, 1], [0, 1, 0, 0, 0]),
        ((3, 2, 3, False), [1, 3, 6, 6], [0, 1, 2, 4, 5], [0, 1, 2, 0, 3, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
    ],
    ids=str,
)
def test_shape(shape, sizes, expanded, draft_rows):
    tree = DraftTree(*shape)
    assert tree.is_chain == (sum(sizes) == len(sizes))
    assert [tree.level_size(level) for level in range(len(sizes))] == sizes
    assert tree.offsets == [sum(sizes[:level]) for level in range(len(sizes) + 1)]
    assert tree.nodes == sum(sizes)
    assert tree.levels == [level for level, size in enumerate(sizes) for _ in range(size)]
    assert tree.expanded == expanded
    assert tree.leaves == [node for node in range(sum(sizes)) if node not in expanded]
    assert tree.draft_rows == draft_rows


# ---- greedy acceptance ----


def random_tree(tree, generator, alphabet=5):
    """Tokens and parents [nodes]: a parent on the level before, siblings of different tokens."""
    tokens, parents = [0], [-1]
    for level in range(1, tree.depth + 1):
        before = range(tree.offsets[level - 1], tree.offsets[level])
        free = [(parent, token) for parent in before for token in range(alphabet)]
        for i in torch.randperm(len(free), generator=generator)[: tree.level_size(level)].tolist():
            parents.append(free[i][0])
            tokens.append(free[i][1])
    return tokens, parents


def longest_path(tokens, parents, chosen, node=0):
    """The nodes below `node` that the model would choose, one after the other."""
    for child, parent in enumerate(parents):
        if parent == node and tokens[child] == chosen[node]:
            return [child, *longest_path(tokens, parents, chosen, child)]
    return []


@pytest.mark.parametrize("shape", [(1, 3, 1), (3, 2, 2), (4, 3, 1), (4, 1, 1)], ids=str)
def test_accept_greedy_tree(shape):
    tree, rows = DraftTree(*shape), 300
    generator = rng(40)
    trees = [random_tree(tree, generator) for _ in range(rows)]
    logits = torch.randn(rows, tree.nodes, 5, generator=generator)
    tokens, parents = (torch.tensor(column) for column in zip(*trees, strict=True))
    for node in range(1, tree.nodes):
        # Most children are what their parent likes: so that long paths occur.
        likes = (torch.rand(rows, generator=generator) < 0.7).nonzero().flatten()
        logits[likes, parents[likes, node], tokens[likes, node]] += 3
    accepted, following, path = accept_greedy_tree(tree, tokens, parents, logits)
    lengths = set()
    for row in range(rows):
        chosen = [max(range(5), key=scores.__getitem__) for scores in logits[row].tolist()]
        expected = longest_path(*trees[row], chosen)
        assert accepted[row] == len(expected)
        assert path[row, : len(expected)].tolist() == expected
        assert following[row] == chosen[expected[-1] if expected else 0]
        lengths.add(len(expected))
    assert lengths == set(range(tree.depth + 1))


# ---- sampled acceptance ----


def race_order(q, count, generator):
    """[n, v] distributions -> [n, count] tokens in the order in which they win an exponential race."""
    return (torch.empty(q.shape).exponential_(generator=generator) / q).argsort(-1)[:, :count]


def draft_and_accept(tree, p, q, seed, n=N):
    """A tree of depth 2 of a Markov chain: rows of p and q [V + 1, V] are what follows a token, row V what starts.

    The nodes of a level stand in an order of their own, not in that of the draws.

    Returns:
        first and second token of the path [n], -1 where it ends before; accepted [n]; next token [n].
    """
    generator = rng(seed)
    first = race_order(q[V].expand(n, V), tree.candidates(1), generator)
    ranks = [q[V][first].argsort(-1, descending=True)]
    first = first.gather(1, ranks[0])
    tokens, parents = [torch.zeros(n, 1, dtype=torch.long), first], [torch.full((n, 1), -1), torch.zeros_like(first)]
    second, of, rank = [], [], []
    for i in range(tree.width):
        second.append(race_order(q[first[:, i]], tree.children, generator))
        of.append(torch.full_like(second[-1], 1 + i))
        rank.append(torch.arange(tree.children).expand(n, -1))
    shuffle = torch.rand(n, tree.width * tree.children, generator=generator).argsort(1)
    tokens.append(torch.cat(second, 1).gather(1, shuffle))
    parents.append(torch.cat(of, 1).gather(1, shuffle))
    ranks = [torch.zeros(n, 1, dtype=torch.long), *ranks, torch.cat(rank, 1).gather(1, shuffle)]
    before = [torch.full((n, 1), V), *tokens[1:]]
    tokens, parents, ranks, before = (torch.cat(parts, 1) for parts in (tokens, parents, ranks, before))
    accepted, following, path = accept_sampled_tree(
        tree,
        tokens,
        parents,
        ranks,
        q[before[:, tree.expanded]],
        torch.tensor(tree.draft_rows),
        p[before],
        torch.rand(n, 2, tree.candidates(1), generator=generator),
        random_bits((n, V), CPU, generator),
    )
    kept = tokens.gather(1, path)
    # A path goes from parent to child.
    assert (parents.gather(1, path[:, :1])[:, 0] == 0)[accepted > 0].all()
    assert (parents.gather(1, path[:, 1:])[:, 0] == path[:, 0])[accepted > 1].all()
    return torch.where(accepted > 0, kept[:, 0], -1), torch.where(accepted > 1, kept[:, 1], -1), accepted, following


def acceptance(p, q, candidates):
    """The probability that one of so many candidates, drawn from q without replacement, is accepted; by enumeration."""
    if candidates == 0 or sum(q) == 0:
        return 0.0
    total = 0.0
    for x in range(len(q)):
        if q[x] == 0:
            continue
        stands = min(1.0, p[x] / q[x])
        total += q[x] * stands
        rest = [max(0.0, a - b) for a, b in zip(p, q, strict=True)]
        if stands < 1 and sum(rest) > 0:
            left = [b if y != x else 0.0 for y, b in enumerate(q)]
            rest, left = ([a / sum(values) if sum(values) else 0.0 for a in values] for values in (rest, left))
            total += q[x] * (1 - stands) * acceptance(rest, left, candidates - 1)
    return total


def markov(kind):
    """p and q [V + 1, V] of a kind."""
    p_logits, q_logits = 2 * torch.randn(2, V + 1, V, generator=rng(41))
    if kind in ("similar", "two tokens", "one token"):
        q_logits = p_logits + 0.3 * q_logits
    if kind == "disjoint":
        p_logits[:, 2:], q_logits[:, :2] = -torch.inf, -torch.inf
    top_k = {"two tokens": 2, "one token": 1}.get(kind)
    return next_token_probs(p_logits, 1.0), next_token_probs(q_logits, 1.0, top_k)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["similar", "different", "disjoint", "two tokens", "one token"])
@pytest.mark.parametrize("shape", [(2, 1, 1), (2, 1, 2), (2, 2, 1), (2, 2, 3), (2, 3, 2)], ids=str)
def test_tree_then_accept_has_the_distribution_of_the_full_model(shape, kind):
    """Also with more candidates than tokens that have a probability. Positions count where they are reached."""
    tree = DraftTree(*shape, greedy=False)
    p, q = markov(kind)
    first, second, accepted, following = draft_and_accept(tree, p, q, 42)
    values = [p_value(torch.where(accepted > 0, first, following), p[V])]
    for before in range(V):
        reached = first == before
        if reached.sum() > 1000:
            values.append(p_value(torch.where(accepted == 2, second, following)[reached], p[before]))
        reached = second == before
        if reached.sum() > 1000:
            values.append(p_value(following[reached], p[before]))
    assert min(values) > 1e-3 / len(values), values
    assert len(values) > (0 if kind == "disjoint" else 1 if kind == "one token" else 3)
    rate = acceptance(p[V].tolist(), q[V].tolist(), tree.candidates(1))
    assert (rate == 0) == (kind == "disjoint")
    assert abs((accepted > 0).double().mean().item() - rate) < 4.5 * math.sqrt(rate * (1 - rate) / N) + 1e-6


def test_more_candidates_are_accepted_more_often():
    p = torch.tensor([0.4, 0.3, 0.2, 0.1, 0.0]).expand(V + 1, V)
    q = torch.tensor([0.1, 0.2, 0.3, 0.2, 0.2]).expand(V + 1, V)
    rates = [
        (draft_and_accept(DraftTree(2, 1, children, greedy=False), p, q, 43)[2] > 0).double().mean().item()
        for children in (1, 2, 3)
    ]
    # sum_x min(p, q) = 0.6 for one; then {0: 0.75, 1: 0.25} is left to accept.
    assert abs(rates[0] - 0.6) < 0.01
    assert rates[1] > rates[0] + 0.03 and rates[2] > rates[1] + 0.03


def test_equal_distributions_accept_the_first_candidates():
    p = distributions(V + 1, seed=44)
    _, _, accepted, _ = draft_and_accept(DraftTree(2, 2, 2, greedy=False), p, p, 45)
    # The second level exists where the first candidate was expanded: not under the least likely of three or more.
    assert (accepted >= 1).all() and (accepted == 2).double().mean() > 0.6


# ---- the masks, and moving in the cache ----


def test_what_text_sees():
    slots, at = torch.arange(7), torch.tensor([[0, 3], [5, 6]])
    mask = visible(at).mask(slots, torch.float64)
    assert mask.dtype == torch.float64
    for row, query in ((row, query) for row in range(2) for query in range(2)):
        assert mask[row, query].tolist() == [0.0 if j <= at[row, query] else -math.inf for j in range(7)]


def test_what_a_tree_sees():
    """All of the text, of the tree itself only the ancestors, nothing behind it; each row at its own place."""
    tree, generator = DraftTree(3, 2, 2), rng(46)
    roots, end = [4, 0, 6], 20
    ancestors = torch.zeros(3, tree.nodes, tree.nodes, dtype=torch.bool)
    expected = torch.full((3, tree.nodes, end), -torch.inf)
    for row, root in enumerate(roots):
        _, parents = random_tree(tree, generator)
        for node in range(tree.nodes):
            expected[row, node, :root] = 0
            at = node
            while at >= 0:
                ancestors[row, node, at] = True
                expected[row, node, root + at] = 0
                at = parents[at]
    root = torch.tensor(roots)
    assert torch.equal(visible_tree(root, ancestors).mask(torch.arange(end), torch.float32), expected)
    some = [1, 3, 4]
    assert torch.equal(visible_tree(root, ancestors[:, some]).mask(torch.arange(end), torch.float32), expected[:, some])
    assert torch.equal(visible_tree(root, ancestors).mask(torch.arange(8), torch.float32), expected[..., :8])


@pytest.mark.parametrize("rows", [1, 3])
def test_moving_in_the_cache(rows):
    """Overlapping sources and targets, as a path's are: all is read before anything is written."""
    cache = DecodingCache(model_of("llama3_2"), rows, 9)
    before = []
    for layer in cache.layers:
        layer.k, layer.v = torch.randn(2, rows, 2, 9, 4)
        before.append((layer.k.clone(), layer.v.clone()))
    source, target = torch.tensor([[3, 5, 7], [1, 2, 3], [8, 4, 5]])[:rows], torch.tensor([[2, 3, 4]] * 3)[:rows]
    cache.move(source, target)
    for layer, old in zip(cache.layers, before, strict=True):
        for buffer, was in zip((layer.k, layer.v), old, strict=True):
            for row in range(rows):
                for slot in range(9):
                    came_from = dict(zip(target[row].tolist(), source[row].tolist(), strict=True)).get(slot, slot)
                    assert torch.equal(buffer[row, :, slot], was[row, :, came_from])


# ---- what is drafted ----

EXIT = 2


def plain_tree(text, tree, vocabulary=None, penalty=1.0):
    """The nodes of a greedy tree as (tokens of the path, parent, rank), every path walked from scratch.

    Of each level's candidates stay the likeliest child of the first node, and the `width - 1` likeliest others.
    """
    nodes, frontier = [((), -1, 0)], [(0, (), 0.0)]
    for level in range(1, tree.depth + 1):
        drawn, found = max(tree.width, tree.children) if level == 1 else tree.children, []
        for node, path, score in frontier:
            tokens = (*text, *path)
            logits = walk(model_of("llama3_2"), torch.tensor([tokens]), range(EXIT))[0, -1].tolist()
            logits = penalised(logits, tokens, penalty)
            allowed = range(len(logits)) if vocabulary is None else sorted(vocabulary)
            total = torch.tensor([logits[token] for token in allowed]).logsumexp(0).item()
            likeliest = sorted(allowed, key=lambda token: -logits[token])[:drawn]
            found += [
                (score + logits[token] - total, (*path, token), node, rank) for rank, token in enumerate(likeliest)
            ]
        kept = found[:1] + sorted(found[1:], reverse=True)[: tree.width - 1]
        frontier = [(len(nodes) + i, path, score) for i, (score, path, _, _) in enumerate(kept)]
        nodes += [(path, parent, rank) for _, path, parent, rank in kept]
    return nodes


@torch.no_grad()
def drafts_of(prompts, count, shape, sampler=None, **speculation):
    """Each round of a generation: the rows' texts before it, its draft, and the new tokens of each row."""
    depth, width, children = shape
    generation = Generation(
        model_of("llama3_2"),
        prompts,
        count,
        sampler=sampler,
        speculation=Speculation(EXIT, depth, width, children, **speculation),
    )
    propose, rounds, last = generation.drafter.propose, [], []

    def recording(now):
        draft = propose(now)
        if draft.tree is not None:
            last.append(draft)
        return draft

    generation.drafter.propose = recording
    texts = [list(prompt) for prompt in prompts]
    for new in generation:
        if last:
            rounds.append(([list(text) for text in texts], last.pop(), new))
        texts = [text + tokens for text, tokens in zip(texts, new, strict=True)]
    return rounds


@pytest.mark.parametrize("penalty", [1.0, 1.5])
@pytest.mark.parametrize("vocabulary", [None, range(0, 97, 2)], ids=["all", "even"])
@pytest.mark.parametrize("shape", [(3, 3, 2), (2, 2, 4), (2, 3, 1)], ids=str)
def test_a_greedy_tree_holds_what_a_plain_search_finds(shape, vocabulary, penalty):
    prompts, count = [PROMPT, PROMPT[:1], (9, 60, 2, 41, 41, 7, 3)], 9
    rounds = drafts_of(prompts, count, shape, Sampler(repetition_penalty=penalty), draft_vocabulary=vocabulary)
    assert len(rounds) > 1
    for texts, draft, _ in rounds:
        room = max(count - len(text) + len(prompt) for text, prompt in zip(texts, prompts, strict=True))
        tree = DraftTree(min(shape[0], room - 1), *shape[1:])
        for row, text in enumerate(texts):
            if len(text) - len(prompts[row]) == count:
                continue  # a row at its end drafts anything
            nodes = plain_tree(text, tree, vocabulary, penalty)
            assert draft.tokens[row].tolist() == [text[-1]] + [path[-1] for path, _, _ in nodes[1:]]
            assert draft.parents[row].tolist() == [parent for _, parent, _ in nodes]
            assert draft.ranks[row].tolist() == [rank for _, _, rank in nodes]
            for node, (_, parent, _) in enumerate(nodes):
                on_path = [node]
                while parent >= 0:
                    on_path.append(parent)
                    parent = nodes[parent][1]
                assert draft.ancestors[row, node].nonzero().flatten().tolist() == sorted(on_path)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(3, 2, 2), (4, 3, 1), (2, 4, 3)], ids=str)
def test_a_greedy_tree_is_never_worse_than_its_chain(shape):
    """Each round keeps the longest path that the full model follows in the tree, at least what a chain would keep."""
    more = 0
    for prompt in (PROMPT, PROMPT[:1], (30, 31, 7), (9, 60, 2, 41)):
        count = 24
        rounds = drafts_of([prompt], count, shape)
        full = [*prompt, *greedy("llama3_2", prompt, count)]
        for (text,), draft, (new,) in rounds:
            depth = min(shape[0], len(prompt) + count - len(text) - 1)
            tokens, parents = draft.tokens[0].tolist(), draft.parents[0].tolist()
            node, kept = 0, []
            while node is not None:
                want = full[len(text) + len(kept)] if len(text) + len(kept) < len(full) else None
                children = [i for i, parent in enumerate(parents) if parent == node and tokens[i] == want]
                node = children[0] if children else None
                kept += [want] if children else []
            assert new == [*kept, full[len(text) + len(kept)]]
            chain = greedy("llama3_2", tuple(text), depth, EXIT)
            accepted = next((i for i in range(depth) if chain[i] != full[len(text) + i]), depth)
            assert len(kept) >= accepted
            more += len(kept) > accepted
        chain = Generation(model_of("llama3_2"), [prompt], count, speculation=Speculation(EXIT, shape[0]))
        tree = Generation(model_of("llama3_2"), [prompt], count, speculation=Speculation(EXIT, *shape))
        for generation in (chain, tree):
            assert sum(map(len, (new[0] for new in generation))) == count
        assert tree.stats.rounds <= chain.stats.rounds
        assert shape[1] > 1 or tree.stats.rounds == chain.stats.rounds
    assert (more > 3) == (shape[1] > 1)


def test_a_sampled_tree_keeps_every_candidate_that_was_drawn():
    """Two from the root and from each node that goes on: those are the first child of the first node, which a chain
    would have drawn, and the likeliest of the others. Siblings differ, ranks count the draws.
    """
    rounds = drafts_of([PROMPT, PROMPT[:2]], 14, (3, 2, 2), Sampler(1.5, rng=rng(47)))
    assert len(rounds) > 2
    for texts, draft, _ in rounds[:-1]:
        for row in range(2):
            tokens, parents, ranks = (part[row].tolist() for part in (draft.tokens, draft.parents, draft.ranks))
            assert tokens[0] == texts[row][-1] and parents[0] == -1
            families = {}
            for token, parent, rank in zip(tokens[1:], parents[1:], ranks[1:], strict=True):
                families.setdefault(parent, []).append((rank, token))
            assert next(iter(families)) == 0 and len(families) == len(draft.q[row])
            for children in families.values():
                assert sorted(rank for rank, _ in children) == [0, 1]
                assert len({token for _, token in children}) == 2
            tree, probability = DraftTree(3, 2, 2, greedy=False), [1.0]
            for node in range(1, tree.nodes):
                q = draft.q[row, tree.draft_rows[parents[node]]].tolist()
                probability.append(probability[parents[node]] * q[tokens[node]])
            for level in range(1, 4):
                first, *others = range(tree.offsets[level], tree.offsets[level + 1])
                assert (parents[first], ranks[first]) == (tree.offsets[level - 1], 0)
                assert others == sorted(others, key=lambda node: -probability[node])
