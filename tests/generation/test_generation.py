"""Generation against decoding without any cache: the whole sequence walked anew for every token, in plain PyTorch."""

import re
from collections import Counter

import numpy as np
import pytest
import torch
import torchtune.generation
from helpers.decoding import PROMPT, L, greedy, make_model, model_of, until
from helpers.speculation import VARIANTS, perturbed, run
from helpers.tiny import EVERY_FAMILY, VOCAB, make_tiny, walk

from layerskip_recipes.generation.api import generate
from layerskip_recipes.generation.drafting.drafter import RoundKind
from layerskip_recipes.generation.drafting.rule import DraftRule
from layerskip_recipes.generation.drafting.speculation import Speculation
from layerskip_recipes.generation.engine import Generation

DRAFTS = {"exit_layer": 3, "num_speculations": 5}
LOOK_UPS = {"exit_layer": 1, "num_speculations": 5, "prompt_lookup": 1, "draft_vocabulary": range(0, VOCAB, 2)}


def new_tokens(out, prompt=PROMPT):
    """What follows the prompt in an output of one row."""
    assert out.tokens.shape[0] == 1 and out.tokens[0, : len(prompt)].tolist() == list(prompt)
    return out.tokens[0, len(prompt) :].tolist()


# ---- greedy: the tokens of the full model ----


@pytest.mark.parametrize("exit_layer", [3, *(pytest.param(e, marks=pytest.mark.slow) for e in (1, L))])
@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_self_speculation_gives_the_models_tokens_in_every_family(family, exit_layer):
    """Self-speculation, accepting some drafts only, gives the full model's tokens; the exit alone gives its own."""
    model, prompt = model_of(family), torch.tensor(PROMPT)
    generation = run(model, [PROMPT], 16, speculation=Speculation(exit_layer, 4))
    assert generation.generated[0] == greedy(family, PROMPT, 16)
    assert 0 < generation.stats.acceptance_rate < 1 or exit_layer == L
    assert len(set(generation.generated[0])) > 5
    settings = {key: value for key, value in VARIANTS["all"].items() if key not in ("decoder", "answers")} | {
        "exit_layer": exit_layer
    }
    all_drafts = {"speculation": Speculation(**settings), "draft_weights": (perturbed(model), None)}
    assert run(model, [PROMPT], 16, **all_drafts).generated[0] == greedy(family, PROMPT, 16)
    assert new_tokens(generate(model, prompt, 16, exit_layer=exit_layer)) == greedy(family, PROMPT, 16, exit_layer)


@pytest.mark.slow
@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_plain_decoding_is_torchtunes_generate(family):
    """Also from a plain decoder, which `generate` wraps itself."""
    base = make_tiny(family)
    prompt = torch.tensor([PROMPT, PROMPT[::-1]])
    expected, _ = torchtune.generation.generate(base, prompt, max_generated_tokens=20, top_k=1)
    assert torch.equal(generate(base, prompt, 20).tokens, expected)
    assert torch.equal(generate(base, prompt, 20, exit_layer=3, num_speculations=4).tokens, expected)


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [{}, {"exit_layer": 3}, DRAFTS, LOOK_UPS], ids=str)
def test_a_text_ends_at_its_stop_token_wherever_it_falls(arguments):
    """Each token of the output as the stop token: first, in the middle of a draft, as the bonus token, never."""
    full = greedy("llama3_2", PROMPT, 24, L if "num_speculations" in arguments else arguments.get("exit_layer", L))
    absent = min(set(range(VOCAB)) - set(full))
    for stop_tokens in [[stop] for stop in (*set(full), absent)] + [full[5:7]]:
        out = generate(model_of("llama3_2"), torch.tensor(PROMPT), 24, stop_tokens=stop_tokens, **arguments)
        assert new_tokens(out) == until(full, stop_tokens)
        assert out.stats.tokens == len(new_tokens(out))


@pytest.mark.parametrize("arguments", [{}, {"exit_layer": 2, "num_speculations": 12}, LOOK_UPS], ids=str)
@pytest.mark.parametrize(("family", "limit"), [("llama3_2", 128), ("gemma2", 64)])
def test_a_text_may_be_as_long_as_the_model_allows(family, limit, arguments):
    """Up to max_seq_len, or gemma2's sliding window, exactly; one token more is refused with what fits."""
    prompt = tuple(position % VOCAB for position in range(limit - 7))
    out = generate(model_of(family), torch.tensor(prompt), 7, **arguments)
    assert out.tokens.shape == (1, limit)
    assert new_tokens(out, prompt) == greedy(family, prompt, 7)
    with pytest.raises(ValueError, match=rf"max_generated_tokens: .* {limit} .*up to 7, "):
        generate(model_of(family), torch.tensor(prompt), 8, **arguments)


def test_a_prompt_may_contain_the_pad_token():
    prompt = (0, 5, 0, 0, 7)
    for form in (torch.tensor(prompt), [torch.tensor(prompt)]):
        assert new_tokens(generate(model_of("llama3_2"), form, 8), prompt) == greedy("llama3_2", prompt, 8)


