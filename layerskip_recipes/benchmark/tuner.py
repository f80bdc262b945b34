"""`layerskip_benchmark tune=true` finds the fastest drafting method on this machine.

1. Decode the prompts without drafts.
2. Run one teacher-forced pass over the texts: it gives the tokens per round of every exit and draft vocabulary, or of
   the trained draft, with drafts of a fixed length and with drafts that end at low confidence.
3. Time a few short probes: they give the cost of the parts of a round.
4. Predict the speed of every exit, draft length, draft vocabulary, end and draft precision with prediction.py.
5. Measure the best few like any variant, and the best one also with prompt lookup.
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml  # type: ignore[import-untyped]
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX

from layerskip_recipes.acceptance.exit_quality import exit_quality
from layerskip_recipes.acceptance.tokens_per_round import ALL_TOKENS, MIN_CONFIDENCE, TokensPerRound
from layerskip_recipes.acceptance.trained_exits import DRAFT_VOCABULARIES, LONGEST_DRAFT
from layerskip_recipes.benchmark.config import BenchmarkConfig
from layerskip_recipes.benchmark.measuring import Turns
from layerskip_recipes.checkpoint.answers import Answers
from layerskip_recipes.checkpoint.drafts import DraftDescription, own_draft
from layerskip_recipes.config.loading import load_config
from layerskip_recipes.config.names import find_config, our_configs, torchtune_configs
from layerskip_recipes.config.paths import check_file
from layerskip_recipes.config.recipe_config import as_yaml
from layerskip_recipes.config.schema import AUTO
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.generation.config import GenerateConfig
from layerskip_recipes.generation.drafting.planner import LOOKUP, most_frequent
from layerskip_recipes.generation.drafting.prediction import Costs, Option, StepCost, machine_for, ranked, variants
from layerskip_recipes.generation.drafting.section import SelfSpeculation
from layerskip_recipes.generation.drafting.speculation import SECTION_KEY, Speculation
from layerskip_recipes.generation.stats import GenerationStats
from layerskip_recipes.model.decoder import LayerSkipDecoder
from layerskip_recipes.model.draft import Draft

PROBE_TOKENS = 48  # new tokens per prompt in a probe
FIRST_LINE = "# Written by layerskip_benchmark: "  # marks a tuned config
# Settings that affect the choice, besides the temperature.
MEASURED_WITH = (
    "device",
    "dtype",
    "float32_matmul_precision",
    "compile",
    "batch_size",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
)
NOTHING_TO_DRAFT = (
    "max_new_tokens: the outputs ended with their first tokens, or the limit leaves no room for a draft. Give other "
    "prompts or more tokens, for example max_new_tokens=128"
)


def variant_name(plan: Speculation) -> str:
    """The plan's name in the report."""
    parts = ["draft" if plan.draft_layers else f"exit{plan.model_layers}", f"{plan.num_speculations}"]
    if plan.num_draft_tokens is not None and not plan.draft_layers:
        parts.append(f"vocabulary{plan.num_draft_tokens}")
    flags = {"int8": plan.draft_int8, "confident": plan.ends_early, "lookup": plan.looks_up}
    return "_".join([*parts, *(name for name, on in flags.items() if on)])


def measured_rates(
    model: LayerSkipDecoder,
    texts: Iterable[tuple[Sequence[int], Sequence[int]]],
    vocabulary: Sequence[int] = (),
    sizes: Sequence[int] = (),
    longest: int = LONGEST_DRAFT,
    trained: tuple[Speculation, Draft] | None = None,
) -> list[Option]:
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
    device, num_layers = model.tok_embeddings.weight.device, model.num_layers
    if trained is not None:
        plan, draft = trained
        quality = exit_quality(model, batches, [0, num_layers], device, num_speculations=longest, draft=draft)
        return [(plan, TokensPerRound(**quality[0].tokens_per_round[ALL_TOKENS]))]
    exits = range(1, num_layers + 1)
    quality = exit_quality(model, batches, exits, device, num_speculations=longest, vocabulary=vocabulary, sizes=sizes)
    return [
        (
            Speculation(e, draft_vocabulary=None if name == ALL_TOKENS else vocabulary[: int(name)]),
            TokensPerRound(**rates),
        )
        for e in exits[:-1]
        for name, rates in quality[e].tokens_per_round.items()
    ]


