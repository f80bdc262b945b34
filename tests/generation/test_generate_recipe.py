"""The generate recipe: outputs, stops, batches, variants, the comparison, the report."""

import json
import re
import warnings
from types import SimpleNamespace

import pytest
import torch
import torchao.quantization
from helpers.commands import run_tune
from helpers.compiled import compiles
from helpers.json_lines import write_lines
from helpers.ranks import check_success, run_tune_on_ranks
from helpers.recipes import run_generate as run
from torchtune.generation import generate as torchtune_generate

from layerskip_recipes.checkpoint.weights import load_decoder
from layerskip_recipes.config.loading import load_config
from layerskip_recipes.generation import accounts
from layerskip_recipes.generation.config import GenerateConfig
from layerskip_recipes.generation.text import text_stream
from layerskip_recipes.generation.text.text_stream import TextStream

pytestmark = pytest.mark.slow

INT4 = "torchtune.training.quantization.Int8DynActInt4WeightQuantizer"


def plain_tokens(recipe, row=0):
    """The 24 tokens after a prompt by torchtune's `generate`."""
    prompt = recipe.prompt_tokens[row]
    arguments = {"max_generated_tokens": 24, "top_k": 1, "stop_tokens": recipe.llm.stop_tokens}
    return torchtune_generate(recipe.llm.model, torch.tensor(prompt), **arguments)[0][0, len(prompt) :].tolist()


def answers(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_greedy_output_is_torchtunes(path, capsys):
    """The text on stdout is that of `torchtune.generation.generate`, and the last line is the report."""
    recipe, report = run(path, "benchmark.compare=true")
    out = capsys.readouterr().out
    assert json.loads(out.splitlines()[-1]) == report
    expected = plain_tokens(recipe)
    assert report["tokens"] == report["baseline_tokens"] == len(expected)
    assert report["identical"] is True and report["speedup"] > 0
    text = recipe.tokenizer.decode([token for token in expected if token not in recipe.llm.stop_tokens])
    assert text.strip() and f">>> {text}\n" in out


@pytest.mark.parametrize("level", ["INFO", "WARNING"])
def test_the_log_level_holds_for_the_whole_run(path, level, caplog):
    caplog.set_level("DEBUG")
    run(path, f"log_level={level}")
    shown = {record.levelname for record in caplog.records if record.name.startswith("torchtune")}
    assert ("INFO" in shown) == (level == "INFO") and "DEBUG" not in shown


def test_the_report_adds_up(path):
    _, report = run(path, "prompt=[import os, class A, x = 1]")
    assert report["prompts"] == 3
    assert report["acceptance_rate"] == report["accepted"] / report["drafted"]
    assert sum(report["accepted_histogram"]) == report["rounds"] - report["rounds_by_kind"]["plain"]
    assert sum(k * n for k, n in enumerate(report["accepted_histogram"])) == report["accepted"]
    # Each round gives its accepted tokens and one more; each prompt's first token comes from the prefill.
    assert report["tokens"] == report["accepted"] + report["rounds"] + 3
    assert report["peak_memory_bytes"] > 1e7 and report["prefill_s"] > 0 and report["decode_s"] > 0


@pytest.mark.parametrize("stream", ["false", "true", "draft"])
def test_a_comparison_measures_both_sides_alike(stream, path, monkeypatch):
    """Only one side shows its text, so neither counts the time of it; without a comparison it counts."""
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    now, whole = [0.0], TextStream._continue

    def perf_counter():
        now[0] += 0.001
        return now[0]

    def slow(self, *args):
        now[0] += 1000
        return whole(self, *args)

    for module in (accounts, text_stream):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=perf_counter))
    monkeypatch.setattr(TextStream, "_continue", slow)
    settings = {compare: (f"stream={stream}", f"benchmark.compare={compare}") for compare in (True, False)}
    seconds = {compare: run(path, *given)[1]["decode_s"] for compare, given in settings.items()}
    assert 0 < seconds[True] < 1000
    assert (seconds[False] > 1000) == (stream != "false")


