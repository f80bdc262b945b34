"""`layerskip cost NAME`: what a training step costs, ours beside torchtune's: seconds and peak memory.

Each way runs in a process of its own, so that its peak is its own, in turns with the others, and the medians count.
A step is forward and backward on random tokens, with gradients that stay, and no optimizer. Of `early_exit_loss` only
chunk_tokens counts: the exits are those of --layers, at each step. Activations are not offloaded.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from omegaconf import DictConfig
from torchtune import config, training
from torchtune.modules.early_exit_loss import early_exit_loss, sum_l_loss_scale
from torchtune.modules.loss import CEWithChunkedOutputLoss

from layerskip_recipes.config.layer_strings import select_layers
from layerskip_recipes.config.loading import load_config
from layerskip_recipes.config.settings import check_device, check_dtype
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.generation.report import peak_memory_bytes
from layerskip_recipes.model.adapters import freeze_base
from layerskip_recipes.model.decoder import layerskip_decoder
from layerskip_recipes.model.layer_dropout import LayerDropout
from layerskip_recipes.training.config import FinetuneConfig
from layerskip_recipes.training.early_exit import EarlyExitLoss
from layerskip_recipes.training.parallel import checkpoint_layers

Step = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def ours(model: Any, layers: str, compiled: bool, chunks: Mapping[str, int]) -> Step:
    """Our early-exit loss on these layers, at each step; the last layer's alone with its number."""
    loss = EarlyExitLoss(curriculum=None, layers=layers, **chunks)
    if compiled:
        loss.compile()
    return lambda tokens, labels: loss(model, tokens, labels, step=0, total_steps=1)[0]


def torchtunes(model: Any) -> Step:
    """As `full_finetune_single_device` does it, with its chunked cross-entropy."""
    loss = CEWithChunkedOutputLoss()
    model.set_num_output_chunks(loss.num_output_chunks)
    return lambda tokens, labels: loss(model(tokens), labels)


