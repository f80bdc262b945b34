"""`tune run layerskip_eval`: how good is a checkpoint, and each of its exits? Wiring only.

On a dataset: loss, perplexity and agreement with the last layer of every exit, with a picture. One pass over the data
serves all exits; the heads run exit by exit and in chunks of tokens, as in training (exit_quality.py). Besides, or
instead: tasks of the lm-evaluation-harness (harness.py), HumanEval (human_eval.py).
"""

import json
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from torch.utils.data import DataLoader
from torchtune import training, utils
from tqdm import tqdm

from layerskip_recipes.checkpoint.checkpointers import check_checkpointer, ready
from layerskip_recipes.checkpoint.weights import load_decoder
from layerskip_recipes.config.checks import PICTURES, check_ending, check_file
from layerskip_recipes.config.layer_strings import select_exits
from layerskip_recipes.config.settings import (
    build,
    build_on_meta,
    check_component,
    check_one_process,
    check_section,
    check_settings,
)
from layerskip_recipes.data.tokenizer import PLAIN_TEMPLATE
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.evaluation.answers import Answers
from layerskip_recipes.evaluation.config import (
    REFUSED,
    SETTINGS,
    check_measured,
    checkpoints,
    datasets_of,
    harness,
    task_folders,
)
from layerskip_recipes.evaluation.human_eval import HumanEval, check_execution, pass_at_1, read_problems
from layerskip_recipes.generation.drafting.section import check_draft_fits, check_speculation, tree_of
from layerskip_recipes.generation.drafting.speculation import check_lengths, most_positions
from layerskip_recipes.generation.report import place_of
from layerskip_recipes.generation.sampling import Sampler
from layerskip_recipes.model.decoder import LayerSkipDecoder, layerskip_decoder
from layerskip_recipes.model.exit_quality import exit_quality
from layerskip_recipes.model.limits import check_cache_fits, check_vocabulary, weight_bytes
from layerskip_recipes.training.batches import limit_samples, load_data

log = utils.get_logger("INFO")

REQUIRED = ()  # one of dataset, tasks, human_eval is: `check_measured`


def plot_exits(measured: dict[str, dict[int, dict[str, float]]], path: Path, title: str) -> None:
    """A PNG with two panels over the exit layer: the loss, and the agreement with the last layer, by checkpoint."""
    from matplotlib.figure import Figure  # a second to import, and only here

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplots(1, 2)
    for panel, key, label in zip(
        panels, ("loss", "agreement"), ("loss (nats per token)", "agreement with the last layer"), strict=True
    ):
        for name, quality in measured.items():
            panel.plot(list(quality), [q[key] for q in quality.values()], marker="o", markersize=4, label=name)
        panel.set_xlabel("exit layer (layers run)")
        panel.set_ylabel(label)
        panel.grid(alpha=0.3)
    panels[1].set_ylim(0, 1.02)
    if len(measured) > 1:
        panels[0].legend()
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def check_config(cfg: DictConfig) -> None:
    """All of an evaluation config that can be wrong on any machine.

    Raises:
        ValueError: the key, what was given, what is allowed.
    """
    check_settings(cfg, SETTINGS, REFUSED, REQUIRED)
    check_measured(cfg)
    check_ending("report", cfg.get("report"), [".json"])
    check_ending("picture", cfg.get("picture"), PICTURES)
    model = layerskip_decoder(build_on_meta(cfg))
    check_checkpointer(cfg, model)
    select_exits(":" if cfg.get("layers") is None else cfg.layers, model.num_layers)
    if cfg.get("human_eval") is not None:
        HumanEval(**check_section(cfg.human_eval, "human_eval", HumanEval))
    if cfg.get("self_speculation") is not None:
        check_speculation(cfg.self_speculation, model)
        check_draft_fits(cfg, model)
    if cfg.get("exit_layer") is not None:
        model.check_exit(cfg.exit_layer)
    for name, other in checkpoints(cfg).items():
        check_component(other.checkpointer, f"compare.{name}", given=["output_dir"])
        try:
            check_checkpointer(other, model)
        except ValueError as e:
            raise ConfigError(f"compare.{name}: {e}") from e


