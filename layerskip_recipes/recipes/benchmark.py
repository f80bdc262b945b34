"""`tune run layerskip_benchmark`: autoregressive decoding, variants of self-speculation and other libraries, compared.

One process, one checkpoint, the same prompts. For each repeat and each batch of prompts all ways decode one after the
other, so that a machine that gets slower or faster does so for all of them. Compilation is in no time but its own.
"""

import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, ListConfig, OmegaConf
from torchtune import config, training, utils
from torchtune.modules import TransformerDecoder
from tqdm import tqdm

from layerskip_recipes import checkpoint as ckpt
from layerskip_recipes import settings
from layerskip_recipes.checks import check_number
from layerskip_recipes.config import build_recipe, find_config, main_of
from layerskip_recipes.decoder import layerskip_decoder
from layerskip_recipes.generation import Generation, GenerationStats, Speculation
from layerskip_recipes.generation.sampling import Sampler
from layerskip_recipes.generation.speculation import check_lengths
from layerskip_recipes.generation.timing import memory_bandwidth
from layerskip_recipes.generation.tree import DraftTree
from layerskip_recipes.recipes.benchmark_report import Run, device_name, figures, markdown, plot
from layerskip_recipes.recipes.decoding import build_speculation, check_speculation, self_speculation
from layerskip_recipes.recipes.peers import PEERS, Job, Peer, check_peer_files, check_peers, find_peers
from layerskip_recipes.recipes.prompts import read_prompts, to_tokens
from layerskip_recipes.recipes.tuning import (
    LONGEST,
    Prediction,
    acceptance,
    choose,
    predict,
    probes,
    round_cost,
    write_config,
)

log = utils.get_logger("INFO")

BASELINE = "baseline"
FILTERS = ("top_k", "top_p", "min_p", "repetition_penalty")


def check_temperatures(key: str, value: Any) -> None:
    """Raises a ValueError unless it is a list of different numbers of 0 or more."""
    if not isinstance(value, ListConfig) or not value or len(set(map(str, value))) < len(value):
        raise ValueError(f"{key}: {value!r} is not allowed. Allowed: a list of different numbers of 0 or more; for "
                         f"example {key}=[0.0,0.8]")  # fmt: skip
    for temperature in value:
        check_number(key, temperature, minimum=0, integer=False, example="[0.0,0.8]")


SETTINGS = settings.COMMON | {
    "prompt": settings.anything,
    "prompts": settings.component(optional=True),
    "prompt_file": settings.text("prompts.jsonl"),
    "max_new_tokens": settings.number(minimum=2, example=128),
    "temperatures": check_temperatures,
    **dict.fromkeys(FILTERS, settings.anything),
    "compile": settings.one_of(True, False),
    "repeats": settings.number(minimum=1, example=3),
    "batch_size": settings.number(minimum=1),
    "variants": settings.anything,
    "peers": settings.list_of(str, "[torchtune]"),
    "report_dir": settings.text("benchmark", optional=False),
    "picture": settings.text("benchmark.png"),
    "tune": settings.flag,
    "tune_extends": settings.text("quickstart/generate"),
    "tune_file": settings.text("tuned.yaml"),
    "enable_kv_cache": settings.one_of(True, None),
}
REQUIRED = ("variants", "report_dir")
REFUSED = {
    "temperature": "temperatures lists them",
    "self_speculation": "variants lists what is compared",
    "exit_layer": "variants lists what is compared",
    "quantizer": "all ways decode the checkpoint as it is; draft_quantizer of a variant quantises its draft",
    "tensor_parallel_plan": "it measures one device",
    "tensor_parallel_dim": "it measures one device",
}


# ---- the config ----


def early_exit_variant(early_exit: int | None = None) -> dict[str, int | None]:
    """A variant that takes all tokens from an exit, without verification: fast, and another output."""
    return {"early_exit": early_exit}


