"""Time and peak memory of a training step, ours and torchtune's.

    python tools/training_cost.py CONFIG [key=value ...] [--batch 2] [--seq-len 512] [--exits 4::4] [--prob 0.5]

Each method runs in its own process, to measure its own peak memory. The methods take turns; the report has medians. A
step is forward and backward on random tokens, keeping gradients, without an optimizer or activation offloading. Every
step trains the exits of --exits; of the section `early_exit_loss` only chunk_tokens matters.
The last line of the output is the report as JSON.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torchtune import training
from torchtune.modules.early_exit_loss import early_exit_loss, sum_l_loss_scale
from torchtune.modules.loss import CEWithChunkedOutputLoss

from layerskip_recipes.checkpoint.weights import initialise
from layerskip_recipes.config.layer_strings import select_exits
from layerskip_recipes.config.loading import load_config
from layerskip_recipes.config.schema import Fraction, PositiveInt, check
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.generation.report import peak_memory_bytes
from layerskip_recipes.model.adapters import freeze_base
from layerskip_recipes.model.decoder import layerskip_decoder
from layerskip_recipes.model.head import head_of
from layerskip_recipes.model.layer_dropout import LayerDropout
from layerskip_recipes.training import chunked_loss
from layerskip_recipes.training.config import FinetuneConfig
from layerskip_recipes.training.early_exit import EarlyExitLoss
from layerskip_recipes.training.parallel import checkpoint_layers

METHODS = ("ours", "ours, exits", "torchtune", "torchtune, exits", "ours, dropout", "ours, one layer")
LIGER = "liger"  # not in METHODS, as it needs a GPU and an optional package
LossOfStep = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (tokens, labels) [b, s] -> the loss


def our_loss(model: Any, exits: str, compiled: bool, chunks: Mapping[str, Any]) -> LossOfStep:
    """Our early-exit loss of these exits at each step. With only the last exit it is the plain loss."""
    loss = EarlyExitLoss(curriculum=None, exits=exits, **chunks)
    if compiled:
        loss.chunk_loss = chunked_loss.compiled(loss.chunk_loss)

    def step(tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        rows = torch.ones(model.tok_embeddings.num_embeddings, device=tokens.device)
        return loss(model, tokens, labels, step=0, total_steps=1, head_rows=rows)[0]

    return step


def torchtune_loss(model: Any) -> LossOfStep:
    """The loss of `full_finetune_single_device`, with its chunked cross-entropy."""
    loss = CEWithChunkedOutputLoss()
    model.set_num_output_chunks(loss.num_output_chunks)
    return lambda tokens, labels: loss(model(tokens), labels)


def torchtune_early_exit_loss(model: Any, exits: str) -> LossOfStep:
    """The loss of `early_exit_finetune_distributed`, which runs the head on a stack of all exits."""
    loss, depth = torch.nn.CrossEntropyLoss(), len(model.layers)
    model.output_hidden_states = [exit_layer - 1 for exit_layer in select_exits(exits, depth)]

    def step(tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        *hidden, _ = model(tokens)  # the recipe throws the last layer's logits away
        states = dict(zip(model.output_hidden_states, hidden, strict=True))
        return early_exit_loss(model, states, labels, loss, 0.2, sum_l_loss_scale)

    return step


def liger_loss(model: Any) -> LossOfStep:
    """Our decoder with Liger's fused head and cross-entropy."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss  # optional, and only on a GPU

    loss = LigerFusedLinearCrossEntropyLoss()

    def step(tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        states = model.norm(model(tokens, unembed=False)).flatten(0, 1)
        return loss(head_of(model).weight, states, labels.flatten())

    return step


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Measure one method here: seconds per step after the first, and GiB of memory before the steps and at peak."""
    # The model and random tokens.
    cfg, method = FinetuneConfig.load(load_config(args.config, args.overrides)), args.method
    device = cfg.find_device()
    torch.set_float32_matmul_precision(cfg.float32_matmul_precision)
    torch.manual_seed(0)
    with training.set_default_dtype(cfg.torch_dtype), device:
        base = cfg.model.builder.build()
        tokens = torch.randint(base.tok_embeddings.weight.shape[0], (args.batch, args.seq_len + 1))
    model = layerskip_decoder(base)
    initialise(model, seed=0)
    freeze_base(model)
    checkpoint_layers(model, cfg.checkpoint_every_layers)
    if method == "ours, one layer":
        model.layers = model.layers[:1]
    depth = model.num_layers
    exits, last = f"{args.exits},{depth}", str(depth)
    compiled = cfg.compile
    chunks: dict[str, Any] = {"chunk_tokens": cfg.early_exit_loss.chunk_tokens} if cfg.early_exit_loss else {}
    if compiled:
        training.compile_model(model, verbose=False)
    # The method's loss.
    if method == "ours, dropout":
        model.layer_dropout = LayerDropout(depth, prob=args.prob, layers_scale="uniform")
    if method == "torchtune":
        step = torchtune_loss(base)
    elif method == "torchtune, exits":
        step = torchtune_early_exit_loss(base, exits)
    elif method == LIGER:
        step = liger_loss(model)
    else:
        # On a GPU the recipe always compiles the loss.
        step = our_loss(model, exits if method == "ours, exits" else last, compiled or device.type == "cuda", chunks)
    # Time the steps, with all gradients allocated.
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    before, seconds = peak_memory_bytes(device) / 2**30, []
    model.train()
    for _ in range(args.steps + 1):
        started = time.perf_counter()
        step(tokens[:, :-1], tokens[:, 1:]).backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return {"seconds": seconds[1:], "peak_gb": peak_memory_bytes(device) / 2**30, "before_gb": before}


def measure_in_process(method: str, arguments: list[str]) -> dict[str, Any]:
    """`measure` in a new process. A ConfigError shows the last line of a failed process."""
    command = [sys.executable, __file__, *arguments, "--method", method]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode < 0:
        killed = f"killed by signal {-done.returncode}, probably for memory; try a smaller --batch or --seq-len"
        raise ConfigError(f"{method!r} failed: {killed}")
    if done.returncode:
        raise ConfigError(f"{method!r} failed: {(done.stderr.strip() or 'no message').splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(args: argparse.Namespace, arguments: list[str]) -> dict[str, Any]:
    """Measure all methods in turns. Returns medians and ratios."""
    depth = FinetuneConfig.load(load_config(args.config, args.overrides)).num_layers
    select_exits(args.exits, depth, key="--exits")
    runs: dict[str, list[dict]] = {method: [] for method in METHODS}
    for _ in range(args.repeats):
        for method in METHODS:
            runs[method].append(measure_in_process(method, arguments))
    figures = {
        method: {
            "seconds": statistics.median(second for run in of_method for second in run["seconds"]),
            "peak_gb": statistics.median(run["peak_gb"] for run in of_method),
            "before_gb": statistics.median(run["before_gb"] for run in of_method),
        }
        for method, of_method in runs.items()
    }
    # Ratios.
    plain, torchtunes = figures["ours"], figures["torchtune"]
    one = figures["ours, one layer"]["seconds"]
    layers_s = (plain["seconds"] - one) / (depth - 1) * depth if depth > 1 else one
    left_s = plain["seconds"] - args.prob * layers_s  # a step without the share of the layers that dropout skips
    exits, theirs = figures["ours, exits"], figures["torchtune, exits"]
    ratios = {
        "exits / torchtune's exits, time": exits["seconds"] / theirs["seconds"],
        "exits / torchtune's last layer, peak": exits["peak_gb"] / torchtunes["peak_gb"],
        "last layer / torchtune's, time": plain["seconds"] / torchtunes["seconds"],
        f"dropout {args.prob} / what is left to compute, time": figures["ours, dropout"]["seconds"] / left_s,
    }
    return {
        "figures": figures,
        "ratios": ratios,
        "batch": args.batch,
        "seq_len": args.seq_len,
        "exits": args.exits,
    }


def print_report(name: str, report: Mapping[str, Any]) -> None:
    print(f"{name}: batch {report['batch']} x {report['seq_len']} tokens, exits {report['exits']} and the last")
    print(f"{'method':<18}{'s / step':>10}{'peak GiB':>10}{'start GiB':>10}")
    for method, row in report["figures"].items():
        print(f"{method:<18}{row['seconds']:>10.3f}{row['peak_gb']:>10.2f}{row['before_gb']:>10.2f}")
    for ratio_name, ratio in report["ratios"].items():
        print(f"{ratio_name:<50}{ratio:>6.2f}")
    print(json.dumps(report), flush=True)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a finetune config's name or path")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--repeats", type=int, default=3, help="processes for each method (default 3)")
    parser.add_argument("--steps", type=int, default=2, help="steps in each process after a first one (default 2)")
    parser.add_argument("--batch", type=int, default=2, help="rows (default 2)")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens of a row (default 512)")
    parser.add_argument("--exits", default="4::4", help='exits with a loss beside the last (default "4::4")')
    parser.add_argument("--prob", type=float, default=0.5, help="layer dropout in its own method (default 0.5)")
    parser.add_argument("--method", choices=(*METHODS, LIGER), help="measure one method in this process")
    args = parser.parse_intermixed_args(arguments)
    try:
        for name in ("repeats", "steps", "batch", "seq_len"):
            check(f"--{name.replace('_', '-')}", getattr(args, name), PositiveInt)
        check("--prob", args.prob, Fraction)
        if args.method:
            print(json.dumps(measure(args)))
        else:
            print_report(args.config, compare(args, arguments))
    except ConfigError as e:
        sys.exit(f"ValueError: {e}")


if __name__ == "__main__":
    main(sys.argv[1:])
