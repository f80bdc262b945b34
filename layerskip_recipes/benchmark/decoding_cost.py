"""`layerskip decoding-cost NAME`: what a model's rounds of drafts will cost on this machine, before there are weights.

Time depends on the architecture, not on the numbers in it, so the weights are random. Acceptance depends on the
training: the table says what each acceptance would bring.
"""

import json
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from omegaconf import DictConfig
from torchtune import config, training

from layerskip_recipes.benchmark.report import device_name
from layerskip_recipes.checkpoint.weights import quantise
from layerskip_recipes.config.loading import load_config
from layerskip_recipes.config.settings import build_on_meta, check_device, check_dtype
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.generation.config import check_config, make_sampler
from layerskip_recipes.generation.drafting.section import build_speculation, check_speculation, tree_of
from layerskip_recipes.generation.drafting.speculation import Speculation, most_positions
from layerskip_recipes.generation.engine import Generation
from layerskip_recipes.generation.kernels.compiling import cache_length, find_compiled_steps
from layerskip_recipes.generation.stats import GenerationStats, memory_bandwidth
from layerskip_recipes.model.adapters import without_adapters
from layerskip_recipes.model.decoder import LayerSkipDecoder, layerskip_decoder
from layerskip_recipes.model.limits import check_cache_fits, weight_bytes

ACCEPTANCES = (0.5, 0.7, 0.9)


def plan(cfg: DictConfig, model: LayerSkipDecoder, drafts: Sequence[int]) -> dict[str, Any]:
    """The values of `self_speculation` for all rounds that are measured: its exits as a list, each number of drafts
    checked. A threshold and look-ups only choose between rounds, so they are left out.

    Raises:
        ValueError: if there is no such section, or a number of drafts is not allowed.
    """
    if cfg.get("self_speculation") is None:
        raise ConfigError(
            "self_speculation: missing, and its rounds are what is measured; for example "
            "self_speculation.exit_layer=4 self_speculation.num_speculations=6"
        )
    values = check_speculation(cfg.self_speculation, model) | {"threshold": None, "prompt_lookup": None}
    for d in drafts:
        check_speculation(cfg.self_speculation | {"num_speculations": d}, model, "--drafts, self_speculation")
    if isinstance(values["draft_vocabulary"], int):  # which tokens they are costs nothing
        values["draft_vocabulary"] = list(range(min(values["draft_vocabulary"], model.tok_embeddings.num_embeddings)))
    exits = values["exit_layer"]
    return values | {"exit_layer": exits if isinstance(exits, list) else [exits]}


def random_model(cfg: DictConfig, device: torch.device, dtype: torch.dtype) -> LayerSkipDecoder:
    """The model of a generation config, in eval mode, with the weights that its builder draws."""
    torch.manual_seed(0)
    with training.set_default_dtype(dtype), device:
        model = layerskip_decoder(config.instantiate(cfg.model))
    model = without_adapters(model)
    return (model if cfg.get("quantizer") is None else quantise(model, cfg.quantizer, "quantizer")).eval()


