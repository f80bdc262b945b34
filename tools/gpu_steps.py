"""The steps of tools/gpu_report.py, which runs each in its own process:

    python tools/gpu_steps.py decode_1b decode_1b.rows --device cpu --tiny

A step appends its rows to a file as JSON lines, so earlier rows survive a crash or time limit.
"""

import argparse
import gc
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from compare_engines import Decode, Job, take_turns, transformers_decode
from gpu_report import ONE_GRAPH
from omegaconf import DictConfig, OmegaConf

from layerskip_recipes.benchmark.measuring import Run
from layerskip_recipes.benchmark.recipe import LayerSkipBenchmark
from layerskip_recipes.benchmark.report import figures, speedup_by_acceptance, spread
from layerskip_recipes.config.loading import load_config
from layerskip_recipes.families.hf_names import to_files
from layerskip_recipes.families.reading import read_hf_config
from layerskip_recipes.generation.api import generate
from layerskip_recipes.generation.kernels.compiling import CompiledSteps
from layerskip_recipes.generation.llm import LLM
from layerskip_recipes.generation.report import peak_memory_bytes
from layerskip_recipes.generation.stats import memory_bandwidth
from layerskip_recipes.quickstart import heldout_prompts, stdlib_tokenizer
from layerskip_recipes.training.recipe import LayerSkipFinetune

ROOT = Path(__file__).parents[1]
COMMON = {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256}
SHAPES = {
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64, **COMMON},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "head_dim": 128, **COMMON},
}
TINY = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 8, "head_dim": 16}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512}
TINY_QUICKSTART = ("model.num_layers=4", "model.vocab_size=300")
TINY_DATA = ("max_steps_per_epoch=2", "dataset.split=heldout", "dataset.seq_len=64", "dataset.max_samples=16")


