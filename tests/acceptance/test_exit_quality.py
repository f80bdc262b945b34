"""exit_quality against plain PyTorch: acceptance by draft vocabulary, of exits and of trained drafts."""

import math
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from helpers.tiny import VOCAB, make_tiny, unembedded

from layerskip_recipes.acceptance.exit_quality import exit_quality
from layerskip_recipes.model.decoder import layerskip_decoder
from layerskip_recipes.model.draft import Draft

CPU = torch.device("cpu")
FREQUENT = [5, 96, 7, *range(20, 60), 3]


def some_batches() -> list[dict[str, torch.Tensor]]:
    """Two batches of several lengths, where some labels do not count."""
    batches = []
    for length in (9, 14):
        tokens = torch.randint(VOCAB, (3, length))
        labels = tokens.clone()
        labels[0, :4] = labels[1, 7:] = -100
        batches.append({"tokens": tokens, "labels": labels})
    return batches


def copied(batches):
    return [{name: value.clone() for name, value in batch.items()} for batch in batches]


def counted(batch):
    """[b, s], the positions whose next token counts."""
    return F.pad(batch["labels"][:, 1:], (0, 1), value=-100) != -100


def acceptance(final, logits, ids):
    """[3, b, s], padded to 20 positions: whether the best of some tokens is the last layer's; sum_v min(p_v, q_v); the
    largest q_v."""
    agrees = torch.tensor(ids)[logits[..., ids].argmax(-1)] == final.argmax(-1)
    q = logits[..., ids].softmax(-1)
    overlap = torch.minimum(final.softmax(-1)[..., ids], q).sum(-1)
    return F.pad(torch.stack([agrees.to(overlap), overlap, q.max(-1).values]), (0, 20 - final.shape[1]))


def followed_rounds(
    first: torch.Tensor,
    later: torch.Tensor,
    counts: torch.Tensor,
    drafts: Sequence[int],
    sure: tuple[torch.Tensor, torch.Tensor] | None = None,
    least: float = 0.0,
) -> list[tuple[float, float]]:
    """Tokens and drafted tokens per round for each draft length, found by following the rounds of each text from its
    first token on.

    first, later [b, s]: the probability that a token is accepted as the first drafted one, or as a later one. counts
    [b, s]: True for the tokens of texts. A text's first token comes from its prefill. With `sure`, the largest
    probability of the first drafted token and of later ones, a draft ends where their product is below `least`.
    """
    rates = []
    for d in drafts:
        rounds = drafted = written = 0.0
        for row, there in enumerate(counts.tolist()):
            starts = [i for i in range(len(there)) if there[i] and (i == 0 or not there[i - 1])]
            for start in starts:
                end = next((i for i in range(start, len(there)) if not there[i]), len(there))
                a, b, *c = [x[row, start + 1 : end].tolist() for x in (first, later, *(sure or ()))]
                begins = [1.0] + [0.0] * (len(a) + d + 1)  # the probability that a round begins at a token
                for i in range(len(a)):
                    length = d
                    if sure is not None:
                        known = [*c[0][i : i + 1], *c[1][i + 1 :], 0.0]
                        length = next((k for k in range(1, d) if math.prod(known[:k]) < least), d)
                    drafted += begins[i] * length
                    reached = begins[i]
                    for k, p in enumerate([*a[i : i + 1], *b[i + 1 : i + length]]):
                        begins[i + k + 1] += reached * (1 - p)
                        reached *= p
                    begins[min(i + length + 1, len(a))] += reached
                rounds += sum(begins[: len(a)])
                written += len(a)
        rates.append((written / rounds, drafted / rounds))
    return rates


def check_rates(found, first, later, counts):
    """Tokens per round of 1 to 8 drafted tokens, greedily and sampled; and of drafts that end at a confidence of .4."""
    *first, sure = first
    *later, sure_later = later
    for kind, a, b in zip(("greedy", "sampled"), first, later, strict=True):
        assert found[kind] == pytest.approx([n for n, _ in followed_rounds(a, b, counts, range(1, 9))], abs=1e-5), kind
        ended = followed_rounds(a, b, counts, range(1, 9), (sure, sure_later), 0.4)
        torch.testing.assert_close(torch.tensor(found["ended"][kind]), torch.tensor(ended), atol=1e-5, rtol=0)
        assert 1 <= ended[-1][1] < 8


