"""`tune run layerskip_benchmark`: autoregressive decoding, variants of self-speculation and other libraries, compared.

One process, one checkpoint, the same prompts. Wiring only: measuring.py decodes, report.py makes figures of the runs,
tuner.py chooses what is compared.
"""

import importlib.metadata
import json
import platform
import shlex
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torchtune import config, training, utils
from tqdm import tqdm

from layerskip_recipes.benchmark.config import BASELINE, BenchmarkConfig, Variant
from layerskip_recipes.benchmark.measuring import Method, Run, Turns, longest_prompt
from layerskip_recipes.benchmark.peers import PEERS, Job, Peer, find_peers
from layerskip_recipes.benchmark.report import device_name, figures, heat_map, markdown, plot, speedup_by_acceptance
from layerskip_recipes.benchmark.text_metrics import check_references, text_metrics
from layerskip_recipes.benchmark.tuner import LONGEST, Candidate, Tuner, check_config_path, write_choice
from layerskip_recipes.checkpoint.checkpointers import prepare_device, weights_folder
from layerskip_recipes.checkpoint.trained_exits import read_trained_exits
from layerskip_recipes.checkpoint.weights import load_decoder, quantise_decoder
from layerskip_recipes.config.paths import check_file, check_folder
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.generation.drafting.chosen import choose_for
from layerskip_recipes.generation.drafting.section import SelfSpeculation, bytes_of_weights
from layerskip_recipes.generation.kernels.compiling import cache_length, find_compiled_steps
from layerskip_recipes.generation.report import report_path
from layerskip_recipes.generation.stats import memory_bandwidth
from layerskip_recipes.generation.text.prompts import Example, encode, refuse_bad, try_examples
from layerskip_recipes.generation.text.text_stream import TextStream
from layerskip_recipes.model.adapters import without_adapters
from layerskip_recipes.model.decoder import LayerSkipDecoder, layerskip_decoder
from layerskip_recipes.model.limits import check_prompt_lengths, check_vocabulary, most_positions
from layerskip_recipes.model.memory import check_cache_fits, weight_bytes
from layerskip_recipes.processes import check_one_process

log = utils.get_logger("INFO")