@dataclass
class Place:
    """A step's device, model size and output file."""

    device: torch.device
    tiny: bool
    work: Path
    model_dir: Path | None
    rows: Path

    @property
    def cuda(self) -> bool:
        """Whether steps are compiled into CUDA graphs."""
        return self.device.type == "cuda"

    def shape(self, name: str) -> dict[str, int]:
        """Model sizes with the keys of config.json."""
        return TINY if self.tiny else SHAPES[name]

    def record(self, row: Mapping[str, Any]) -> None:
        print(row, flush=True)
        with self.rows.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def load(self, name: str, extends: str, **keys: Any) -> DictConfig:
        """A config that extends one of ours, for this device."""
        path = self.work / f"{re.sub(r'[^a-z0-9]+', '_', name)}.yaml"
        OmegaConf.save(OmegaConf.create({"extends": extends, "device": str(self.device), **keys}), path)
        return load_config(str(path), [])

    def free(self) -> None:
        """Free a model's memory before loading the next one."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def run_recipe(place: Place, recipe: str, config: str, *overrides: str) -> str:
    """Run a recipe in its own process and return its output. If it fails, the error shows all output."""
    command = [sys.executable, "-m", "torchtune._cli.tune", "run", recipe, "--config", config]
    command += [f"device={place.device}", *overrides]
    done = subprocess.run(command, cwd=place.work, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"tune run {recipe} --config {config} {' '.join(overrides)}\n{done.stdout}{done.stderr}")
    return done.stdout


# ---- environment, tests ----


def matmul_flops(place: Place) -> float:
    """FLOP/s of a large bf16 matrix product, the best of several runs."""
    size, best = 64 if place.tiny else 8192, float("inf")
    a, b = torch.randn(2, size, size, device=place.device).bfloat16()
    for _ in range(8):
        started = time.perf_counter()
        (a @ b)[0, 0].item()  # waits for the GPU
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def environment(place: Place) -> None:
    """Measure the GPU's peak rates, then run the user's commands from training to generation on a tiny model."""
    row: dict[str, Any] = {"check": "card", "bf16 TFLOP/s": matmul_flops(place) / 1e12}
    row["GB/s read"] = memory_bandwidth(place.device, 8 if place.tiny else 1024) / 1e9
    if place.cuda:
        capability = ".".join(map(str, torch.cuda.get_device_capability()))
        row |= {"free GiB": torch.cuda.mem_get_info()[0] / 2**30, "compute capability": capability}
    place.record(row)
    started = time.perf_counter()
    small = [*TINY_QUICKSTART, f"output_dir={place.work / 'small'}"]
    data = [*(TINY_DATA if place.tiny else ["max_steps_per_epoch=50"]), "early_exit_loss.exits=1"]
    run_recipe(place, "layerskip_finetune", "quickstart/finetune", *small, *data)
    small += ["self_speculation.exit_layer=1", f"compile={str(place.cuda).lower()}"]
    small += ["max_new_tokens=8", "prompts.count=1"] if place.tiny else []
    report = json.loads(run_recipe(place, "layerskip_generate", "quickstart/generate", *small).splitlines()[-1])
    row = {"check": "train and generate", "seconds": time.perf_counter() - started}
    place.record(row | {"identical output": report["identical"], "speed-up": report["speedup"]})


def tests(place: Place) -> None:
    """Run the tests marked `gpu`; tracebacks go to the log."""
    import pytest  # not on every machine

    counts, missing = Counter[str](), pytest.ExitCode.NO_TESTS_COLLECTED

    class Outcomes:
        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.when == "call" or report.outcome != "passed":
                counts[report.outcome] += 1
            if report.failed:
                place.record({"outcome": "failed", "test": report.nodeid})

    os.chdir(ROOT)
    files = ["tests/generation/test_cuda_graphs.py"] if place.tiny else ["tests", "-n", "4"]
    status = pytest.main(["-m", "gpu", "-q", "-p", "no:cacheprovider", *files], plugins=[Outcomes()])
    for outcome, count in counts.items():
        place.record({"outcome": outcome, "tests": count})
    if status:
        raise RuntimeError("no test was found" if status == missing else "tests failed, see above")


# ---- decoding with random weights ----


def random_model(place: Place, shape: str, weights: bool = False) -> Path:
    """Make a Hugging Face folder with a Llama of this shape and the quickstart's tokenizer, weights optional."""
    from transformers import LlamaConfig, LlamaForCausalLM  # seconds to import, and only for these models

    folder = place.work / shape
    sizes = {"max_position_embeddings": 16384, "rope_theta": 5e5, "tie_word_embeddings": shape == "1b"}
    config = LlamaConfig(**place.shape(shape), **sizes, architectures=["LlamaForCausalLM"])
    config.save_pretrained(folder)
    stdlib_tokenizer(path=str(folder), vocab_size=300 if place.tiny else 16384)
    if weights:
        with place.device:
            model = LlamaForCausalLM._from_config(config, dtype=torch.float32 if place.tiny else torch.bfloat16)
        model.save_pretrained(folder)
    return folder


def make_benchmark(
    place: Place, shape: str, longest: int, rows: int, variants: Mapping[str, Any]
) -> LayerSkipBenchmark:
    """Set up layerskip_benchmark with random weights and full-length drafts."""
    keys: dict[str, Any] = {"model_dir": str(random_model(place, shape)), "dtype": "fp32" if place.tiny else "bf16"}
    keys |= {"prompt_tokens": longest, "batch_size": rows, "max_new_tokens": 8 if place.tiny else 64}
    keys |= {"random_weights": True, "temperatures": [0.0], "compile": place.cuda, "variants": dict(variants)}
    cfg = place.load(f"benchmark_{shape}_{rows}", "hf/_model", **keys)
    recipe = LayerSkipBenchmark(cfg)
    recipe.setup()
    return recipe


def static_cache(recipe: LayerSkipBenchmark) -> Decode:
    """transformers' `generate` on the benchmark's weights, with a static cache; compiled on a GPU."""
    from transformers import AutoConfig, AutoModelForCausalLM  # seconds to import, and only for this engine

    cfg, model, folder = recipe.cfg, recipe.llm.model, Path(str(recipe.cfg.model_dir))
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=cfg.torch_dtype)
    theirs.load_state_dict(to_files(model.state_dict(), read_hf_config(folder)), strict=False, assign=True)
    theirs.tie_weights()
    with recipe.device:  # no checkpoint has its frequencies
        theirs.model.rotary_emb = type(theirs.model.rotary_emb)(theirs.config)
    return transformers_decode(Job(recipe), theirs.eval(), compiled=recipe.device.type == "cuda")