def read_variants(cfg: DictConfig, model: TransformerDecoder) -> dict[str, dict[str, Any]]:
    """The variants by name: {"early_exit": E}, or what `check_speculation` makes of a section. null drops one.

    Raises:
        ValueError: the key, what was given, what is allowed.
    """
    given = cfg.get("variants")
    sections = {k: v for k, v in given.items() if v is not None} if isinstance(given, DictConfig) else {}
    example = "for example variants.chain.exit_layer=3 variants.chain.num_speculations=5"
    if not sections:
        raise ValueError(f"variants: {given!r} has nothing to compare. Allowed: sections by names; {example}")
    variants = {}
    for name, section in sections.items():
        key = f"variants.{name}"
        if name == BASELINE or name in PEERS:
            raise ValueError(f"{key}: the name is taken. Allowed: any but {', '.join([BASELINE, *PEERS])}; {example}")
        if not isinstance(section, DictConfig):
            raise ValueError(f"{key}: {section!r} is no section. Allowed: the keys of self_speculation; {example}")
        if "early_exit" in section:
            variants[name] = settings.check_section(section, key, early_exit_variant)
            model.check_exit(section.early_exit, f"{key}.early_exit")
            continue
        settings.check_section(section, key, self_speculation)
        for needed, value in (("exit_layer", 3), ("num_speculations", 5)):
            if section.get(needed) is None:
                raise ValueError(f"{key}.{needed}: missing; for example {key}.{needed}={value}, or for all tokens from "
                                 f"an exit, without verification, {key}={{early_exit: 3}}")  # fmt: skip
        variants[name] = check_speculation(section, model, key)
    return variants


def first_draft(variants: dict[str, dict[str, Any]]) -> tuple[int, int] | None:
    """Exit layer and draft length of the first variant that drafts."""
    for values in variants.values():
        if "early_exit" not in values:
            exits = values["exit_layer"]
            return exits[0] if isinstance(exits, list) else exits, values["num_speculations"]
    return None


def sampler_of(cfg: DictConfig, temperature: float, rng: torch.Generator | None = None) -> Sampler:
    """How tokens are chosen at a temperature."""
    return Sampler(temperature, **{key: cfg[key] for key in FILTERS if cfg.get(key) is not None}, rng=rng)


def check_config(cfg: DictConfig) -> None:
    """All of a benchmark config that can be wrong on any machine.

    Raises:
        ValueError: the key, what was given, what is allowed.
    """
    settings.check_settings(cfg, SETTINGS, REFUSED, REQUIRED)
    sampler = sampler_of(cfg, 0.0)
    model = layerskip_decoder(settings.build_on_meta(cfg))
    ckpt.check_checkpointer(cfg, model)
    check_peers(cfg.get("peers") or [], sampler, cfg.get("batch_size", 1), first_draft(read_variants(cfg, model)))
    if cfg.get("tune"):
        if cfg.get("tune_extends") is None:
            raise ValueError(
                f"tune: {cfg.tune} needs the generation config that it extends; for example "
                "tune_extends=quickstart/generate"
            )
        find_config(cfg.tune_extends, key="tune_extends")
        if len(model.layers) < 4:
            raise ValueError(f"tune: a model of {len(model.layers)} layers has nothing to choose. Set tune=false")
    if all(cfg.get(key) is None for key in ("prompt", "prompts", "prompt_file")):
        raise ValueError('prompt: missing. Give prompt="text", prompt=[text, text], or prompt_file=FILE')


