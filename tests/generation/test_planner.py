"""What `self_speculation: auto` chooses: the fastest drafting method by stored acceptance and estimated costs."""

import json
import shutil
from functools import partial
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.configs import generate_config, make_checkpoint
from torchtune.models.llama3_2._component_builders import llama3_2

from layerskip_recipes import layerskip_decoder
from layerskip_recipes.acceptance.tokens_per_round import Round
from layerskip_recipes.checkpoint.answers import Answers, write_answers
from layerskip_recipes.checkpoint.hf_checkpointer import HFCheckpointer
from layerskip_recipes.cli.configs import resolved
from layerskip_recipes.config.components import Component
from layerskip_recipes.config.loading import load_config
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.generation.drafting.planner import DraftPlanner
from layerskip_recipes.generation.drafting.prediction import (
    estimated_costs,
    machine_for,
    ranked,
)
from layerskip_recipes.generation.drafting.section import SelfSpeculation
from layerskip_recipes.generation.drafting.speculation import SPECULATION_DEFAULTS, Speculation
from layerskip_recipes.generation.kernels import when_to_compile
from layerskip_recipes.generation.kernels.when_to_compile import compiling_pays
from layerskip_recipes.generation.recipe import LayerSkipGenerate

LAYER = 2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536 + 2 * 576
VOCABULARY = 49152
INT8 = Component({"_component_": "torchao.quantization.Int8WeightOnlyConfig"}, "quantizer")
# Tokens per round of 1, 2, .. 8 drafted tokens, greedily and at temperature 1, about as a finetuned SmolLM2 has them.
TASK = {
    "all": ([1.84, 2.54, 3.18, 3.72, 4.13, 4.61, 4.97, 5.24], [1.82, 2.47, 3.07, 3.54, 3.91, 4.29, 4.61, 4.83]),
    "2048": ([1.83, 2.5, 3.1, 3.6, 4.0, 4.5, 4.9, 5.2], [1.8, 2.4, 3.0, 3.5, 3.9, 4.2, 4.5, 4.8]),
    "512": ([1.7, 2.2, 2.56, 2.82, 3.01, 3.14, 3.24, 3.31], [1.6, 2.0, 2.2, 2.3, 2.4, 2.45, 2.48, 2.5]),
}


SMOLLM2 = {
    "vocab_size": VOCABULARY, "num_layers": 30, "num_heads": 9, "num_kv_heads": 3, "embed_dim": 576,
    "intermediate_dim": 1536, "max_seq_len": 8192, "rope_base": 100000, "norm_eps": 1e-5, "scale_factor": 1,
}  # fmt: skip


def smollm2():
    with torch.device("meta"):
        return layerskip_decoder(llama3_2(**SMOLLM2))


def smollm2_costs(dtype=torch.float32):
    return estimated_costs(smollm2(), dtype, gpu=False, compiled=True, batch_rows=1)


def described(folder, exits, trained=(6, 30), draft=None, tokens=range(10, 2058), ends={}, **keys):  # noqa: B006
    """A folder whose layerskip.json has these measurements: {exit: {vocabulary: (greedy, sampled)}}, and of drafts that
    end early {vocabulary: rates}."""
    folder.mkdir(exist_ok=True)
    measured = {
        str(e): {name: {"greedy": n, "sampled": m} for name, (n, m) in of_exit.items()} for e, of_exit in exits.items()
    }
    for of_exit, (name, ended) in product(measured.values(), ends.items()):
        of_exit[name]["ended"] = {"greedy": ended, "sampled": ended}
    content = {"exits": list(trained), "vocabulary": list(tokens)} | keys
    if exits or draft:
        content["measured"] = {"on": "dataset_val", "labels": 999, "exits": measured} | (
            {"draft": draft} if draft else {}
        )
    (folder / "layerskip.json").write_text(json.dumps(content))
    return folder