def test_early_exit_takes_all_tokens_from_that_exit(path, tmp_path):
    """Chosen one by one from exit 3 of the whole text, without a cache."""
    recipe, report = run(path, "self_speculation=null", "exit_layer=3", f"output_file={tmp_path / 'out.jsonl'}")
    tokens, new = list(recipe.prompt_tokens[0]), []
    while len(new) < 24 and not {*new} & {*recipe.llm.stop_tokens}:
        with torch.no_grad():
            new.append(recipe.llm.model(torch.tensor([tokens + new]), exit_layer=3)[0, -1].argmax().item())
    (line,) = answers(tmp_path / "out.jsonl")
    assert line["text"] == recipe.text_of(0).text(new) and report["tokens"] == len(new)
    assert report["acceptance_rate"] is None and report["drafted"] == 0


def shown(capsys):
    """The answers on stdout."""
    return [part.split("\n\n---")[0].rstrip("\n") for part in capsys.readouterr().out.split(">>> ")[1:]]


@pytest.mark.parametrize("stream", ["true", "false"])
def test_stop_strings_end_the_text_before_them_in_every_mode(path, capsys, stream):
    """Without drafts, with them, and in a batch, of which one row ends."""
    prompts = "prompt=[def main(, import os]"
    recipe, _ = run(path, prompts, "self_speculation=null", "stream=false")
    text = TextStream(recipe.tokenizer, recipe.llm.stop_tokens).text
    first, second = (text(plain_tokens(recipe, row)) for row in range(2))
    stop = next(first[at : at + 4] for at in range(4, 20) if first[at : at + 4] not in second)
    counts = set()
    for mode in ("self_speculation=null", "batch_size=1", "batch_size=2"):
        capsys.readouterr()
        _, report = run(path, prompts, mode, f"stop_strings=[{json.dumps(stop)}]", f"stream={stream}")
        assert shown(capsys) == [first[: first.index(stop)].rstrip("\n"), second.rstrip("\n")]
        counts.add(report["tokens"])
    assert len(counts) == 1 and counts.pop() < 2 * 24


def test_stop_tokens_are_the_tokenizers_and_the_configs(path):
    recipe, report = run(path)
    output = plain_tokens(recipe)
    _, stopped = run(path, f"stop_tokens=[{output[7]}]", "benchmark.compare=true")
    assert stopped["tokens"] == output.index(output[7]) + 1 < report["tokens"]
    assert stopped["identical"] is True


def test_batches_give_what_each_prompt_gives_alone_in_input_order(path, tmp_path, capsys):
    """Prompts of very different lengths, so that batches mix and reorder them; answers come back in their order."""
    texts = ["x = 1\n" * 6, "def f(", "import os\nimport sys\n" * 3, "class A:", "a", "for i in range(9):\n    print(i"]
    file, found = write_lines(tmp_path / "prompts.jsonl", ({"prompt": text} for text in texts)), []
    for size in (1, 2, 4):
        out = tmp_path / f"{size}.jsonl"
        overrides = [f"prompt_file={file}", "max_new_tokens=12", "benchmark.compare=true"]
        _, report = run(path, *overrides, f"batch_size={size}", f"output_file={out}")
        assert report["identical"] is True and report["prompts"] == 6
        found.append(answers(out))
        printed = capsys.readouterr().out
        assert re.findall(r"--- prompt (\d) of 6", printed) == ["1", "2", "3", "4", "5", "6"]
        assert [line["prompt"] for line in found[-1]] == texts
        assert all(line["text"] in printed for line in found[-1])
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize(
    "overrides",
    [
        ["self_speculation.prompt_lookup=2"],
        ["self_speculation.draft_vocabulary=40"],
        ["self_speculation.draft_vocabulary=[5,6,7,8,9,10,11]"],
        ["self_speculation.draft_int8=true"],
        [f"quantizer={{_component_: {INT4}, groupsize: 16}}"],
    ],
    ids=str,
)
@pytest.mark.filterwarnings("error:.*version 1 of Int8WeightOnlyConfig")
def test_every_variant_leaves_the_output_as_it_is(path, overrides):
    _, report = run(path, *overrides, "prompt=[def main(, import os]", "benchmark.compare=true")
    assert report["identical"] is True and report["drafted"] > 0
    assert report["engine_efficiency"] == pytest.approx(report["speedup"] / report["ideal_speedup"])


