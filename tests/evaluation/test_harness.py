"""The model that lm-eval is given: log-likelihoods and answers against plain PyTorch, offline, tiny models."""

import pytest
from helpers.plain_decoding import Letters, plain_answer, plain_logits, plain_score
from helpers.tiny import make_tiny

from layerskip_recipes import layerskip_decoder
from layerskip_recipes.generation.drafting.planner import DraftChoice
from layerskip_recipes.generation.drafting.section import SelfSpeculation
from layerskip_recipes.generation.drafting.speculation import SPECULATION_DEFAULTS

pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance

from layerskip_recipes.evaluation import harness
from layerskip_recipes.generation.sampling import Sampler


def request(kind: str, *args) -> Instance:
    return Instance(kind, {}, args, 0, metadata=("task", 0, 1))


def check_scores(lm, model, pairs, exit_layer=None):
    """log p of each answer against plain PyTorch; returns whether each is what the model itself would say."""
    found = lm.loglikelihood([request("loglikelihood", *pair) for pair in pairs], disable_tqdm=True)
    for (context, answer), (score, greedy) in zip(pairs, found, strict=True):
        tokens = lm.tokenizer.encode(context, add_eos=False), lm.tokenizer.encode(answer, False, False)
        expected, right = plain_score(model, *tokens, exit_layer)
        assert score == pytest.approx(expected, abs=1e-4) and greedy is right
    return [greedy for _, greedy in found]


@pytest.mark.parametrize("exit_layer", [None, 2])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_loglikelihood_is_that_of_each_text_alone(exit_layer, batch_size):
    """Batches of different lengths; one continuation is what the model itself would say."""
    model, tokenizer = make_tiny(), Letters()
    lm = harness.LayerSkipLM(layerskip_decoder(model), tokenizer, batch_size=batch_size, exit_layer=exit_layer)
    context, own = tokenizer.encode("AB", add_eos=False), []
    for _ in range(3):
        own.append(int(plain_logits(model, context + own, exit_layer)[-1].argmax()))
    half = [own[0], own[1] + 1]  # greedy at first
    pairs = [("AB", tokenizer.decode(own)), ("AB", tokenizer.decode(half)), ("", "XYZ"), ("A longer one", " Z")]
    pairs += [("ab", "+"), ("B", "CDEF")]
    assert check_scores(lm, model, pairs, exit_layer)[:2] == [True, False]


def test_choices_of_one_token_share_a_forward(monkeypatch):
    """As in MMLU; the head takes two positions at a time, so that an answer lies in two pieces."""
    model, rows = make_tiny(), []
    lm = harness.LayerSkipLM(layerskip_decoder(model), Letters(), batch_size=2)
    hook = model.tok_embeddings.register_forward_hook(lambda _, args, __: rows.extend(args[0].tolist()))
    monkeypatch.setattr(harness, "HEAD_TOKENS", 2)
    pairs = [("Which?", letter) for letter in "ABCD"] + [("Which", "?D"), ("Which", "?DE"), ("What", "A"), ("W", "h")]
    lm.loglikelihood([request("loglikelihood", *pair) for pair in pairs], disable_tqdm=True)
    hook.remove()
    assert len(rows) == 4  # "Which?" with five answers, "Which?D", "What", "W"
    check_scores(lm, model, pairs)


def test_a_context_longer_than_the_model_loses_its_beginning(caplog):
    """128 positions: the last 128 of the tokens that predict something, of which two are the answer's."""
    model, tokenizer = make_tiny(), Letters()
    lm = harness.LayerSkipLM(layerskip_decoder(model), tokenizer)
    context, answer = "ABCDE" * 40, "FGH"
    ((score, _),) = lm.loglikelihood([request("loglikelihood", context, answer)], disable_tqdm=True)
    tokens = tokenizer.encode(context, add_eos=False)[-126:], tokenizer.encode(answer, False, False)
    assert score == pytest.approx(plain_score(model, *tokens)[0], abs=1e-4)
    assert "lose their beginning" in caplog.text


