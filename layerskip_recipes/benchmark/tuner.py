"""`layerskip_benchmark tune=true` finds the fastest drafting method on this machine.

1. Decode the prompts autoregressively.
2. Run one teacher-forced pass over the texts: it gives the tokens per round of every exit and draft vocabulary, with
   drafts of a fixed length and with drafts that end at low confidence.
3. Time a few short probes: they give the cost of the parts of a round.
4. Predict the speed of every exit, draft length, draft vocabulary, end and draft precision with prediction.py.
5. Measure the best few like any variant, and the best one also with prompt lookup.

For a trained draft, given or the model's own, probes replace step 2, and step 4 predicts lengths, ends and precisions.
"""

import itertools
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml  # type: ignore[import-untyped]
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX

from layerskip_recipes.benchmark.config import BenchmarkConfig
from layerskip_recipes.benchmark.measuring import Turns
from layerskip_recipes.checkpoint.drafts import DraftDescription, own_draft
from layerskip_recipes.checkpoint.trained_exits import DRAFT_VOCABULARIES, LONGEST_DRAFT, TokensPerRound
from layerskip_recipes.config.loading import load_config
from layerskip_recipes.config.names import find_config, our_configs, torchtune_configs
from layerskip_recipes.config.paths import check_file
from layerskip_recipes.config.recipe_config import as_yaml
from layerskip_recipes.config.schema import AUTO
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.generation.config import GenerateConfig
from layerskip_recipes.generation.drafting.auto_drafts import LOOKUP, most_frequent, prediction_keys
from layerskip_recipes.generation.drafting.draft_model import DraftModels
from layerskip_recipes.generation.drafting.prediction import (
    Costs,
    DraftMethod,
    Prediction,
    Round,
    StepCost,
    ranked,
    rounds_of,
)
from layerskip_recipes.generation.drafting.section import SelfSpeculation
from layerskip_recipes.generation.drafting.speculation import Speculation
from layerskip_recipes.generation.stats import GenerationStats
from layerskip_recipes.model.decoder import LayerSkipDecoder
from layerskip_recipes.model.exit_quality import ALL, exit_quality

PROBE_TOKENS = 48  # new tokens per prompt in a probe
FIRST_LINE = "# Written by layerskip_benchmark: "  # marks a tuned config
# Settings that affect the choice, besides the temperature.
MEASURED_WITH = (
    *("device", "dtype", "float32_matmul_precision", "compile"),
    *("batch_size", "top_k", "top_p", "min_p", "repetition_penalty"),
)
NOTHING_TO_DRAFT = (
    "max_new_tokens: the outputs ended with their first tokens, or the limit leaves no room for a draft. Give other "
    "prompts or more tokens, for example max_new_tokens=128"
)


@dataclass(frozen=True)
class Candidate:
    """A drafting method to measure."""

    speculation: Speculation  # to measure
    written: SelfSpeculation  # for tuned.yaml: its draft vocabulary may be a number of the checkpoint's tokens
    prediction: Prediction

    @property
    def name(self) -> str:
        method = self.prediction.method
        parts = [
            "draft" if method.draft_layers else f"exit{method.model_layers}",
            f"{self.prediction.num_speculations}",
        ]
        if method.vocabulary is not None and not method.draft_layers:
            parts.append(f"vocabulary{method.vocabulary}")
        flags = {"int8": method.int8, "confident": method.ends, "lookup": self.speculation.prompt_lookup}
        return "_".join([*parts, *(name for name, on in flags.items() if on)])


