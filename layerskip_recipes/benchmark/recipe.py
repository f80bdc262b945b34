"""`tune run layerskip_benchmark` compares self-speculation with plain decoding, in one process on the same prompts."""

import importlib.metadata
import json
import math
import platform
import shlex
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torchtune import config, training, utils
from tqdm import tqdm

from layerskip_recipes.benchmark.config import BASELINE, BenchmarkConfig
from layerskip_recipes.benchmark.measuring import Method, Run, Turns, longest_prompt
from layerskip_recipes.benchmark.report import device_name, figures, markdown, plot, speedup_by_acceptance
from layerskip_recipes.benchmark.text_metrics import check_references, text_metrics
from layerskip_recipes.benchmark.tuner import Tuner, check_config_path, write_choice
from layerskip_recipes.checkpoint.answers import Answers
from layerskip_recipes.checkpoint.checkpointer_checks import prepare_device
from layerskip_recipes.checkpoint.drafts import DraftDescription
from layerskip_recipes.checkpoint.weights import quantise_decoder
from layerskip_recipes.config.auto import Choices
from layerskip_recipes.config.layer_strings import default_exit
from layerskip_recipes.config.paths import check_file, check_folder
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.generation.drafting.planner import DraftPlanner
from layerskip_recipes.generation.drafting.prediction import machine_for
from layerskip_recipes.generation.drafting.section import SelfSpeculation
from layerskip_recipes.generation.drafting.speculation import SPECULATION_DEFAULTS, Speculation
from layerskip_recipes.generation.fitting_memory import check_memory
from layerskip_recipes.generation.llm import LLM
from layerskip_recipes.generation.report import report_path
from layerskip_recipes.generation.stats import memory_bandwidth
from layerskip_recipes.generation.text.prompts import Example, encode, predicted_tokens, refuse_bad, try_examples
from layerskip_recipes.model.adapters import without_adapters
from layerskip_recipes.model.decoder import LayerSkipDecoder, layerskip_decoder
from layerskip_recipes.model.limits import check_prompt_lengths, check_vocabulary
from layerskip_recipes.processes import check_one_process

log = utils.get_logger("INFO")


def _plan_of_random_weights(section: SelfSpeculation, model: LayerSkipDecoder) -> Speculation:
    """They always draft the full length, from an exit. Of a draft vocabulary only the size affects the time."""
    keys = SPECULATION_DEFAULTS | {"exit_layer": default_exit(model.num_layers)} | section.given
    ids = keys["draft_vocabulary"]
    ids = range(min(ids, model.tok_embeddings.num_embeddings)) if isinstance(ids, int) else ids
    return Speculation(
        keys["exit_layer"],
        keys["num_speculations"],
        ids,
        min_confidence=keys["min_confidence"],
        draft_int8=keys["draft_int8"],
    )