def measure_transformers(place: Place, recipe: LayerSkipBenchmark, lengths: Iterable[int]) -> None:
    """Plain decoding by transformers and by this package, in turns. Records the time of a step with a token per row."""
    slots = Job(recipe).room
    engines = {
        "baseline": lambda batch, temperature, seed: recipe.turns.decode(None, temperature, batch, seed),
        f"transformers, {slots} slots": static_cache(recipe),
    }
    for length in lengths:
        batches = [[prompt[:length] for prompt in recipe.prompts]]
        for name, turns in take_turns(engines, batches, 0.0, 2 if place.tiny else 3, recipe.seed).items():
            steps = [1000 * len(turn.outputs) / (turn.stats.tokens_per_second or float("nan")) for turn in turns]
            place.record({"text": length, "method": name, "ms a round": spread(steps)})


def measure(place: Place, recipe: LayerSkipBenchmark, methods: dict[str, Any], length: int, **columns: Any) -> None:
    """Decode after prompts of one length, methods in turns. Records round time and the time to read its bytes."""
    turns, runs = recipe.turns, defaultdict[str, list[Run]](list)
    turns.batches = [[prompt[:length] for prompt in recipe.prompts]]
    before = len(getattr(recipe.llm.state.compiled, "graphs", ()))
    for turn in turns.take(methods, 0.0, 2 if place.tiny else 3):
        for name, run in turn.items():
            runs[name].append(run)
    columns |= {"text": length}
    step_s = figures(runs["baseline"], runs["baseline"], 0.0)["round_s"]
    for name in methods:
        method_runs = runs[name]
        row = figures(method_runs, runs["baseline"], recipe.bandwidth)
        rounds = [1000 * run.stats.decode_s / run.stats.rounds for run in method_runs]
        read = sum(run.stats.weight_bytes + run.stats.cache_bytes for run in method_runs) / row["rounds"]
        found = {"method": name, "ms a round": spread(rounds), "ms to read": 1000 * read / recipe.bandwidth}
        for shown, phase in {"draft": "draft", "verify": "verify", "host": "rest"}.items():
            seconds = row[f"{phase}_s_per_round"]
            found[f"ms {shown}"] = None if seconds is None else 1000 * seconds
        place.record(columns | found | {"speed-up at .7": (speedup_by_acceptance(row, step_s) or {}).get("0.7")})
    if (steps := recipe.llm.state.compiled) is not None:
        counts = {"graphs": len(steps.graphs), "new graphs": len(steps.graphs) - before}
        counts["whole rounds"] = sum(map(bool, steps.rounds.values()))
        without = {"steps without graph": len(steps.refused), "without FlexAttention": len(steps.masked)}
        place.record(columns | {"method": "all", **counts, **without})