def torchtunes_early_exit(model: Any, layers: str) -> Step:
    """As `early_exit_finetune_distributed` does it: all exits stacked, and one head over the stack."""
    loss, chosen = torch.nn.CrossEntropyLoss(), select_layers(layers, len(model.layers))
    model.output_hidden_states = [layer for layer, on in enumerate(chosen) if on]

    def step(tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        *hidden, _ = model(tokens)  # the logits of the last layer, which it throws away
        states = dict(zip(model.output_hidden_states, hidden, strict=True))
        return early_exit_loss(model, states, labels, loss, 0.2, sum_l_loss_scale)

    return step


def measure(cfg: DictConfig, way: str, steps: int, batch: int, seq_len: int, layers: str, prob: float) -> dict:
    """One way in this process: seconds of each step after the first, peak memory in GB, and before any step."""
    device = check_device(cfg)
    torch.set_float32_matmul_precision(cfg.get("float32_matmul_precision", "highest"))
    torch.manual_seed(0)
    with training.set_default_dtype(check_dtype(cfg, device)), device:
        base = config.instantiate(cfg.model.get("base") or cfg.model)
        tokens = torch.randint(base.tok_embeddings.weight.shape[0], (batch, seq_len + 1))
    model = layerskip_decoder(base)
    freeze_base(model)
    checkpoint_layers(model, FinetuneConfig.load(cfg).checkpoint_every_layers)
    if way == "ours, one layer":
        model.layers = model.layers[:1]
    depth = model.num_layers
    compiled, section = bool(cfg.get("compile")), cfg.get("early_exit_loss") or {}
    chunks = {"chunk_tokens": section["chunk_tokens"]} if section.get("chunk_tokens") else {}
    if compiled:
        training.compile_model(model, verbose=False)
    step = {
        "ours": lambda: ours(model, str(depth - 1), compiled, chunks),
        "ours, exits": lambda: ours(model, layers, compiled, chunks),
        "ours, dropout": lambda: ours(model, str(depth - 1), compiled, chunks),
        "torchtune": lambda: torchtunes(base),
        "torchtune, exits": lambda: torchtunes_early_exit(base, layers),
        "ours, one layer": lambda: ours(model, "0", compiled, chunks),
    }[way]()
    if way == "ours, dropout":
        model.layer_dropout = LayerDropout(depth, prob, "uniform", batch_size=batch)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    before, seconds = peak_memory_bytes(device) / 2**30, []
    model.train()
    for _ in range(steps + 1):
        started = time.perf_counter()
        step(tokens[:, :-1], tokens[:, 1:]).backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return {"seconds": seconds[1:], "peak_gb": peak_memory_bytes(device) / 2**30, "before_gb": before}


WAYS = ("ours", "ours, exits", "torchtune", "torchtune, exits", "ours, dropout", "ours, one layer")


def compare(
    name: str, overrides: list[str], repeats: int, steps: int, batch: int, seq_len: int, layers: str, prob: float
) -> dict[str, Any]:
    """All ways in turns. Prints a table and returns the figures.

    Raises:
        ValueError: for a wrong config, layers outside of the model, or a run that failed.
    """
    cfg = load_config(name, overrides)
    depth = FinetuneConfig.load(cfg).num_layers
    select_layers(layers, depth, key="--layers")
    last = str(depth - 1)
    runs: dict[str, list[dict]] = {way: [] for way in WAYS}
    for _ in range(repeats):
        for way in WAYS:
            job = {"name": name, "overrides": overrides, "way": way, "steps": steps, "batch": batch}
            job |= {"seq_len": seq_len, "layers": f"{layers},{last}", "prob": prob}
            command = [sys.executable, "-m", "layerskip_recipes.benchmark.training_cost", json.dumps(job)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                killed = f"killed by signal {-done.returncode}, probably for memory; try a smaller --batch or --seq-len"
                said = killed if done.returncode < 0 else (done.stderr.strip() or "no message").splitlines()[-1]
                raise ConfigError(f"cost: {way!r} failed: {said}")
            runs[way].append(json.loads(done.stdout.splitlines()[-1]))
    figures = {
        way: {
            "seconds": statistics.median(second for run in of_way for second in run["seconds"]),
            "peak_gb": statistics.median(run["peak_gb"] for run in of_way),
            "before_gb": statistics.median(run["before_gb"] for run in of_way),
        }
        for way, of_way in runs.items()
    }
    one, plain = figures["ours, one layer"]["seconds"], figures["ours"]["seconds"]
    layers_s = (plain - one) / (depth - 1) * depth if depth > 1 else one
    expected = plain - prob * layers_s
    print(f"{name}: batch {batch} x {seq_len} tokens, exits of layers {layers} and the last, {repeats} x {steps} steps")
    print(f"{'way':<18}{'s / step':>10}{'peak GB':>10}{'start GB':>10}")
    for way, row in figures.items():
        print(f"{way:<18}{row['seconds']:>10.3f}{row['peak_gb']:>10.2f}{row['before_gb']:>10.2f}")
    ratios = {
        "exits / torchtune's exits, time": figures["ours, exits"]["seconds"] / figures["torchtune, exits"]["seconds"],
        "exits / torchtune's last layer, peak": figures["ours, exits"]["peak_gb"] / figures["torchtune"]["peak_gb"],
        "last layer / torchtune's, time": plain / figures["torchtune"]["seconds"],
        f"dropout {prob} / what is left to compute, time": figures["ours, dropout"]["seconds"] / expected,
    }
    for what, ratio in ratios.items():
        print(f"{what:<50}{ratio:>6.2f}")
    report = {"figures": figures, "ratios": ratios, "batch": batch, "seq_len": seq_len, "layers": layers}
    print(json.dumps(report), flush=True)
    return report


if __name__ == "__main__":
    order = json.loads(sys.argv[1])
    print(json.dumps(measure(load_config(order.pop("name"), order.pop("overrides")), **order)))