def measured_rates(
    model: LayerSkipDecoder,
    texts: Iterable[tuple[Sequence[int], Sequence[int]]],
    vocabulary: Sequence[int],
    sizes: Sequence[int],
    temperature: float,
    longest: int = LONGEST_DRAFT,
    endings: Sequence[bool] = (False,),
    precisions: Sequence[bool] = (False,),
) -> dict[DraftMethod, Sequence[Round]]:
    """The rounds of drafts of at most 1 to `longest` tokens, for each exit, draft vocabulary and end.

    One pass over `texts`, pairs of a prompt and the model's output. A draft vocabulary is the first n tokens of
    `vocabulary`, for n in `sizes`.
    """
    batches = (
        {
            "tokens": torch.tensor([[*prompt, *output]]),
            "labels": torch.tensor([[*[CROSS_ENTROPY_IGNORE_IDX] * len(prompt), *output]]),
        }
        for prompt, output in texts
    )
    exits, device = range(1, model.num_layers + 1), model.tok_embeddings.weight.device
    quality = exit_quality(model, batches, exits, device, num_speculations=longest, vocabulary=vocabulary, sizes=sizes)
    methods = {
        DraftMethod(e, None if name == ALL else int(name)): TokensPerRound(**rates)
        for e in exits[:-1]
        for name, rates in quality[e].tokens_per_round.items()
    }
    return rounds_of(methods, temperature, endings, precisions)


def fitted_costs(
    timed: Mapping[tuple[DraftMethod, int], GenerationStats],
    plain_s: float,
    num_layers: int,
    vocabulary: int,
    batch_rows: int,
) -> Costs:
    """Fit the costs of prediction.py by least squares to the times of probes, by method and draft length."""
    draft, further = {}, []
    for int8 in {method.int8 for method, _ in timed}:
        probes = {method: s for (method, _), s in timed.items() if method.int8 == int8}
        rows = [vocabulary if method.vocabulary is None else method.vocabulary for method in probes]
        features = [
            [1.0, method.draft_layers or method.model_layers, n] for method, n in zip(probes, rows, strict=True)
        ]
        seconds = [[s.draft_s / s.draft_steps] for s in probes.values()]
        fit = torch.linalg.lstsq(torch.tensor(features).double(), torch.tensor(seconds).double(), driver="gelsd")
        draft[int8] = StepCost(*fit.solution[:, 0].tolist())
    for (method, d), s in timed.items():
        verified = d * batch_rows * (1 - method.shared_layers / num_layers)
        further.append((s.verify_s / s.rounds / plain_s - 1) / verified)
    rest = statistics.median(s.accept_s / s.rounds for s in timed.values())
    return Costs(num_layers, vocabulary, plain_s, draft, max(statistics.median(further), 0.0), rest, batch_rows)


def pick(predictions: Sequence[Prediction], count: int = 4) -> list[Prediction]:
    """The best few to measure, with at most two draft lengths per method, at least three tokens apart."""
    picked: list[Prediction] = []
    for prediction in predictions:
        same = [other.num_speculations for other in picked if other.method == prediction.method]
        if len(same) < 2 and all(abs(prediction.num_speculations - other) >= 3 for other in same):
            picked.append(prediction)
        if len(picked) == count:
            break
    return picked


