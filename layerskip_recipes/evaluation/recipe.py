"""`tune run layerskip_eval` measures all exits of a checkpoint in one pass over a dataset."""

import json
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from torchtune import training, utils
from tqdm import tqdm

from layerskip_recipes.acceptance.exit_quality import exit_quality
from layerskip_recipes.checkpoint.checkpointer_checks import prepare_device
from layerskip_recipes.checkpoint.weights import load_decoder
from layerskip_recipes.config.layer_strings import select_exits
from layerskip_recipes.config.paths import check_file
from layerskip_recipes.data.datasets import Batches, limit_samples, load_data
from layerskip_recipes.data.replies import ReplyFormat
from layerskip_recipes.evaluation.config import EvalConfig
from layerskip_recipes.generation.report import report_path
from layerskip_recipes.model.decoder import layerskip_decoder
from layerskip_recipes.model.limits import check_vocabulary
from layerskip_recipes.processes import check_one_process

log = utils.get_logger("INFO")


class LayerSkipEval:
    """Measures checkpoints of one model; raises ConfigError for a mistake before loading weights."""

    def __init__(self, cfg: DictConfig) -> None:
        self.cfg = EvalConfig.load(cfg)
        for key in ("report", "picture"):
            if (name := getattr(self.cfg, key)) is not None:
                check_file(key, name)
        self.checkpoints = self.cfg.checkpoints()
        for checkpoint in self.checkpoints.values():
            self.device = prepare_device(checkpoint)
        check_one_process()
        training.set_seed(seed=self.cfg.seed)

    def setup(self) -> None:
        """Load the data, then the model. `evaluate` loads the checkpoints in `compare` one after the other."""
        cfg = self.cfg
        self.tokenizer = cfg.tokenizer.build()
        self.replies = ReplyFormat.of(self.tokenizer)
        model = layerskip_decoder(cfg.meta_model)
        check_vocabulary(self.tokenizer, model)
        limit_samples(cfg.dataset, self.tokenizer, model)
        dataset, collate = load_data(cfg.dataset, cfg.collate_fn, self.tokenizer, model, self.device)
        self.batches = Batches(dataset, range(len(dataset)), cfg.batch_size, collate, self.device)
        self.total = min(len(self.batches), cfg.max_batches or len(self.batches))
        self.model = load_decoder(cfg, self.device, cfg.quantizer)

    def evaluate(self) -> dict[str, Any]:
        """Measure every checkpoint, print its table, and write the report and the picture.

        After an error or Ctrl-C the report has the finished checkpoints.
        """
        measured: dict[str, dict[int, dict[str, Any]]] = {}
        self.interrupted = True  # until everything is measured
        try:
            for name, checkpoint in self.checkpoints.items():
                if measured:
                    del self.model  # one model at a time in memory
                    self.model = load_decoder(checkpoint, self.device, checkpoint.quantizer)
                print(f"\n{name}")
                measured[name] = self._measure_exits(name)
            self.interrupted = False
        except KeyboardInterrupt:
            log.warning("interrupted: finished: %s", ", ".join(measured) or "nothing, so there is no report")
        finally:
            report = self._report(measured) if measured else {}
        return report

    def _measure_exits(self, name: str) -> dict[int, dict[str, Any]]:
        """The quality by exit; also prints it as a table."""
        cfg, model = self.cfg, self.model
        length, generated = cfg.num_speculations, self.replies.generated
        exits = sorted({*select_exits(cfg.exits or ":", model.num_layers), model.num_layers})
        with tqdm(self.batches, total=self.total, desc=name) as batches:
            limited = islice(batches, self.total)
            measured = exit_quality(model, limited, exits, self.device, num_speculations=length, generated=generated)
        quality = {e: of_exit.report() for e, of_exit in measured.items()}
        print(f"\n exit     loss  perplexity  accuracy  exact  agreement {f'of {length}':>6}")
        for e, q in quality.items():
            accepted = "-" if q["accepted_length"] is None else f"{q['accepted_length']:.2f}"
            print(
                f"{e:>5} {q['loss']:>8.3f} {q['perplexity']:>11.4g} {q['accuracy']:>9.3f} "
                f"{q['exact_match']:>6.3f} {q['agreement']:>10.3f} {accepted:>6}"
            )
        return quality

    def _report(self, measured: dict[str, dict[int, dict[str, Any]]]) -> dict[str, Any]:
        """Write the report to its file and to stdout, and draw the picture."""
        cfg = self.cfg
        # The config's own checkpoint is at the top level, the others are in `compare`.
        first, *others = measured
        report: dict[str, Any] = {"exits": measured[first], "batches": self.total}
        if cfg.compare:
            report["compare"] = {name: measured[name] for name in others}
        if self.interrupted:
            report["interrupted"] = True
        # An interrupted run replaces no earlier file.
        if cfg.picture is not None:
            picture = report_path(Path(cfg.picture), "picture", self.interrupted)
            report["picture"] = str(picture)
            plot_exits(measured, picture, title=f"{cfg.given_folder}, {self.total} batches")
        if cfg.report is not None:
            document = report_path(Path(cfg.report), "report", self.interrupted)
            document.parent.mkdir(parents=True, exist_ok=True)
            document.write_text(json.dumps(report, indent=2) + "\n")
        print(json.dumps(report), flush=True)
        return report


def plot_exits(quality: Mapping[str, Mapping[int, Mapping[str, Any]]], path: Path, title: str) -> None:
    """Plot loss and agreement with the last layer over the exit layer, with a line for each checkpoint."""
    from matplotlib.figure import Figure  # takes a second to import

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplots(1, 2)
    labels = {"loss": "loss (nats per token)", "agreement": "agreement with the last layer"}
    for panel, (key, label) in zip(panels, labels.items(), strict=True):
        for name, exits in quality.items():
            panel.plot(list(exits), [exit[key] for exit in exits.values()], marker="o", markersize=4, label=name)
        panel.set_xlabel("exit layer (layers run)")
        panel.set_ylabel(label)
        panel.grid(alpha=0.3)
    panels[1].set_ylim(0, 1.02)
    if len(quality) > 1:
        panels[0].legend()
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