def count_launches(place: Place, recipe: LayerSkipBenchmark, methods: Mapping[str, Any]) -> None:
    """Count CUDA graph launches per round."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    for name, method in methods.items():
        with torch.profiler.profile(activities=activities) as profile:
            _, stats = recipe.turns.decode(method, 0.0, recipe.turns.batches[0], 0)
        launches = sum(event.count for event in profile.key_averages() if event.key == "cudaGraphLaunch")
        place.record({"method": name, "CUDA graphs a round": launches / stats.rounds})


def drafts(place: Place, shape: str) -> dict[str, dict[str, Any]]:
    """Variants of drafts by name; the first one is that of the estimates."""
    depth, some = place.shape(shape)["num_hidden_layers"], 64 if place.tiny else 4096
    early = {"exit_layer": depth // 8, "num_speculations": 6}
    return {
        f"exit {depth // 8}, 6 drafts of {some} tokens": early | {"draft_vocabulary": some},
        f"exit {depth // 8}, 6 drafts": early,
        f"exit {depth // 8}, 6 int8 drafts of {some} tokens": early | {"draft_vocabulary": some, "draft_int8": True},
        f"exit {depth // 4}, 4 drafts": {"exit_layer": depth // 4, "num_speculations": 4},
    }


def decode(place: Place, shape: str) -> None:
    """What the estimates are about, after a short text: plain decoding, and a draft. First each step of a round has a
    CUDA graph, then the whole round has one, whose time counts as that of the draft."""
    length, (name, settings) = 16 if place.tiny else 512, next(iter(drafts(place, shape).items()))
    recipe = make_benchmark(place, shape, length, 1, {name: settings})
    for whole_rounds, suffix in ((False, ""), (True, ONE_GRAPH)):
        CompiledSteps.whole_rounds = whole_rounds
        methods = {method + (suffix if plan else ""): plan for method, plan in recipe.methods.items()}
        measure(place, recipe, methods, length)
        if place.cuda:
            count_launches(place, recipe, methods)


def other_drafts(place: Place, shape: str) -> None:
    """Several drafts at three text lengths, and transformers."""
    lengths = (16, 40) if place.tiny else (512, 2048, 8192)
    recipe = make_benchmark(place, shape, max(lengths), 1, drafts(place, shape))
    for length in lengths:
        measure(place, recipe, recipe.methods, length)
    measure_transformers(place, recipe, lengths)


def batches(place: Place) -> None:
    """Larger batches: plain decoding, and short drafts from an early exit."""
    for shape in SHAPES:
        exit_layer = place.shape(shape)["num_hidden_layers"] // 8
        variants = {f"exit {exit_layer}, 3 drafts": {"exit_layer": exit_layer, "num_speculations": 3}}
        for rows in (2,) if place.tiny else (8, 32):
            length = 16 if place.tiny else 512
            recipe = make_benchmark(place, shape, length, rows, variants)
            measure(place, recipe, recipe.methods, length, model=shape, rows=rows)
            del recipe
            place.free()


# ---- losslessness of a trained model ----


def lossless(place: Place) -> None:
    """Train a model, then check that its greedy outputs equal plain decoding's (in bf16, except for ties)."""
    overrides = [f"device={place.device}", f"output_dir={place.work / 'quickstart'}"]
    overrides += TINY_QUICKSTART if place.tiny else []
    data = TINY_DATA if place.tiny else ["max_steps_per_epoch=600"]
    recipe = LayerSkipFinetune(load_config("quickstart/finetune", [*overrides, *data]))
    recipe.setup()
    recipe.train()
    recipe.cleanup()
    torch.set_float32_matmul_precision("highest")  # training allows TF32
    count, new, some = (2, 8, 64) if place.tiny else (16, 128, 512)
    for dtype in ("fp32", "bf16"):
        llm = LLM.load(str(place.work / "quickstart"), dtype=dtype, device=str(place.device))
        model, tokenizer = llm.model, llm.tokenizer
        texts = heldout_prompts(count)
        prompts = [torch.tensor(tokenizer.encode(text, add_bos=False, add_eos=False)) for text in texts]
        tokens = partial(generate, model, max_generated_tokens=new, compile=place.cuda)
        plain = [tokens(prompt).tokens[0].tolist() for prompt in prompts]
        for vocabulary in (None, range(some)):
            drafted = partial(tokens, exit_layer=3, num_speculations=6, draft_vocabulary=vocabulary)
            found = [drafted(prompt).tokens[0].tolist() for prompt in prompts]
            gaps = [gap_at_difference(model, a, b) for a, b in zip(plain, found, strict=True) if a != b]
            row: dict[str, Any] = {
                "dtype": dtype,
                "drafted of": "all tokens" if vocabulary is None else f"{some} tokens",
            }
            row |= {"outputs": count, "identical": count - len(gaps)}
            place.record(row | {"largest gap of logits where they part": max(gaps, default=None)})


@torch.inference_mode()
def gap_at_difference(model: Any, a: list[int], b: list[int]) -> float:
    """The logit difference of the first two tokens that differ between two outputs; near 0 for a tie."""
    at = next(i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y)
    logits = model(torch.tensor([a[:at]], device=model.tok_embeddings.weight.device))[0, -1].float()
    return float((logits[a[at]] - logits[b[at]]).abs())


