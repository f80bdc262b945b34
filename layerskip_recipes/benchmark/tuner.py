"""`layerskip_benchmark tune=true`: which exit layer and draft length are fastest on this machine?

One pass over the baseline's outputs tells how many tokens a round of each exit would give, and a few short probes tell
what a round costs. Together they predict the speed of every pair. The best few are then measured like any variant.
"""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml  # type: ignore[import-untyped]

from layerskip_recipes.benchmark.config import BenchmarkConfig
from layerskip_recipes.benchmark.measuring import Turns
from layerskip_recipes.benchmark.sweep import LONGEST, Pair
from layerskip_recipes.config.components import Component
from layerskip_recipes.config.names import find_config, our_configs, torchtune_configs
from layerskip_recipes.config.paths import check_file
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.generation.drafting.section import SelfSpeculation
from layerskip_recipes.generation.drafting.speculation import Speculation
from layerskip_recipes.generation.sampling import Sampler
from layerskip_recipes.generation.stats import GenerationStats
from layerskip_recipes.model.decoder import LayerSkipDecoder

FIRST_LINE = "# Written by layerskip_benchmark: "  # of a config
# Settings that decide which pair is fastest, beside the temperature.
MEASURED_WITH = (
    *("dtype", "float32_matmul_precision", "compile"),
    *("batch_size", "top_k", "top_p", "min_p", "repetition_penalty"),
)
NOTHING_TO_DRAFT = (
    "max_new_tokens: every output ended with its first token, so there is nothing to draft. Give other prompts"
)


class Prediction(NamedTuple):
    """How fast a pair of exit layer and draft length should be."""

    pair: Pair
    tokens_per_round: float
    round_s: float
    speedup: float  # over autoregressive decoding


@torch.no_grad()
def round_tokens(
    model: LayerSkipDecoder,
    prompts: Sequence[Sequence[int]],
    outputs: Sequence[Sequence[int]],
    sampler: Sampler,
    longest: int = LONGEST,
) -> dict[int, list[float]]:
    """Tokens of a round by exit and draft length, on outputs of the whole model: one pass for all exits.

    A token drafted from q is accepted with probability sum_v min(p_v, q_v). Greedily this is 1 or 0, and the rounds are
    those of decoding.

    Args:
        model: the decoder, in eval mode.
        prompts, outputs: tokens of each prompt, and of its continuation by the whole model.
        sampler: its temperature and filters make p and q.
        longest: the longest draft.

    Returns:
        {E: [tokens of a round with 1, 2, .. longest drafts]} for E in 1 .. L-1.

    Raises:
        ConfigError: if every output ended with its first token.
    """
    device = model.tok_embeddings.weight.device
    exits = list(range(1, model.num_layers))
    rounds, drafted = {e: [0.0] * longest for e in exits}, 0
    for prompt, output in zip(prompts, outputs, strict=True):
        tokens = torch.tensor([[*prompt, *output]], device=device)
        final, hidden = model.hidden_states(tokens, exits)
        # Row i gives the (i+1)-th token of the output. The first token comes from the prompt and is not drafted.
        rows = slice(len(prompt), len(prompt) + len(output) - 1)
        drafted += len(output) - 1
        whole = model.unembed(final[:, rows])[0]
        for e in exits:
            accepted = _accepted(whole, model.unembed(hidden[e][:, rows])[0], sampler).tolist()
            for d in range(1, longest + 1):
                rounds[e][d - 1] += count_rounds(accepted, d)
    if not drafted:
        raise ConfigError(NOTHING_TO_DRAFT)
    return {e: [drafted / count for count in counts] for e, counts in rounds.items()}