class LayerSkipBenchmark:
    """Compares methods of decoding a checkpoint.

    Raises:
        ConfigError: for a wrong setting or prompt, before any weight is loaded.
    """

    def __init__(self, source: DictConfig) -> None:
        self.cfg = cfg = BenchmarkConfig.load(source)
        check_one_process()
        if cfg.random_weights:
            self.device = cfg.find_device()
            torch.set_float32_matmul_precision(cfg.float32_matmul_precision)
        else:
            self.device = prepare_device(cfg)
        if cfg.report_dir is not None:
            check_folder("report_dir", Path(cfg.report_dir))
        if cfg.picture:
            check_file("picture", cfg.picture)
        if cfg.writes_choice:
            check_config_path(cfg.tuned_path)
        self.seed = training.set_seed(seed=cfg.seed)
        model = layerskip_decoder(cfg.meta_model)
        self.candidates: dict[str, Candidate] = {}
        self.variants: dict[str, Variant] = cfg.compared
        self.variants = {name: chosen for name in self.variants if (chosen := self._chosen(name)) is not None}
        drafts = [variant for variant in self.variants.values() if isinstance(variant, SelfSpeculation)]
        longest = max((draft.num_speculations for draft in drafts), default=0)
        self.spare_tokens = longest + 1 if cfg.random_weights else 0
        self.limit = cfg.max_new_tokens + self.spare_tokens
        if cfg.random_weights:
            self._draw_prompts(model)
        else:
            self._read_prompts(model)
        rows = cfg.batch_size
        if len(self.prompts) % rows:
            raise ConfigError(
                f"batch_size: {rows} does not divide the {len(self.prompts)} prompts, and another size is another "
                "measurement. Allowed: a number that does; for example batch_size=1"
            )
        nodes = 1 + max(longest, LONGEST if cfg.tune else 0)
        self.reserve = longest_prompt(self.prompts) + self.limit + nodes
        slots = cache_length(self.reserve) if cfg.compile else self.reserve
        drafts = [variant for variant in self.variants.values() if isinstance(variant, SelfSpeculation)]
        if cfg.tuned_draft is not None:
            drafts = [cfg.tuned_draft.with_vocabulary(model, self.tokenizer, self.prompts)]
        whole = weight_bytes(model, cfg.torch_dtype)
        sizes = bytes_of_weights(model, whole, cfg.torch_dtype, cfg.quantizer, drafts)
        sizes |= {"prompt": longest_prompt(self.prompts), "nodes": nodes}
        sizes["draft_layers"] = max((draft.own_layers() for draft in drafts), default=0)
        check_cache_fits(model, rows, slots, cfg.torch_dtype, self.device, **sizes)
        self.batches = [self.prompts[i : i + rows] for i in range(0, len(self.prompts), rows)]
        self.runs: dict[tuple[float, str], list[Run]] = defaultdict(list)

    def _chosen(self, name: str) -> Variant | None:
        """A variant, with the keys that its section leaves out where it names no exit; None if nothing can draft."""
        cfg, variant = self.cfg, self.variants[name]
        named = not isinstance(variant, SelfSpeculation) or variant.exit_layer is not None or variant.draft is not None
        if cfg.random_weights or (named and cfg.variants):
            return variant
        assert isinstance(variant, SelfSpeculation)
        choice = choose_for(
            cfg, variant, cfg.all_temperatures[0], cfg.compile, cfg.batch_size, cfg.quantizer, cfg.key_of(name)
        )
        if choice.why is not None:
            log.info("%s: %s", name, choice.why)
        return choice.section

    def _read_prompts(self, model: LayerSkipDecoder) -> None:
        """The config's prompts, and draft vocabularies that are counted in them."""
        cfg = self.cfg
        check = partial(check_prompt_lengths, model, max_generated_tokens=self.limit, key="max_new_tokens")
        self.tokenizer = cfg.tokenizer.build()
        check_vocabulary(self.tokenizer, model)
        self.stop_tokens: list[int] = [*getattr(self.tokenizer, "stop_tokens", []), *(cfg.stop_tokens or [])]
        self.examples: list[Example]
        self.examples, self.prompts = encode(
            try_examples(cfg.prompt, cfg.prompts, cfg.prompt_file), self.tokenizer, check
        )
        refuse_bad(self.examples, [len(tokens) for tokens in self.prompts])
        check_references(cfg.metrics or [], self.examples)
        self.variants = {
            name: variant.with_vocabulary(model, self.tokenizer, self.prompts, cfg.key_of(name))
            if isinstance(variant, SelfSpeculation)
            else variant
            for name, variant in self.variants.items()
        }

    def _draw_prompts(self, model: LayerSkipDecoder) -> None:
        """Random prompts, and of each variant the rounds that always draft its whole length."""
        cfg, tokens = self.cfg, model.tok_embeddings.num_embeddings
        positions, why = most_positions(model)
        if cfg.prompt_tokens + self.limit > positions:
            raise ConfigError(
                f"prompt_tokens: {cfg.prompt_tokens} and {self.limit} new tokens are more than the model's {positions} "
                f"({why}); for example prompt_tokens={max(1, positions // 4)} max_new_tokens={max(2, positions // 4)}"
            )
        self.stop_tokens = []
        self.prompts = torch.randint(tokens, (cfg.batch_size, cfg.prompt_tokens)).tolist()
        for name, variant in self.variants.items():
            if isinstance(variant, SelfSpeculation):
                changes: dict[str, Any] = {"prompt_lookup": None}
                if isinstance(variant.draft_vocabulary, int):  # which tokens these are does not change the time
                    changes["draft_vocabulary"] = list(range(min(variant.draft_vocabulary, tokens)))
                self.variants = self.variants | {name: variant.model_copy(update=changes)}

    def setup(self) -> None:
        """Load the model, choose the variants with `tune`, build the drafts, find each peer's fastest setting."""
        cfg = self.cfg
        config.log_config(recipe_name=type(self).__name__, cfg=cfg.source)
        self.bandwidth = memory_bandwidth(self.device)
        if cfg.random_weights:
            with training.set_default_dtype(cfg.torch_dtype), self.device:
                self.model: LayerSkipDecoder = without_adapters(layerskip_decoder(cfg.model.build())).eval()
        else:
            self.model = load_decoder(cfg, self.device, None if self._quantises_late else cfg.quantizer)
        self.turns = Turns(
            self.model,
            self.batches,
            self.limit,
            cfg.sampler,
            self.stop_tokens,
            cfg.compile,
            self.reserve,
            self.seed,
            self.spare_tokens,
        )
        if cfg.tune:
            folder = weights_folder(cfg.checkpointer)
            trained = None if folder is None else read_trained_exits(folder)
            self.candidates = Tuner(cfg, self.turns, trained.vocabulary if trained else None).candidates()
            self.variants = {name: candidate.section for name, candidate in self.candidates.items()}
        self.methods: dict[str, Method] = {BASELINE: None}
        for name, variant in self.variants.items():
            if isinstance(variant, SelfSpeculation):
                self.methods[name] = variant.build(self.model, cfg.key_of(name), cfg.batch_size)
            else:
                self.methods[name] = variant.early_exit
        if cfg.quantizer is not None and self._quantises_late:
            self.model = self.turns.model = quantise_decoder(self.model, cfg.quantizer)
        self.peers: dict[float, dict[str, Peer]] = defaultdict(dict)
        self.left_out: dict[str, str] = {}
        if cfg.peers and cfg.tune != "grid":
            sections = (variant for variant in self.variants.values() if isinstance(variant, SelfSpeculation))
            first = next((section.exit_layer for section in sections if section.exit_layer and not section.draft), 0)
            job = Job(
                cfg.model,
                cfg.checkpointer,
                self.model,
                self.batches[0],
                longest_prompt(self.prompts),
                self.limit,
                self.stop_tokens,
                [e for e in (first, 2 * first) if 0 < e < self.model.num_layers],
                (cfg.peers.llama_cpp.gguf, cfg.peers.llama_cpp.draft) if cfg.peers.llama_cpp else None,
                quantised=cfg.quantizer is not None,
            )
            for temperature in cfg.all_temperatures:
                names = [name for name in cfg.peers.names if name not in self.left_out]
                found, left_out = find_peers(names, job, cfg.sampler(temperature), cfg.compile)
                self.peers[temperature] = found
                self.left_out |= {name: f"{why}, at temperature {temperature}" for name, why in left_out.items()}

    @property
    def _quantises_late(self) -> bool:
        """Whether the model is quantised after its drafts are built: a trained draft is checked against the weights
        that it was trained for, which are not quantised."""
        drafts = (variant for variant in self.variants.values() if isinstance(variant, SelfSpeculation))
        return self.cfg.random_weights or any(draft.draft is not None for draft in drafts)

    def benchmark(self) -> dict[str, Any]:
        """Measure and write the report; after Ctrl-C or an error with all that is measured by then."""
        cfg, interrupted = self.cfg, True  # until all is measured
        temperatures = cfg.all_temperatures
        try:
            with tqdm(total=len(temperatures) * (1 + cfg.repeats * len(self.batches)), desc="batches") as bar:
                for temperature in temperatures:
                    left_out = self.left_out | self.turns.failed
                    peers = {name: peer for name, peer in self.peers[temperature].items() if name not in left_out}
                    methods = self.methods | peers
                    for turn in self.turns.take(methods, temperature, cfg.repeats):
                        for name, run in turn.items():
                            self.runs[temperature, name].append(run)
                        bar.update()
            interrupted = False
        except KeyboardInterrupt:
            log.warning("interrupted: the report has what was measured so far")
        finally:
            report = self._report(interrupted)
            if report["results"]:  # else the last report stays
                self._write(report)
        if cfg.writes_choice and not interrupted:
            write_choice(cfg, report, self.candidates)
        return report

    def _report(self, interrupted: bool) -> dict[str, Any]:
        """The document: where, how, and a row for each method and temperature."""
        results: list[dict[str, Any]] = []
        left_out = self.left_out | self.turns.failed
        # The better of before and after: on a machine that others use too, one measurement is too low.
        self.bandwidth = max(self.bandwidth, memory_bandwidth(self.device))
        for (temperature, name), runs in self.runs.items():
            if name in left_out:  # a peer that ran in part only compares with nothing
                continue
            peer = self.peers[temperature].get(name)
            baseline = self.runs[temperature, BASELINE]
            row = {
                "temperature": temperature,
                "name": name,
                "kind": "peer" if peer else "variant" if name in self.variants else "baseline",
                "setting": peer and peer.setting,
                "trial_tokens_per_second": peer and peer.trial,
                "compile_s": None if peer else self.turns.compile_s[temperature, name],
                "predicted_speedup": None,
            }
            candidate = self.candidates.get(name)
            if candidate is not None:
                row |= {"exit_layer": candidate.section.exit_layer, "length": candidate.section.num_speculations}
                if temperature == self.cfg.all_temperatures[0] and not candidate.section.prompt_lookup:
                    row["predicted_speedup"] = candidate.prediction.speedup
            row |= figures(runs, baseline, temperature == 0, self.bandwidth)
            results.append(row | self._quality(runs))
            if self.cfg.random_weights:
                # The baseline is the first row of its temperature; its round is a step.
                step_s = next(done["round_s"] for done in results if done["temperature"] == temperature)
                results[-1]["speedup_by_acceptance"] = speedup_by_acceptance(row, step_s)
        return self._circumstances() | {"peers_left_out": left_out, "interrupted": interrupted, "results": results}

    def _quality(self, runs: Sequence[Run]) -> dict[str, dict[str, float]]:
        """The metrics of a method's outputs, if there are any, over all repeats."""
        if not self.cfg.metrics:
            return {}
        text = TextStream(self.tokenizer, self.stop_tokens, self.cfg.stop_strings or []).text
        outputs = [text(tokens) for run in runs for tokens in run.outputs]
        # Outputs are in the order of the prompts. After Ctrl-C the last repeat has fewer.
        references = [self.examples[i % len(self.examples)].response or "" for i in range(len(outputs))]
        return {"metrics": text_metrics(self.cfg.metrics, outputs, references)}

    def _circumstances(self) -> dict[str, Any]:
        """Where and how everything here is measured."""
        cfg = self.cfg
        command = [*(["tune", "run"] if Path(sys.argv[0]).stem == "layerskip_benchmark" else []), *sys.argv]
        left_out = self.left_out | self.turns.failed
        names = {name for peers in self.peers.values() for name in peers if name not in left_out}
        used = {PEERS[name].package for name in names}
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
            "compiled": cfg.compile and not getattr(steps, "failed", False),
            "not_compiled": sorted(set(getattr(steps, "refused", {}).values())),
            "random_weights": cfg.random_weights,
            "tune": cfg.tune,
            "parameters": sum(parameter.numel() for parameter in cfg.meta_model.parameters()),
            "prompts": len(self.prompts),
            "prompt_tokens": statistics.mean(map(len, self.prompts)),
            "batch_size": len(self.batches[0]),
            "max_new_tokens": cfg.max_new_tokens,
            "repeats": cfg.repeats,
            "seed": self.seed,
            "config": OmegaConf.to_container(cfg.source, resolve=True),
        }

    def _write(self, report: dict[str, Any]) -> None:
        """The table on stdout, the files, and as the last line where they are; without report_dir the report."""
        print(markdown(report))
        if self.cfg.report_dir is None:
            print(json.dumps(report), flush=True)
            return
        stem = {True: "tune", "grid": "grid", False: "benchmark"}[self.cfg.tune]
        document = report_path(Path(self.cfg.report_dir) / f"{stem}.json", "report_dir", report["interrupted"])
        document.parent.mkdir(parents=True, exist_ok=True)
        files = {"json": document, "markdown": document.with_suffix(".md")}
        files["json"].write_text(json.dumps(report, indent=1) + "\n")
        files["markdown"].write_text(markdown(report))
        results = report["results"]
        if self.cfg.picture:
            picture = Path(self.cfg.picture)
            files["picture"] = picture if document.stem == "benchmark" else picture.with_stem(document.stem)
            title = str(self.cfg.given_folder)
            (heat_map if self.cfg.tune == "grid" else plot)(results, files["picture"], title)
        print(json.dumps({name: str(path) for name, path in files.items()}), flush=True)