@pytest.mark.parametrize("arguments", [{}, DRAFTS], ids=str)
def test_layout_of_a_left_padded_batch_is_torchtunes(arguments):
    prompt = torch.tensor([[0, 0, 0, 5], [9, 60, 2, 41], [0, 30, 31, 7]])
    model = model_of("llama3_2")
    free = generate(model, prompt, 16).tokens
    for stop_tokens in (None, [free[0, 6].item(), free[1, 11].item()], free[:, 5].tolist()):
        arguments = arguments | {"stop_tokens": stop_tokens}
        theirs = {"max_generated_tokens": 16, "top_k": 1, "stop_tokens": stop_tokens}
        expected, _ = torchtune.generation.generate(model, prompt, **theirs)
        assert torch.equal(generate(model, prompt, 16, **arguments).tokens, expected)


# ---- the iterator, and the model afterwards ----


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
    stats = generation.stats
    assert stats.tokens == keep + 20 and stats.rounds > rounds
    # Each round gives the accepted tokens and one more, also the round that was cut.
    assert stats.tokens - stats.first_tokens == stats.accepted + stats.row_rounds
    assert stats.accepted <= stats.drafted and stats.accepted == sum(k * n for k, n in stats.rounds_accepting.items())
    # The cache holds only the tokens that were kept, so that a later prompt goes on from them.
    prompts = [(*prompt, *tokens, 9) for prompt, tokens in zip(prompts, expected, strict=True)]
    again = Generation(model, prompts, 4, cache=generation.cache)
    assert list(again)[-1] and again.generated == [greedy("llama3_2", prompt, 4) for prompt in prompts]


def test_numpy_arrays_and_lists_of_tensors_are_prompts():
    expected = generate(model_of("llama3_2"), torch.tensor(PROMPT), 8).tokens
    lists = [*np.array(PROMPT)], [*torch.tensor(PROMPT)], [np.array(PROMPT)], [torch.tensor(PROMPT)]
    for prompt in (np.array(PROMPT), np.array([PROMPT]), *lists):
        assert torch.equal(generate(model_of("llama3_2"), prompt, 8).tokens, expected)
    with pytest.raises(ValueError, match=r"^prompt: 'a text' is a text.*tokenizer.prompt"):
        generate(model_of("llama3_2"), "a text", 8)


@pytest.mark.parametrize("end", ["finished", "break", "the model fails", "the caller fails"])
@pytest.mark.parametrize("caches", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_the_model_is_left_as_it_was(training, caches, end):
    model = make_model()
    if caches:
        model.setup_caches(1, torch.float32, decoder_max_seq_len=16)
    model.train(training).layers[1].eval()

    def state():
        modes = [(name, module.training) for name, module in model.named_modules()]
        return modes, [(layer.attn.kv_cache, layer.attn.cache_enabled) for layer in model.layers], [*model.state_dict()]

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


# ---- refused ----

CHAIN = {"exit_layer": 2, "num_speculations": 3}
COUNT, VOCABULARY = "an integer of 1 or more", "ids of 0..96"


@pytest.mark.parametrize(
    ("prompt", "arguments", "message", "allowed"),
    [
        ([], {}, "prompt: ", ""),
        ([[1, 2], []], {}, "prompt: ", ""),
        (torch.tensor([[1, 2], [0, 0]]), {}, "prompt: ", ""),  # a row of padding only
        ([[1, -1]], {}, "prompt: -1 is no token of this model. Allowed: 0..96", ""),
        ([[1]], {"max_generated_tokens": 0}, "max_generated_tokens: 0", ""),
        ([[1]], {"max_generated_tokens": 128}, "max_generated_tokens: ", "more than the model's 128"),
        ([[1], [1] * 125], {}, "max_generated_tokens: ", "more than the model's 128"),
        ([[1]], CHAIN | {"num_speculations": True}, "num_speculations: True ", COUNT),
        ([[1]], {"num_speculations": 2}, "exit_layer: None ", "exit_layer=8"),
        ([[1]], {"exit_layer": 2, "prompt_lookup": 2}, "num_speculations: None", "num_speculations=6"),
        ([[1]], CHAIN | {"draft_vocabulary": [True, False]}, "draft_vocabulary: no list ", VOCABULARY),
        ([[1]], {"exit_layer": 0}, "exit_layer: 0", "1..6"),
        ([[1]], {"temperature": -1}, "temperature: -1", ""),
    ],
    ids=str,
)
def test_wrong_arguments_are_named_with_what_is_allowed(prompt, arguments, message, allowed):
    if isinstance(prompt, list):
        prompt = [torch.tensor(row, dtype=torch.long if not row else None) for row in prompt]
    with pytest.raises(ValueError, match=f"^{re.escape(message)}.*{re.escape(allowed)}"):
        generate(model_of("llama3_2"), prompt, **{"max_generated_tokens": 4, **arguments})


def test_rounds_without_room_for_a_draft_teach_nothing():
    """Calls for two tokens say nothing of drafts: their only round has no draft."""
    model, rule = model_of("llama3_2"), DraftRule()
    for _ in range(6):
        list(Generation(model, [PROMPT], 2, speculation=Speculation(3, 6), rule=rule))
    assert not rule.seconds[RoundKind("chain")] and not rule.recent


def test_short_outputs_are_drafted_too():
    """Their first rounds are learned, although the limit may cut them."""
    rule, kinds = DraftRule(), Counter()
    for _ in range(12):
        generation = Generation(model_of("llama3_2"), [PROMPT], 7, speculation=Speculation(3, 6), rule=rule)
        list(generation)
        kinds += generation.stats.rounds_by_kind
    assert kinds["plain"] and kinds["chain"]
