"""Generation against decoding without any cache: the whole sequence walked anew for every token, in plain PyTorch."""

import itertools
from collections import Counter

import pytest
import torch
import torchtune.generation
from helpers.decoding import PROMPT, SMALL, L, greedy, make_model, model_of, small_model, until
from helpers.sampling import filtered, p_value
from helpers.tiny import FAMILIES, VOCAB, make_tiny
from helpers.walks import walk

from layerskip_recipes import layerskip_decoder
from layerskip_recipes.generation.api import generate
from layerskip_recipes.generation.drafting.speculation import Speculation
from layerskip_recipes.generation.engine import Generation
from layerskip_recipes.generation.sampling import Sampler


def new_tokens(out, prompt=PROMPT):
    """What follows the prompt in an output of one row."""
    assert out.tokens.shape[0] == 1 and out.tokens[0, : len(prompt)].tolist() == list(prompt)
    return out.tokens[0, len(prompt) :].tolist()


# ---- greedy: the tokens of the full model ----


@pytest.mark.parametrize(
    ("exit_layer", "num_speculations"), [*((e, 3) for e in range(1, L + 1)), *itertools.product((1, 4), (1, 12))]
)
def test_self_speculation_gives_the_full_models_tokens(exit_layer, num_speculations):
    for prompt in ((5,), (5, 17), tuple(range(20, 41))):
        for count in (2, 18):
            out = generate(
                model_of("llama3_2"),
                torch.tensor(prompt),
                count,
                exit_layer=exit_layer,
                num_speculations=num_speculations,
            )
            assert new_tokens(out, prompt) == greedy("llama3_2", prompt, 18)[:count]


@pytest.mark.parametrize("exit_layer", [1, 3, L])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family, exit_layer):
    """Self-speculation, accepting some drafts only, gives the full model's tokens; the exit alone gives its own."""
    arguments = {"max_generated_tokens": 16, "exit_layer": exit_layer}
    out = generate(model_of(family), torch.tensor(PROMPT), **arguments, num_speculations=4)
    assert new_tokens(out) == greedy(family, PROMPT, 16)
    assert 0 < out.stats.acceptance_rate < 1 or exit_layer == L
    assert len(set(new_tokens(out))) > 5
    out = generate(model_of(family), torch.tensor(PROMPT), **arguments)
    assert new_tokens(out) == greedy(family, PROMPT, 16, exit_layer)


@pytest.mark.parametrize("family", FAMILIES)
def test_autoregressive_is_torchtunes_generate(family):
    """Also from a plain decoder, which `generate` wraps itself."""
    base = make_tiny(family)
    prompt = torch.tensor([PROMPT, PROMPT[::-1]])
    expected, _ = torchtune.generation.generate(base, prompt, max_generated_tokens=20, top_k=1)
    assert torch.equal(generate(base, prompt, 20).tokens, expected)
    assert torch.equal(generate(base, prompt, 20, exit_layer=3, num_speculations=4).tokens, expected)


@pytest.mark.parametrize("arguments", [{}, {"exit_layer": 3}, {"exit_layer": 3, "num_speculations": 5}], ids=str)
def test_stop_tokens_wherever_they_fall(arguments):
    """Each token of the output as the stop token: first, in the middle of a draft, as the bonus token, never."""
    full = greedy("llama3_2", PROMPT, 24, L if "num_speculations" in arguments else arguments.get("exit_layer", L))
    absent = min(set(range(VOCAB)) - set(full))
    for stop in (*set(full), absent):
        out = generate(model_of("llama3_2"), torch.tensor(PROMPT), 24, stop_tokens=[stop], **arguments)
        assert new_tokens(out) == until(full, [stop])
        assert out.stats.tokens == len(new_tokens(out))
    out = generate(model_of("llama3_2"), torch.tensor(PROMPT), 24, stop_tokens=full[5:7], **arguments)
    assert new_tokens(out) == until(full, full[5:7])