class LayerSkipBenchmark:
    """Compares decoding methods on a checkpoint; raises ConfigError for a mistake before loading weights."""

    def __init__(self, source: DictConfig) -> None:
        self.cfg = cfg = BenchmarkConfig.load(source)
        check_one_process()
        # The device, and the files to write.
        if cfg.random_weights:
            self.device = cfg.find_device()
            torch.set_float32_matmul_precision(cfg.float32_matmul_precision)
        else:
            self.device = prepare_device(cfg)
        if cfg.report_dir is not None:
            check_folder("report_dir", Path(cfg.report_dir))
        if cfg.picture:
            check_file("picture", cfg.picture)
        if cfg.tuned_path is not None:
            check_config_path(cfg.tuned_path)
        self.seed = training.set_seed(seed=cfg.seed)
        # How to draft.
        model = layerskip_decoder(cfg.meta_model)
        self.tuned_sections: dict[str, SelfSpeculation] = {}  # by the names of the variants that `tune` measures
        self.frequent: Sequence[int] | None = None  # the checkpoint's tokens, for `tune`
        self.tuned_draft: DraftDescription | None = None  # whose length and precision `tune` chooses
        self.answers: Answers | None = None  # for the look-ups of `tune`
        self.predictions: dict[tuple[int, ...], list[int]] = {}  # by prompt
        self.spare_tokens, plans = 0, dict[str, Speculation | None]()
        if cfg.random_weights:
            plans = {name: _plan_of_random_weights(section, model) for name, section in cfg.compared.items()}
            self.spare_tokens = max((plan.num_speculations for plan in plans.values() if plan), default=0) + 1
            self.limit = cfg.max_new_tokens + self.spare_tokens
            self._draw_prompts(model)
        else:
            self.limit = cfg.max_new_tokens
            self._read_prompts(model)
            plans = self._plan(DraftPlanner.of_config(cfg, cfg.quantizer))
        sections = {name: section.resolved(plans[name]) for name, section in cfg.compared.items()}
        choices = Choices(cfg)
        for key, value in ({"variants": sections} if sections and cfg.variants else sections).items():
            choices.set(key, value)
        drafting = {name: plan for name, plan in plans.items() if plan is not None}  # the others have nothing to draft
        self.methods: dict[str, Method] = {BASELINE: None} | drafting
        self.repeats = choices.pick("repeats", lambda: min(3, math.ceil(12 / len(self.prompts))))
        self.cfg = self.cfg.with_choices(choices)
        rows = cfg.batch_size
        if len(self.prompts) % rows:
            raise ConfigError(
                f"batch_size: {rows} does not divide the {len(self.prompts)} prompts, and every batch must have the "
                "same size. Allowed: a divisor; for example batch_size=1"
            )
        self.batches = [self.prompts[i : i + rows] for i in range(0, len(self.prompts), rows)]
        # Weights, KV cache and activations must fit in memory.
        speculations, draft = [*self._drafts.values()], self.tuned_draft
        if cfg.tune:
            exit_layer, ids = (1, None) if draft is None else (draft.exit_layer, draft.vocabulary)
            longest = machine_for(cfg.torch_dtype, self.device.type != "cpu", bool(cfg.compile)).longest
            speculations = [Speculation(exit_layer, longest, ids, draft=draft)]
        self.reserve = check_memory(
            cfg, self.device, speculations, rows, longest_prompt(self.prompts), self.limit, True
        )
        self.runs: dict[tuple[float, str], list[Run]] = defaultdict(list)

    @property
    def _drafts(self) -> dict[str, Speculation]:
        return {name: method for name, method in self.methods.items() if isinstance(method, Speculation)}

    def _plan(self, planner: DraftPlanner) -> dict[str, Speculation | None]:
        """The plan of each variant; for `tune`, what the tuner has to know."""
        cfg, plans = self.cfg, dict[str, Speculation | None]()
        for name, section in cfg.compared.items():
            plans[name], why = planner.plan(
                section,
                cfg.all_temperatures[0],
                bool(cfg.compile),
                self.prompts,
                cfg.batch_size,
                cfg.key_of(name),
                any(self.predictions.values()),
            )
            if why is not None:
                log.info("%s: %s", name, why)
        if cfg.tune:
            self.frequent = None if planner.exits is None else planner.exits.vocabulary
            section = cfg.self_speculation or SelfSpeculation()
            self.tuned_draft, _ = planner.find_description(section)
            self.answers = planner.answers(section, self.tuned_draft)
        return plans

    def _read_prompts(self, model: LayerSkipDecoder) -> None:
        cfg = self.cfg
        self.tokenizer = cfg.tokenizer.build()
        check_vocabulary(self.tokenizer, model)
        examples = try_examples(cfg.prompt, cfg.prompts, cfg.prompt_file)
        self.examples: list[Example]
        self.examples, self.prompts = encode(examples, self.tokenizer, model, self.limit)
        refuse_bad(self.examples)
        self.predictions = {
            tuple(tokens): predicted_tokens(example.prediction, tokens, self.tokenizer)
            for example, tokens in zip(self.examples, self.prompts, strict=True)
        }
        check_references(cfg.metrics or [], self.examples)

    def _draw_prompts(self, model: LayerSkipDecoder) -> None:
        cfg, num_tokens = self.cfg, model.tok_embeddings.num_embeddings
        check_prompt_lengths(model, [cfg.prompt_tokens], self.limit, key="max_new_tokens")
        self.tokenizer = None
        self.prompts = torch.randint(num_tokens, (cfg.batch_size, cfg.prompt_tokens)).tolist()

    def setup(self) -> None:
        """Load the model, choose variants with `tune`, and build the drafts."""
        cfg = self.cfg
        config.log_config(recipe_name=type(self).__name__, cfg=cfg.source)
        self.bandwidth = memory_bandwidth(self.device)
        plans = {cfg.key_of(name): plan for name, plan in self._drafts.items()}
        if cfg.random_weights:
            with training.set_default_dtype(cfg.torch_dtype), self.device:
                random_model = without_adapters(layerskip_decoder(cfg.model.build())).eval()
            self.llm = LLM(random_model if cfg.quantizer is None else quantise_decoder(random_model, cfg.quantizer))
            self.llm.prepare(plans)
        else:
            self.llm = LLM.of_config(cfg, self.device, self.tokenizer, plans)
        self.turns = Turns(
            cfg, self.llm, self.batches, self.limit, self.reserve, self.seed, self.spare_tokens, self.predictions
        )
        if cfg.tune:
            tuner = Tuner(cfg, self.turns, self.frequent, self.tuned_draft, self.answers)
            candidates = tuner.candidates()
            self.methods |= candidates
            self.tuned_sections = {name: tuner.section(plan) for name, plan in candidates.items()}

    def benchmark(self) -> dict[str, Any]:
        """Measure and write the report; after Ctrl-C or an error it has the runs so far."""
        cfg, interrupted, temperatures = self.cfg, True, self.cfg.all_temperatures
        try:
            with tqdm(total=len(temperatures) * (1 + self.repeats * len(self.batches)), desc="batches") as bar:
                for temperature in temperatures:
                    for turn in self.turns.take(self.methods, temperature, self.repeats):
                        for name, run in turn.items():
                            self.runs[temperature, name].append(run)
                        bar.update()
            interrupted = False
        except KeyboardInterrupt:
            log.warning("interrupted: the report has the runs so far")
        finally:
            report = self._report(interrupted)
            if report["results"]:  # otherwise keep the last report
                self._write(report)
        if cfg.tuned_path is not None and not interrupted:
            write_choice(cfg, cfg.tuned_path, report, self.tuned_sections)
        return report

    def _report(self, interrupted: bool) -> dict[str, Any]:
        """The settings of the run, and a row of figures for each method and temperature."""
        results: list[dict[str, Any]] = []
        # Measure again and keep the larger figure: other load on the machine makes a measurement too low.
        self.bandwidth = max(self.bandwidth, memory_bandwidth(self.device))
        for (temperature, name), runs in self.runs.items():
            row = {
                "temperature": temperature,
                "name": name,
                "compile_s": self.turns.compile_s[temperature, name],
                "predicted_speedup": None,
            }
            plan = self.methods[name]
            if self.cfg.tune and plan is not None and temperature == self.cfg.all_temperatures[0]:
                row["predicted_speedup"] = plan.speedup
            row |= figures(runs, self.runs[temperature, BASELINE], self.bandwidth)
            row |= self._quality(runs)
            results.append(row)
            if self.cfg.random_weights:
                # The baseline is the first row of its temperature, and its rounds are single steps.
                step_s = next(done["round_s"] for done in results if done["temperature"] == temperature)
                row["speedup_by_acceptance"] = speedup_by_acceptance(row, step_s)
        return self._settings() | {"interrupted": interrupted, "results": results}

    def _quality(self, runs: Sequence[Run]) -> dict[str, dict[str, float]]:
        """The text metrics of a method over all repeats, if the config asks for any."""
        if not self.cfg.metrics:
            return {}
        text = self.llm.text_stream(stop=self.cfg.stop_strings or []).text
        outputs = [text(tokens) for run in runs for tokens in run.outputs]
        # Outputs are in prompt order; after Ctrl-C the last repeat is incomplete.
        examples = [self.examples[i % len(self.examples)] for i in range(len(outputs))]
        return {"metrics": text_metrics(self.cfg.metrics, outputs, examples)}

    def _settings(self) -> dict[str, Any]:
        cfg = self.cfg
        command = [*(["tune", "run"] if Path(sys.argv[0]).stem == "layerskip_benchmark" else []), *sys.argv]
        steps = self.llm.state.compiled
        return {
            "command": shlex.join(command),
            "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            "versions": {"python": platform.python_version()}
            | {name: importlib.metadata.version(name) for name in ("torch", "torchtune", "torchao")},
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
            "repeats": self.repeats,
            "seed": self.seed,
            "config": OmegaConf.to_container(cfg.source, resolve=True),
        }

    def _write(self, report: dict[str, Any]) -> None:
        """Print the table and write the files. The last line of stdout has their paths, or without files the report."""
        page = markdown(report)
        print(page)
        if self.cfg.report_dir is None:
            print(json.dumps(report), flush=True)
            return
        name = "tune.json" if self.cfg.tune else "benchmark.json"
        document = report_path(Path(self.cfg.report_dir) / name, "report_dir", report["interrupted"])
        document.parent.mkdir(parents=True, exist_ok=True)
        files = {"json": document, "markdown": document.with_suffix(".md")}
        files["json"].write_text(json.dumps(report, indent=1) + "\n")
        files["markdown"].write_text(page)
        if self.cfg.picture:
            picture = Path(self.cfg.picture)
            files["picture"] = picture if document.stem == "benchmark" else picture.with_stem(document.stem)
            files["picture"].parent.mkdir(parents=True, exist_ok=True)
            plot(report["results"], files["picture"], str(self.cfg.given_folder))
        print(json.dumps({name: str(path) for name, path in files.items()}), flush=True)
