"""exit_quality against plain PyTorch: acceptance by draft vocabulary, of exits and of trained drafts."""

import pytest
import torch
import torch.nn.functional as F
from helpers.acceptance import matches
from helpers.tiny import VOCAB, make_tiny, unembedded
from torch.utils._python_dispatch import TorchDispatchMode

from layerskip_recipes.model.decoder import layerskip_decoder
from layerskip_recipes.model.draft import Draft
from layerskip_recipes.model.exit_quality import exit_quality

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


def agreement(final, logits, ids):
    """[b, s], padded to 20 positions: whether the best of some tokens is the last layer's."""
    return F.pad(torch.tensor(ids)[logits[..., ids].argmax(-1)] == final.argmax(-1), (0, 20 - final.shape[1]))


def overlaps(final, logits, ids, counts):
    """sum_v min(p_v, q_v) at each label, q over some tokens."""
    return torch.minimum(final.softmax(-1)[..., ids], logits[..., ids].softmax(-1)).sum(-1)[counts]


@pytest.mark.parametrize("family", ["llama3_2", "gemma2"])
def test_acceptance_by_draft_vocabulary(family, float64):
    """Over all tokens and over the first few of a vocabulary, with q renormalised over them."""
    model = layerskip_decoder(make_tiny(family))
    torch.manual_seed(1)
    batches = some_batches()
    found = exit_quality(model, copied(batches), [2, 5, 6], CPU, num_speculations=8, vocabulary=FREQUENT, sizes=[3, 30])
    counts = torch.cat([F.pad(counted(batch), (0, 20 - batch["labels"].shape[1])) for batch in batches])
    with torch.no_grad():
        for e in (2, 5):
            pairs = []
            for batch in batches:
                _, hidden = model.hidden_states(batch["tokens"], exits=[e, 6])
                pairs.append([unembedded(model, hidden[x]).double() for x in (6, e)])
            for name, ids in {"all": [*range(VOCAB)], "3": FREQUENT[:3], "30": FREQUENT[:30]}.items():
                agrees = torch.cat([agreement(*pair, ids) for pair in pairs])
                shared = [overlaps(*pair, ids, counted(batch)) for pair, batch in zip(pairs, batches, strict=True)]
                acceptance = found[e].acceptance[name]
                assert acceptance["matches"] == pytest.approx(matches(agrees, 8, counts), abs=1e-9), name
                assert acceptance["overlap"] == pytest.approx(torch.cat(shared).mean().item(), abs=1e-6), name
            assert found[e].agreement == found[e].acceptance["all"]["matches"][0]
    assert list(found[6].acceptance) == ["all"] and found[6].overlap == pytest.approx(1)
    assert found[6].acceptance["all"]["matches"] == [1.0] * 8


@pytest.mark.parametrize("vocabulary", [None, FREQUENT], ids=["all", "some"])
@pytest.mark.parametrize("kind", ["copy", "adapter"])
def test_acceptance_of_a_trained_draft(kind, vocabulary):
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
    counts, (first, *later) = counted(batch), [agreement(final, one, ids) for one in logits]
    expected = matches(first, 8, F.pad(counts, (0, 6)), *later)
    assert found.acceptance["all"]["matches"] == pytest.approx(expected, abs=1e-6) and found.agreement > 0
    assert found.overlap == pytest.approx(overlaps(final, logits[0], ids, counts).mean().item(), abs=1e-5)


class CountedCasts(TorchDispatchMode):
    """How often a tensor of a shape is cast."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default and args[0].shape == self.shape:
            self.count += 1
        return func(*args, **(kwargs or {}))


def test_the_head_is_cast_once_for_all_chunks_and_exits():
    """bf16 products of fp32 weights: 3 exits of two chunks."""
    model = layerskip_decoder(make_tiny("llama3"))
    tokens = torch.randint(VOCAB, (10, 100))
    batch = {"tokens": tokens, "labels": tokens.clone()}
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False), CountedCasts(model.output.weight.shape) as casts:
        exit_quality(model, [batch], [2, 4, 6], CPU)
    assert casts.count == 1