@pytest.mark.parametrize("quantizer", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
@pytest.mark.filterwarnings("error:.*version 1 of Int8WeightOnlyConfig")
def test_quantised_weights_are_what_decodes(path, quantizer):
    """The logits are those of a model that torchao quantises here: all layers, and a copy of the tied head's matrix."""
    # Uncompiled, one row of x and several differ in attention's last bits, which rounding to int8 can make larger.
    arguments = [f"quantizer._component_=torchao.quantization.{quantizer}", "benchmark.compare=true", "compile=true"]
    recipe, report = run(path, *arguments)
    _, of_few_tokens = run(path, *arguments, "self_speculation.draft_vocabulary=40")
    assert report["identical"] is of_few_tokens["identical"] is True and of_few_tokens["tokens"] == report["tokens"]
    linears = [part for part in recipe.llm.model.modules() if isinstance(part, torch.nn.Linear)]
    assert len(linears) == 4 * 7 + 1 and all(type(part.weight) is not torch.nn.Parameter for part in linears)
    assert type(recipe.llm.model.tok_embeddings.weight) is torch.nn.Parameter
    tokens = torch.tensor([recipe.prompt_tokens[0]])
    theirs = load_decoder(GenerateConfig.load(load_config(str(path))), torch.device("cpu"))
    with torch.no_grad():
        assert not torch.equal(recipe.llm.model(tokens), theirs(tokens))
        theirs.output = torch.nn.Linear(*theirs.tok_embeddings.weight.shape[::-1], bias=False)
        theirs.output.weight.data = theirs.tok_embeddings.weight.data.clone()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torchao.quantization.quantize_(theirs, getattr(torchao.quantization, quantizer)(version=2))
        torch.testing.assert_close(recipe.llm.model(tokens), theirs(tokens))


@pytest.mark.parametrize("vocabulary", [None, 40])
@pytest.mark.parametrize("has_vnni", [False, True])
def test_a_quantised_draft_is_of_the_early_layers_and_the_head(path, vocabulary, has_vnni, monkeypatch):
    """Of a draft vocabulary the rows of the head; the model and what it shares are as they were."""
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: has_vnni)
    drafts = {"draft_int8": "true", "draft_vocabulary": vocabulary or "null"}
    recipe, _ = run(path, *(f"self_speculation.{key}={value}" for key, value in drafts.items()))
    (built,), model = recipe.llm.state.drafts.values(), recipe.llm.model
    draft_decoder, draft_head = built.decoder, built.head
    linears = [part for part in draft_decoder.layers.modules() if isinstance(part, torch.nn.Linear)]
    assert len(draft_decoder.layers) == recipe.plan.exit_layer == len(linears) / 7
    assert all(type(part.weight) is not torch.nn.Parameter for part in linears)
    assert all(type(weight) is torch.nn.Parameter for weight in model.parameters())
    assert draft_decoder.tok_embeddings is model.tok_embeddings
    rows, head = slice(None), draft_decoder.output
    if vocabulary is not None:
        rows, head = draft_head.vocabulary, draft_head.output
    x = torch.randn(1, 3, model.tok_embeddings.embedding_dim)
    expected = torch.nn.Linear(1, 1, bias=False)
    expected.weight = torch.nn.Parameter(getattr(model.output, "tied_module", model.output).weight.detach()[rows])
    rounds_inputs = torchao.quantization.Int8DynamicActivationInt8WeightConfig
    int8 = rounds_inputs(version=2) if has_vnni else torchao.quantization.Int8WeightOnlyConfig()
    torchao.quantization.quantize_(expected, int8)
    with torch.no_grad():
        torch.testing.assert_close(head(x), expected(x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["Float8WeightOnlyConfig"], r"Float8WeightOnlyConfig does not work on cpu \("),
        # torchao leaves layers that groups do not fit as they are.
        (["Int4WeightOnlyConfig", "quantizer.group_size=64"], "Int4WeightOnlyConfig changes no weight .*divisor"),
    ],
)
def test_a_quantiser_that_does_not_work_here_is_named(arguments, message, path):
    with pytest.raises(ValueError, match=f"^quantizer: .*{message}"):
        run(path, f"quantizer._component_=torchao.quantization.{arguments[0]}", *arguments[1:])