def fitted_costs(
    timed: Sequence[tuple[Speculation, GenerationStats]],
    plain_s: float,
    num_layers: int,
    vocabulary: int,
    batch_rows: int,
) -> Costs:
    """Fit the costs of prediction.py by least squares to the times of probes, by plan."""

    def factors(plan: Speculation) -> list[float]:
        """Of the six costs of a draft step: constant, layer and head row in full precision, and in int8."""
        layers, head_rows = plan.draft_layers or plan.model_layers, plan.num_draft_tokens or vocabulary
        below = plan.model_layers if plan.draft_layers else 0  # the model's layers below a trained draft
        return [0, below, 0, 1, layers, head_rows] if plan.draft_int8 else [1, layers + below, head_rows, 0, 0, 0]

    features = torch.tensor([factors(plan) for plan, _ in timed]).double()
    seconds = torch.tensor([[s.draft_s / s.draft_steps] for _, s in timed]).double()
    fit = torch.linalg.lstsq(features, seconds, driver="gelsd").solution[:, 0].tolist()
    step, layer, head_row, int8_step, int8_layer, int8_head_row = fit
    further = []
    for plan, s in timed:
        verified = s.draft_steps / s.rounds * batch_rows * (1 - plan.shared_layers / num_layers)
        further.append((s.verify_s / s.rounds / plain_s - 1) / verified)
    draft = {False: StepCost(step, layer, head_row), True: StepCost(int8_step, int8_layer, int8_head_row)}
    rest = statistics.median(s.accept_s / s.rounds for _, s in timed)
    return Costs(num_layers, vocabulary, plain_s, draft, max(statistics.median(further), 0.0), rest, batch_rows)


def pick(plans: Sequence[Speculation], count: int = 4) -> list[Speculation]:
    """The best few to measure, with at most two draft lengths per method, at least three tokens apart."""
    picked: list[Speculation] = []
    for plan in plans:
        lengths = [
            other.num_speculations
            for other in picked
            if (other.weights_key, other.ends_early) == (plan.weights_key, plan.ends_early)
        ]
        if len(lengths) < 2 and all(abs(plan.num_speculations - length) >= 3 for length in lengths):
            picked.append(plan)
        if len(picked) == count:
            break
    return picked


