"""Where drafts do not pay, decoding goes on without them: by a clock that counts layers, and without losing a token."""

from types import SimpleNamespace

import pytest
import torch
from helpers.decoding import START, make_model, model_of, numbered, probabilities, small_model
from helpers.sampling import p_value, rng
from helpers.speculation import PROMPTS, VARIANTS, PlainBetween, perturbed, plain, run, speculation_of
from helpers.tiny import SIZE

from layerskip_recipes.generation import engine
from layerskip_recipes.generation.drafting.choice import DiscountedUCB
from layerskip_recipes.generation.drafting.speculation import Speculation
from layerskip_recipes.generation.sampling import Sampler
from layerskip_recipes.model.draft import Draft

NEW = 129


@pytest.fixture
def clock(monkeypatch):
    """Each layer takes a second, and a twentieth for each further token. Watch layers with `clock.watch`."""
    now = SimpleNamespace(seconds=0.0)

    def tick(module, args):
        now.seconds += 0.95 + 0.05 * args[0].shape[1]

    def watch(layers):
        for layer in layers:
            layer.register_forward_pre_hook(tick)

    monkeypatch.setitem(SIZE, "max_seq_len", 2 * NEW)
    monkeypatch.setattr(engine, "time", SimpleNamespace(perf_counter=lambda: now.seconds))
    now.watch = watch
    return now


def bad_draft(model, kind):
    """A speculation whose drafts the model never says."""
    if kind in ("exit", "look-up"):
        drafter = perturbed.__wrapped__(model, 40.0, 2)
        return Speculation(2, 4, drafter=drafter, prompt_lookup=1 if kind == "look-up" else None)
    torch.manual_seed(3)
    draft = Draft(model, kind, 2, 1) if kind == "adapter" else Draft(model, kind, 1)
    for parameter in draft.parameters():
        parameter.data += 3 * torch.randn_like(parameter)
    return Speculation(2 if kind == "adapter" else 1, 4, drafter=draft.requires_grad_(False).decoder(model))


@pytest.mark.parametrize(("kind", "rows"), [("exit", 3), ("look-up", 1), ("copy", 3), ("adapter", 3)])
def test_bad_drafts_cost_a_twentieth_at_most(kind, rows, clock):
    model, prompts = make_model(), PROMPTS[:rows]
    speculation = bad_draft(model, kind)
    clock.watch({*model.layers, *speculation.drafter.layers})
    plainly = run(model, prompts, NEW)
    drafted = run(model, prompts, NEW, speculation=speculation, choice=DiscountedUCB(plain=True))
    assert drafted.generated == plainly.generated
    assert drafted.stats.decode_s < 1.05 * plainly.stats.decode_s
    assert drafted.stats.plain_share > (0.5 if kind == "look-up" else 0.9) and drafted.stats.drafted > 0


def test_good_drafts_are_hardly_slower_by_the_choice(clock):
    """Exit 1 of a model whose other layers do nothing: all drafts are accepted."""
    model = make_model()
    for layer in model.layers[1:]:
        torch.nn.init.zeros_(layer.attn.output_proj.weight)
        torch.nn.init.zeros_(layer.mlp.w2.weight)
    clock.watch(model.layers)
    arguments = {"speculation": Speculation(1, 4)}
    always = run(model, PROMPTS[:1], NEW, **arguments)
    chosen = run(model, PROMPTS[:1], NEW, **arguments, choice=DiscountedUCB(plain=True))
    assert chosen.generated == always.generated
    assert chosen.stats.decode_s < 1.05 * always.stats.decode_s
    assert chosen.stats.rounds_by_kind["plain"] <= 2 and chosen.stats.acceptance_rate == 1


@pytest.mark.parametrize("variant", VARIANTS)
def test_rounds_without_a_draft_change_no_token(variant):
    """Nor what is counted of the drafts of other rounds."""
    model, drafts = model_of("llama3_2"), []
    generation = run(
        model, PROMPTS, 18, rows=3, speculation=speculation_of(variant, model), choice=PlainBetween(),
        on_draft=drafts.append,
    )  # fmt: skip
    assert generation.generated == [plain(model, prompt, 18) for prompt in PROMPTS]
    stats = generation.stats
    empty = sum(not draft[0] for draft in drafts)  # with those that have no room for a draft
    assert 3 < stats.rounds_by_kind["plain"] <= empty
    assert stats.plain_share == stats.rounds_by_kind["plain"] / stats.rounds
    assert stats.drafted == sum(stats.drafted_at.values())
    assert stats.rounds_accepting.total() <= 3 * (stats.rounds - stats.rounds_by_kind["plain"])


@pytest.mark.slow
@pytest.mark.parametrize("variant", [{}, {"draft_vocabulary": [0, 2, 3]}])
def test_sampling_with_rounds_without_a_draft(variant):
    settings = {"temperature": 1.0, "repetition_penalty": 1.2}
    speculation, sampler = Speculation(1, 2, **variant), Sampler(**settings, rng=rng(3))
    generation = run(small_model(), [START] * 5000, 5, speculation=speculation, sampler=sampler, choice=PlainBetween())
    assert p_value(numbered(generation.generated, 3), probabilities(3, **settings)) > 1e-3
