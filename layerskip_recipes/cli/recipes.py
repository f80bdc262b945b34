"""The entry points of the five recipes for `tune run`."""

import sys
from collections.abc import Callable
from functools import wraps

from layerskip_recipes.benchmark.recipe import LayerSkipBenchmark
from layerskip_recipes.cli.run import build_recipe, run_cli
from layerskip_recipes.evaluation.recipe import LayerSkipEval
from layerskip_recipes.generation.recipe import LayerSkipGenerate
from layerskip_recipes.processes import end_processes
from layerskip_recipes.serving.recipe import LayerSkipServe
from layerskip_recipes.training.recipe import LayerSkipFinetune


def run_from_command_line(steps: Callable[[], None]) -> Callable[[], None]:
    return wraps(steps)(lambda: run_cli(steps))


@run_from_command_line
def finetune() -> None:
    """Finetune a torchtune model for early exit and self-speculative decoding (LayerSkip, arXiv 2404.16710).

    tune run layerskip_finetune --config quickstart/finetune
    tune run layerskip_finetune --config my.yaml layer_dropout.prob=0.2 early_exit_loss.interval=4
    tune run --nproc_per_node 2 layerskip_finetune --config my.yaml resume_from_checkpoint=true
    """
    recipe = build_recipe(LayerSkipFinetune, "layerskip_finetune", finetune.__doc__)
    recipe.setup()
    try:
        recipe.train()
    finally:
        recipe.cleanup()
    end_processes()


@run_from_command_line
def generate() -> None:
    """Generate text with a torchtune model: plainly, from an early exit, or by self-speculation (arXiv 2404.16710).

    tune run layerskip_generate --config quickstart/generate
    tune run layerskip_generate --config my.yaml prompt="def fibonacci(n):" self_speculation.exit_layer=4
    tune run --nproc_per_node 2 layerskip_generate --config my.yaml
    """
    recipe = build_recipe(LayerSkipGenerate, "layerskip_generate", generate.__doc__)
    recipe.setup()
    recipe.generate()
    end_processes()
    if recipe.interrupted:
        sys.exit(130)  # what a shell expects after Ctrl-C


@run_from_command_line
def serve() -> None:
    """Serve a model over HTTP, with the endpoints of OpenAI's API.

    tune run layerskip_serve --config hf/generate model_dir=out
    tune run layerskip_serve --config my_generate.yaml port=8001
    """
    recipe = build_recipe(LayerSkipServe, "layerskip_serve", serve.__doc__)
    recipe.serve()


@run_from_command_line
def evaluate() -> None:
    """Evaluate a model: the loss of each exit, and its agreement with the last layer.

    tune run layerskip_eval --config quickstart/eval
    tune run layerskip_eval --config hf/eval model_dir=out exits=4,8
    """
    recipe = build_recipe(LayerSkipEval, "layerskip_eval", evaluate.__doc__)
    recipe.setup()
    recipe.evaluate()
    if recipe.interrupted:
        sys.exit(130)


@run_from_command_line
def benchmark() -> None:
    """Compare the speed of plain decoding and self-speculation on one checkpoint.

    tune run layerskip_benchmark --config quickstart/benchmark
    tune run layerskip_benchmark --config quickstart/benchmark compile=false repeats=1 report_dir=quickstart/uncompiled
    """
    recipe = build_recipe(LayerSkipBenchmark, "layerskip_benchmark", benchmark.__doc__)
    recipe.setup()
    if recipe.benchmark()["interrupted"]:
        sys.exit(130)  # what a shell expects after Ctrl-C
