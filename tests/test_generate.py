"""The generate and eval recipes: prompts, stops, streaming, the comparison, the report, and the exits' measurement."""

import io
import json
import re
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchao.quantization
from configs import MODEL, eval_config, generate_config, make_checkpoint, write_yaml
from conftest import run_tune
from omegaconf import OmegaConf
from torchtune import config as tune_config
from torchtune.generation import generate as torchtune_generate

from layerskip_recipes import generate
from layerskip_recipes.checkpoint import load_decoder
from layerskip_recipes.config import load_config
from layerskip_recipes.generation import Generation, GenerationStats
from layerskip_recipes.recipes.eval import LayerSkipEval
from layerskip_recipes.recipes.generate import LayerSkipGenerate
from layerskip_recipes.recipes.report import Totals
from layerskip_recipes.recipes.stream import TextStream

CPU = torch.device("cpu")
MODES = {
    "autoregressive": ["self_speculation=null"],
    "early exit": ["self_speculation=null", "exit_layer=3"],
    "self-speculative": [],
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tokenizer_folder) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model") / "folder", tokenizer_folder)


def run(path: Path, *overrides: str) -> tuple[LayerSkipGenerate, dict]:
    recipe = LayerSkipGenerate(load_config(str(path), overrides))
    recipe.setup()
    return recipe, recipe.generate()


@pytest.fixture
def path(tmp_path, checkpoint) -> Path:
    return generate_config(tmp_path, checkpoint, max_new_tokens=24)


def test_greedy_output_is_torchtunes(path, capsys):
    """The text on stdout is that of `torchtune.generation.generate`, and the last line is the report."""
    recipe, report = run(path, "benchmark.compare=true")
    out = capsys.readouterr().out
    assert json.loads(out.splitlines()[-1]) == report
    expected, _ = torchtune_generate(
        recipe.model,
        torch.tensor(recipe.prompt_tokens[0]),
        max_generated_tokens=24,
        top_k=1,
        stop_tokens=recipe.stop_tokens,
    )
    expected = expected[0, len(recipe.prompt_tokens[0]) :].tolist()
    assert report["tokens"] == report["baseline_tokens"] == len(expected)
    assert report["identical"] is True and report["speedup"] > 0
    text = recipe.tokenizer.decode([token for token in expected if token not in recipe.stop_tokens])
    assert text.strip() and f">>> {text}\n" in out


def test_the_report_adds_up(path):
    _, report = run(path, "prompt=[import os, class A, x = 1]")
    assert report["prompts"] == 3
    assert report["acceptance_rate"] == report["accepted"] / report["drafted"]
    assert sum(report["accepted_histogram"]) == report["rounds"]
    assert sum(k * n for k, n in enumerate(report["accepted_histogram"])) == report["accepted"]
    # Each round gives its accepted tokens and one more; each prompt's first token comes from the prefill.
    assert report["tokens"] == report["accepted"] + report["rounds"] + 3
    assert report["peak_memory_bytes"] > 1e7 and report["prefill_s"] > 0 and report["decode_s"] > 0


def test_early_exit_takes_all_tokens_from_that_exit(path):
    """Chosen one by one from exit 3 of the whole text, without a cache."""
    recipe, report = run(path, *MODES["early exit"], f"output_file={path.parent / 'out.jsonl'}")
    tokens = list(recipe.prompt_tokens[0])
    with torch.no_grad():
        for _ in range(24):
            tokens.append(recipe.model(torch.tensor([tokens]), exit_layer=3)[0, -1].argmax().item())
            if tokens[-1] in recipe.stop_tokens:
                break
    (line,) = (path.parent / "out.jsonl").read_text().splitlines()
    assert json.loads(line)["text"] == recipe.text_of(0).text(tokens[len(recipe.prompt_tokens[0]) :])
    assert report["tokens"] == len(tokens) - len(recipe.prompt_tokens[0])
    assert report["acceptance_rate"] is None and report["drafted"] == 0


