"""The cache of an earlier generation, and attention over the cache."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from helpers.decoding import PROMPT, L, count_calls, greedy, make_model, model_of
from helpers.speculation import PROMPTS, drafting, noisy, run
from helpers.tiny import make_tiny, slow_except

from layerskip_recipes.generation import backends
from layerskip_recipes.generation.drafting.speculation import Speculation
from layerskip_recipes.generation.engine import Generation
from layerskip_recipes.model.decoder import layerskip_decoder
from layerskip_recipes.model.draft import Draft


@pytest.mark.parametrize("chunk", [512, 3])
@pytest.mark.parametrize("variant", [None, "chain", "perturbed", "look-up"])
@pytest.mark.parametrize("family", slow_except(["llama3_2", "gemma2", "gemma3", "lfm2"], "gemma2", "lfm2"))
def test_a_conversation_goes_on_from_the_cache(family, variant, chunk, monkeypatch):
    """The next prompt is the text so far and more: only what is new runs, and the tokens are those from scratch."""
    monkeypatch.setattr(backends, "CHUNK", chunk)
    model = make_model(family)
    calls, cache, prompt, reused = count_calls(model), None, PROMPT, 0
    for more in [(30, 31, 7), (9,), (60, 2, 41, 7, 7)]:
        generation = Generation(model, [prompt], 7, cache=cache, reserve=50, **drafting(variant, model))
        calls.clear()
        steps = iter(generation)
        next(steps)
        new = len(prompt) - reused
        in_chunks = reused or family in ("gemma2", "gemma3")
        pieces = [min(chunk, new - i) for i in range(0, new, chunk)] if in_chunks else [new]
        layers = {(layer, n): m for layer in range(L) for n, m in Counter(pieces).items()}
        assert calls == Counter(layers | {("head", 1): 1})
        assert (generation.stats.reused_tokens, generation.stats.prefill_tokens) == (reused, new)
        for _ in steps:
            pass
        assert generation.generated == [greedy(family, prompt, 7)]
        assert cache is None or generation.cache is cache
        cache = generation.cache
        # The last token of the answer was never an input.
        reused = len(prompt) + 7 - 1
        prompt = (*prompt, *generation.generated[0], *more)


@pytest.mark.parametrize(
    ("prompt", "reused"),
    [
        ((*PROMPT, 1, 2, 3), 4),
        ((*PROMPT[:2], 1, 2, 3), 2),
        (PROMPT[:3], 2),  # at least the last token runs
        (PROMPT, 3),
        ((77, *PROMPT), 0),
        ((4,), 0),
    ],
)
def test_a_prompt_that_diverges_reuses_the_common_part(prompt, reused):
    model = model_of("llama3_2")
    first = run(model, [PROMPT], 9, speculation=Speculation(2, 3), reserve=40)
    again = run(model, [prompt], 9, speculation=Speculation(2, 3), cache=first.cache)
    assert again.stats.reused_tokens == reused and again.cache is first.cache
    assert again.generated == [greedy("llama3_2", prompt, 9)]


def changed(model, what):
    """Another model, or the same one with other weights."""
    if what == "another family":
        return layerskip_decoder(make_tiny("gemma2"))
    if what == "another depth":
        return model.with_modules(layers=model.layers[:4])
    if what == "the same weights":
        return layerskip_decoder(make_tiny("llama3_2"))
    with torch.no_grad():
        if what == "an optimizer step":
            model.layers[1].mlp.w1.weight.mul_(1.5)
        elif what == "averaged weights":  # their tensors replace the model's for a while
            for parameter in model.parameters():
                parameter.data = 1.5 * parameter.data
        elif what == "a copy through .data":
            for parameter in model.parameters():
                parameter.data.copy_(1.5 * parameter.data)
        elif what == "another dtype and back":
            model.bfloat16().float()
        elif what == "rotary tables":
            model.layers[0].attn.pos_embeddings.cache.mul_(0.5)
        elif what == "another parameter":
            model.layers[1].mlp.w1.weight = torch.nn.Parameter(1.5 * model.layers[1].mlp.w1.weight)
        else:
            weights = model.state_dict()
            model.load_state_dict(weights | {"norm.scale": 2 * weights["norm.scale"]})
    return model


CHANGES = ["another family", "another depth", "the same weights", "an optimizer step", "another parameter", "weights"]
CHANGES += ["averaged weights", "a copy through .data", "another dtype and back", "rotary tables"]
COMPILED = [pytest.param(CHANGES[3], True, marks=pytest.mark.slow)]


@pytest.mark.parametrize(("what", "compile"), [*((what, False) for what in CHANGES), *COMPILED])
def test_a_cache_serves_the_weights_that_filled_it(what, compile, traced):
    """A change between two generations costs the tokens in the cache, and gives no other output."""
    first = run(make_model("llama3_2"), [PROMPT], 9, reserve=60, compile=compile)
    model = changed(first.model, what)
    longer = (*PROMPT, *first.generated[0], 5)
    again = run(model, [longer], 9, cache=first.cache, compile=compile)
    assert again.cache is first.cache and again.stats.reused_tokens == 0
    assert again.generated == run(model, [longer], 9).generated
    third = run(model, [(*longer, *again.generated[0])], 2, cache=first.cache, compile=compile)
    assert third.stats.reused_tokens == len(longer) + 8


def test_weights_may_change_between_the_making_of_a_generation_and_its_first_step():
    first = run(make_model("llama3_2"), [PROMPT], 9, reserve=60)
    longer = (*PROMPT, *first.generated[0], 5)
    generation = Generation(first.model, [longer], 9, cache=first.cache)
    changed(first.model, "an optimizer step")
    list(generation)
    assert generation.cache is first.cache and generation.stats.reused_tokens == 0
    assert generation.generated == run(first.model, [longer], 9).generated


@pytest.mark.slow
def test_graphs_take_no_tokens_from_the_cache_that_they_share(traced):
    """What they compute depends on how a text is split. The second generation is made before the first one runs."""
    model = make_model("llama3_2")
    first, second = (Generation(model, [PROMPT], 9, compile=True, reuse=3) for _ in range(2))
    assert first.cache is second.cache
    list(first)
    list(second)
    assert second.stats.reused_tokens == 0 and second.generated == first.generated


def test_a_cache_serves_the_draft_that_filled_it():
    model = make_model("llama3_2")
    drafts = [noisy(Draft(model, "copy", 2)).decoder(model) for _ in range(2)]
    ways = [{"speculation": Speculation(2, 3), "draft_weights": (draft, None)} for draft in drafts]
    first = run(model, [PROMPT], 9, reserve=60, **ways[0])
    for way, reused in zip(ways, (True, False), strict=True):
        again = run(model, [(*PROMPT, 5)], 9, cache=first.cache, **way)
        assert (again.stats.reused_tokens > 0) == reused and again.cache is first.cache


def test_rows_reuse_what_all_of_them_have():
    model = model_of("llama3_2")
    first = run(
        model, PROMPTS[:3], 6, stop_tokens=[greedy("llama3_2", PROMPTS[0], 6)[2]], speculation=Speculation(2, 3)
    )
    prompts = [(*prompt, *tokens, 1, 2) for prompt, tokens in zip(first.rows.prompts, first.generated, strict=True)]
    assert len(first.generated[0]) == 3
    again = run(model, prompts, 6, cache=first.cache, reserve=30, speculation=Speculation(3, 2))
    assert again.cache is not first.cache and again.stats.reused_tokens == 0  # too small
    assert again.generated == [greedy("llama3_2", prompt, 6) for prompt in prompts]
    prompts = [(*prompts[0], 5), (*prompts[1], 5), (*prompts[2][:6], 5)]
    last = run(model, prompts, 6, cache=again.cache)
    # The third row has six tokens in common with what ran before, the others more.
    assert last.cache is again.cache and last.stats.reused_tokens == 3 * 6
    assert last.stats.prefill_tokens == sum(len(prompt) - 6 for prompt in prompts)
    assert last.generated == [greedy("llama3_2", prompt, 6) for prompt in prompts]
    fewer = run(model, prompts[:2], 6, cache=again.cache)
    assert fewer.cache is not again.cache and fewer.stats.reused_tokens == 0
    assert fewer.generated == last.generated[:2]


def test_an_exits_cache_is_no_cache_of_the_whole_model():
    """Layers above the exit never ran; the other way round what is there is enough."""
    model = model_of("llama3_2")
    first = run(model, [PROMPT], 6, exit_layer=2, reserve=60)
    prompt = (*PROMPT, *first.generated[0], 9)
    exit_again = run(model, [prompt], 6, exit_layer=2, cache=first.cache)
    assert exit_again.stats.reused_tokens == len(prompt) - 2
    assert exit_again.generated == [greedy("llama3_2", prompt, 6, 2)]
    whole = run(model, [prompt], 6, cache=first.cache, speculation=Speculation(2, 3))
    assert whole.cache is first.cache and whole.stats.reused_tokens == 0
    assert whole.generated == [greedy("llama3_2", prompt, 6)]
    prompt = (*prompt, *whole.generated[0], 9)
    exit_again = run(model, [prompt], 6, exit_layer=3, cache=first.cache)
    assert exit_again.stats.reused_tokens == len(prompt) - 2
    assert exit_again.generated == [greedy("llama3_2", prompt, 6, 3)]


@pytest.mark.parametrize("when", ["prefill", "rounds"])
def test_after_an_interruption_the_cache_holds_what_ran(when):
    model = make_model()
    first = run(model, [PROMPT], 6, reserve=60)
    prompt = (*PROMPT, *first.generated[0], 9, 60, 2)
    generation, steps = Generation(model, [prompt], 12, cache=first.cache, speculation=Speculation(2, 3)), 0
    fails = 2 if when == "rounds" else 0
    hook = model.layers[4].register_forward_pre_hook(lambda *_: 1 / 0 if steps == fails else None)
    with pytest.raises(ZeroDivisionError):
        for _ in generation:
            steps += 1
    hook.remove()
    assert generation.generated[0] == greedy("llama3_2", prompt, 12)[: len(generation.generated[0])]
    prompt = (*prompt, *generation.generated[0], 41)
    again = run(model, [prompt], 12, cache=first.cache)
    assert again.cache is first.cache
    assert again.stats.reused_tokens == len(prompt) - (2 if when == "rounds" else 4 + 1)
    assert again.generated == [greedy("llama3_2", prompt, 12)]


@pytest.mark.parametrize("variant", [None, "chain", "perturbed"])
@pytest.mark.parametrize("family", ["llama3_2", "qwen2", "phi3"])
def test_attention_reads_the_cache_in_place_and_only_what_is_filled(family, variant, monkeypatch):
    """The keys of every call are a view of the cache, of its own heads, up to the last slot that is in use."""
    model, calls, attention = model_of(family), [], F.scaled_dot_product_attention

    def recording(q, k, v, **arguments):
        calls.extend([k, v])
        return attention(q, k, v, **arguments)

    monkeypatch.setattr(F, "scaled_dot_product_attention", recording)
    drafts = drafting(variant, model)
    generation = Generation(model, [PROMPT, PROMPT[:2]], 14, reserve=100, **drafts)
    verified = drafts["speculation"].num_speculations + 1 if variant else 1
    longest, rounds = 0, 0
    for _ in generation:
        assert generation.cache.max_len == 100
        buffers = {x.untyped_storage().data_ptr() for layer in generation.cache.layers for x in (layer.k, layer.v)}
        assert {x.untyped_storage().data_ptr() for x in calls} <= buffers
        ((b, heads, end, width),) = {x.shape for x in calls}
        assert (b, heads, width) == (2, 2, 8)
        assert longest < end <= longest + verified if rounds else end == len(PROMPT)
        longest = max(len(p) + len(g) for p, g in zip(generation.rows.prompts, generation.generated, strict=True)) - 1
        rounds += 1
        calls.clear()
    assert rounds > 3