@pytest.mark.parametrize("arguments", [{}, {"exit_layer": 2, "num_speculations": 12}], ids=str)
@pytest.mark.parametrize(("family", "limit"), [("llama3_2", 128), ("gemma2", 64)])
def test_as_long_as_the_model_allows(family, limit, arguments):
    """Up to max_seq_len, or gemma2's sliding window, exactly; one token more is refused with what fits."""
    prompt = tuple(position % VOCAB for position in range(limit - 7))
    out = generate(model_of(family), torch.tensor(prompt), 7, **arguments)
    assert out.tokens.shape == (1, limit)
    assert new_tokens(out, prompt) == greedy(family, prompt, 7)
    with pytest.raises(ValueError, match=rf"max_generated_tokens: .* {limit} .*up to 7, "):
        generate(model_of(family), torch.tensor(prompt), 8, **arguments)


def test_a_prompt_may_contain_the_pad_token():
    """Only padding at the start of a [b, s] batch is padding."""
    prompt = (0, 5, 0, 0, 7)
    for form in (torch.tensor(prompt), [torch.tensor(prompt)]):
        assert new_tokens(generate(model_of("llama3_2"), form, 8), prompt) == greedy("llama3_2", prompt, 8)


# ---- batches ----


@pytest.mark.parametrize(
    "arguments",
    [{}, {"exit_layer": 3}, *({"exit_layer": e, "num_speculations": d} for e, d in ((1, 1), (2, 4), (3, 12), (5, 3)))],
    ids=str,
)
@pytest.mark.parametrize("family", ["llama3_2", "qwen2", "gemma2", "phi3"])
def test_rows_of_a_batch_are_what_they_are_alone(family, arguments):
    """Prompts of different lengths that accept and stop differently, against each of them decoded from scratch."""
    prompts = [(5,), (9, 60, 2, 41, 41, 7, 3, 88, 1), PROMPT, (30, 31)]
    depth = L if "num_speculations" in arguments else arguments.get("exit_layer", L)
    alone = [greedy(family, prompt, 18, depth) for prompt in prompts]
    stop_tokens = [alone[0][4], alone[2][9]]
    out = generate(
        model_of(family), [torch.tensor(p) for p in prompts], 18, stop_tokens=stop_tokens, pad_id=96, **arguments
    )
    expected = [until(tokens, stop_tokens) for tokens in alone]
    assert len({len(tokens) for tokens in expected}) > 1
    longest = max(map(len, expected))
    assert out.tokens.tolist() == [
        [96] * (9 - len(prompt)) + list(prompt) + tokens + [96] * (longest - len(tokens))
        for prompt, tokens in zip(prompts, expected, strict=True)
    ]
    assert out.stats.tokens == sum(map(len, expected)) and out.stats.first_tokens == 4


@pytest.mark.parametrize("arguments", [{}, {"exit_layer": 4, "num_speculations": 3}], ids=str)
def test_layout_of_a_left_padded_batch_is_torchtunes(arguments):
    prompt = torch.tensor([[0, 0, 0, 5], [9, 60, 2, 41], [0, 30, 31, 7]])
    model = model_of("llama3_2")
    free = generate(model, prompt, 16).tokens
    for stop_tokens in (None, [free[0, 6].item(), free[1, 11].item()], free[:, 5].tolist()):
        expected, _ = torchtune.generation.generate(
            model, prompt, max_generated_tokens=16, top_k=1, stop_tokens=stop_tokens
        )
        assert torch.equal(generate(model, prompt, 16, stop_tokens=stop_tokens, **arguments).tokens, expected)


# ---- the iterator, and the model afterwards ----


@pytest.mark.parametrize("arguments", [{}, {"speculation": Speculation(3, 4)}], ids=str)
def test_each_step_yields_the_new_tokens(arguments):
    prompts = [PROMPT, PROMPT[:1]]
    generation = Generation(model_of("llama3_2"), prompts, 20, **arguments)
    so_far = [[], []]
    for new in generation:
        so_far = [before + after for before, after in zip(so_far, new, strict=True)]
        assert generation.generated == so_far
        assert any(new)
    assert so_far == [greedy("llama3_2", prompt, 20) for prompt in prompts]