# ---- training with random weights ----


def measure_step(place: Place, method: str, *overrides: str) -> None:
    """Measure forward and backward without an optimizer, with tools/training_cost.py."""
    config = ["llama3_2/1B_full_single_device_layerskip", "dtype=bf16"]
    rows, length, steps = (1, 16, 1) if place.tiny else (2, 2048, 5)
    if place.tiny:
        config = ["quickstart/finetune", *TINY_QUICKSTART]
    sizes = [f"--batch={rows}", f"--seq-len={length}", f"--steps={steps}", f"--method={method}"]
    command = [sys.executable, str(ROOT / "tools/training_cost.py"), *config, f"device={place.device}", *overrides]
    done = subprocess.run([*command, *sizes], capture_output=True, text=True, check=False)
    row: dict[str, Any] = {"step without optimizer": " ".join([method, *overrides])}
    if done.returncode:
        place.record(row | {"failed": (done.stderr.strip() or "killed").splitlines()[-1][:200]})
        return
    cost = json.loads(done.stdout.splitlines()[-1])
    rates = [rows * length / seconds for seconds in cost["seconds"]]
    place.record(row | {"tokens/s": spread(rates), "peak GiB": cost["peak_gb"]})


def measure_training(place: Place, folder: Path, config: str, keys: Mapping[str, Any], flops: float | None) -> None:
    """Run the recipe on the standard library. `flops`: FLOPs per token / FLOP/s of the GPU, for the MFU."""
    steps, length = (3, 32) if place.tiny else (7, 2048)
    data = {"_component_": "layerskip_recipes.quickstart.StdlibDataset", "seq_len": length}
    data["split"] = "heldout" if place.tiny else "train"
    name = " ".join([config, *(f"{key}={'null' if value is None else value}" for key, value in keys.items())])
    out = place.work / "training" / re.sub(r"\W+", "_", name)
    shutil.rmtree(out, ignore_errors=True)  # with the logs of an earlier call
    sizes = {"max_steps_per_epoch": steps, "log_every_n_steps": 1, "tokenizer": {"max_seq_len": length}}
    sizes |= {"batch_size": 1, "gradient_accumulation_steps": 2} if place.tiny else {}
    files = {"model_dir": str(folder), "output_dir": str(out), "dataset": data}
    cfg = place.load(name, config, **files, **sizes, **keys)
    # Nobody needs a checkpoint of random weights, nor room for one.
    with mock.patch("layerskip_recipes.training.recipe.check_checkpoint_files"):
        recipe = LayerSkipFinetune(cfg)
    vars(recipe)["_save"] = lambda *_, **__: None
    recipe.setup()
    recipe.train()
    recipe.cleanup()
    log = next(out.glob("logs/*")).read_text()
    rates = [float(rate) for rate in re.findall(r"tokens_per_second_per_gpu:([\d.]+)", log)][2:]
    row: dict[str, Any] = {"recipe": name, "tokens/s": spread(rates)}
    row |= {} if flops is None else {"MFU": statistics.median(rates) * flops}
    row |= {"peak GiB": peak_memory_bytes(place.device) / 2**30, "dtype": recipe.cfg.dtype}
    row["layers computed again"] = bool(recipe.cfg.checkpoint_every_layers)
    place.record(row | {"tokens of a batch": recipe.cfg.batch_size * length})