def check_folder(key: str, folder: Path) -> None:
    """Raises a ValueError if it is no folder and cannot become one. Nothing is made here."""
    path = folder.absolute()
    existing = next(place for place in (path, *path.parents) if place.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ValueError(f"{key}: {str(folder)!r} cannot be written, {str(existing)!r} is in the way")


# ---- the recipe ----


def longest(batch: Sequence[Sequence[int]]) -> int:
    """Tokens of the longest prompt."""
    return max(map(len, batch))


class LayerSkipBenchmark:
    """Compares ways of decoding a checkpoint.

    Args:
        cfg: the config, see the README; settings and prompts are all checked here.

    Raises:
        ValueError: for a wrong setting or prompt, before any weight is loaded.
    """

    def __init__(self, cfg: DictConfig) -> None:
        check_config(cfg)
        self.cfg = cfg
        self.device = settings.check_device(cfg)
        self.dtype = settings.check_dtype(cfg, self.device)
        ckpt.check_checkpoint_files(cfg)
        ckpt.require_weights(cfg)
        check_peer_files(cfg.get("peers") or [], cfg.checkpointer.get("checkpoint_dir"))
        check_folder("report_dir", Path(cfg.report_dir))
        check_folder("picture", Path(cfg.get("picture") or cfg.report_dir).parent)
        settings.check_one_process()
        torch.set_float32_matmul_precision(cfg.get("float32_matmul_precision", "highest"))
        self.seed = training.set_seed(seed=cfg.get("seed"))
        self.limit, self.repeats = cfg.get("max_new_tokens", 128), cfg.get("repeats", 3)
        self.temperatures = list(cfg.get("temperatures", [0.0, 0.8]))
        model = layerskip_decoder(settings.build_on_meta(cfg))
        self.variants = read_variants(cfg, model)
        self.tokenizer = settings.build(cfg.tokenizer, "tokenizer")
        settings.check_vocabulary(self.tokenizer, model)
        self.stop_tokens = getattr(self.tokenizer, "stop_tokens", [])
        self.prompts = [to_tokens(prompt, self.tokenizer) for prompt in read_prompts(cfg)]
        trees = [
            DraftTree(values["num_speculations"], values["tree_width"], values["tree_children"], temperature == 0)
            for values in self.variants.values()
            for temperature in self.temperatures
            if "early_exit" not in values
        ]
        spare = max((tree.nodes for tree in trees if not tree.is_chain), default=0)
        lengths = [len(tokens) for tokens in self.prompts]
        check_lengths(model, lengths, self.limit, key="max_new_tokens", spare=spare)
        # One size of the cache for all ways: compiled steps are made for a size.
        drafted = [tree.nodes for tree in trees] + [LONGEST if cfg.get("tune") else 1]
        self.reserve = max(lengths) + self.limit + max(drafted)
        rows = cfg.get("batch_size", 1)
        if len(self.prompts) % rows:
            raise ValueError(
                f"batch_size: {rows} does not divide the {len(self.prompts)} prompts, and another size is another "
                "measurement. Allowed: a number that does; for example batch_size=1"
            )
        self.batches = [self.prompts[i : i + rows] for i in range(0, len(self.prompts), rows)]
        self.runs: dict[tuple[float, str], list[Run]] = defaultdict(list)
        self.compile_s: dict[tuple[float, str], float] = defaultdict(float)

    def setup(self) -> None:
        """Load the model, make the drafts, and find each peer's best setting."""
        cfg = self.cfg
        config.log_config(recipe_name=type(self).__name__, cfg=cfg)
        self.bandwidth = memory_bandwidth(self.device)
        self.model = ckpt.load_decoder(cfg, self.device, self.dtype)
        # None: the whole model, a number: an exit without verification.
        self.ways: dict[str, int | Speculation | None] = {BASELINE: None}
        for name, values in self.variants.items():
            self.ways[name] = values["early_exit"] if "early_exit" in values else self._speculation(name, values)
        job = Job(
            cfg,
            self.model,
            self.batches[0],
            longest(self.prompts),
            self.limit,
            self.stop_tokens,
            compile=cfg.get("compile", False),
            draft=first_draft(self.variants),
        )
        samplers = {temperature: sampler_of(cfg, temperature) for temperature in self.temperatures}
        self.peers, self.left_out = find_peers(cfg.get("peers") or [], job, samplers)

    def _speculation(self, name: str, values: dict[str, Any]) -> Speculation:
        try:
            return build_speculation(values, self.model, self.tokenizer, self.prompts)
        except ValueError as e:
            raise ValueError(str(e).replace("self_speculation", f"variants.{name}")) from e

    def tune(self) -> None:
        """Replace the variants by the pairs of exit layer and draft length that promise most."""
        temperature = self.temperatures[0]
        runs = [self._run(BASELINE, None, temperature, batch, self.seed) for batch in (self.batches[0], *self.batches)]
        outputs = [row for rows, _ in runs[1:] for row in rows]
        stats = sum((stats for _, stats in runs[1:]), GenerationStats())
        prompts = [row for batch in self.batches for row in batch]
        reach = acceptance(self.model, prompts, outputs, sampler_of(self.cfg, temperature))
        timed = {}
        for pair in probes(self.model.num_layers):
            way = Speculation(*pair)
            turns = [
                self._run("probe", replace(way), temperature, batch, self.seed)[1]
                for batch in (self.batches[0], *self.batches)
            ]
            # The first one compiled. Rounds count by row, seconds by batch.
            timed[pair] = statistics.median(t.decode_s * t.rows / t.rounds for t in turns[1:] if t.rounds)
        step_s = stats.decode_s / (stats.tokens - stats.rows) * len(self.batches[0])
        self.ranked = predict(reach, round_cost(timed), step_s)
        chosen = choose(self.ranked)
        best = chosen[0]
        sections = {
            pair.name: {"exit_layer": pair.exit_layer, "num_speculations": pair.num_speculations} for pair in chosen
        }
        longer = min(best.num_speculations + 2, LONGEST)
        sections[f"exit{best.exit_layer}_auto"] = {
            "exit_layer": best.exit_layer,
            "num_speculations": longer,
            "threshold": "auto",
        }
        self.predicted = {pair.name: pair for pair in chosen}
        self.variants = self.tuned = sections
        self.ways = {BASELINE: None} | {name: Speculation(**section) for name, section in sections.items()}
        print(f"{'predicted':<18}{'tokens / round':>15}{'ms / round':>12}{'speed-up':>10}")
        for pair in self.ranked[:10]:
            print(f"{pair.name:<18}{pair.tokens_per_round:>15.2f}{1000 * pair.round_s:>12.2f}{pair.speedup:>9.2f}x")

    def _write_choice(self, report: dict[str, Any]) -> None:
        """Prediction beside measurement, and the config of the fastest."""
        temperature = self.temperatures[0]
        rows = {row["name"]: row for row in report["results"] if row["temperature"] == temperature}
        measured = {name: rows[name]["speedup"]["median"] for name in self.tuned if name in rows}
        print(f"{'variant':<18}{'predicted':>10}{'measured':>10}")
        for name, speedup in measured.items():
            pair: Prediction | None = self.predicted.get(name)
            print(f"{name:<18}{f'{pair.speedup:.2f}x' if pair else '':>10}{speedup:>9.2f}x")
        best = max(measured, key=measured.get)
        pays = measured[best] > 1
        why = f"{best} at {measured[best]:.2f}x, temperature {temperature}, on {report['device']}"
        path = Path(self.cfg.get("tune_file") or Path(self.cfg.report_dir) / "tuned.yaml")
        write_config(path, self.cfg.tune_extends, self.tuned[best] if pays else None, why)
        print(f"fastest: {best if pays else 'autoregressive'}; written to {path}")

    def benchmark(self) -> dict[str, Any]:
        """Measure and write the report; after Ctrl-C with what there is by then."""
        interrupted = False
        try:
            with tqdm(total=len(self.temperatures) * (1 + self.repeats * len(self.batches)), desc="batches") as bar:
                for temperature in self.temperatures:
                    self._measure(temperature, bar)
        except KeyboardInterrupt:
            interrupted = True
            log.warning("interrupted: the report has what was measured so far")
        report = self._report(interrupted)
        self._write(report)
        if self.cfg.get("tune") and not interrupted:
            self._write_choice(report)
        return report

    def _measure(self, temperature: float, bar: tqdm) -> None:
        """All ways at one temperature: a warm-up of each, then the repeats, in which they take turns."""
        # What a speculation learned at another temperature would mislead it: a copy knows nothing.
        ways = {name: replace(way) if isinstance(way, Speculation) else way for name, way in self.ways.items()}
        ways |= self.peers[temperature]
        # Two lengths, as torch compiles again for the second, and from then on for any.
        for batch in (min(self.batches, key=longest), max(self.batches, key=longest)):
            for name, way in ways.items():
                self._run(name, way, temperature, batch, self.seed)
        bar.update()
        for repeat in range(self.repeats):
            for i, batch in enumerate(self.batches):
                # The same numbers for all ways, other ones in each repeat.
                seed = self.seed + repeat * len(self.batches) + i
                turn = {name: self._run(name, way, temperature, batch, seed) for name, way in ways.items()}
                for name, (outputs, stats) in turn.items():
                    self.runs[temperature, name].append(Run(repeat, outputs, stats))
                bar.update()

    def _run(self, name: str, way: Any, temperature: float, batch: list[list[int]], seed: int):
        """One batch by one way: the new tokens of each row, and what they took."""
        if isinstance(way, Peer):
            return way.decode(batch, sampler_of(self.cfg, temperature), seed)
        generation = Generation(
            self.model,
            batch,
            self.limit,
            exit_layer=way if isinstance(way, int) else None,
            speculation=way if isinstance(way, Speculation) else None,
            sampler=sampler_of(self.cfg, temperature, torch.Generator(device=self.device).manual_seed(seed)),
            stop_tokens=self.stop_tokens,
            compile=self.cfg.get("compile", False),
            reserve=self.reserve,
        )
        for _ in generation:
            pass
        self.compile_s[temperature, name] += generation.stats.compile_s
        return generation.generated, generation.stats

    def _report(self, interrupted: bool) -> dict[str, Any]:
        # Best of before and after: on a machine that others use too, one look is too low.
        self.bandwidth = max(self.bandwidth, memory_bandwidth(self.device))
        command = [*(["tune", "run"] if Path(sys.argv[0]).stem == "layerskip_benchmark" else []), *sys.argv]
        used = {name.partition("_")[0] for peers in self.peers.values() for name in peers}
        packages = ["torch", "torchtune", "torchao", *sorted(used - {"torchtune"})]
        steps = getattr(self.model, "compiled_steps", None)
        results = []
        for (temperature, name), runs in self.runs.items():
            peer = self.peers[temperature].get(name)
            row = {
                "temperature": temperature,
                "name": name,
                "kind": "peer" if peer else "variant" if name in self.variants else "baseline",
                "setting": peer and peer.setting,
                "trial_tokens_per_second": peer and peer.trial,
                "compile_s": None if peer else self.compile_s[temperature, name],
            }
            results.append(row | figures(runs, self.runs[temperature, BASELINE], temperature == 0, self.bandwidth))
        return {
            "command": shlex.join(command),
            "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            "versions": {"python": platform.python_version()}
            | {name: importlib.metadata.version(name) for name in packages},
            "device": device_name(self.device),
            "threads": torch.get_num_threads(),
            "memory_bandwidth": self.bandwidth,
            "compiled": steps is not None and not steps.failed,
            "prompts": len(self.prompts),
            "prompt_tokens": statistics.mean(map(len, self.prompts)),
            "batch_size": len(self.batches[0]),
            "max_new_tokens": self.limit,
            "repeats": self.repeats,
            "seed": self.seed,
            "config": OmegaConf.to_container(self.cfg, resolve=True),
            "peers_left_out": self.left_out,
            "interrupted": interrupted,
            "results": results,
        }

    def _write(self, report: dict[str, Any]) -> None:
        """The files, the table on stdout, and as its last line where the files are."""
        folder = Path(self.cfg.report_dir)
        folder.mkdir(parents=True, exist_ok=True)
        files = {"json": folder / "benchmark.json", "markdown": folder / "benchmark.md"}
        files["json"].write_text(json.dumps(report, indent=1) + "\n")
        files["markdown"].write_text(markdown(report))
        if self.cfg.get("picture") and report["results"]:
            files["picture"] = Path(self.cfg.picture)
            plot(report["results"], files["picture"], title=self.cfg.checkpointer.checkpoint_dir)
        print(markdown(report))
        print(json.dumps({name: str(path) for name, path in files.items()}), flush=True)


def main() -> None:
    """Compare autoregressive decoding, variants of self-speculation and other libraries on one checkpoint.

    tune run layerskip_benchmark --config quickstart/benchmark
    tune run layerskip_benchmark --config quickstart/benchmark compile=false repeats=1 "temperatures=[0.0]"
    """

    def steps() -> None:
        recipe = build_recipe(LayerSkipBenchmark, main.__doc__)
        recipe.setup()
        if recipe.cfg.get("tune"):
            recipe.tune()
        if recipe.benchmark()["interrupted"]:
            sys.exit(130)  # what a shell expects after Ctrl-C

    main_of(steps)