@pytest.mark.parametrize("arguments", [{}, {"speculation": Speculation(3, 4)}], ids=str)
def test_a_row_is_stopped_on_request(arguments):
    """Between two steps, by a number of tokens to keep; the other row goes on, and nothing else is counted."""
    prompts, model = [PROMPT, PROMPT[:1]], model_of("llama3_2")
    generation, keep = Generation(model, prompts, 20, **arguments), 5
    for _ in generation:
        if not generation.finished[0] and len(generation.generated[0]) >= keep:
            generation.stop(0, keep)
            rounds = generation.stats.rounds
            assert generation.stats.tokens == sum(map(len, generation.generated))
    expected = [greedy("llama3_2", PROMPT, 20)[:keep], greedy("llama3_2", PROMPT[:1], 20)]
    assert generation.generated == expected and generation.finished == [True, True]
    assert generation.stats.tokens == keep + 20 and generation.stats.rounds > rounds
    # The cache holds only the tokens that were kept, so that a later prompt goes on from them.
    prompts = [(*prompt, *tokens, 9) for prompt, tokens in zip(prompts, expected, strict=True)]
    again = Generation(model, prompts, 4, cache=generation.cache)
    assert list(again)[-1] and again.generated == [greedy("llama3_2", prompt, 4) for prompt in prompts]