class Tuner:
    """Finds the drafting methods to measure.

    `stored` has the checkpoint's frequent tokens, most frequent first; None: count the prompts' tokens.
    `draft` is the trained draft whose length and precision to choose; None: choose an exit.
    """

    def __init__(
        self, cfg: BenchmarkConfig, turns: Turns, stored: Sequence[int] | None, draft: DraftDescription | None
    ) -> None:
        self.cfg, self.turns, self.model, self.draft = cfg, turns, turns.model, draft
        self.temperature, self.batch_rows = cfg.all_temperatures[0], len(turns.batches[0])
        self.prompts = [prompt for batch in turns.batches for prompt in batch]
        self.stored, self.frequent = bool(stored), list(stored or most_frequent(self.prompts))
        self.device = self.model.tok_embeddings.weight.device
        self.endings = [False, True] if self.device.type == "cpu" and self.batch_rows == 1 else [False]

    def candidates(self) -> dict[str, Candidate]:
        """The candidates by name; prints the predictions."""
        baseline = self._decode_all(None)
        plain = sum((stats for _, stats in baseline), GenerationStats())
        if plain.tokens == plain.first_tokens:
            raise ConfigError(NOTHING_TO_DRAFT)
        plain_s = plain.decode_s / plain.rounds
        precisions = [False, True] if self.cfg.compile and self.device.type == "cpu" else [False]
        # Tokens per round of each method, and times of the probes.
        if self.draft is not None:
            rates, timed = self._trained_draft(self.draft, precisions)
        else:
            sizes = [n for n in DRAFT_VOCABULARIES if n <= len(self.frequent)] or [len(self.frequent)]
            texts = zip(self.prompts, [row for rows, _ in baseline for row in rows], strict=True)
            rates = measured_rates(
                self.model, texts, self.frequent, sizes, self.temperature, LONGEST_DRAFT, self.endings, precisions
            )
            timed = self._probes(precisions, sizes[0])
        # Predict, and choose what to measure.
        size = self.model.tok_embeddings.num_embeddings
        costs = fitted_costs(timed, plain_s, self.model.num_layers, size, self.batch_rows)
        chosen = pick(ranked(rates, costs))
        print(f"{'predicted':<36}{'tokens / round':>15}{'ms / round':>12}{'speed-up':>10}")
        candidates = [self._candidate(prediction) for prediction in chosen]
        for c in candidates:
            p = c.prediction
            print(f"{c.name:<36}{p.tokens_per_round:>15.2f}{1000 * p.round_s:>12.2f}{p.speedup:>9.2f}x")
        candidates.append(self._candidate(chosen[0], LOOKUP))
        return {candidate.name: candidate for candidate in candidates}

    def _candidate(self, prediction: Prediction, lookup: int | None = None) -> Candidate:
        keys, draft = prediction_keys(prediction, lookup), self.draft
        if draft is not None:
            written = SelfSpeculation(**keys | {"draft": draft.folder, "draft_vocabulary": AUTO})
            keys |= {"exit_layer": draft.exit_layer, "draft": draft, "draft_vocabulary": draft.vocabulary}
            return Candidate(Speculation(**keys), written, prediction)
        num_tokens = prediction.method.vocabulary
        ids = None if num_tokens is None else self.frequent[:num_tokens]
        # Generation would count a number of tokens in its own prompts if the checkpoint stores none.
        written = SelfSpeculation(**keys | {"draft": None} | ({} if self.stored else {"draft_vocabulary": ids}))
        return Candidate(Speculation(**keys | {"draft_vocabulary": ids}), written, prediction)

    def _probes(self, precisions: Sequence[bool], small: int) -> dict[tuple[DraftMethod, int], GenerationStats]:
        """Probes that differ in layers, head rows and draft length, so that `fitted_costs` can separate the costs."""
        early = max(self.model.num_layers // 8, 1)
        late = max(self.model.num_layers // 2, min(early + 1, self.model.num_layers - 1))
        kinds = [(DraftMethod(early, small), 8), (DraftMethod(late, small), 4), (DraftMethod(early), 4)]
        methods = [(method._replace(int8=int8), d) for int8 in precisions for method, d in kinds]
        return {(method, d): self._probe(method, d) for method, d in methods}

    def _probe(self, method: DraftMethod, num_speculations: int) -> GenerationStats:
        speculation = self._candidate(Prediction(method, num_speculations, 0, 0, 0)).speculation
        turns = replace(self.turns, limit=min(self.turns.limit, PROBE_TOKENS), batches=self.turns.batches[:2])
        turns.draft_models = DraftModels()  # which goes with the probe
        stats = sum((stats for _, stats in self._decode_all(speculation, turns)), GenerationStats())
        if not stats.draft_steps:
            raise ConfigError(NOTHING_TO_DRAFT)
        return stats

    def _trained_draft(
        self, draft: DraftDescription, precisions: Sequence[bool]
    ) -> tuple[dict[DraftMethod, Sequence[Round]], dict[tuple[DraftMethod, int], GenerationStats]]:
        """Rounds and times of a trained draft, from probes with drafts of up to 8 tokens."""
        rates, timed = dict[DraftMethod, Sequence[Round]](), {}
        for int8, ends in itertools.product(precisions, self.endings):
            method = DraftMethod(0, None, int8, draft_layers=draft.num_layers, ends=ends)
            stats = self._probe(method, 8)
            if not ends:
                timed[method, 8] = stats
            rounds = sum(stats.rounds_accepting.values())
            # The tokens that the same rounds would have written with shorter drafts.
            written = [sum(n * min(k, d) for k, n in stats.rounds_accepting.items()) for d in range(1, 9)]
            drafted = [min(d, stats.drafted / rounds) for d in range(1, 9)]
            rates[method] = [Round(1 + accepted / rounds, m) for accepted, m in zip(written, drafted, strict=True)]
        return rates, timed

    def _decode_all(self, method: Any, turns: Turns | None = None) -> list[tuple[list, GenerationStats]]:
        """Decode every batch once, after a warm-up."""
        turns = turns or self.turns
        batches = [turns.batches[0], *turns.batches]
        return [turns.decode(method, self.temperature, batch, turns.seed) for batch in batches][1:]


# ---- the tuned config ----


def check_config_path(path: Path) -> None:
    """Raise ConfigError if the config cannot be written, or would replace a file of the user's."""
    check_file("report_dir", str(path))
    if path.is_file() and not path.read_bytes().startswith(FIRST_LINE.encode()):
        raise ConfigError(
            f"report_dir: {str(path)!r} exists, and layerskip_benchmark did not write it. Allowed: another folder; for "
            f"example report_dir={path.parent}_2"
        )


def write_config(path: Path, cfg: BenchmarkConfig, best: SelfSpeculation | None, why: str) -> None:
    """Write a config that extends `tune_extends` with the measured settings and the fastest drafts, if any."""
    # The user's paths are relative to the current folder: make them absolute.
    assert cfg.tune_extends is not None  # see `BenchmarkConfig.tuned_path`
    extends = cfg.tune_extends
    known = extends in our_configs() | torchtune_configs() and not Path(extends).is_file()
    content: dict[str, Any] = {"extends": extends if known else str(find_config(extends))}
    if cfg.model_dir is not None:
        folder = Path(cfg.model_dir)
        content["model_dir"] = str(folder.absolute()) if folder.is_dir() else cfg.model_dir
    base = GenerateConfig.load(load_config(extends, [] if cfg.model_dir is None else [f"model_dir={cfg.model_dir}"]))
    wanted = {key: getattr(cfg, key) for key in MEASURED_WITH} | {"temperature": cfg.all_temperatures[0]}
    wanted |= {"exit_layer": None, "quantizer": cfg.quantizer}
    wanted |= {key: getattr(cfg, key) for key in ("model", "checkpointer", "tokenizer")}
    for key, value in wanted.items():
        if value != getattr(base, key):
            content[key] = as_yaml(value)
    if best is None:
        content["self_speculation"] = None
    else:
        content["self_speculation"] = dict(best)
        if best.draft is not None:
            draft = Path(best.draft).absolute()
            content["self_speculation"]["draft"] = str(draft)
            if own_draft(draft.parent) == str(draft) and cfg.model_dir is not None:
                content["model_dir"] = str(draft.parent)  # the run's newest checkpoint may change
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{FIRST_LINE}{why}\n{yaml.safe_dump(content, sort_keys=False)}")


def write_choice(
    cfg: BenchmarkConfig, path: Path, report: Mapping[str, Any], candidates: Mapping[str, Candidate]
) -> None:
    """Print predicted and measured speed-ups, and write the config of the fastest candidate."""
    temperature = cfg.all_temperatures[0]
    rows = {row["name"]: row for row in report["results"] if row["temperature"] == temperature and row["speedup"]}
    measured = {name: rows[name]["speedup"]["median"] for name in candidates if name in rows}
    print(f"{'variant':<36}{'predicted':>10}{'measured':>10}")
    for name, speedup in measured.items():
        predicted = rows[name]["predicted_speedup"]
        print(f"{name:<36}{'-' if predicted is None else f'{predicted:.2f}x':>10}{speedup:>9.2f}x")
    if not measured:
        raise ConfigError(NOTHING_TO_DRAFT)
    best = max(measured, key=measured.__getitem__)
    faster = measured[best] > 1
    chosen = f"{best} at {measured[best]:.2f}x" if faster else f"no drafts, since {best} had {measured[best]:.2f}x"
    why = f"{chosen}, temperature {temperature}, {report['device']}"
    write_config(path, cfg, candidates[best].written if faster else None, why)
    print(f"fastest: {best if faster else 'autoregressive'}; written to {path}")