def count_rounds(accepted: Sequence[float], num_speculations: int) -> float:
    """Rounds in which a text is written, in expectation.

    A round that begins at token i accepts k drafts and rejects the next with a_i .. a_(i+k-1) (1 - a_(i+k)), and the
    round after it begins at i + k + 1.

    Args:
        accepted: a, for each token of the text the probability that its draft is accepted.
        num_speculations: d.
    """
    end = len(accepted)
    begins = [1.0, *[0.0] * end]  # the probability that a round begins at a token
    for i in range(end):
        stands = begins[i]
        for k in range(min(num_speculations, end - i)):
            begins[i + k + 1] += stands * (1 - accepted[i + k])
            stands *= accepted[i + k]
        begins[min(i + num_speculations + 1, end)] += stands
    return sum(begins[:end])


def _accepted(whole: torch.Tensor, draft: torch.Tensor, sampler: Sampler) -> torch.Tensor:
    """[n], the probability at each position that a draft is accepted; logits [n, v]."""
    if sampler.temperature == 0:
        return (whole.argmax(-1) == draft.argmax(-1)).float()
    p, q = (sampler.scores(logits, None, sampler.settings(logits.device)) for logits in (whole, draft))
    return torch.minimum(p, q).sum(-1)


def probes(num_layers: int) -> list[tuple[int, int]]:
    """The (exit layer, draft length) pairs whose rounds are timed: enough to fit `round_cost`."""
    early = max(num_layers // 8, 1)
    late = num_layers - early
    return [(e, d) for e in (early, late) for d in (2, 8)]


def round_cost(timed: dict[tuple[int, int], float]) -> torch.Tensor:
    """[4] coefficients of a round's seconds, a + b E + c d + e E d: drafting costs d E layers and d heads, verifying
    (L - E) layers over d + 1 positions, and both are of this form.

    Args:
        timed: seconds of a round for the pairs of `probes`.
    """
    features = torch.tensor([[1, e, d, e * d] for e, d in timed], dtype=torch.float64)
    return torch.linalg.solve(features, torch.tensor(list(timed.values()), dtype=torch.float64))


def predict(tokens: dict[int, list[float]], cost: torch.Tensor, step_s: float) -> list[Prediction]:
    """All pairs, the fastest first: tokens of a round (`round_tokens`) over its seconds (`round_cost`).

    Args:
        step_s: seconds of an autoregressive step.
    """
    found = []
    for e, of_exit in tokens.items():
        for d, count in enumerate(of_exit, start=1):
            seconds = float(cost @ torch.tensor([1, e, d, e * d], dtype=torch.float64))
            seconds = max(seconds, step_s)  # every layer runs once at least
            found.append(Prediction(Pair(e, d), count, seconds, count * step_s / seconds))
    return sorted(found, key=lambda prediction: -prediction.speedup)


def choose(ranked: Sequence[Prediction], count: int = 4) -> list[Prediction]:
    """The best few to measure, no neighbours: at most two draft lengths of an exit, three tokens or more apart."""
    chosen: list[Prediction] = []
    for prediction in ranked:
        exit_layer, length = prediction.pair
        same = [other.pair.num_speculations for other in chosen if other.pair.exit_layer == exit_layer]
        if len(same) < 2 and all(abs(length - other) >= 3 for other in same):
            chosen.append(prediction)
        if len(chosen) == count:
            break
    return chosen


def propose(turns: Turns, temperature: float) -> dict[str, Prediction]:
    """Decode all prompts autoregressively, time the probes, predict every pair, print the best, and return a few to
    measure.
    """
    baseline = _decode_all(turns, None, temperature)
    outputs = [row for rows, _ in baseline for row in rows]
    plain = sum((stats for _, stats in baseline), GenerationStats())
    prompts = [prompt for batch in turns.batches for prompt in batch]
    tokens = round_tokens(turns.model, prompts, outputs, turns.sampler(temperature, None))
    timed = {}
    for pair in probes(turns.model.num_layers):
        runs = _decode_all(turns, Speculation(*pair), temperature)
        timed[pair] = statistics.median(stats.decode_s / stats.rounds for _, stats in runs if stats.rounds)
    ranked = predict(tokens, round_cost(timed), plain.decode_s / plain.rounds)
    print(f"{'predicted':<18}{'tokens / round':>15}{'ms / round':>12}{'speed-up':>10}")
    for pair, count, seconds, speedup in ranked[:10]:
        print(f"{pair.name:<18}{count:>15.2f}{1000 * seconds:>12.2f}{speedup:>9.2f}x")
    return {prediction.pair.name: prediction for prediction in choose(ranked)}


def _decode_all(turns: Turns, method: Speculation | None, temperature: float) -> list[tuple[list, GenerationStats]]:
    """Every batch once, after a warm-up."""
    batches = [turns.batches[0], *turns.batches]
    return [turns.decode(method, temperature, batch, turns.seed) for batch in batches][1:]


# ---- the config of the fastest pair, of the tuner or of a sweep ----


def check_config_path(path: Path) -> None:
    """Raises a ConfigError if the config cannot be written, or somebody else's file stands there."""
    check_file("tune_file", str(path))
    if path.is_file() and not path.read_bytes().startswith(FIRST_LINE.encode()):
        raise ConfigError(
            f"tune_file: {str(path)!r} is there, and layerskip_benchmark did not write it. Allowed: a new file, or one "
            f"that it wrote; for example tune_file={path.with_stem(path.stem + '_2')}"
        )


def write_config(path: Path, cfg: BenchmarkConfig, best: SelfSpeculation | None, why: str) -> None:
    """A generation config that extends `tune_extends` with the choice, and with the settings that it was measured with.

    Args:
        best: None where autoregressive decoding is fastest.
        why: for the first line.
    """
    # A path of the user's is relative to the folder where the command was given: make it absolute.
    extends = cfg.tune_extends or ""
    known = extends in our_configs() | torchtune_configs() and not Path(extends).is_file()
    content: dict[str, Any] = {"extends": extends if known else str(find_config(extends)), "exit_layer": None}
    if cfg.model_dir is not None:
        folder = Path(cfg.model_dir)
        content["model_dir"] = str(folder.absolute()) if folder.is_dir() else cfg.model_dir
    # All keys are written: of those left out the user's own values, which were not measured, would hold.
    content["self_speculation"] = None
    if best is not None:
        content["self_speculation"] = {name: _plain(value) for name, value in best}
    if best is not None and best.draft is not None:
        content["self_speculation"]["draft"] = str(Path(best.draft).absolute())
    content["quantizer"] = _plain(cfg.quantizer)
    content["temperature"] = cfg.all_temperatures[0]
    content |= {key: getattr(cfg, key) for key in MEASURED_WITH}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{FIRST_LINE}{why}\n{yaml.safe_dump(content, sort_keys=False)}")


def _plain(value: Any) -> Any:
    """A setting as YAML has it."""
    return dict(value.section) if isinstance(value, Component) else value


def write_choice(cfg: BenchmarkConfig, report: Mapping[str, Any], variants: Mapping[str, SelfSpeculation]) -> None:
    """Print what was measured, beside what was predicted if it was, and write the config of the fastest."""
    temperature = cfg.all_temperatures[0]
    rows = {row["name"]: row for row in report["results"] if row["temperature"] == temperature and row["speedup"]}
    measured = {name: rows[name]["speedup"]["median"] for name in variants if name in rows}
    if cfg.tune:
        print(f"{'variant':<18}{'predicted':>10}{'measured':>10}")
        for name, speedup in measured.items():
            predicted = rows[name]["predicted_speedup"]
            print(f"{name:<18}{'-' if predicted is None else f'{predicted:.2f}x':>10}{speedup:>9.2f}x")
    if not measured:
        raise ConfigError(NOTHING_TO_DRAFT)
    best = max(measured, key=measured.__getitem__)
    faster = measured[best] > 1
    why = f"{best} at {measured[best]:.2f}x, temperature {temperature}, {report['device']}"
    write_config(cfg.tuned_path, cfg, variants[best] if faster else None, why)
    print(f"fastest: {best if faster else 'autoregressive'}; written to {cfg.tuned_path}")
