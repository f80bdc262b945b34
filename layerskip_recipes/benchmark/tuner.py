"""`layerskip_benchmark tune=true`: which exit layer and draft length are fastest on this machine?

One pass over the baseline's outputs says how many tokens a round of each exit would give; a few short probes say what
it costs; together they predict the speed of every pair. The best few are then measured like any variant.
"""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import yaml
from omegaconf import DictConfig

from layerskip_recipes.config.checks import check_file
from layerskip_recipes.config.names import find_config, our_configs, torchtune_configs
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.generation.drafting.section import self_speculation
from layerskip_recipes.generation.drafting.speculation import Speculation
from layerskip_recipes.generation.sampling import Sampler
from layerskip_recipes.generation.stats import GenerationStats
from layerskip_recipes.model.decoder import LayerSkipDecoder

if TYPE_CHECKING:
    from layerskip_recipes.benchmark.recipe import LayerSkipBenchmark

LONGEST = 12  # the longest draft that is considered
WRITTEN = "# Written by layerskip_benchmark: "  # the beginning of a config
NOTHING_TO_DRAFT = (
    "max_new_tokens: every output ended with its first token, so there is nothing to draft. Give other prompts"
)


class Prediction(NamedTuple):
    """What a pair of exit layer and draft length promises."""

    exit_layer: int
    num_speculations: int
    tokens_per_round: float
    round_s: float
    speedup: float  # over autoregressive decoding

    @property
    def name(self) -> str:
        """Of the variant that measures it."""
        return f"exit{self.exit_layer}_draft{self.num_speculations}"


@torch.no_grad()
def round_tokens(
    model: LayerSkipDecoder,
    prompts: Sequence[Sequence[int]],
    outputs: Sequence[Sequence[int]],
    sampler: Sampler,
    longest: int = LONGEST,
) -> dict[int, list[float]]:
    """Tokens of a round by exit and draft length, on what the whole model wrote: one pass for all exits.

    A token drafted from q is accepted with probability sum_v min(p_v, q_v) (greedy: 1 or 0, and the rounds are those
    that decoding has).

    Args:
        model: the decoder, in eval mode.
        prompts, outputs: tokens of each prompt, and of its continuation by the whole model.
        sampler: its temperature and filters make p and q.
        longest: the longest draft.

    Returns:
        {E: [tokens of a round with 1, 2, .. longest drafts]} for E in 1 .. L-1.

    Raises:
        ValueError: if every output ended with its first token.
    """
    device = model.tok_embeddings.weight.device
    exits = list(range(1, model.num_layers))
    rounds, drafted = {e: [0.0] * longest for e in exits}, 0
    for prompt, output in zip(prompts, outputs, strict=True):
        tokens = torch.tensor([[*prompt, *output]], device=device)
        final, hidden = model.hidden_states(tokens, exits)
        # Row i gives the (i+1)-th token of the output; the first one comes from the prompt and is not drafted.
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
    late = max(num_layers - early, 2)  # the others are between them
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
    """All pairs, the fastest first: tokens of a round over its seconds.

    Args:
        tokens: of `round_tokens`.
        cost: of `round_cost`.
        step_s: seconds of an autoregressive step.
    """
    found = []
    for e, of_exit in tokens.items():
        for d, count in enumerate(of_exit, start=1):
            seconds = float(cost @ torch.tensor([1, e, d, e * d], dtype=torch.float64))
            seconds = max(seconds, step_s)  # every layer runs once at least
            found.append(Prediction(e, d, count, seconds, count * step_s / seconds))
    return sorted(found, key=lambda pair: -pair.speedup)


def choose(ranked: Sequence[Prediction], count: int = 4) -> list[Prediction]:
    """The best few to measure, no neighbours: at most two draft lengths of an exit, three tokens or more apart."""
    chosen: list[Prediction] = []
    for pair in ranked:
        same = [other.num_speculations for other in chosen if other.exit_layer == pair.exit_layer]
        if len(same) < 2 and all(abs(pair.num_speculations - other) >= 3 for other in same):
            chosen.append(pair)
        if len(chosen) == count:
            break
    return chosen


def write_config(path: Path, extends: str, best: dict[str, Any] | None, compile: bool, why: str) -> None:
    """A generation config that extends the user's with the choice.

    Args:
        path: of the file.
        extends: a config's name or path.
        best: keys of `self_speculation`; None: autoregressive decoding is fastest.
        compile: whether it was measured compiled.
        why: for its first line.
    """
    # From everywhere: a path of the user's is relative to where the command was given.
    known = extends in our_configs() | torchtune_configs() and not Path(extends).is_file()
    content: dict[str, Any] = {"extends": extends if known else str(find_config(extends)), "exit_layer": None}
    # All keys, since those that are left out would be the user's, and were not measured.
    content["self_speculation"] = None if best is None else self_speculation(**best)
    content["compile"] = compile  # the user's may be another, for which the choice is not
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{WRITTEN}{why}\n{yaml.safe_dump(content, sort_keys=False)}")