def measure(cfg: DictConfig, drafts: Sequence[int], text: int, rounds: int, repeats: int) -> dict[str, Any]:
    """Plain steps and rounds of each exit and number of drafts, in turns; medians over the repeats, seconds.

    Args:
        cfg: a generation config; its checkpoint and prompts are not read.
        drafts: numbers of drafts in a round, d.
        text: tokens before the first round.
        rounds: of each way in each repeat, after as many that warm up.
        repeats: turns of all ways.

    Returns:
        `step_s` of a plain step, and in `rounds` a row for each exit and d: `draft_s` of one draft step, its cost c in
        plain steps, `verify_s`, `round_s`, `engine_efficiency` = (d c + 1) / (round_s / step_s), in which acceptance
        cancels out, and `speedup` at some acceptances.

    Raises:
        ValueError: for a wrong config, or a model that does not fit its lengths or the memory.
    """
    check_config(cfg)
    device = check_device(cfg)
    dtype = check_dtype(cfg, device)
    meta = layerskip_decoder(build_on_meta(cfg))
    values, rows, compiled = plan(cfg, meta, drafts), cfg.get("batch_size") or 1, bool(cfg.get("compile"))
    nodes = max(tree_of(values | {"num_speculations": d}, make_sampler(cfg).greedy).nodes for d in drafts)
    limit = (rounds + 1) * (max(drafts) + 1) + 1  # no round comes near the end of its text
    reserve = text + limit + nodes
    positions, what = most_positions(meta, nodes)
    if text + limit > positions:
        raise ConfigError(
            f"--text: {text} tokens and up to {limit} of {rounds} rounds make {text + limit}, more than the model's "
            f"{positions} ({what}); for example --text {max(1, positions // 2)} --rounds 4"
        )
    weights = 0 if cfg.get("quantizer") is not None else weight_bytes(meta, dtype)
    check_cache_fits(meta, rows, cache_length(reserve) if compiled else reserve, dtype, device, weights=weights)
    torch.set_float32_matmul_precision(cfg.get("float32_matmul_precision", "highest"))
    model = random_model(cfg, device, dtype)
    prompts = torch.randint(model.tok_embeddings.num_embeddings, (rows, text)).tolist()

    def run(speculation: Speculation | None) -> GenerationStats:
        rng = torch.Generator(device=device).manual_seed(0)
        sampler = make_sampler(cfg, rng)
        generation = Generation(
            model, prompts, limit, speculation=speculation, sampler=sampler, compile=compiled, reserve=reserve
        )
        steps = iter(generation)
        for _ in range(rounds + 1):  # the first is the prompt
            next(steps)
        steps.close()
        return generation.stats

    ways: dict[tuple[int, int] | None, Speculation | None] = {None: None}
    for exit_layer in values["exit_layer"]:
        first = build_speculation(values | {"exit_layer": exit_layer}, model)
        ways |= {(exit_layer, d): replace(first, num_speculations=d) for d in drafts}
    bandwidth = memory_bandwidth(device)
    runs: dict[tuple[int, int] | None, list[GenerationStats]] = {way: [] for way in ways}
    for turn in range(repeats + 1):
        for way, speculation in ways.items():
            stats = run(speculation)
            if turn:
                runs[way].append(stats)

    def median(way: tuple[int, int] | None, name: str, count: str = "rounds") -> float:
        return statistics.median(getattr(stats, name) / getattr(stats, count) for stats in runs[way])

    step, steps = median(None, "decode_s"), find_compiled_steps(model)
    plain = runs[None][0]
    report = {
        "parameters": sum(parameter.numel() for parameter in meta.parameters()),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "memory_bandwidth": bandwidth,
        "torch": torch.__version__,
        "dtype": cfg.dtype,
        "compiled": compiled and not steps.failed,
        "batch_size": rows,
        "text": text,
        "step_s": step,
        "step_bytes": (plain.weight_bytes + plain.cache_bytes) / plain.rounds,
        "rounds": [],
    }
    for exit_layer, d in [way for way in ways if way]:
        way = (exit_layer, d)
        draft, whole = median(way, "draft_s", "draft_steps"), median(way, "decode_s") / step
        report["rounds"].append(
            {
                "exit_layer": exit_layer,
                "num_speculations": d,
                "draft_s": draft,
                "draft_cost": draft / step,
                "verify_s": median(way, "verify_s"),
                "round_s": whole * step,
                "engine_efficiency": (d * draft / step + 1) / whole,
                "speedup": {str(rho): (rho * d + 1) / whole for rho in ACCEPTANCES},
            }
        )
    return report


def decoding_cost(
    name: str, overrides: list[str], drafts: Sequence[int], text: int, rounds: int, repeats: int
) -> dict[str, Any]:
    """`measure` of a config; prints a table, and the figures as its last line."""
    report = measure(load_config(name, overrides), drafts, text, rounds, repeats)
    compiled = "compiled" if report["compiled"] else "eager"
    print(
        f"{name}: {report['parameters'] / 1e6:.0f} million random weights, {report['dtype']}, {report['device']}, "
        f"{report['threads']} threads, {report['memory_bandwidth'] / 1e9:.1f} GB/s, torch {report['torch']}, {compiled}"
    )
    print(
        f"batch {report['batch_size']}, {text} tokens before: a plain step takes {1e3 * report['step_s']:.2f} ms "
        f"and reads {report['step_bytes'] / 1e6:.0f} MB"
    )
    headings = ("exit", "drafts", "draft, ms", "cost", "verify, ms", "round, ms", "efficiency")
    print(*(f"{heading:>10}" for heading in headings), "  speed-up at acceptance " + ", ".join(map(str, ACCEPTANCES)))
    for row in report["rounds"]:
        cells = (
            f"{row['exit_layer']}",
            f"{row['num_speculations']}",
            f"{1e3 * row['draft_s']:.2f}",
            f"{row['draft_cost']:.3f}",
            f"{1e3 * row['verify_s']:.2f}",
            f"{1e3 * row['round_s']:.2f}",
            f"{row['engine_efficiency']:.2f}",
        )
        print(*(f"{cell:>10}" for cell in cells), "  " + ", ".join(f"{x:.2f}" for x in row["speedup"].values()))
    print(json.dumps(report), flush=True)
    return report