def choose(
    folder,
    temperature=0.0,
    given=None,
    int8=True,
    ends=False,
    batch_rows=1,
    dtype=torch.float32,
    quantizer=None,
    has_predictions=False,
):
    """The plan for SmolLM2 in C++; `int8` and `ends`: whether drafts may be in int8, and may end early."""
    given = ({} if ends else {"min_confidence": 0.0}) | ({} if int8 else {"draft_int8": False}) | (given or {})
    section, planner = (
        SelfSpeculation(**given),
        DraftPlanner(smollm2(), folder, "cpu", dtype, HFCheckpointer, quantizer, make_tokenizer=Words),
    )
    plan, why = planner.plan(section, temperature, True, batch_rows=batch_rows, has_predictions=has_predictions)
    return SimpleNamespace(plan=plan, section=section.resolved(plan), why=why, speedup=plan and plan.speedup)


def step_s(layers, rows, itemsize=1):
    """Seconds of a step, from the bytes that it reads."""
    return (layers * LAYER + rows * 576) * itemsize / 2e10 + 2e-5 + layers * 5e-6


PLAIN = step_s(30, VOCABULARY, 4)


def speedup(tokens, drafted, draft_s, verified_layers=30):
    """Of rounds of so many tokens, by the formula of prediction.py."""
    verify = PLAIN * (1 + 0.06 * drafted * verified_layers / 30)
    return tokens * PLAIN / (drafted * draft_s + verify + 2e-4)


def expected(exits, precisions):
    """The best (exit, vocabulary, bytes per weight, length) and its speed-up."""

    def speedup_of(e, name, itemsize, d):
        draft_s = step_s(e, VOCABULARY if name == "all" else int(name), itemsize)
        layers = 30 if itemsize == 1 else 30 - e  # states of quantised layers are not kept
        return speedup(exits[e][name][0][d - 1], d, draft_s, layers)

    methods = [(e, name, i, d) for e in exits for name, i, d in product(exits[e], precisions, range(1, 9))]
    best = max(methods, key=lambda method: speedup_of(*method))
    return best, speedup_of(*best)


def test_costs_are_those_of_a_real_machine():
    """Seen on SmolLM2: exit 6 takes .34 of a plain step, .11 to .13 with 2048 tokens, .04 of that in int8; a pass over
    5 to 9 tokens takes 1.1 to 1.5 steps."""
    costs = smollm2_costs()
    assert costs.plain_step_s == pytest.approx(1 / 37.9, rel=0.1)
    assert costs.draft[False].seconds(6, VOCABULARY) / costs.plain_step_s == pytest.approx(0.34, abs=0.05)
    assert costs.draft[False].seconds(6, 2048) / costs.plain_step_s == pytest.approx(0.13, abs=0.05)
    assert costs.draft[True].seconds(6, 2048) / costs.plain_step_s == pytest.approx(0.04, abs=0.01)
    plan = Speculation(6, draft_vocabulary=range(2048))
    for further in (4, 8):
        verify = costs.round_s(plan, further) - further * costs.draft[False].seconds(6, 2048)
        assert 1.1 < verify / costs.plain_step_s < 1.5


@pytest.mark.parametrize("precisions", [(4, 1), (4,)])
def test_the_choice_is_the_best_of_all(tmp_path, precisions):
    exits = {6: TASK, 12: {name: ([n * 1.2 for n in greedy], sampled) for name, (greedy, sampled) in TASK.items()}}
    (e, name, itemsize, d), best = expected(exits, precisions)
    found = choose(described(tmp_path, exits), int8=1 in precisions)
    assert (found.section.exit_layer, found.section.num_speculations) == (e, d)
    assert found.section.draft_vocabulary == (None if name == "all" else int(name))
    assert found.section.draft_int8 == (itemsize == 1)
    assert found.speedup == pytest.approx(best, rel=1e-6) and best > 1.8
    assert f"exit {e}, " in found.why and f"{d} drafted tokens" in found.why and f"{best:.2f}x" in found.why


