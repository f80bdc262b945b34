"""`tune run layerskip_benchmark`: autoregressive decoding, variants of self-speculation and other libraries, compared.

One process, one checkpoint, the same prompts. For each repeat and each batch of prompts all ways decode one after the
other, so that a machine that gets slower or faster does so for all of them. Compilation is in no time but its own.
"""

import importlib.metadata
import json
import platform
import shlex
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torchtune import config, training, utils
from tqdm import tqdm

from layerskip_recipes.benchmark.config import BASELINE, check_config, first_draft, read_variants
from layerskip_recipes.benchmark.peers import Job, Peer, check_peer_files, find_peers, first_line
from layerskip_recipes.benchmark.report import Run, device_name, figures, markdown, plot
from layerskip_recipes.benchmark.sweep import check_sweep, sweep
from layerskip_recipes.benchmark.sweep_files import read_journal
from layerskip_recipes.benchmark.text_metrics import check_metrics, text_metrics
from layerskip_recipes.benchmark.tuner import LONGEST, Prediction, check_config_path, propose, write_choice
from layerskip_recipes.checkpoint.checkpointers import ready
from layerskip_recipes.checkpoint.weights import load_decoder
from layerskip_recipes.config import settings
from layerskip_recipes.config.checks import check_file, check_folder
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.generation.drafting.choice import DiscountedUCB
from layerskip_recipes.generation.drafting.section import build_speculation, sampler_of, tree_of, with_vocabulary
from layerskip_recipes.generation.drafting.speculation import Speculation, check_lengths
from layerskip_recipes.generation.engine import Generation
from layerskip_recipes.generation.kernels.compiling import cache_length, find_compiled_steps
from layerskip_recipes.generation.prompts import encode, read_examples, refuse_bad
from layerskip_recipes.generation.report import place_of
from layerskip_recipes.generation.sampling import Sampler
from layerskip_recipes.generation.stats import GenerationStats, memory_bandwidth
from layerskip_recipes.generation.text_stream import TextStream
from layerskip_recipes.model.decoder import layerskip_decoder
from layerskip_recipes.model.limits import check_cache_fits, check_vocabulary, weight_bytes

