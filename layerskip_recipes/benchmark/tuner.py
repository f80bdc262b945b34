"""`layerskip_benchmark tune=true` finds the fastest drafting method on this machine.

1. Decode the prompts autoregressively.
2. Run one teacher-forced pass over the texts: it gives the tokens per round of every exit and draft vocabulary, or of
   the trained draft, with drafts of a fixed length and with drafts that end at low confidence.
3. Time a few short probes: they give the cost of the parts of a round.
4. Predict the speed of every exit, draft length, draft vocabulary, end and draft precision with prediction.py.
5. Measure the best few like any variant, and the best one also with prompt lookup.
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml  # type: ignore[import-untyped]
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX

from layerskip_recipes.acceptance.exit_quality import exit_quality
from layerskip_recipes.acceptance.tokens_per_round import ALL_TOKENS, TokensPerRound
from layerskip_recipes.acceptance.trained_exits import DRAFT_VOCABULARIES, LONGEST_DRAFT
from layerskip_recipes.benchmark.config import BenchmarkConfig
from layerskip_recipes.benchmark.measuring import Turns
from layerskip_recipes.checkpoint.drafts import DraftDescription, own_draft, read_draft
from layerskip_recipes.config.loading import load_config
from layerskip_recipes.config.names import find_config, our_configs, torchtune_configs
from layerskip_recipes.config.paths import check_file
from layerskip_recipes.config.recipe_config import as_yaml
from layerskip_recipes.config.schema import AUTO
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.generation.config import GenerateConfig
from layerskip_recipes.generation.drafting.auto_drafts import (
    LOOKUP,
    DraftChoice,
    method_of,
    most_frequent,
    prediction_keys,
)
from layerskip_recipes.generation.drafting.draft_model import DraftModels
from layerskip_recipes.generation.drafting.prediction import (
    Costs,
    DraftMethod,
    Prediction,
    StepCost,
    machine_for,
    ranked,
    rounds_of,
)
from layerskip_recipes.generation.drafting.section import SelfSpeculation
from layerskip_recipes.generation.drafting.speculation import KEY, SPECULATION_DEFAULTS, Speculation
from layerskip_recipes.generation.stats import GenerationStats
from layerskip_recipes.model.decoder import LayerSkipDecoder
from layerskip_recipes.model.draft import Draft

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
    vocabulary: Sequence[int] = (),
    sizes: Sequence[int] = (),
    longest: int = LONGEST_DRAFT,
    trained: tuple[DraftMethod, Draft] | None = None,
) -> dict[DraftMethod, TokensPerRound]:
    """The tokens per round of drafts of at most 1 to `longest` tokens, for each exit and draft vocabulary.

    One pass over `texts`, pairs of a prompt and the model's output. A draft vocabulary is the first n tokens of
    `vocabulary`, for n in `sizes`. `trained`: measure only this draft.
    """
    batches = (
        {
            "tokens": torch.tensor([[*prompt, *output]]),
            "labels": torch.tensor([[*[CROSS_ENTROPY_IGNORE_IDX] * len(prompt), *output]]),
        }
        for prompt, output in texts
    )
    device, depth = model.tok_embeddings.weight.device, model.num_layers
    if trained is not None:
        method, draft = trained
        quality = exit_quality(model, batches, [0, depth], device, num_speculations=longest, draft=draft)
        return {method: TokensPerRound(**quality[0].tokens_per_round[ALL_TOKENS])}
    exits = range(1, depth + 1)
    quality = exit_quality(model, batches, exits, device, num_speculations=longest, vocabulary=vocabulary, sizes=sizes)
    return {
        DraftMethod(e, None if name == ALL_TOKENS else int(name)): TokensPerRound(**rates)
        for e in exits[:-1]
        for name, rates in quality[e].tokens_per_round.items()
    }


def fitted_costs(
    timed: Mapping[tuple[DraftMethod, int], GenerationStats],
    plain_s: float,
    num_layers: int,
    vocabulary: int,
    batch_rows: int,
) -> Costs:
    """Fit the costs of prediction.py by least squares to the times of probes, by method and draft length."""

    def factors(method: DraftMethod) -> list[float]:
        """Of the six costs of a draft step: constant, layer and head row in full precision, and in int8."""
        own = [1, method.draft_layers or method.model_layers, method.vocabulary or vocabulary]
        below = method.model_layers if method.draft_layers else 0  # the model's layers below a trained draft
        return [0, below, 0, *own] if method.int8 else [own[0], own[1] + below, own[2], 0, 0, 0]

    features = torch.tensor([factors(method) for method, _ in timed]).double()
    seconds = torch.tensor([[s.draft_s / s.draft_steps] for s in timed.values()]).double()
    fit = torch.linalg.lstsq(features, seconds, driver="gelsd").solution[:, 0].tolist()
    further = []
    for (method, _), s in timed.items():
        verified = s.draft_steps / s.rounds * batch_rows * (1 - method.shared_layers / num_layers)
        further.append((s.verify_s / s.rounds / plain_s - 1) / verified)
    draft = {False: StepCost(*fit[:3]), True: StepCost(*fit[3:])}
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
        self.trained = None if draft is None else read_draft(draft, self.model, f"{KEY}.draft")
        turns.draft_models = DraftModels(self.trained)

    def candidates(self) -> dict[str, Candidate]:
        """The candidates by name; prints the predictions."""
        baseline = self._decode_all(None)
        plain = sum((stats for _, stats in baseline), GenerationStats())
        if plain.tokens == plain.first_tokens:
            raise ConfigError(NOTHING_TO_DRAFT)
        texts = zip(self.prompts, [row for rows, _ in baseline for row in rows], strict=True)
        on_cpu = self.model.tok_embeddings.weight.device.type == "cpu"
        endings = [False, True] if on_cpu and self.batch_rows == 1 else [False]
        precisions = [False, True] if self.cfg.compile and on_cpu else [False]
        # Tokens per round of each method, and what to time.
        longest = machine_for(self.cfg.torch_dtype, not on_cpu, bool(self.cfg.compile)).longest
        if self.draft is not None and self.trained is not None:
            method = method_of(self.draft)
            measured = measured_rates(self.model, texts, longest=longest, trained=(method, self.trained))
            probes = [(method, longest)]
        else:
            sizes = [n for n in DRAFT_VOCABULARIES if n <= len(self.frequent)] or [len(self.frequent)]
            measured = measured_rates(self.model, texts, self.frequent, sizes, longest)
            probes = self._probes(sizes[0])
        timed = {
            (m._replace(int8=int8), n): self._probe(m._replace(int8=int8), n) for int8 in precisions for m, n in probes
        }
        # Predict, and choose what to measure.
        size = self.model.tok_embeddings.num_embeddings
        costs = fitted_costs(timed, plain.decode_s / plain.rounds, self.model.num_layers, size, self.batch_rows)
        chosen = pick(ranked(rounds_of(measured, self.temperature, endings, precisions), costs))
        print(f"{'predicted':<36}{'tokens / round':>15}{'ms / round':>12}{'speed-up':>10}")
        candidates = [self._candidate(prediction) for prediction in chosen]
        for c in candidates:
            p = c.prediction
            print(f"{c.name:<36}{p.tokens_per_round:>15.2f}{1000 * p.round_s:>12.2f}{p.speedup:>9.2f}x")
        candidates.append(self._candidate(chosen[0], LOOKUP))
        return {candidate.name: candidate for candidate in candidates}

    def _candidate(self, prediction: Prediction, lookup: int | None = None) -> Candidate:
        folder = None if self.draft is None else self.draft.folder
        section = SelfSpeculation(**SPECULATION_DEFAULTS | prediction_keys(prediction, lookup) | {"draft": folder})
        choice = DraftChoice(section, None, 0.0, draft=self.draft, frequent=self.frequent)
        speculation = choice.speculation(self.prompts)
        assert speculation is not None
        written = section
        if self.draft is not None:
            written = section.model_copy(update={"draft_vocabulary": AUTO})  # the draft's own
        elif not self.stored:  # generation would count a number of tokens in its own prompts
            written = section.model_copy(update={"draft_vocabulary": speculation.draft_vocabulary})
        return Candidate(speculation, written, prediction)

    def _probes(self, small: int) -> list[tuple[DraftMethod, int]]:
        """Probes that differ in layers, head rows and draft length, so that `fitted_costs` can separate the costs."""
        early = max(self.model.num_layers // 8, 1)
        late = max(self.model.num_layers // 2, min(early + 1, self.model.num_layers - 1))
        return [(DraftMethod(early, small), 8), (DraftMethod(late, small), 4), (DraftMethod(early), 4)]

    def _probe(self, method: DraftMethod, num_speculations: int) -> GenerationStats:
        """The statistics of a short run of a method."""
        speculation = self._candidate(Prediction(method, num_speculations, 0, 0, 0)).speculation
        turns = replace(self.turns, limit=min(self.turns.limit, PROBE_TOKENS), batches=self.turns.batches[:2])
        turns.draft_models = DraftModels(self.trained)  # which goes with the probe
        stats = sum((stats for _, stats in self._decode_all(speculation, turns)), GenerationStats())
        if not stats.draft_steps:
            raise ConfigError(NOTHING_TO_DRAFT)
        return stats

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