def config_path(cfg: DictConfig) -> Path:
    """Where the config goes."""
    return Path(cfg.get("tune_file") or Path(cfg.report_dir) / "tuned.yaml")


def check_config_path(cfg: DictConfig) -> None:
    """Raises a ValueError if the config cannot be written, or a file of somebody else's stands there."""
    path = config_path(cfg)
    check_file("tune_file", str(path))
    if path.is_file() and not path.read_bytes().startswith(WRITTEN.encode()):
        raise ConfigError(
            f"tune_file: {str(path)!r} is there, and layerskip_benchmark did not write it. Allowed: a new file, or one "
            f"that it wrote; for example tune_file={path.with_stem(path.stem + '_2')}"
        )


# ---- with the benchmark ----


def observe(
    bench: "LayerSkipBenchmark", temperature: float, longest: int = LONGEST
) -> tuple[dict[int, list[float]], float]:
    """Decode all prompts autoregressively.

    Returns:
        The tokens of a round by exit and draft length (see `round_tokens`), and the seconds of a step.
    """
    batches = [bench.batches[0], *bench.batches]  # the first time warms up
    runs = [bench.run("baseline", None, temperature, batch, bench.seed) for batch in batches][1:]
    outputs = [row for rows, _ in runs for row in rows]
    stats = sum((stats for _, stats in runs), GenerationStats())
    tokens = round_tokens(bench.model, bench.prompts, outputs, bench.sampler(temperature), longest)
    return tokens, stats.decode_s / stats.rounds


def propose(bench: "LayerSkipBenchmark") -> tuple[dict[str, dict[str, Any]], dict[str, Prediction]]:
    """Predict every pair, print the best.

    Returns:
        The few pairs to measure as sections of `variants`, and what was predicted of them.
    """
    temperature = bench.temperatures[0]
    tokens, step_s = observe(bench, temperature)
    timed = {}
    for pair in probes(bench.model.num_layers):
        batches = [bench.batches[0], *bench.batches]
        turns = [bench.run("probe", Speculation(*pair), temperature, batch, bench.seed)[1] for batch in batches]
        timed[pair] = statistics.median(t.decode_s / t.rounds for t in turns[1:] if t.rounds)
    ranked = predict(tokens, round_cost(timed), step_s)
    print(f"{'predicted':<18}{'tokens / round':>15}{'ms / round':>12}{'speed-up':>10}")
    for pair in ranked[:10]:
        print(f"{pair.name:<18}{pair.tokens_per_round:>15.2f}{1000 * pair.round_s:>12.2f}{pair.speedup:>9.2f}x")
    chosen = choose(ranked)
    sections: dict[str, dict[str, Any]] = {
        pair.name: {"exit_layer": pair.exit_layer, "num_speculations": pair.num_speculations} for pair in chosen
    }
    return sections, {pair.name: pair for pair in chosen}


def write_choice(bench: "LayerSkipBenchmark", report: dict[str, Any]) -> None:
    """Print prediction beside measurement, and write the config of the fastest."""
    temperature = bench.temperatures[0]
    rows = {row["name"]: row for row in report["results"] if row["temperature"] == temperature}
    measured = {name: rows[name]["speedup"]["median"] for name in bench.variants if rows[name]["speedup"]}
    print(f"{'variant':<18}{'predicted':>10}{'measured':>10}")
    for name, speedup in measured.items():
        pair = bench.predicted.get(name)
        print(f"{name:<18}{f'{pair.speedup:.2f}x' if pair else '':>10}{speedup:>9.2f}x")
    best = max(measured, key=measured.__getitem__)
    write_fastest(
        bench.cfg, best, bench.variants[best], measured[best], f"temperature {temperature}, {report['device']}"
    )


def write_fastest(cfg: DictConfig, name: str, section: dict[str, Any], speedup: float, where: str) -> None:
    """The config of the fastest way of those measured; autoregressive if that is faster than all."""
    path = config_path(cfg)
    best, why = section if speedup > 1 else None, f"{name} at {speedup:.2f}x, {where}"
    write_config(path, cfg.tune_extends, best, cfg.get("compile", False), why)
    print(f"fastest: {name if speedup > 1 else 'autoregressive'}; written to {path}")