class LayerSkipEval:
    """Measures a checkpoint: its exits on a dataset, tasks, HumanEval.

    Args:
        cfg: model, checkpointer, tokenizer, batch_size, compare (other checkpoints by name), report (path of a JSON
            document), and what is measured, one or more of
            dataset: with max_batches, layers (the layers whose output is an exit, ":" for all), num_speculations (d of
                the accepted length), picture (path of a PNG);
            tasks: of lm-eval, with task_path (folders of task files), num_fewshot, limit (documents of each);
            human_eval: file, execute, timeout, memory_mb, count, temperature;
            and for both of these exit_layer or self_speculation, and max_new_tokens.

    Raises:
        ValueError: for a wrong setting, before any weight is loaded.
    """

    def __init__(self, cfg: DictConfig) -> None:
        check_config(cfg)
        self.cfg = cfg
        if cfg.get("report"):
            check_file("report", cfg.report)
        if cfg.get("picture"):
            check_file("picture", cfg.picture)
        for one in checkpoints(cfg).values():
            self.device, self.dtype = ready(one)
        check_one_process()
        self.max_new_tokens = cfg.get("max_new_tokens") or 256
        self.seed = training.set_seed(seed=cfg.get("seed"))

    def setup(self) -> None:
        """The data, then the model. Those to compare with come one after the other, in `evaluate`."""
        cfg = self.cfg
        self.tokenizer = build(cfg.tokenizer, "tokenizer")
        model = layerskip_decoder(build_on_meta(cfg))
        check_vocabulary(self.tokenizer, model)
        self.batches = self.tasks = self.problems = None
        if cfg.get("dataset") is not None:
            datasets = datasets_of(cfg.dataset)
            limit_samples(datasets, self.tokenizer, model)
            dataset, collate = load_data(datasets, cfg.get("collate_fn"), self.tokenizer, model, self.device)
            self.batches = DataLoader(dataset, batch_size=cfg.get("batch_size", 1), collate_fn=collate)
            self.total = min(len(self.batches), cfg.get("max_batches") or len(self.batches))
        self.draft = None
        if cfg.get("self_speculation") is not None:
            self.draft = check_speculation(cfg.self_speculation, model)
        if cfg.get("tasks") is not None:
            self._setup_tasks(model)
        if cfg.get("human_eval") is not None:
            self._setup_human_eval(model)
        self.model = load_decoder(cfg, self.device, self.dtype)

    def _setup_tasks(self, model: LayerSkipDecoder) -> None:
        """The tasks with their documents."""
        cfg = self.cfg
        if cfg.get("apply_chat_template") and getattr(self.tokenizer, "chat_template", None) in (None, PLAIN_TEMPLATE):
            raise ConfigError(
                f"apply_chat_template: true, and this {type(self.tokenizer).__name__} has no chat template. Allowed: "
                "tokenizer={_component_: layerskip_recipes.hf_tokenizer, path: FOLDER}, the folder of a chat model, or "
                "apply_chat_template=false"
            )
        folders = task_folders("task_path", cfg.get("task_path"))
        self.tasks = harness().load_tasks(
            list(cfg.tasks), folders, cfg.get("num_fewshot"), self.max_new_tokens, most_positions(model)[0]
        )

    def _setup_human_eval(self, model: LayerSkipDecoder) -> None:
        """The problems; and whether programs run here at all."""
        self.section = HumanEval(**check_section(self.cfg.human_eval, "human_eval", HumanEval))
        self.problems = read_problems(self.section.file, self.section.count)
        lengths = [len(self.tokenizer.encode(problem.prompt, add_eos=False)) for problem in self.problems]
        check_lengths(model, lengths, self.max_new_tokens, key="max_new_tokens")
        nodes = tree_of(self.draft, Sampler(self.section.temperature).greedy).nodes if self.draft else 1
        weights = 0 if self.cfg.get("quantizer") else weight_bytes(model, self.dtype)
        slots = max(lengths) + self.max_new_tokens + nodes
        rows = min(self.cfg.get("batch_size") or 1, len(lengths))
        check_cache_fits(model, rows, slots, self.dtype, self.device, weights=weights)
        check_execution(self.section)

    def evaluate(self) -> dict[str, Any]:
        """Measure every checkpoint, print tables of each, write report and picture; of what there is, after an error.

        Returns:
            The report, which is also printed as the last line.
        """
        measured: dict[str, dict[str, Any]] = {}
        self.interrupted = True  # until all is measured
        try:
            for name, one in checkpoints(self.cfg).items():
                if measured:
                    del self.model  # one at a time in memory
                    self.model = load_decoder(one, self.device, self.dtype)
                print(f"\n{name}")
                self._measure(name, measured.setdefault(name, {}))
            self.interrupted = False
        except KeyboardInterrupt:
            done = [f"{what} of {name}" for name, parts in measured.items() for what in parts]
            log.warning("interrupted: measured to the end: %s", ", ".join(done) or "nothing, there is no report")
        finally:
            report = self._report(measured) if any(measured.values()) else {}
        return report

    def _report(self, measured: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """To the file, the picture and standard output: what was measured, by checkpoint, the config's own first."""
        cfg = self.cfg
        own, *others = measured
        report: dict[str, Any] = dict(measured[own])
        if self.batches is not None:
            report["batches"] = self.total
        for what in measured[own] if others else ():
            key = "compare" if what == "exits" else f"compare_{what}"
            report[key] = {name: measured[name][what] for name in others if what in measured[name]}
        if self.interrupted:
            report["interrupted"] = True
        exits = {name: of_name["exits"] for name, of_name in measured.items() if "exits" in of_name}
        document = place_of(Path(cfg.report), "report", self.interrupted) if cfg.get("report") else None
        if cfg.get("picture") and exits:
            picture = Path(cfg.picture)
            whole = picture.exists() if document is None else document != Path(cfg.report)
            if self.interrupted and whole:
                picture = picture.with_stem(f"{picture.stem}_interrupted")
            report["picture"] = str(picture)
        if document is not None:
            document.parent.mkdir(parents=True, exist_ok=True)
            document.write_text(json.dumps(report, indent=2) + "\n")
        if "picture" in report:
            plot_exits(exits, picture, title=f"{cfg.checkpointer.checkpoint_dir}, {self.total} batches")
            print(f"picture: {picture}")
        print(json.dumps(report), flush=True)
        return report

    def _measure(self, name: str, measured: dict[str, Any]) -> None:
        """All that the config asks for, of the model that is loaded: "exits", "tasks", "human_eval"."""
        cfg = self.cfg
        if self.batches is not None:
            measured["exits"] = self._measure_exits(name)
        answers = Answers(
            self.model,
            self.tokenizer,
            batch_size=cfg.get("batch_size", 1),
            exit_layer=cfg.get("exit_layer"),
            draft=self.draft,
            seed=self.seed,
        )
        if self.tasks is not None:
            lm = harness().LayerSkipLM(answers, self.max_new_tokens)
            chat = bool(cfg.get("apply_chat_template"))
            measured["tasks"] = harness().run_tasks(lm, self.tasks, cfg.get("limit"), chat)
        if self.problems is not None:
            measured["human_eval"] = pass_at_1(answers, self.problems, self.section, self.max_new_tokens)

    def _measure_exits(self, name: str) -> dict[int, dict[str, float]]:
        """The quality by exit, also printed as a table."""
        cfg, model = self.cfg, self.model
        progress = tqdm(self.batches, total=self.total, desc=name)
        batches = (batch for batch, _ in zip(progress, range(self.total), strict=False))
        draft = cfg.get("num_speculations") or 6
        exits = select_exits(":" if cfg.get("layers") is None else cfg.layers, model.num_layers)
        quality = exit_quality(model, batches, exits, self.device, num_speculations=draft)
        progress.close()
        print(f"\n{'exit':>5} {'loss':>8} {'perplexity':>11} {'accuracy':>9} {'agreement':>10} {f'of {draft}':>6}")
        for e, q in quality.items():
            print(
                f"{e:>5} {q['loss']:>8.3f} {q['perplexity']:>11.4g} {q['accuracy']:>9.3f} {q['agreement']:>10.3f} "
                + (f"{'-':>6}" if q["accepted_length"] is None else f"{q['accepted_length']:>6.2f}")
            )
        return quality
