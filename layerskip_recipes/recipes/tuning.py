"""`layerskip_benchmark tune=true`: which exit layer and draft length are fastest on this machine?

One pass over the baseline's outputs says how many drafted tokens each exit would get accepted; a few short probes say
what a round costs; together they predict the speed of every pair. The best few are then measured like any variant.
"""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from omegaconf import DictConfig

from layerskip_recipes.decoder import LayerSkipDecoder
from layerskip_recipes.generation import GenerationStats, Speculation
from layerskip_recipes.generation.sampling import Sampler, next_token_probs

if TYPE_CHECKING:
    from layerskip_recipes.recipes.benchmark import LayerSkipBenchmark

LONGEST = 12  # the longest draft that is considered


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
def acceptance(
    model: LayerSkipDecoder,
    prompts: Sequence[Sequence[int]],
    outputs: Sequence[Sequence[int]],
    sampler: Sampler,
    longest: int = LONGEST,
) -> dict[int, list[float]]:
    """How far drafts reach, on what the whole model wrote: one pass for all exits.

    A token drafted from q is accepted with probability sum_v min(p_v, q_v) (greedy: 1 or 0). From a position on, k
    tokens in a row are accepted with the product of k of them.

    Args:
        model: the decoder, in eval mode.
        prompts, outputs: tokens of each prompt, and of its continuation by the whole model.
        sampler: its temperature and filters make p and q.
        longest: the longest draft.

    Returns:
        {E: [the mean probability that the first 1, 2, .. longest drafted tokens are all accepted]} for E in 1 .. L-1.
    """
    device = model.tok_embeddings.weight.device
    exits = list(range(1, model.num_layers))
    sums, count = torch.zeros(len(exits), longest, dtype=torch.float64), 0
    for prompt, output in zip(prompts, outputs, strict=True):
        if len(output) < longest + 1:
            continue
        tokens = torch.tensor([[*prompt, *output]], device=device)
        final, hidden = model.hidden_states(tokens, exits)
        # Row i gives the (i+1)-th token of the output; the first one comes from the prompt and is not drafted.
        rows = slice(len(prompt), len(prompt) + len(output) - 1)
        whole = _distribution(model.unembed(final[:, rows])[0], sampler)
        count += len(output) - longest
        for i, e in enumerate(exits):
            q = _distribution(model.unembed(hidden[e][:, rows])[0], sampler)
            accepted = torch.minimum(whole, q).sum(-1).double()
            sums[i] += accepted.unfold(0, longest, 1).cumprod(-1).sum(0).cpu()
    if count == 0:
        raise ValueError(f"max_new_tokens: no output has {longest + 1} tokens, too few to tune on; for example 128")
    return {e: (sums[i] / count).tolist() for i, e in enumerate(exits)}


def _distribution(logits: torch.Tensor, sampler: Sampler) -> torch.Tensor:
    """[n, v] probabilities; greedy: all on the largest."""
    if sampler.temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).float()
    return next_token_probs(logits, sampler.temperature, sampler.top_k, sampler.top_p, sampler.min_p)