@pytest.mark.parametrize("tiles", [False, True])
def test_matrix_tiles_make_long_drafts_pay(tiles, monkeypatch):
    """Of drafts that are nearly always right: eight tokens, because verification of more rows is slow, or all 15."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: tiles)
    plan = Speculation(4, draft_vocabulary=range(2048), draft_int8=True)
    rounds = [Round(0.95 * n + 1, float(n)) for n in range(1, 16)]
    costs = smollm2_costs(torch.bfloat16)
    best = ranked([(plan, rounds)], costs)[0]
    assert best.num_speculations == (15 if tiles else 8)
    # Seen on an Intel Xeon: nine rows take 1.18 steps, and 16 take 1.28.
    drafting = 8 * costs.draft[True].seconds(4, 2048)
    verify = (costs.round_s(plan, 8) - drafting) / costs.plain_step_s
    assert verify == pytest.approx(1.18 if tiles else 1.5, abs=0.05)
    for dtype, gpu, compiled in (
        (torch.float32, False, True),
        (torch.bfloat16, True, True),
        (torch.bfloat16, False, False),
    ):
        assert machine_for(dtype, gpu, compiled).longest == 8


def test_drafts_that_end_early_are_longer_at_most_and_cost_their_mean_length(tmp_path):
    """Up to 8 tokens, on average 4.5 of them drafted. In a batch all rows must end."""
    greedy, sampled = TASK["2048"]
    ended = [(n - 0.2, min(d, 0.5 * d + 0.5)) for d, n in enumerate(greedy, 1)]
    folder = described(tmp_path, {6: {"all": ([1.0] * 8,) * 2, "2048": (greedy, sampled)}}, ends={"2048": ended})
    step = step_s(6, 2048)
    found = choose(folder, ends=True)
    assert found.section.min_confidence == 0.4
    assert found.section.num_speculations == max(range(1, 9), key=lambda d: speedup(*ended[d - 1], step)) == 8
    assert found.speedup == pytest.approx(speedup(*ended[7], step), rel=1e-6)
    assert "up to 8 drafted tokens" in found.why
    fixed = choose(folder)
    assert fixed.speedup == pytest.approx(max(speedup(n, d, step) for d, n in enumerate(greedy, 1)), rel=1e-6)
    assert fixed.speedup < found.speedup
    assert choose(folder, ends=True, given={"min_confidence": 0}).speedup == fixed.speedup
    in_batch = [choose(folder, ends=ends, batch_rows=2) for ends in (False, True)]
    assert in_batch[0] == in_batch[1] and in_batch[1].section.min_confidence == 0


def test_drafts_do_not_end_early_where_the_exit_agrees_without_being_sure(tmp_path):
    """Then ended drafts would write too few tokens. Who asks for an end gets it."""
    folder = described(tmp_path, {6: TASK}, ends={name: [(1.8, 1.0), *[(2.0, 1.2)] * 7] for name in TASK})
    found, fixed = choose(folder, ends=True), choose(folder)
    assert found == fixed and found.section.min_confidence == 0
    asked = choose(folder, ends=True, given={"min_confidence": 0.6})
    assert asked.section.min_confidence == 0.6 and asked.speedup < found.speedup


def test_a_vocabulary_that_costs_more_than_it_saves_is_not_chosen(tmp_path):
    """Greedily the small vocabulary says the same; when sampling it lacks most of the tokens."""
    folder = described(tmp_path, {6: {"all": TASK["all"], "2048": (TASK["all"][0], [1.2, *[1.25] * 7])}})
    found = choose(folder)
    assert found.section.draft_vocabulary == 2048 and found.plan.draft_vocabulary == [*range(10, 2058)]
    assert choose(folder, temperature=1.0).section.draft_vocabulary is None


def test_a_vocabulary_smaller_than_all_measured_ones_has_their_worst_rates(tmp_path):
    """By the rates of all tokens, drafting from 100 tokens would pay; by those of 512 it does not."""
    exits = {6: {"all": ([2.0, 4.0, 6.0, 8.0] * 2,) * 2, "512": ([1.0] * 8,) * 2}}
    assert choose(described(tmp_path, exits), given={"draft_vocabulary": 100}).section is None


def test_no_exit_drafts_where_none_pays_unless_the_user_asks(tmp_path):
    bad = described(tmp_path / "bad", {6: {"all": ([1.05] * 8, [1.1] * 8)}})
    found = choose(bad)
    assert found.plan is None
    assert found.why.startswith("No drafts: no exit should pay. The best would be exit 6, ") and "0.9" in found.why
    found = choose(tmp_path / "nowhere")
    assert found.section is None and "has no layerskip.json" in found.why
    assert found.why.endswith("To draft anyway: self_speculation.exit_layer=4")
    assert choose(described(tmp_path / "last", {}, trained=(30,))).section is None
    # Who asks for drafts gets them.
    assert choose(bad, given={"exit_layer": 6}).section.exit_layer == 6
    assert choose(bad, given={"num_speculations": 4}).plan is None  # how to draft, if at all


def test_look_ups_draft_beside_an_exit_of_single_rows_or_on_request(tmp_path):
    """Beside a draft of single rows; alone where no exit pays, if the user asks for them."""
    good, bad = described(tmp_path / "good", {6: TASK}), described(tmp_path / "bad", {6: {"all": ([1.05], [1.1])}})
    assert choose(good).section.prompt_lookup == 1
    assert choose(good, batch_rows=2).section.prompt_lookup is None
    for given in ({"prompt_lookup": 5}, {"prompt_lookup": None}):
        found = choose(good, given=given).section
        assert (found.exit_layer, found.prompt_lookup) == (6, given["prompt_lookup"])
    assert choose(bad).section is choose(bad, given={"prompt_lookup": None}).section is None
    for folder in (bad, tmp_path / "nowhere"):
        found = choose(folder, given={"prompt_lookup": 2, "num_speculations": 4})
        assert found.section == SelfSpeculation(
            **SPECULATION_DEFAULTS | {"exit_layer": None, "num_speculations": 4, "prompt_lookup": 2}
        )
        assert found.why.startswith("Drafts: look-ups in the text alone, because ")


class Words:
    """A tokenizer that decodes to numbers."""

    def decode(self, tokens):
        return " ".join(map(str, tokens))


def with_answers(folder):
    folder.mkdir(exist_ok=True)
    tokens = np.arange(200, dtype=np.int32)
    write_answers(folder, Answers("", tokens, " ".join(map(str, range(64)))))
    return folder


def test_answers_beside_the_model_draft_with_and_without_an_exit(tmp_path):
    """In batches too, unless the user does not want them. Alone, drafts are as long as this machine verifies well."""
    good, nowhere = with_answers(described(tmp_path / "good", {6: TASK})), with_answers(tmp_path / "nowhere")
    for batch_rows in (1, 2):
        found = choose(good, batch_rows=batch_rows)
        assert found.section.exit_layer == 6 and found.section.prompt_lookup == 1
        assert found.section.answers == str(good / "answers.npz")
        assert found.why.endswith(f"; look-ups in the text and 200 tokens of {good / 'answers.npz'}")
    found = choose(nowhere)
    keys = {"exit_layer": None, "num_speculations": 8, "prompt_lookup": 1, "answers": str(nowhere / "answers.npz")}
    assert found.section == SelfSpeculation(**SPECULATION_DEFAULTS | keys)
    assert found.why.startswith("Drafts: look-ups in the text and 200 tokens of ") and "no layerskip.json" in found.why
    # A resolved section drafts the same way again, from any other folder.
    assert choose(tmp_path, given=found.section.given).section == found.section
    assert choose(nowhere, given={"prompt_lookup": None}).section.prompt_lookup is None
    assert choose(nowhere, given={"answers": None}).section is None
    assert choose(nowhere, given={"exit_layer": 4}).section.answers == str(nowhere / "answers.npz")
    assert choose(good, given={"answers": None}).section.answers is None


def test_with_predictions_drafts_are_looked_up_in_the_text(tmp_path):
    """In batches, beside any exit and without one, unless the user does not want it."""
    good, nowhere = described(tmp_path / "good", {6: TASK}), tmp_path / "nowhere"
    for batch_rows in (1, 2):
        predicted = partial(choose, batch_rows=batch_rows, has_predictions=True)
        assert predicted(good).section.prompt_lookup == 1
        assert predicted(good, given={"prompt_lookup": None}).section.prompt_lookup is None
        assert predicted(nowhere, given={"exit_layer": 4}).section.prompt_lookup == 1
        keys = {"exit_layer": None, "num_speculations": 8, "prompt_lookup": 1}
        assert predicted(nowhere).section == SelfSpeculation(**SPECULATION_DEFAULTS | keys)
        assert predicted(nowhere, given={"num_speculations": 3}).section.num_speculations == 3
        assert predicted(nowhere, given={"prompt_lookup": None}).section is None


def test_the_log_says_why_a_draft_beside_the_model_is_not_used(tmp_path, monkeypatch):
    """Also where an exit drafts in its place."""
    monkeypatch.setattr(DraftPlanner, "find_description", lambda *arguments: (None, "the draft in out/draft is split"))
    chosen = choose(described(tmp_path, {6: {"all": ([1.9, 2.7, 3.4], [1.8, 2.5, 3.0])}}))
    assert chosen.plan.exit_layer == 6 and "the draft in out/draft is split" in chosen.why


def test_no_exit_means_look_ups_alone(tmp_path):
    """And the whole model as the exit drafts, for example in int8."""
    folder = described(tmp_path, {6: TASK})
    for given, length in (({}, 1), ({"prompt_lookup": 2}, 2)):
        found = choose(folder, given={"exit_layer": None} | given)
        expected = SPECULATION_DEFAULTS | {"exit_layer": None, "num_speculations": 8, "prompt_lookup": length}
        assert found.section == SelfSpeculation(**expected) and found.why is None
    found = choose(folder, given={"exit_layer": 30, "draft_int8": True})
    assert found.section.draft_int8 and found.section.prompt_lookup is None


def test_an_unmeasured_exit_near_a_seventh_of_the_depth_drafts(tmp_path):
    """Exit 5 is the nearest to a seventh of 30 layers, and exit 8 the nearest to a quarter."""
    found = choose(described(tmp_path, {}, trained=(2, 5, 8, 30)))
    assert found.section.exit_layer == 5 and "acceptance assumed" in found.why
    given = {"exit_layer": 3, "num_speculations": 5}
    assert choose(tmp_path, given=given).section == SelfSpeculation(**SPECULATION_DEFAULTS | given)


@pytest.mark.parametrize(
    "given",
    [
        {"exit_layer": 6},
        {"num_speculations": 2},
        {"draft_vocabulary": None},
        {"draft_vocabulary": 600},
        {"draft_vocabulary": [5, 6, 7]},
        {"draft_int8": False},
        {"exit_layer": 12, "num_speculations": 3, "draft_vocabulary": None, "draft_int8": False},
    ],
)
def test_keys_that_are_given_stay(tmp_path, given):
    folder = described(tmp_path, {6: TASK})
    found = choose(folder, given=given).section
    assert found.exit_layer == given.get("exit_layer", 6)
    for key, value in given.items():
        assert getattr(found, key) == value


def test_a_quantised_model_drafts_with_its_own_packed_layers(tmp_path):
    """So int8 copies are no choice of the planner, and a mistake of the user."""
    found = choose(described(tmp_path, {6: TASK}), quantizer=INT8).section
    assert found.draft_vocabulary == 2048 and not found.draft_int8
    with pytest.raises(ConfigError, match=r"^self_speculation\.draft_int8: True .*quantizer"):
        choose(tmp_path, quantizer=INT8, given={"draft_int8": True})


@pytest.mark.parametrize(("kind", "exit_layer", "layers"), [("copy", 3, 3), ("adapter", 6, 1)])
def test_a_trained_draft_has_the_length_and_precision_that_pay_most(tmp_path, kind, exit_layer, layers):
    greedy, sampled = TASK["2048"]
    keys = {"format": 3, "base": {"folder": "model", "hash": "0"}, "kind": kind, "exit_layer": exit_layer}
    keys |= {"num_layers": layers, "vocabulary": [*range(1024)]}
    described(tmp_path, {}, draft={"greedy": greedy, "sampled": sampled}, **keys)
    (tmp_path / "draft.safetensors").touch()
    found = choose(None, given={"draft": str(tmp_path)})
    below = exit_layer if kind == "adapter" else 0  # layers of the model, in fp32
    step = step_s(layers, 1024) + below * (LAYER * 4 / 2e10 + 5e-6)
    speedups = [speedup(n, d, step, 30 - below) for d, n in enumerate(greedy, 1)]
    best = 1 + speedups.index(max(speedups))
    chosen = {"num_speculations": best, "draft_int8": True, "prompt_lookup": 1, "draft_vocabulary": 1024}
    assert dict(found.section) == dict(SelfSpeculation()) | SPECULATION_DEFAULTS | {"draft": str(tmp_path)} | chosen
    whole = choose(None, given={"draft": str(tmp_path), "draft_vocabulary": None})  # its head has rows of all tokens
    assert whole.section.draft_vocabulary is None and whole.speedup < found.speedup
    assert found.speedup == pytest.approx(max(speedups), rel=1e-4)
    # Of a quantised model, the draft's own layers are not quantised, so int8 copies of them pay.
    quantised = choose(None, given={"draft": str(tmp_path)}, dtype=torch.bfloat16, quantizer=INT8).section
    assert quantised.draft_int8 is (kind == "copy")
    # The draft is the one beside the model, which is found later than the section is checked.
    found = choose(tmp_path, quantizer=INT8, given={"draft_int8": True})
    assert found.plan.draft_int8 and found.plan.draft is not None


@pytest.mark.parametrize("compiled_before", [False, True])
def test_compiling_pays_for_long_runs_only(compiled_before, monkeypatch):
    """A saving of 8 seconds pays once an earlier process has compiled the C++."""
    monkeypatch.setattr(when_to_compile, "is_library_compiled", lambda: compiled_before)
    cpu = torch.device("cpu")
    pays, why = compiling_pays(0.05, 0.01, 10_000, cpu)
    assert pays and "5.0x faster" in why and "400 s" in why
    assert compiling_pays(0.05, 0.01, 200, cpu)[0] is compiled_before
    pays, why = compiling_pays(0.05, 0.01, 100, cpu)
    assert not pays and "save about 4 s" in why and "compile=true" in why
    assert ("first time" in why) is not compiled_before


def test_a_gpu_compiles_all_but_short_runs(monkeypatch):
    """Whatever the model's size: an estimate would ask for 19,000 tokens of a large model."""
    monkeypatch.setattr(when_to_compile, "has_compiler", lambda device: True)
    cuda = torch.device("cuda")
    assert compiling_pays(0.009, 0.008, 301, cuda)[0] and compiling_pays(0.009, 0.001, 10_000, cuda)[0]
    pays, why = compiling_pays(0.009, 0.001, 300, cuda)
    assert not pays and "compile=true" in why