class Tuner:
    """Finds the drafting methods to measure.

    `stored` has the checkpoint's frequent tokens, most frequent first; None: count the prompts' tokens.
    `draft` is the trained draft whose length and precision to choose; None: choose an exit. `answers` are for look-ups.
    """

    def __init__(
        self,
        cfg: BenchmarkConfig,
        turns: Turns,
        stored: Sequence[int] | None,
        draft: DraftDescription | None,
        answers: Answers | None,
    ) -> None:
        self.answers = answers
        self.cfg, self.turns, self.model, self.draft = cfg, turns, turns.llm.model, draft
        self.temperature, self.batch_rows = cfg.all_temperatures[0], len(turns.batches[0])
        self.prompts = [prompt for batch in turns.batches for prompt in batch]
        self.stored, self.frequent = bool(stored), list(stored or most_frequent(self.prompts))
        self.trained = None
        if draft is not None:
            self.trained = turns.llm.state.trained_draft(draft, self.model, f"{SECTION_KEY}.draft")

    def candidates(self) -> dict[str, Speculation]:
        """The plans to measure, by name, with their predicted speed-ups; prints the predictions."""
        plain_runs = self._decode_all(None)
        plain = sum((stats for _, stats in plain_runs), GenerationStats())
        if plain.tokens == plain.first_tokens:
            raise ConfigError(NOTHING_TO_DRAFT)
        texts = zip(self.prompts, [output for outputs, _ in plain_runs for output in outputs], strict=True)
        on_cpu = self.model.tok_embeddings.weight.device.type == "cpu"
        min_confidences = [0.0, MIN_CONFIDENCE] if on_cpu and self.batch_rows == 1 else [0.0]
        precisions = [False, True] if self.cfg.compile and on_cpu else [False]
        # Tokens per round of each method, and what to time.
        longest = machine_for(self.cfg.torch_dtype, not on_cpu, bool(self.cfg.compile)).longest
        if self.draft is not None and self.trained is not None:
            plan = Speculation(self.draft.exit_layer, longest, self.draft.vocabulary, draft=self.draft)
            measured = measured_rates(self.model, texts, longest=longest, trained=(plan, self.trained))
            probes = [plan]
        else:
            sizes = [n for n in DRAFT_VOCABULARIES if n <= len(self.frequent)] or [len(self.frequent)]
            measured = measured_rates(self.model, texts, self.frequent, sizes, longest)
            probes = self._probes(sizes[0])
        probes = [replace(probe, draft_int8=int8) for int8 in precisions for probe in probes]
        timed = [(probe, self._probe(probe)) for probe in probes]
        # Predict, and choose what to measure.
        size = self.model.tok_embeddings.num_embeddings
        costs = fitted_costs(timed, plain.decode_s / plain.rounds, self.model.num_layers, size, self.batch_rows)
        chosen = pick(ranked(variants(measured, self.temperature, min_confidences, precisions), costs))
        print(f"{'predicted':<36}{'tokens / round':>15}{'ms / round':>12}{'speed-up':>10}")
        for plan in chosen:
            tokens, speedup = plan.tokens_per_round or 0.0, plan.speedup or 1.0
            round_ms = 1000 * tokens * costs.plain_step_s / speedup
            print(f"{variant_name(plan):<36}{tokens:>15.2f}{round_ms:>12.2f}{speedup:>9.2f}x")
        best = replace(chosen[0], tokens_per_round=None, speedup=None)  # which are not predicted with look-ups
        with_look_ups = replace(best, prompt_lookup=LOOKUP, answers=self.answers)
        return {variant_name(plan): plan for plan in (*chosen, with_look_ups)}

    def section(self, plan: Speculation) -> SelfSpeculation:
        """A plan as the section of the tuned config."""
        section = SelfSpeculation().resolved(plan)
        assert section is not None
        if self.draft is not None:
            return section.model_copy(update={"draft_vocabulary": AUTO})  # that of the draft
        if not self.stored:  # generation would count a number of tokens in its own prompts
            return section.model_copy(update={"draft_vocabulary": plan.draft_vocabulary})
        return section

    def _probes(self, small: int) -> list[Speculation]:
        """Probes that differ in layers, head rows and draft length, so that `fitted_costs` can separate the costs."""
        early = max(self.model.num_layers // 8, 1)
        late = max(self.model.num_layers // 2, min(early + 1, self.model.num_layers - 1))
        ids = self.frequent[:small]
        return [Speculation(early, 8, ids), Speculation(late, 4, ids), Speculation(early, 4)]

    def _probe(self, plan: Speculation) -> GenerationStats:
        """The statistics of a short run of a plan."""
        turns = replace(self.turns, limit=min(self.turns.limit, PROBE_TOKENS), batches=self.turns.batches[:2])
        stats = sum((stats for _, stats in self._decode_all(plan, turns)), GenerationStats())
        self.turns.llm.forget_draft(plan)  # its int8 copies go with the probe
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
    cfg: BenchmarkConfig, path: Path, report: Mapping[str, Any], sections: Mapping[str, SelfSpeculation]
) -> None:
    """Print predicted and measured speed-ups of variants, and write the config of the fastest one."""
    temperature = cfg.all_temperatures[0]
    rows = {row["name"]: row for row in report["results"] if row["temperature"] == temperature and row["speedup"]}
    measured = {name: rows[name]["speedup"]["median"] for name in sections if name in rows}
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
    write_config(path, cfg, sections[best] if faster else None, why)
    print(f"fastest: {best if faster else 'no drafts'}; written to {path}")