@pytest.mark.parametrize("exit_layer", [None, 3])
def test_a_whole_text_in_windows(exit_layer):
    """300 tokens, 128 positions: bos and 127, the next 128, then the last 44 after as many as the window holds."""
    model, tokenizer = make_tiny(), Letters()
    lm = harness.LayerSkipLM(layerskip_decoder(model), tokenizer, batch_size=2, exit_layer=exit_layer)
    text = "".join(chr(1 + (7 * i * i + i) % 90) for i in range(300))
    tokens = [0, *tokenizer.encode(text, False, False)]
    expected = 0.0
    for first, last in ((1, 128), (129, 256), (257, 300)):  # the tokens predicted by each window
        seen, predicted = tokens[max(last - 128, 0) : first], tokens[first : last + 1]
        expected += plain_score(model, seen, predicted, exit_layer)[0]
    found = lm.loglikelihood_rolling([request("loglikelihood_rolling", text)] * 2, disable_tqdm=True)
    assert found == pytest.approx([expected, expected], abs=1e-3)


@pytest.mark.parametrize(
    "method",
    [
        {},
        {"exit_layer": 3},
        {"drafts": DraftChoice(SelfSpeculation(**SPECULATION_DEFAULTS | {"exit_layer": 2}), None, 1.0)},
    ],
    ids=["plain", "exit", "speculation"],
)
def test_answers_are_those_of_plain_greedy_decoding(method):
    model, tokenizer, exit_layer = make_tiny(), Letters(), method.get("exit_layer")
    lm = harness.LayerSkipLM(layerskip_decoder(model), tokenizer, batch_size=2, **method, max_new_tokens=9)
    contexts = ["A", "ABC", "hello", "X+Y"]
    whole = [plain_answer(model, tokenizer.encode(c, add_eos=False), 9, [], exit_layer) for c in contexts]
    stop = whole[0][3:5]
    kinds = [{"until": [stop, "\n\n"]}, {"until": stop, "max_gen_toks": 6, "do_sample": False, "temperature": 0.7}]
    asked = [(context, kind) for context in contexts for kind in kinds]
    found = lm.generate_until([request("generate_until", *args) for args in asked], disable_tqdm=True)
    for (context, kind), text in zip(asked, found, strict=True):
        tokens = tokenizer.encode(context, add_eos=False)
        until = [kind["until"]] if isinstance(kind["until"], str) else kind["until"]
        assert text == plain_answer(model, tokens, kind.get("max_gen_toks", 9), until, exit_layer)
    assert len(found[0]) == 3 and lm.stats["task"].tokens > 0
    assert (lm.stats["task"].drafted > 0) == ("drafts" in method)


def test_a_context_longer_than_the_sliding_window_loses_its_beginning():
    """For Gemma 2, whose cached attention is right up to its window of 64 tokens; the model itself takes 128."""
    lm = harness.LayerSkipLM(layerskip_decoder(make_tiny("gemma2")), Letters(), max_new_tokens=9)
    text = "ABCDEFGHIJ" * 10
    found = lm.generate_until([request("generate_until", text, {"until": []})], disable_tqdm=True)
    assert found == lm._answers("task", [Letters().encode(text, add_eos=False)[-(64 - 9) :]], 9, [], Sampler())


def test_sampling_as_a_task_asks_for_it():
    """do_sample without a temperature is temperature 1; top_k=1 is greedy; equal seeds give equal texts."""
    model, tokenizer = make_tiny(), Letters()

    def sample(seed, **kwargs):
        lm = harness.LayerSkipLM(layerskip_decoder(model), tokenizer, seed=seed, max_new_tokens=12)
        return lm.generate_until([request("generate_until", "AB", {"until": [], **kwargs})], disable_tqdm=True)[0]

    greedy = plain_answer(model, tokenizer.encode("AB", add_eos=False), 12, [])
    assert sample(0, do_sample=True, top_k=1) == greedy == sample(0, temperature=0.0)
    assert sample(0, temperature=1.0) == sample(0, do_sample=True) != sample(1, do_sample=True)