@pytest.mark.parametrize("mode", MODES)
def test_seeds_make_sampling_reproducible(path, mode, capsys):
    texts = []
    for seed in (1, 1, 2):
        run(path, *MODES[mode], "temperature=0.9", "top_k=40", "top_p=0.95", f"seed={seed}")
        texts.append(capsys.readouterr().out.split("\n---")[1])
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("stream", ["true", "false"])
def test_stop_strings_end_the_text_before_them_in_every_mode(path, capsys, stream):
    recipe, _ = run(path, "self_speculation=null", "stream=false")
    stream_of = TextStream(recipe.tokenizer, recipe.stop_tokens)
    whole = stream_of.text(generate(recipe.model, torch.tensor(recipe.prompt_tokens[0]), 24).tokens[0].tolist())
    whole = whole[len("def main(") :]
    stop = whole[len(whole) // 2 : len(whole) // 2 + 3]
    expected = whole[: whole.index(stop)]
    counts = []
    for mode in ("autoregressive", "self-speculative"):
        capsys.readouterr()
        _, report = run(path, *MODES[mode], f"stop_strings=[{json.dumps(stop)}]", f"stream={stream}")
        shown = capsys.readouterr().out.split(">>> ")[1].split("\n\n---")[0]
        assert shown == expected
        counts.append(report["tokens"])
    assert counts[0] == counts[1] < 24


def test_stop_tokens_are_the_tokenizers_and_the_configs(path):
    recipe, report = run(path)
    output = (
        generate(recipe.model, torch.tensor(recipe.prompt_tokens[0]), 24)
        .tokens[0, len(recipe.prompt_tokens[0]) :]
        .tolist()
    )
    stop = output[7]
    _, stopped = run(path, f"stop_tokens=[{stop}]", "benchmark.compare=true")
    assert stopped["tokens"] == output.index(stop) + 1 < report["tokens"]
    assert stopped["identical"] is True


def test_batches_give_what_each_prompt_gives_alone_in_input_order(path, tmp_path, capsys):
    """Prompts of very different lengths, so that batches mix and reorder them; answers come back in their order."""
    texts = [
        "x = 1\n" * 6,
        "def f(",
        "import os\nimport sys\n" * 3,
        "class A:",
        "a",
        "for i in range(10):\n    print(i)",
    ]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    overrides = [f"prompt_file={file}", "max_new_tokens=12", "benchmark.compare=true"]
    answers = []
    for size in (1, 2, 4):
        out = tmp_path / f"{size}.jsonl"
        _, report = run(path, *overrides, f"batch_size={size}", f"output_file={out}")
        assert report["identical"] is True and report["prompts"] == 6
        answers.append([json.loads(line) for line in out.read_text().splitlines()])
        shown = capsys.readouterr().out
        assert [shown.index(f"--- prompt {i + 1} of 6") for i in range(6)] == sorted(
            shown.index(f"--- prompt {i + 1} of 6") for i in range(6)
        )
        assert [line["prompt"] for line in answers[-1]] == texts
        assert all(line["text"] in shown for line in answers[-1])
    assert answers[0] == answers[1] == answers[2]


def test_a_stop_string_ends_its_row_of_a_batch_only(path, capsys):
    recipe, _ = run(path, "prompt=[def main(, import os]", "stream=false")
    rows = [
        generate(recipe.model, torch.tensor(tokens), 24).tokens[0, len(tokens) :] for tokens in recipe.prompt_tokens
    ]
    texts = [TextStream(recipe.tokenizer, recipe.stop_tokens).text(row.tolist()) for row in rows]
    stop = next(texts[0][at : at + 4] for at in range(4, 20) if texts[0][at : at + 4] not in texts[1])
    capsys.readouterr()
    run(path, "prompt=[def main(, import os]", "batch_size=2", f"stop_strings=[{json.dumps(stop)}]")
    shown = [part.split("\n\n---")[0] for part in capsys.readouterr().out.split(">>> ")[1:]]
    assert [text.rstrip("\n") for text in shown] == [
        texts[0][: texts[0].index(stop)].rstrip("\n"),
        texts[1].rstrip("\n"),
    ]


VARIANTS = [
    "exit_layer=[1,2,3]",
    "tree_width=3; tree_children=2",
    "threshold=auto",
    "threshold=0.2",
    "prompt_lookup=2",
    "draft_vocabulary=40",
    "draft_vocabulary=[5,6,7,8,9,10,11]",
    "draft_quantizer._component_=torchao.quantization.Int8WeightOnlyConfig",
]


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_leaves_the_output_as_it_is(path, variant):
    overrides = [f"self_speculation.{part}" for part in variant.split("; ")]
    _, report = run(path, *overrides, "prompt=[def main(, import os]", "benchmark.compare=true")
    assert report["identical"] is True and report["drafted"] > 0
    assert report["engine_efficiency"] == pytest.approx(report["speedup"] / report["ideal_speedup"])


def test_the_draft_vocabulary_of_a_file_is_its_frequent_tokens(path, tmp_path):
    (tmp_path / "text.txt").write_text("import os\n" * 9 + "zzz")
    recipe, report = run(
        path,
        "self_speculation.draft_vocabulary=4",
        f"self_speculation.draft_vocabulary_file={tmp_path / 'text.txt'}",
    )
    frequent = set(recipe.tokenizer.encode("import os\n" * 9, add_bos=False, add_eos=False))
    assert set(recipe.speculation.draft_vocabulary) <= frequent and report["drafted"] > 0


def test_the_report_says_how_near_to_the_ideal(path):
    """Efficiency is measured / ((rho d + 1) / (d c + 1)), with rho and c of the same run."""
    _, report = run(path, "benchmark.compare=true", "prompt=[def main(, import os]")
    steps = report["baseline_tokens"] - report["prompts"]
    c = (report["draft_s"] / (report["rounds"] * 3 - 2)) / (report["baseline_decode_s"] / steps)
    assert report["draft_cost"] == pytest.approx(c, rel=0.2)
    d = report["drafted"] / report["rounds"]
    ideal = (report["acceptance_rate"] * d + 1) / (d * report["draft_cost"] + 1)
    assert report["ideal_speedup"] == pytest.approx(ideal, rel=0.1)
    assert report["draft_s"] + report["verify_s"] + report["accept_s"] == pytest.approx(report["decode_s"])


@pytest.mark.parametrize("quantizer", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
def test_quantised_weights_are_what_decodes(path, quantizer):
    """The logits are those of a model that torchao quantises here; all layers' weights are torchao's."""
    recipe, report = run(path, f"quantizer._component_=torchao.quantization.{quantizer}", "benchmark.compare=true")
    assert report["identical"] is True
    linears = [part for part in recipe.model.layers.modules() if isinstance(part, torch.nn.Linear)]
    assert len(linears) == 4 * 7 and all(type(part.weight) is not torch.nn.Parameter for part in linears)
    theirs = load_decoder(load_config(str(path)), CPU, torch.float32)
    torchao.quantization.quantize_(theirs, getattr(torchao.quantization, quantizer)())
    tokens = torch.tensor([recipe.prompt_tokens[0]])
    with torch.no_grad():
        torch.testing.assert_close(recipe.model(tokens), theirs(tokens))
        assert not torch.equal(recipe.model(tokens), load_decoder(load_config(str(path)), CPU, torch.float32)(tokens))


def test_a_quantised_draft_is_of_the_early_layers_only(path):
    quantizer = "self_speculation.draft_quantizer._component_=torchao.quantization.Int8WeightOnlyConfig"
    recipe, _ = run(path, quantizer)
    drafter = recipe.speculation.drafter
    assert len(drafter.layers) == recipe.speculation.exits[-1]
    of = {name: [m.weight for m in part.layers.modules() if isinstance(m, torch.nn.Linear)] for name, part in
          (("draft", drafter), ("model", recipe.model))}  # fmt: skip
    assert all(type(weight) is not torch.nn.Parameter for weight in of["draft"])
    assert all(type(weight) is torch.nn.Parameter for weight in of["model"])


def test_a_quantiser_that_does_not_work_here_is_named(path):
    with pytest.raises(ValueError, match=r"^quantizer: .*Float8WeightOnlyConfig does not work on cpu \("):
        run(path, "quantizer._component_=torchao.quantization.Float8WeightOnlyConfig")


def test_compile_is_reported_apart_and_changes_no_token(path, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    outputs = []
    for flag in ("false", "true"):
        out = tmp_path / f"{flag}.jsonl"
        _, report = run(path, f"compile={flag}", f"output_file={out}", "benchmark.compare=true")
        assert report["identical"] is True
        assert (report["compile_s"] > 0) is (flag == "true")
        outputs.append(out.read_text())
    assert outputs[0] == outputs[1]


def test_interactive_keeps_the_conversation_and_its_cache(path, tmp_path):
    """Two questions by standard input: the second prompt holds the first answer, whose cache is not computed again."""
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    template += "{% if add_generation_prompt %}<reply>{% endif %}"
    overrides = [f"tokenizer.chat_template={json.dumps(template)}", "prompt=interactive", "max_new_tokens=8"]
    recipe = LayerSkipGenerate(load_config(str(path), [*overrides, "system_prompt=be"]))
    recipe.setup()
    monkey = pytest.MonkeyPatch()
    monkey.setattr("sys.stdin", io.StringIO("hello\n\nand now\n/exit\n"))
    seen = []
    monkey.setattr(recipe, "_generation", lambda prompts, *a, old=recipe._generation, **k: seen.append(
        (prompts[0], made := old(prompts, *a, **k))) or made)  # fmt: skip
    report = recipe.generate()
    monkey.undo()
    assert report["prompts"] == 2
    (first, one), (second, two) = seen
    decode = recipe.tokenizer.decode
    assert decode(first) == "<system>be<user>hello<reply>"
    answer = TextStream(recipe.tokenizer, recipe.stop_tokens).text(one.generated[0])
    assert decode(second) == f"<system>be<user>hello<assistant>{answer}<user>and now<reply>"
    common = next(i for i, (a, b) in enumerate(zip(first + one.generated[0], second, strict=False)) if a != b)
    assert two.stats.reused_tokens == min(common, len(first) + len(one.generated[0]) - 1) > 4
    assert two.stats.prefill_tokens == len(second) - two.stats.reused_tokens
    alone = generate(recipe.model, torch.tensor(second), 8, stop_tokens=recipe.stop_tokens)
    assert two.generated[0] == alone.tokens[0, len(second) :].tolist()


def test_ctrl_c_ends_with_the_report_so_far(path, monkeypatch, capsys):
    recipe = LayerSkipGenerate(load_config(str(path), ["prompt=[a, b, c]"]))
    recipe.setup()
    calls = []

    def interrupted(batch, *args, run=recipe._run, **kwargs):
        calls.append(batch)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return run(batch, *args, **kwargs)

    monkeypatch.setattr(recipe, "_run", interrupted)
    assert recipe.generate()["prompts"] == 2
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["prompts"] == 2


@pytest.mark.parametrize("compare", [False, True])
def test_ctrl_c_within_a_text_keeps_it_as_far_as_it_came(path, compare, monkeypatch, capsys):
    """In the second of three prompts, after two rounds; in a comparison it has no counterpart, and stays out."""
    out = path.parent / "out.jsonl"
    overrides = ["prompt=[a, b, c]", f"output_file={out}", f"benchmark.compare={str(compare).lower()}"]
    recipe = LayerSkipGenerate(load_config(str(path), overrides))
    recipe.setup()
    rounds = []

    def interrupted(self, round_=Generation._round):
        rounds.append(self.prompts[0])
        if rounds.count(recipe.prompt_tokens[1]) == 3:
            raise KeyboardInterrupt
        return round_(self)

    monkeypatch.setattr(Generation, "_round", interrupted)
    report = recipe.generate()
    first, second = map(json.loads, out.read_text().splitlines())
    assert "interrupted" not in first and second["interrupted"] is True and second["prompt"] == "b"
    assert 3 <= second["tokens"] < 24 and second["text"] in capsys.readouterr().out
    assert report["prompts"] == 2 - compare
    assert report["tokens"] == first["tokens"] + (0 if compare else second["tokens"])


def test_ctrl_c_compares_what_both_ways_did(path, monkeypatch):
    """It comes after the baseline's second prompt, before ours."""
    recipe = LayerSkipGenerate(load_config(str(path), ["prompt=[a, b, c]", "benchmark.compare=true"]))
    recipe.setup()
    calls = []

    def interrupted(batch, limit, plain=False, run=recipe._run, **kwargs):
        calls.append((*batch, plain))
        if calls[2:] == [(0, True), (0, False), (1, True), (1, False)]:
            raise KeyboardInterrupt
        return run(batch, limit, plain=plain, **kwargs)

    monkeypatch.setattr(recipe, "_run", interrupted)
    report = recipe.generate()
    assert (report["prompts"], report["identical"]) == (1, True)
    assert report["baseline_tokens"] == report["tokens"]


def test_each_answer_is_printed_once(path, capsys):
    """A batch that is left with one prompt, too."""
    run(path, "prompt=[one, two, three]", "batch_size=2")
    out = capsys.readouterr().out
    assert [out.count(f"--- prompt {i} of 3") for i in (1, 2, 3)] == [1, 1, 1]


def test_a_conversation_has_no_baseline(path, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    overrides = [f"tokenizer.chat_template={json.dumps(template)}", "prompt=interactive", "benchmark.compare=true"]
    recipe = LayerSkipGenerate(load_config(str(path), overrides))
    recipe.setup()
    report = recipe.generate()
    assert report["prompts"] == 1 and "identical" not in report


def test_drafts_are_shown_dim_and_replaced(path, capsys, monkeypatch):
    """On a terminal: without what is between saving and restoring the cursor, the text is the accepted text."""
    run(path)
    plain = capsys.readouterr().out.split(">>> ")[1].split("\n\n---")[0]
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    run(path, "stream=draft")
    shown = capsys.readouterr().out.split(">>> ")[1].split("\n\n---")[0]
    assert "\x1b[2m" in shown
    assert re.sub(r"\x1b\[s.*?\x1b\[u\x1b\[J", "", shown) == plain


@pytest.mark.parametrize("mode", ["self-speculative", "autoregressive"])
def test_two_processes_give_the_output_of_one(path, tmp_path, mode):
    """Sharded over two gloo processes: the same text, printed once."""
    outputs = []
    for processes in ([], ["--nproc_per_node", "2"]):
        done = run_tune(
            "run", *processes, "layerskip_generate", "--config", str(path), *MODES[mode], cwd=tmp_path,
            env={"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        outputs.append(done.stdout.split("\n--- ")[1])
        assert done.stdout.count("--- prompt 1 of 1") == 1
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("compile=true", "compile"),
        ("prompt=interactive", "prompt"),
        ("prompt_file=-", "prompt_file"),
        (
            "self_speculation.draft_quantizer._component_=torchao.quantization.Int8WeightOnlyConfig",
            "self_speculation.draft_quantizer",
        ),
    ],
)
def test_what_works_in_one_process_only_is_refused_in_several(path, monkeypatch, override, key):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=rf"^{re.escape(key)}: .*one process, and there are 2"):
        LayerSkipGenerate(load_config(str(path), [override]))


def test_a_batch_that_does_not_fit_is_refused(path, monkeypatch):
    monkeypatch.setattr("os.sysconf", lambda name: 10)
    with pytest.raises(ValueError, match=r"^batch_size: the caches of 2 rows .*up to \d+"):
        LayerSkipGenerate(load_config(str(path), ["batch_size=2", "prompt=[a, b]"]))


def test_prompt_files_and_standard_input(path, tmp_path, monkeypatch):
    (tmp_path / "one.txt").write_text("import sys\n")
    (tmp_path / "two.jsonl").write_text(
        '{"prompt": "import sys\\n"}\n\n{"prompt": {"user": "hi", "system": "be brief"}}\n'
    )
    monkeypatch.setattr("sys.stdin", io.StringIO("import sys\n"))

    def prompts(name):
        return LayerSkipGenerate(load_config(str(path), [f"prompt_file={name}"])).prompts

    assert prompts(tmp_path / "one.txt") == prompts("-") == ["import sys\n"]
    assert prompts(tmp_path / "two.jsonl") == ["import sys\n", {"user": "hi", "system": "be brief"}]


def test_what_a_prompt_takes_from_other_keys_is_filled_in(path):
    cfg = load_config(str(path), ["prompt=null", 'prompt.user="Tell me about ${max_new_tokens} ${tokenizer.path}"'])
    assert LayerSkipGenerate(cfg).prompts == [{"user": f"Tell me about {cfg.max_new_tokens} {cfg.tokenizer.path}"}]


def test_the_tokenizers_limit_of_a_training_cuts_no_prompt(path):
    limited = LayerSkipGenerate(load_config(str(path), ["prompt='x = 1 + 2 + 3 + 4'", "tokenizer.max_seq_len=4"]))
    free = LayerSkipGenerate(load_config(str(path), ["prompt='x = 1 + 2 + 3 + 4'"]))
    assert limited.prompt_tokens == free.prompt_tokens and len(free.prompt_tokens[0]) > 4
    assert limited.tokenizer.max_seq_len == 4


def test_a_chat_prompt_goes_through_the_template(path, checkpoint, tmp_path):
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    template += "{% if add_generation_prompt %}<reply>{% endif %}"
    overrides = [f"tokenizer.chat_template={json.dumps(template)}", "prompt=null", "prompt.system=be", "prompt.user=hi"]
    recipe = LayerSkipGenerate(load_config(str(path), overrides))
    assert recipe.tokenizer.decode(recipe.prompt_tokens[0]) == "<system>be<user>hi<reply>"


def test_a_torchtune_quantizer_keeps_output_identical_to_the_quantised_model(path):
    _, report = run(
        path, "quantizer._component_=torchtune.training.quantization.Int8DynActInt4WeightQuantizer",
        "quantizer.groupsize=16", "benchmark.compare=true",
    )  # fmt: skip
    assert report["identical"] is True


def test_tune_run_prints_only_text_and_report_on_stdout(path, tmp_path):
    run_ = run_tune("run", "layerskip_generate", "--config", str(path), "benchmark.compare=true", cwd=tmp_path)
    assert run_.returncode == 0, run_.stderr[-2000:]
    assert run_.stdout.startswith("\n--- prompt 1 of 1\ndef main(\n>>> ")
    assert json.loads(run_.stdout.splitlines()[-1])["identical"] is True
    assert sorted(p.name for p in tmp_path.iterdir()) == ["generate.yaml"]


def test_eval_measures_every_exit(tmp_path, checkpoint, capsys):
    """Loss, accuracy and agreement by plain PyTorch over the same samples; the picture is a PNG."""
    path = eval_config(tmp_path, checkpoint, picture=str(tmp_path / "exits.png"), num_speculations=3)
    recipe = LayerSkipEval(load_config(str(path)))
    recipe.setup()
    report = recipe.evaluate()
    model = tune_config.instantiate(OmegaConf.create(MODEL))
    model.load_state_dict(recipe.model.state_dict())
    tokens = torch.tensor([sample["tokens"] for sample in recipe.batches.dataset])
    labels = tokens[:, 1:].flatten()
    with torch.no_grad():
        h, logits = model.tok_embeddings(tokens), {}
        for i, layer in enumerate(model.layers):
            h = layer(h)
            logits[i + 1] = model.output(model.norm(h))[:, :-1].flatten(0, 1)
    assert list(report["exits"]) == [1, 2, 3, 4]
    for e, quality in report["exits"].items():
        assert quality["loss"] == pytest.approx(F.cross_entropy(logits[e], labels).item(), abs=1e-4)
        agree = (logits[e].argmax(-1) == logits[4].argmax(-1)).float().mean().item()
        assert quality["agreement"] == pytest.approx(agree, abs=1e-3)
        assert quality["accuracy"] == pytest.approx((logits[e].argmax(-1) == labels).float().mean().item(), abs=1e-3)
        # Of 3 tokens drafted from each position of a sample whose next 3 labels are there.
        same = (logits[e].argmax(-1) == logits[4].argmax(-1)).view(len(tokens), -1).tolist()
        runs = [sum(all(row[i : i + k]) for k in (1, 2, 3)) for row in same for i in range(len(row) - 2)]
        assert quality["accepted_length"] == pytest.approx(sum(runs) / len(runs), abs=1e-3)
    assert (tmp_path / "exits.png").read_bytes()[:4] == b"\x89PNG"
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["batches"] == 2


def test_eval_compares_checkpoints(tmp_path, checkpoint, tokenizer_folder):
    """Each has the figures that it has alone; the report is a file too."""
    other = make_checkpoint(tmp_path / "other", tokenizer_folder, seed=1)

    def evaluate(**changes):
        recipe = LayerSkipEval(load_config(str(eval_config(tmp_path, **changes))))
        recipe.setup()
        return recipe.evaluate()

    alone = {folder: evaluate(checkpoint=folder)["exits"] for folder in (checkpoint, other)}
    report = tmp_path / "report" / "exits.json"
    both = evaluate(checkpoint=checkpoint, compare={"other": {"checkpoint_dir": str(other)}}, report=str(report))
    assert both["exits"] == alone[checkpoint] != alone[other] == both["compare"]["other"]
    assert json.loads(report.read_text()) == json.loads(json.dumps(both))


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError("the second checkpoint is broken")])
def test_eval_loses_nothing_that_it_measured(tmp_path, checkpoint, monkeypatch, capsys, error):
    report = tmp_path / "exits.json"
    compare = {"other": {"checkpoint_dir": str(checkpoint)}}
    recipe = LayerSkipEval(load_config(str(eval_config(tmp_path, checkpoint, compare=compare, report=str(report)))))
    recipe.setup()
    exits_of = recipe._measure_exits

    def first_only(name):
        if name == "other":
            raise error
        return exits_of(name)

    monkeypatch.setattr(recipe, "_measure_exits", first_only)
    with nullcontext() if error is KeyboardInterrupt else pytest.raises(RuntimeError, match="is broken"):
        recipe.evaluate()
    found = json.loads(report.read_text())
    assert list(found["exits"]) == ["1", "2", "3", "4"] and found["compare"] == {} and found["interrupted"] is True
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == found


def test_an_evaluation_that_measured_nothing_leaves_the_last_report(tmp_path, checkpoint, monkeypatch):
    (tmp_path / "exits.json").write_text("yesterday's")
    recipe = LayerSkipEval(load_config(str(eval_config(tmp_path, checkpoint, report=str(tmp_path / "exits.json")))))
    recipe.setup()
    monkeypatch.setattr(recipe, "_measure_exits", lambda name: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        recipe.evaluate()
    assert (tmp_path / "exits.json").read_text() == "yesterday's"


@pytest.mark.parametrize("changes", [{"report": "folder"}, {"report": "file/exits.json"}, {"picture": "exits.txt"}])
def test_eval_checks_what_it_will_write(tmp_path, checkpoint, monkeypatch, changes):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    [(key, value)] = changes.items()
    with pytest.raises(ValueError, match=rf"^{key}: '{value}' |^{key}: 'file' cannot be written"):
        LayerSkipEval(load_config(str(eval_config(tmp_path, checkpoint, **changes))))


def test_a_generation_config_becomes_an_evaluation(tmp_path, checkpoint, path):
    """What means nothing here is switched off by null, and refused by its name where it is not."""
    data = {"_component_": "layerskip_recipes.quickstart.StdlibDataset", "split": "heldout", "seq_len": 64}
    off = dict.fromkeys(
        ("prompt", "self_speculation", "max_new_tokens", "benchmark", "top_k", "stop_strings", "stream")
    )
    own = write_yaml(tmp_path / "own.yaml", {"extends": str(path), "dataset": data, "temperature": 0.0, **off})
    LayerSkipEval(load_config(str(own)))
    for key, value in {"temperature": 1.0, "top_k": 1, "stop_tokens": [2], "prompt": "a"}.items():
        with pytest.raises(ValueError, match=rf"^{key}: .* is not honoured by this recipe: .* Set {key}=null"):
            LayerSkipEval(load_config(str(own), [f"{key}={value}"]))


def test_what_does_not_loop_is_compared_on_the_same_prompts():
    """Of three prompts one way loops on the first and the other on the second: the third is left."""
    loop, straight = [1, 2] * 20, list(range(40))
    outputs = {0: (loop, straight), 1: (straight, loop), 2: (straight, straight)}
    totals, seconds = (Totals(), Totals()), ((1.0, 3.0), (5.0, 1.0), (1.0, 2.0))
    for i, both in outputs.items():
        for of_way, mine, other, took in zip(totals, both, both[::-1], seconds[i], strict=True):
            of_way.add({i: mine}, GenerationStats(tokens=41, rows=1, decode_s=took), beside=[other])
    assert [of_way.compared.decode_s for of_way in totals] == [1.0, 2.0]
    assert [of_way.straight.decode_s for of_way in totals] == [5.0 + 1.0, 3.0 + 2.0]
    assert [of_way.looping for of_way in totals] == [1, 1]
