"""Continuous batching: a row whose output has ended goes on with the next prompt, as if it had always been there."""

import itertools
import json

import pytest
import torch
from helpers.compiled import LONG, SHORT, compiles, make_small
from helpers.decoding import PROMPT, model_of, until
from helpers.sampling import p_value, rng
from helpers.speculation import PROMPTS, VARIANTS, AlwaysLookUp, plain, run, speculation_of
from helpers.tiny import VOCAB
from helpers.walks import walk

from layerskip_recipes.config.loading import load_config
from layerskip_recipes.generation.drafting.speculation import Speculation
from layerskip_recipes.generation.engine import Generation
from layerskip_recipes.generation.recipe import LayerSkipGenerate
from layerskip_recipes.generation.sampling import Sampler


@pytest.mark.parametrize(
    ("variant", "rows"),
    [*((variant, 2) for variant in VARIANTS), *itertools.product((None, "chain", "look-up"), (1, 4))],
)
def test_outputs_are_those_of_each_prompt_alone(variant, rows):
    """With a penalty, whose tokens a row must forget, and stop tokens, which end outputs at different times."""
    model, penalty = model_of("llama3_2"), 1.4
    alone = [plain(model, prompt, 18, penalty) for prompt in PROMPTS]
    stop_tokens = [alone[0][4], alone[2][9]]
    expected = [until(tokens, stop_tokens) for tokens in alone]
    speculation = None if variant is None else speculation_of(variant, model)
    arguments = {"sampler": Sampler(repetition_penalty=penalty), "stop_tokens": stop_tokens, "choice": AlwaysLookUp()}
    generation = run(model, PROMPTS, 18, rows=rows, speculation=speculation, **arguments)
    assert generation.generated == expected and all(generation.finished)
    stats = generation.stats
    assert (stats.first_tokens, stats.tokens) == (len(PROMPTS), sum(map(len, expected)))
    assert stats.prefill_tokens == sum(map(len, PROMPTS))
    assert tuple(map(sum, zip(*generation.acceptance, strict=True))) == (stats.drafted, stats.accepted)
    assert generation.cache.rows == rows
    if rows == 1 and variant is not None:  # what drafts must begin anew too, or less is accepted
        alone = [run(model, [prompt], 18, speculation=speculation, **arguments) for prompt in PROMPTS]
        assert generation.acceptance == [one.acceptance[0] for one in alone]


def test_each_step_yields_what_is_new_of_each_prompt():
    """At most as many prompts as rows are under way; the third begins when one of the first two has ended."""
    model = model_of("llama3_2")
    generation, so_far = Generation(model, PROMPTS, 6, rows=2, speculation=Speculation(2, 3)), [[] for _ in PROMPTS]
    for new in generation:
        for tokens, more in zip(so_far, new, strict=True):
            tokens += more
        assert so_far == generation.generated
        assert sum(bool(g) and not done for g, done in zip(so_far, generation.finished, strict=True)) <= 2
        assert not so_far[2] or generation.finished[0] or generation.finished[1]
    assert so_far == [plain(model, prompt, 6) for prompt in PROMPTS]
    # What the rows hold at the end serves later prompts.
    held = [[*prompt, *tokens, 9] for prompt, tokens in zip(PROMPTS, so_far, strict=True)]
    last = [held[prompt] for prompt in generation.in_row]
    again = run(model, last, 4, cache=generation.cache)
    assert again.generated == [plain(model, tuple(text), 4) for text in last]
    assert again.stats.reused_tokens > 0


def test_a_row_that_is_stopped_takes_the_next_prompt():
    model = model_of("llama3_2")
    generation = Generation(model, PROMPTS[:3], 12, rows=1)
    for _ in generation:
        if len(generation.generated[0]) == 3 and not generation.finished[0]:
            generation.stop(0, 2)
    assert generation.generated == [
        plain(model, prompt, 12)[: 2 if i == 0 else 12] for i, prompt in enumerate(PROMPTS[:3])
    ]


def test_a_prompt_that_still_waits_can_be_stopped():
    model = model_of("llama3_2")
    generation = Generation(model, PROMPTS[:3], 5, rows=1)
    steps = iter(generation)
    next(steps)
    generation.stop(1, 0)
    assert len(list(steps)) == 4 + 5
    assert generation.generated == [plain(model, PROMPTS[0], 5), [], plain(model, PROMPTS[2], 5)]
    assert generation.stats.first_tokens == 2 and all(generation.finished)
    with pytest.raises(ValueError, match=r"^rows: 0 is not allowed\. Allowed: 1 or more; for example rows=8$"):
        Generation(model, PROMPTS, 5, rows=0)


@pytest.mark.slow
@pytest.mark.parametrize("speculation", [None, Speculation(2, 2)], ids=["plain", "chain"])
def test_sampled_first_tokens_of_later_prompts_have_the_models_distribution(speculation):
    """The first and second token of prompts that took the place of others."""
    model, n = model_of("llama3_2"), 600
    sampler = Sampler(1.0, top_k=4, rng=rng(3))
    generation = run(model, [PROMPTS[1]] * 40 + [PROMPT] * n, 3, rows=40, speculation=speculation, sampler=sampler)
    pairs = torch.tensor([tokens[:2] for tokens in generation.generated[40:]])

    def next_token(tokens):
        with torch.no_grad():
            logits = walk(model, torch.tensor([tokens]), range(model.num_layers))[0, -1].double()
        values, ids = logits.topk(4)
        return torch.zeros_like(logits).scatter(0, ids, values.softmax(-1))

    first = next_token(list(PROMPT))
    both = torch.zeros(VOCAB, VOCAB, dtype=torch.double)
    for token in first.nonzero().flatten().tolist():
        both[token] = first[token] * next_token([*PROMPT, token])
    assert p_value(pairs[:, 0] * VOCAB + pairs[:, 1], both.flatten()) > 1e-3


@compiles
def test_compiled_steps_are_those_of_one_batch():
    """Other prompts in the rows have nothing compiled again."""
    model, prompts, arguments = make_small(width=32), [*SHORT, *LONG], {"speculation": Speculation(1, 2)}
    expected = run(model, prompts, 6, **arguments).generated
    run(model, LONG, 6, **arguments, compile=True)
    generation = run(model, prompts, 6, rows=2, **arguments, compile=True)
    assert generation.generated == expected
    assert generation.stats.compile_s == 0


def test_the_recipe_answers_as_with_one_prompt_at_a_time(path, tmp_path, monkeypatch):
    """All prompts are one generation of two rows; an answer is written when it has ended."""
    lines = ["a = 1; b = 2; c", "import os; x = 3", "a", "b", "while True:"]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": line}) + "\n" for line in lines))
    answers, written = [], []

    def counted(self, row, take_next=Generation._take_next):
        written.append(len((tmp_path / "2.jsonl.partial").read_text().splitlines()))
        return take_next(self, row)

    monkeypatch.setattr(Generation, "_take_next", counted)
    for batch_size in (1, 2):
        out = tmp_path / f"{batch_size}.jsonl"
        overrides = [f"prompt_file={tmp_path / 'prompts.jsonl'}", f"output_file={out}", f"batch_size={batch_size}"]
        recipe = LayerSkipGenerate(load_config(str(path), [*overrides, "benchmark.compare=false"]))
        recipe.setup()
        assert recipe.generate()["prompts"] == 5
        answers.append([json.loads(line) for line in out.read_text().splitlines()])
    assert answers[0] == answers[1]
    assert len(written) == 3 and written == sorted(written) and written[0] >= 1