log = utils.get_logger("INFO")


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
        self.device, self.dtype = ready(cfg)
        check_folder("report_dir", Path(cfg.report_dir))
        if cfg.get("picture"):
            check_file("picture", cfg.picture)
        if cfg.get("tune_extends") is not None:
            check_config_path(cfg)
        settings.check_one_process()
        self.seed = training.set_seed(seed=cfg.get("seed"))
        self.limit, self.repeats = cfg.get("max_new_tokens", 128), cfg.get("repeats", 3)
        self.temperatures = list(cfg.get("temperatures", [0.0, 0.8]))
        model = layerskip_decoder(settings.build_on_meta(cfg))
        self.variants = read_variants(cfg, model)
        self.tokenizer = settings.build(cfg.tokenizer, "tokenizer")
        check_vocabulary(self.tokenizer, model)
        self.stop_tokens = [*getattr(self.tokenizer, "stop_tokens", []), *(cfg.get("stop_tokens") or [])]
        trees = [
            tree_of(values, greedy=temperature == 0)
            for values in self.variants.values()
            for temperature in self.temperatures
            if "early_exit" not in values
        ]
        spare = max((tree.nodes for tree in trees if not tree.is_chain), default=0)
        check = partial(check_lengths, model, max_generated_tokens=self.limit, key="max_new_tokens", spare=spare)
        self.examples, self.prompts = encode(read_examples(cfg), self.tokenizer, check)
        refuse_bad(self.examples, [len(tokens) for tokens in self.prompts])
        check_metrics(cfg.get("metrics") or [], self.examples)
        self.variants = {
            name: with_vocabulary(values, model, self.tokenizer, self.prompts, f"variants.{name}")
            if "early_exit" not in values
            else values
            for name, values in self.variants.items()
        }
        # One size of the cache for all ways: compiled steps are made for a size.
        drafted = [tree.nodes for tree in trees] + [LONGEST if cfg.get("tune") else 1]
        if cfg.get("sweep") is not None:
            drafted += check_sweep(cfg.sweep, model, self.limit)["num_speculations"]
            read_journal(self)
        else:
            check_peer_files(cfg.get("peers") or [], cfg.checkpointer)
        self.reserve = longest(self.prompts) + self.limit + max(drafted)
        rows = cfg.get("batch_size", 1)
        if len(self.prompts) % rows:
            raise ConfigError(
                f"batch_size: {rows} does not divide the {len(self.prompts)} prompts, and another size is another "
                "measurement. Allowed: a number that does; for example batch_size=1"
            )
        slots = cache_length(self.reserve) if cfg.get("compile", False) else self.reserve
        check_cache_fits(model, rows, slots, self.dtype, self.device, weights=weight_bytes(model, self.dtype))
        self.batches = [self.prompts[i : i + rows] for i in range(0, len(self.prompts), rows)]
        self.predicted: dict[str, Prediction] = {}
        self.runs: dict[tuple[float, str], list[Run]] = defaultdict(list)
        self.compile_s: dict[tuple[float, str], float] = defaultdict(float)
        self.choices: dict[tuple[float, str], DiscountedUCB] = defaultdict(DiscountedUCB)

    def setup(self) -> None:
        """Load the model, make the drafts, and find each peer's best setting."""
        cfg = self.cfg
        config.log_config(recipe_name=type(self).__name__, cfg=cfg)
        self.bandwidth = memory_bandwidth(self.device)
        self.model = load_decoder(cfg, self.device, self.dtype)
        self.peers, self.left_out = {temperature: {} for temperature in self.temperatures}, {}
        # None: the whole model, a number: an exit without verification.
        self.ways: dict[str, int | Speculation | None] = {BASELINE: None}
        if cfg.get("sweep") is not None:
            return
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
        samplers = {temperature: self.sampler(temperature) for temperature in self.temperatures}
        self.peers, self.left_out = find_peers(cfg.get("peers") or [], job, samplers)

    def _speculation(self, name: str, values: dict[str, Any]) -> Speculation:
        try:
            return build_speculation(values, self.model)
        except ValueError as e:
            raise ConfigError(str(e).replace("self_speculation", f"variants.{name}")) from e

    def tune(self) -> None:
        """Replace the variants by the pairs of exit layer and draft length that promise most."""
        self.variants, self.predicted = propose(self)
        self.ways = {BASELINE: None} | {name: Speculation(**section) for name, section in self.variants.items()}

    def benchmark(self) -> dict[str, Any]:
        """Measure and write the report; after Ctrl-C or an error with what there is by then."""
        interrupted = True  # until all is measured
        try:
            with tqdm(total=len(self.temperatures) * (1 + self.repeats * len(self.batches)), desc="batches") as bar:
                for temperature in self.temperatures:
                    self._measure(temperature, bar)
            interrupted = False
        except KeyboardInterrupt:
            log.warning("interrupted: the report has what was measured so far")
        finally:
            report = self._report(interrupted)
            if report["results"]:  # else the last report stays
                self._write(report)
        if self.cfg.get("tune") and not interrupted:
            write_choice(self, report)
        return report

    def _measure(self, temperature: float, bar: tqdm) -> None:
        """All ways at one temperature."""
        for turn in self.take_turns(self.ways | self.peers[temperature], temperature):
            for name, run in turn.items():
                self.runs[temperature, name].append(run)
            bar.update()

    def take_turns(self, ways: dict[str, Any], temperature: float) -> Iterator[dict[str, Run]]:
        """A warm-up of each way, then the repeats: for each batch of prompts what every way made of it.

        Args:
            ways: by name. A peer that fails is taken out, and left out of the report.
            temperature: of all.

        Yields:
            The runs by name; nothing in the first one, after the warm-up.
        """
        # Two lengths, as torch compiles again for the second, and from then on for any.
        for batch in (min(self.batches, key=longest), max(self.batches, key=longest)):
            self._turn(ways, temperature, batch, self.seed)
        yield {}
        for repeat in range(self.repeats):
            for i, batch in enumerate(self.batches):
                # The same numbers for all ways, other ones in each repeat.
                seed = self.seed + repeat * len(self.batches) + i
                yield {name: Run(repeat, *made) for name, made in self._turn(ways, temperature, batch, seed).items()}

    def _turn(self, ways: dict[str, Any], temperature: float, batch: list[list[int]], seed: int) -> dict[str, tuple]:
        """One batch by every way, see `run`."""
        made = {}
        for name, way in list(ways.items()):
            try:
                made[name] = self.run(name, way, temperature, batch, seed)
            except Exception as e:
                if not isinstance(way, Peer):
                    raise
                del ways[name]
                self._leave_out(name, f"{first_line(e)}, at temperature {temperature}")
        return made

    def _leave_out(self, name: str, why: str) -> None:
        """Drop a peer that failed from all temperatures: what ran only in part compares with nothing."""
        log.warning("peers: %s is left out (%s)", name, why)
        self.left_out[name] = why
        for temperature, peers in self.peers.items():
            peers.pop(name, None)
            self.runs.pop((temperature, name), None)

    def run(
        self, name: str, way: Any, temperature: float, batch: list[list[int]], seed: int
    ) -> tuple[list[list[int]], GenerationStats]:
        """One batch by one way: the new tokens of each row, and what they took."""
        if isinstance(way, Peer):
            return way.decode(batch, self.sampler(temperature), seed)
        generation = Generation(
            self.model,
            batch,
            self.limit,
            exit_layer=way if isinstance(way, int) else None,
            speculation=way if isinstance(way, Speculation) else None,
            sampler=self.sampler(temperature, torch.Generator(device=self.device).manual_seed(seed)),
            stop_tokens=self.stop_tokens,
            compile=self.cfg.get("compile", False),
            reserve=self.reserve,
            choice=self.choices[temperature, name],
        )
        for _ in generation:
            pass
        self.compile_s[temperature, name] += generation.stats.compile_s
        return generation.generated, generation.stats

    def sweep(self) -> dict[str, Any]:
        """Measure exits with draft lengths instead of the variants; after Ctrl-C report what there is by then."""
        return sweep(self)

    def _report(self, interrupted: bool) -> dict[str, Any]:
        where, results = self.circumstances(), []
        for (temperature, name), runs in self.runs.items():
            predicted = self.predicted if temperature == self.temperatures[0] else {}  # it is for that one
            peer = self.peers[temperature].get(name)
            row = {
                "temperature": temperature,
                "name": name,
                "kind": "peer" if peer else "variant" if name in self.variants else "baseline",
                "setting": peer and peer.setting,
                "trial_tokens_per_second": peer and peer.trial,
                "compile_s": None if peer else self.compile_s[temperature, name],
                "predicted_speedup": predicted[name].speedup if name in predicted else None,
            }
            row |= figures(runs, self.runs[temperature, BASELINE], temperature == 0, self.bandwidth)
            results.append(row | self._quality(runs))
        return where | {"peers_left_out": self.left_out, "interrupted": interrupted, "results": results}

    def _quality(self, runs: Sequence[Run]) -> dict[str, dict[str, float]]:
        """The metrics of a way's outputs, if there are any, over all repeats."""
        names = list(self.cfg.get("metrics") or [])
        if not names:
            return {}
        text = TextStream(self.tokenizer, self.stop_tokens, self.cfg.get("stop_strings") or []).text
        outputs = [text(tokens) for run in runs for tokens in run.outputs]
        # Always in the order of the prompts; after Ctrl-C the last repeat has fewer.
        references = [self.examples[i % len(self.examples)].response for i in range(len(outputs))]
        return {"metrics": text_metrics(names, outputs, references)}

    def sampler(self, temperature: float, rng: torch.Generator | None = None) -> Sampler:
        """How tokens are chosen at a temperature."""
        return sampler_of(self.cfg, temperature, rng)

    def circumstances(self) -> dict[str, Any]:
        """Where and how everything here is measured."""
        # Best of before and after: on a machine that others use too, one look is too low.
        self.bandwidth = max(self.bandwidth, memory_bandwidth(self.device))
        command = [*(["tune", "run"] if Path(sys.argv[0]).stem == "layerskip_benchmark" else []), *sys.argv]
        used = {name.partition("_")[0] for peers in self.peers.values() for name in peers}
        packages = ["torch", "torchtune", "torchao", *sorted(used - {"torchtune"})]
        steps = find_compiled_steps(self.model)
        return {
            "command": shlex.join(command),
            "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            "versions": {"python": platform.python_version()}
            | {name: importlib.metadata.version(name) for name in packages},
            "device": device_name(self.device),
            "threads": torch.get_num_threads(),
            "memory_bandwidth": self.bandwidth,
            # No step ran where a sweep was complete before.
            "compiled": self.cfg.get("compile", False) and not getattr(steps, "failed", False),
            "not_compiled": sorted(set(getattr(steps, "refused", {}).values())),
            "prompts": len(self.prompts),
            "prompt_tokens": statistics.mean(map(len, self.prompts)),
            "batch_size": len(self.batches[0]),
            "max_new_tokens": self.limit,
            "repeats": self.repeats,
            "seed": self.seed,
            "config": OmegaConf.to_container(self.cfg, resolve=True),
        }

    def _write(self, report: dict[str, Any]) -> None:
        """The files, the table on stdout, and as its last line where the files are."""
        folder, stem = Path(self.cfg.report_dir), "tune" if self.cfg.get("tune") else "benchmark"
        folder.mkdir(parents=True, exist_ok=True)
        document = place_of(folder / f"{stem}.json", "report_dir", report["interrupted"])
        stem = document.stem
        files = {"json": document, "markdown": document.with_suffix(".md")}
        files["json"].write_text(json.dumps(report, indent=1) + "\n")
        files["markdown"].write_text(markdown(report))
        if self.cfg.get("picture") and report["results"]:
            picture = Path(self.cfg.picture)
            files["picture"] = picture if stem == "benchmark" else picture.with_stem(stem)
            plot(report["results"], files["picture"], title=self.cfg.checkpointer.checkpoint_dir)
        print(markdown(report))
        print(json.dumps({name: str(path) for name, path in files.items()}), flush=True)