@compiles
@pytest.mark.parametrize("compare", [True, False])
@pytest.mark.parametrize("size", [1, 2])
def test_the_beginning_that_prompts_share_is_read_once(size, compare, path, tmp_path):
    """In C++, by both sides of a comparison alike; the answers are those of prompts that are read whole."""
    prompts = ["def main(argument):", "def make(value):", "def map_all(items, function):", "def main(argument):"]
    file = write_lines(tmp_path / "prompts.jsonl", ({"prompt": prompt} for prompt in prompts))
    given = [f"prompt_file={file}", f"batch_size={size}", "temperature=0.7", "seed=1"]
    texts = []
    for flag in ("false", "true"):
        out = tmp_path / f"{flag}.jsonl"
        overrides = [f"compile={flag}", f"output_file={out}", f"benchmark.compare={str(compare).lower()}"]
        recipe, report = run(path, *given, *overrides)
        texts.append([line["text"] for line in answers(out)])
        assert report.get("identical", True) is True and (report["compile_s"] > 0) is (flag == "true")
        read_before = 0 if compare else size  # a comparison warms up with the first batch
        assert report["reused_tokens"] == (recipe.common * (4 - read_before) if flag == "true" else 0)
        assert recipe.common == len(recipe.tokenizer.encode("def ma", add_eos=False))
    assert texts[0] == texts[1] and texts[1][0] != texts[1][3]


def test_tune_run_prints_only_text_and_report_on_stdout(path, tmp_path):
    run_ = run_tune("run", "layerskip_generate", "--config", str(path), "benchmark.compare=true", cwd=tmp_path)
    assert run_.returncode == 0, run_.stderr[-2000:]
    assert run_.stdout.startswith("\n--- prompt 1 of 1\ndef main(\n>>> ")
    assert json.loads(run_.stdout.splitlines()[-1])["identical"] is True
    assert sorted(p.name for p in tmp_path.iterdir()) == ["generate.yaml"]


# ---- several processes ----


@pytest.mark.distributed
def test_two_processes_give_the_output_of_one(path, tmp_path, capsys):
    """Sharded over two gloo processes, with drafts and without: the same text, printed once, as what is logged."""
    overrides = ["benchmark.compare=true", "prompts._component_=layerskip_recipes.quickstart.heldout_prompts"]
    _, alone = run(path, *overrides)
    text = capsys.readouterr().out.split("\n--- ")[1].replace("\r\n", "\n").replace("\r", "\n")  # as from a process
    ranks = run_tune_on_ranks("run", "layerskip_generate", "--config", str(path), *overrides, cwd=tmp_path)
    check_success(ranks)
    done, silent = ranks
    assert done.stdout.split("\n--- ")[1] == text and done.stdout.count("--- prompt 1 of 1") == 1
    assert not silent.stdout
    report = json.loads(done.stdout.splitlines()[-1])
    for key in ("identical", "tokens", "baseline_tokens"):  # times decide which rounds draft
        assert report[key] == alone[key]
    assert report["identical"] is True
    assert [rank.stderr.count("prompt: is used instead of prompts") for rank in ranks] == [1, 0]


@pytest.mark.parametrize(
    "override",
    [
        *("compile=true", "prompt=interactive", "prompt_file=-", "self_speculation.draft_int8=true"),
        "quantizer._component_=torchao.quantization.Int8WeightOnlyConfig",
    ],
)
def test_what_works_in_one_process_only_is_refused_in_several(path, monkeypatch, override):
    monkeypatch.setenv("WORLD_SIZE", "2")
    key = re.split(r"=|\._component_", override)[0]
    with pytest.raises(ValueError, match=rf"^{re.escape(key)}: .*one process.*there are 2"):
        run(path, override)