@pytest.mark.parametrize("family", ["llama3_2", "gemma2"])
@pytest.mark.parametrize("some", [False, True], ids=["all", "generated"])
def test_acceptance_by_draft_vocabulary_is_that_of_followed_rounds(family, some, float64):
    """Over all tokens and over the first few of a vocabulary, with q renormalised over them. Labels that decoding never
    generates count in the loss only."""
    model = layerskip_decoder(make_tiny(family))
    torch.manual_seed(1)
    batches = some_batches()
    options = {"num_speculations": 8, "vocabulary": FREQUENT, "sizes": [3, 30]}
    whole = exit_quality(model, copied(batches), [2, 5, 6], CPU, **options)
    if some:  # neither the first and last labels of a row, nor the last row of a batch

        def generated(labels):
            written = torch.ones_like(labels, dtype=torch.bool)
            written[:, :6] = written[:, -1] = written[2] = False
            return written

        options["generated"] = generated
    found = exit_quality(model, copied(batches), [2, 5, 6], CPU, **options)
    assert [found[e].loss for e in found] == [whole[e].loss for e in whole]
    if some:
        assert found[2].labels == whole[2].labels > found[2].generated > 0
        for batch in batches:
            batch["labels"][~generated(batch["labels"])] = -100
    counts = torch.cat([F.pad(counted(batch), (0, 20 - batch["labels"].shape[1])) for batch in batches])
    with torch.no_grad():
        for e in (2, 5):
            pairs = []
            for batch in batches:
                _, hidden = model.hidden_states(batch["tokens"], exits=[e, 6])
                pairs.append([unembedded(model, hidden[x]).double() for x in (6, e)])
            for name, ids in {"all": [*range(VOCAB)], "3": FREQUENT[:3], "30": FREQUENT[:30]}.items():
                accepted = torch.cat([acceptance(*pair, ids) for pair in pairs], 1)
                check_rates(found[e].tokens_per_round[name], accepted, accepted, counts)
                if name == "all":
                    means = accepted[:2, counts].mean(-1).tolist()
                    assert [found[e].agreement, found[e].overlap] == pytest.approx(means, abs=1e-6)
            assert found[e].accepted_length == found[e].tokens_per_round["all"]["greedy"][-1] - 1
    assert list(found[6].tokens_per_round) == ["all"] and found[6].overlap == pytest.approx(1)
    if some:
        return
    # The last layer writes texts of 5, 8; 6, 6; and 8, 13 tokens after the first, up to 9 tokens in a round.
    assert found[6].tokens_per_round["all"]["greedy"][-1] > 5 and found[6].agreement == 1


@pytest.mark.parametrize("vocabulary", [None, FREQUENT], ids=["all", "some"])
@pytest.mark.parametrize("kind", ["copy", "adapter"])
def test_acceptance_of_a_trained_draft_is_that_of_followed_rounds(kind, vocabulary):
    """An adapter's later tokens in a row are those that it drafts from its own states."""
    model = layerskip_decoder(make_tiny())
    torch.manual_seed(1)
    draft = Draft(model, kind, 3).eval()
    draft.vocabulary = vocabulary
    batch = some_batches()[1]
    found = exit_quality(model, copied([batch]), [0, 6], CPU, num_speculations=8, draft=draft)[0]
    ids = [*range(VOCAB)] if vocabulary is None else vocabulary
    with torch.no_grad():
        x, last = draft.teacher_states(model, batch["tokens"])
        final, *logits = (model.output(state).float() for state in (last, *draft.states(x, last)))
    counts, accepted = F.pad(counted(batch), (0, 6)), [acceptance(final, one, ids) for one in logits]
    check_rates(found.tokens_per_round["all"], accepted[0], accepted[-1], counts)
    assert found.agreement > 0 and found.overlap == pytest.approx(accepted[0][1, counts].mean().item(), abs=1e-5)