def probes(num_layers: int) -> list[tuple[int, int]]:
    """The (exit layer, draft length) pairs whose rounds are timed: enough to fit `round_cost`."""
    early, late = max(num_layers // 8, 1), max(num_layers // 2, 2)
    return [(e, d) for e in (early, late) for d in (2, 8)]


def round_cost(timed: dict[tuple[int, int], float]) -> torch.Tensor:
    """[4] coefficients of a round's seconds, a + b E + c d + e E d: drafting costs d E layers and d heads, verifying
    (L - E) layers over d + 1 positions, and both are of this form.

    Args:
        timed: seconds of a round for the pairs of `probes`.
    """
    features = torch.tensor([[1, e, d, e * d] for e, d in timed], dtype=torch.float64)
    return torch.linalg.solve(features, torch.tensor(list(timed.values()), dtype=torch.float64))


def predict(reach: dict[int, list[float]], cost: torch.Tensor, step_s: float) -> list[Prediction]:
    """All pairs, the fastest first: tokens of a round 1 + sum_k P(first k accepted), over the seconds of a round.

    Args:
        reach: of `acceptance`.
        cost: of `round_cost`.
        step_s: seconds of an autoregressive step.
    """
    found = []
    for e, probabilities in reach.items():
        tokens = 1.0
        for d, accepted in enumerate(probabilities, start=1):
            tokens += accepted
            seconds = float(cost @ torch.tensor([1, e, d, e * d], dtype=torch.float64))
            if seconds > 0:
                found.append(Prediction(e, d, tokens, seconds, tokens * step_s / seconds))
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


def write_config(path: Path, extends: str, best: dict[str, Any] | None, why: str) -> None:
    """A generation config that extends the user's with the choice; None: autoregressive decoding is fastest."""
    lines = [f"# Written by layerskip_benchmark: {why}", f"extends: {extends}", ""]
    if best is None:
        lines.append("self_speculation: null")
    else:
        lines += ["self_speculation:", *(f"  {key}: {value}" for key, value in best.items())]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


# ---- with the benchmark ----


def observe(bench: "LayerSkipBenchmark", temperature: float) -> tuple[dict[int, list[float]], float]:
    """Decode all prompts autoregressively.

    Returns:
        How far each exit's drafts would have reached (see `acceptance`), and the seconds of a step.
    """
    batches = [bench.batches[0], *bench.batches]  # the first time warms up
    runs = [bench.run("baseline", None, temperature, batch, bench.seed) for batch in batches][1:]
    outputs = [row for rows, _ in runs for row in rows]
    stats = sum((stats for _, stats in runs), GenerationStats())
    reach = acceptance(bench.model, bench.prompts, outputs, bench.sampler(temperature))
    return reach, stats.decode_s / stats.rounds


def propose(bench: "LayerSkipBenchmark") -> tuple[dict[str, dict[str, Any]], dict[str, Prediction]]:
    """Predict every pair, print the best.

    Returns:
        The few pairs to measure as sections of `variants`, the best one also with an automatic threshold; and what was
        predicted of them.
    """
    temperature = bench.temperatures[0]
    reach, step_s = observe(bench, temperature)
    timed = {}
    for pair in probes(bench.model.num_layers):
        batches = [bench.batches[0], *bench.batches]
        turns = [bench.run("probe", Speculation(*pair), temperature, batch, bench.seed)[1] for batch in batches]
        timed[pair] = statistics.median(t.decode_s / t.rounds for t in turns[1:] if t.rounds)
    ranked = predict(reach, round_cost(timed), step_s)
    print(f"{'predicted':<18}{'tokens / round':>15}{'ms / round':>12}{'speed-up':>10}")
    for pair in ranked[:10]:
        print(f"{pair.name:<18}{pair.tokens_per_round:>15.2f}{1000 * pair.round_s:>12.2f}{pair.speedup:>9.2f}x")
    chosen = choose(ranked)
    sections: dict[str, dict[str, Any]] = {
        pair.name: {"exit_layer": pair.exit_layer, "num_speculations": pair.num_speculations} for pair in chosen
    }
    best = chosen[0]
    longer = min(best.num_speculations + 2, LONGEST)
    sections[f"exit{best.exit_layer}_auto"] = {
        "exit_layer": best.exit_layer,
        "num_speculations": longer,
        "threshold": "auto",
    }
    return sections, {pair.name: pair for pair in chosen}


def write_choice(bench: "LayerSkipBenchmark", report: dict[str, Any]) -> None:
    """Print prediction beside measurement, and write the config of the fastest."""
    temperature = bench.temperatures[0]
    rows = {row["name"]: row for row in report["results"] if row["temperature"] == temperature}
    measured = {name: rows[name]["speedup"]["median"] for name in bench.variants if name in rows}
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
    path = Path(cfg.get("tune_file") or Path(cfg.report_dir) / "tuned.yaml")
    write_config(path, cfg.tune_extends, section if speedup > 1 else None, f"{name} at {speedup:.2f}x, {where}")
    print(f"fastest: {name if speedup > 1 else 'autoregressive'}; written to {path}")