def train(place: Place, shape: str) -> None:
    """Measure training: for 1B single steps (ours, torchtune, Liger), hf/full and hf/task; for 8B hf/draft, hf/lora and
    hf/full."""
    if shape == "1b":
        measure_step(place, "ours")
        if not place.tiny:
            measure_step(place, "ours", "compile=true")
            for method in ("ours, exits", "ours, dropout", "torchtune", "torchtune, exits", "liger"):
                measure_step(place, method)
    plain = {"early_exit_loss": None, "layer_dropout": None}
    # FLOPs per token and weight: 2 in the forward pass, 2 for the states' gradients, 2 for the weights' gradients. None
    # for a draft alone, which does not run the model's head.
    runs: list[tuple[str, int | None, dict[str, Any]]] = [("hf/full", 6, plain), ("hf/full", 6, {}), ("hf/task", 6, {})]
    if shape == "8b":
        runs = [("hf/draft", None, {}), ("hf/lora", 4, {}), ("hf/full", 6, {})]
    folder = random_model(place, shape, weights=True)
    sizes = place.shape(shape)
    heads = sizes["num_attention_heads"] + sizes["num_key_value_heads"]
    layer = sizes["hidden_size"] * (2 * heads * sizes["head_dim"] + 3 * sizes["intermediate_size"])
    weights = sizes["num_hidden_layers"] * layer + sizes["vocab_size"] * sizes["hidden_size"]
    peak, failed = matmul_flops(place), []
    for config, per_weight, keys in runs:
        place.free()
        try:
            measure_training(place, folder, config, keys, per_weight and per_weight * weights / peak)
        except Exception as error:  # such as too little memory; go on with the next recipe
            failed.append(traceback.format_exc())
            place.record({"recipe": config, "failed": f"{type(error).__name__}: {error}"[:200]})
    shutil.rmtree(folder)
    if failed:
        raise RuntimeError("\n".join(failed))


def finetune(place: Place) -> None:
    """Finetune a real model for parsing commands, beside it a copy of its first layers; then tune its drafts."""
    if place.model_dir is None:
        place.record({"left out": "no --model-dir was given"})
        return
    shutil.rmtree(place.work / "finetuned", ignore_errors=True)  # of an earlier call
    script, data = ROOT / "examples/spoken_commands.py", place.work / "commands"
    subprocess.run([sys.executable, str(script), str(data)], check=True, stdout=subprocess.DEVNULL)
    model = f"model_dir={place.model_dir.resolve()}"
    folders = (f"data_dir={data}", f"output_dir={place.work / 'finetuned'}")
    started = time.perf_counter()
    training = ["save_every_n_steps=null"]
    training += ["max_steps_per_epoch=2", "dataset_val.count=2"] if place.tiny else ["max_steps_per_epoch=200"]
    run_recipe(place, "layerskip_finetune", "qa/finetune", model, *folders, *training)
    place.record({"part": "training", "seconds": time.perf_counter() - started})
    decoding = ["repeats=1", "max_new_tokens=8", "prompts.count=1", "compile=false"] if place.tiny else ["compile=true"]
    run_recipe(place, "layerskip_benchmark", "qa/benchmark", *folders, *decoding)
    for row in json.loads((place.work / "finetuned/benchmark/tune.json").read_text())["results"]:
        kept = {name: row[key] for name, key in TUNED.items()} | {"exact match": row["metrics"]["exact_match"]}
        place.record({"part": row["name"], "temperature": row["temperature"], **kept})


TUNED = {"tokens/s": "tokens_per_second", "speed-up": "speedup", "acceptance": "acceptance_rate", "same": "identical"}
STEPS: dict[str, Callable[[Place], None]] = {
    "decode_1b": partial(decode, shape="1b"),
    "decode_8b": partial(decode, shape="8b"),
    "environment": environment,
    "tests": tests,
    "drafts_1b": partial(other_drafts, shape="1b"),
    "drafts_8b": partial(other_drafts, shape="8b"),
    "batches": batches,
    "lossless": lossless,
    "train_1b": partial(train, shape="1b"),
    "train_8b": partial(train, shape="8b"),
    "finetune": finetune,
}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("rows", type=Path, help="the file that gets the rows")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--work", type=Path, default=Path("gpu_report/work"), help="models and runs go there")
    parser.add_argument("--model-dir", type=Path)
    args = parser.parse_args(arguments)
    os.environ["HF_HUB_OFFLINE"] = "1"
    args.work.mkdir(parents=True, exist_ok=True)
    place = Place(torch.device(args.device), args.tiny, args.work.resolve(), args.model_dir, args.rows.resolve())
    STEPS[args.step](place)


if __name__ == "__main__":
    main(sys.argv[1:])