@pytest.mark.parametrize("end", ["finished", "break", "the model fails", "the caller fails"])
@pytest.mark.parametrize("caches", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_the_model_is_left_as_it_was(training, caches, end):
    model = make_model()
    if caches:
        model.setup_caches(1, torch.float32, decoder_max_seq_len=16)
    model.train(training)

    def state():
        modules = [(name, module.training) for name, module in model.named_modules()]
        return (
            modules,
            [(layer.attn.kv_cache, layer.attn.cache_enabled) for layer in model.layers],
            [*model.state_dict()],
        )

    before = state()
    steps = 0
    hook = model.layers[4].register_forward_pre_hook(lambda *_: 1 / 0 if end == "the model fails" and steps else None)
    try:
        for _ in Generation(model, [PROMPT], 12, speculation=Speculation(2, 3)):
            assert not model.training
            steps += 1
            if end == "break":
                break
            if end == "the caller fails":
                raise ZeroDivisionError
    except ZeroDivisionError:
        assert end.endswith("fails")
    hook.remove()
    assert (steps == 1) == (end != "finished")
    assert state() == before
    if not caches:
        tokens = torch.tensor([PROMPT])
        assert torch.equal(model(tokens), walk(model, tokens, range(L)))


@pytest.mark.parametrize("training", [False, True])
def test_a_plain_decoder_is_left_as_it_was(tiny, training):
    tiny.train(training)
    generate(tiny, torch.tensor(PROMPT), 3, exit_layer=2, num_speculations=2)

    assert {module.training for module in tiny.modules()} == {training}
    assert all(layer.attn.kv_cache is None and not layer.attn.cache_enabled for layer in tiny.layers)


def test_layer_dropout_does_not_act_in_generation():
    model = make_model()
    layerskip_decoder(model, layer_dropout={"prob": 1, "layers_scale": "uniform"}).train()
    assert new_tokens(generate(model, torch.tensor(PROMPT), 8)) == greedy("llama3_2", PROMPT, 8)


# ---- sampling ----


@torch.no_grad()
def probabilities(prompt, count, depth, **filters):
    """The exact probability of each continuation of `count` tokens, numbered in base 5."""
    probs = torch.ones(1)
    sequences = torch.tensor([prompt])
    for _ in range(count):
        logits = walk(small_model(), sequences, range(depth))[:, -1]
        following = torch.tensor([filtered(row, **filters) for row in logits.tolist()])
        probs = (probs[:, None] * following).flatten()
        sequences = torch.cat(
            [sequences.repeat_interleave(SMALL, 0), torch.arange(SMALL).repeat(len(sequences))[:, None]], 1
        )
    return probs


@pytest.mark.slow
@pytest.mark.parametrize(
    ("exit_layer", "d", "filters"),
    [
        (None, None, {"temperature": 1.0}),
        (2, None, {"temperature": 0.7, "top_k": 4}),
        (1, 1, {"temperature": 1.0}),
        (1, 4, {"temperature": 1.2, "top_p": 0.8}),
        (2, 2, {"temperature": 1.0}),
        (2, 2, {"temperature": 0.7, "top_k": 4}),
        (2, 4, {"temperature": 0.9, "top_k": 4, "top_p": 0.9}),
        (3, 3, {"temperature": 1.0}),
    ],
)
def test_sampled_continuations_have_the_models_distribution(exit_layer, d, filters):
    """The first three tokens of many rows, which accept differently, against all 125 continuations."""
    prompt, n = (1, 3, 0), 4000
    rng = torch.Generator().manual_seed(11)
    out = generate(
        small_model(), [torch.tensor(prompt)] * n, 6, exit_layer=exit_layer, num_speculations=d, rng=rng, **filters
    )
    first, second, third = out.tokens[:, 3:6].unbind(1)
    depth = 3 if d or exit_layer is None else exit_layer
    assert p_value(first * 25 + second * 5 + third, probabilities(prompt, 3, depth, **filters)) > 1e-3
    if d:
        assert exit_layer == 3 or 0.2 < out.stats.acceptance_rate < 0.95


@pytest.mark.parametrize("speculation", [{}, {"exit_layer": 3, "num_speculations": 4}], ids=str)
def test_the_generator_alone_decides(speculation):
    """The same seed gives the same tokens, another seed others; the global generator is neither used nor moved."""
    model, before = model_of("llama3_2"), torch.get_rng_state()
    outputs = [
        new_tokens(
            generate(
                model,
                torch.tensor(PROMPT),
                20,
                temperature=1.0,
                top_p=0.9,
                rng=torch.Generator().manual_seed(seed),
                **speculation,
            )
        )
        for seed in (1, 1, 2)
    ]
    assert outputs[0] == outputs[1] != outputs[2]
    assert torch.equal(torch.get_rng_state(), before)


def test_sampling_from_one_token_is_greedy():
    out = generate(
        model_of("llama3_2"), torch.tensor(PROMPT), 20, exit_layer=2, num_speculations=4, temperature=0.8, top_k=1
    )
    assert new_tokens(out) == greedy("llama3_2", PROMPT, 20)


# ---- refused ----


WAITS = ("tolist", "item", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__")


@pytest.mark.parametrize("sampler", [None, {"temperature": 0.8, "top_k": 20, "repetition_penalty": 1.2}])
@pytest.mark.parametrize(
    "speculation",
    [None, {}, {"prompt_lookup": 2}],
    ids=["plain", "chain", "lookup"],
)
def test_the_host_waits_once_in_a_round(speculation, sampler, monkeypatch):
    """What was accepted is the only thing that it reads from the device, however many tokens are drafted."""
    calls = Counter()

    def counted(name):
        method = getattr(torch.Tensor, name)
        return lambda *args, **kwargs: (calls.update([name]), method(*args, **kwargs))[1]

    if speculation is not None:
        speculation = Speculation(**{"exit_layer": 1, "num_speculations": 3} | speculation)
    sampler = sampler and Sampler(**sampler, rng=torch.Generator().manual_seed(0))
    prompts = [PROMPT * 2, PROMPT[::-1]]
    generation = Generation(model_of("llama3_2"), prompts, 20, speculation=speculation, sampler=sampler)
    with monkeypatch.context() as patch:
        for name in WAITS:
            patch.setattr(torch.Tensor, name, counted(name))
        for _ in generation:
            pass
    assert generation.stats.rounds > 5
    assert calls == {"tolist": 1 + generation.stats.rounds}  # the first is the prefill's