def test_without_a_compiler_steps_are_not_compiled_and_the_log_says_so(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    pays, why = compiling_pays(0.05, 0.01, 10_000, torch.device("cpu"))
    assert not pays and why == "Not compiled, and so slower: no C++ compiler was found"


@pytest.mark.slow
def test_the_recipe_drafts_as_was_chosen(tmp_path, tokenizer_folder):
    """The same tokens as without drafts, from the chosen exit."""
    checkpoint = make_checkpoint(tmp_path / "model", tokenizer_folder)
    described(
        checkpoint, {1: {"all": ([1 + 0.97 * d for d in range(1, 9)], [2.0] * 8)}}, trained=(1, 4), tokens=range(300)
    )

    def run(*overrides):
        config = generate_config(tmp_path, checkpoint, self_speculation="auto")
        recipe = LayerSkipGenerate(source := load_config(str(config), overrides))
        recipe.source = source
        recipe.setup()
        return recipe, recipe.generate()

    recipe, report = run("benchmark.compare=true")
    assert recipe.plan.exit_layer == 1 and recipe.plan.num_speculations > 3 and not recipe.compile
    assert report["exit_layer"] == 1 and report["drafted"] > 0 and report["identical"] is True
    assert not recipe.plan.draft_int8  # eager
    # The report's section, the log's and that of `cat --resolved` are the same, and leave nothing to choose.
    section = report["self_speculation"]
    assert section == recipe.cfg.source.self_speculation == resolved(recipe.source).self_speculation
    again, repeated = run("benchmark.compare=true", f"self_speculation={json.dumps(section)}")
    assert again.plan == recipe.plan and again.cfg.chosen.keys() <= {"device", "dtype", "compile"}
    same = ("drafted", "accepted", "rounds_by_kind", "self_speculation", "compile")
    assert again.cfg.compile is False and [repeated[key] for key in same] == [report[key] for key in same]
    assert run("batch_size=8")[0].plan == recipe.plan  # one prompt makes no batch
    recipe, report = run("self_speculation.num_speculations=2")
    assert report["num_speculations"] == 2 and report["exit_layer"] == 1
    (checkpoint / "layerskip.json").unlink()
    recipe, report = run()
    assert report["exit_layer"] is None and report["drafted"] == 0
    recipe, report = run("self_speculation.prompt_lookup=1", "benchmark.compare=true", "max_new_tokens=40")
    assert report["exit_layer"] is None and report["drafted"] > 0 and report["identical"] is True
