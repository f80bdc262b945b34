"""Speed of transformers on an exported folder: autoregressive, its own early exit, and `custom_generate`.

    layerskip export quickstart/epoch_0 exported --exit-layer 3
    python tools/transformers_speed.py exported [--new 128] [--prompts 8] [--batch 1] [--temperature 0.8] [--threads 1]

The prompts are code from held-out files of the standard library. All methods decode the same prompts in turn,
uncompiled, with transformers' default cache. The table has medians over the repeats. On a busy machine the CPU time of
one thread is more reliable than the wall-clock time.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from layerskip_recipes.quickstart import heldout_prompts

NUM_SPECULATIONS = 6
# transformers' fastest schedule; its defaults are 20 drafts and a threshold of 0.4.
CONSTANT = {"num_assistant_tokens": NUM_SPECULATIONS, "num_assistant_tokens_schedule": "constant"}


def main() -> None:
    """Print tokens per second, and whether greedy outputs are equal."""
    parser = argparse.ArgumentParser(description="Plain decoding, early exit and custom_generate in transformers")
    parser.add_argument("folder", help="what `layerskip export --exit-layer E` wrote")
    for name, default in (("new", 128), ("prompts", 8), ("batch", 1), ("repeats", 3), ("threads", None)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--temperature", type=float, default=0.0)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    # Load the model twice, without and with the exported decoding loop, and read the prompts.
    tokenizer = AutoTokenizer.from_pretrained(args.folder, padding_side="left")
    load = AutoModelForCausalLM.from_pretrained
    model, ours = (load(args.folder, dtype=torch.float32, trust_remote_code=trust) for trust in (False, True))
    exit_layer = model.generation_config.assistant_early_exit
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    prompts = heldout_prompts(args.prompts)
    batches = [prompts[i : i + args.batch] for i in range(0, len(prompts), args.batch)]
    settings: dict[str, Any] = {"min_new_tokens": args.new, "max_new_tokens": args.new} | {
        "do_sample": args.temperature > 0,
        "temperature": args.temperature or None,
        "top_k": 0 if args.temperature else None,
        "pad_token_id": tokenizer.pad_token_id,
    }

    def early_exit(**kwargs: Any) -> torch.Tensor:
        # transformers takes the length of drafts from the model's settings, and the rest from the call.
        vars(model.generation_config).update(CONSTANT, assistant_confidence_threshold=0.0)
        tokens = model.generate(**kwargs)
        vars(model.generation_config).update(dict.fromkeys([*CONSTANT, "assistant_confidence_threshold"]))
        return tokens

    methods: dict[str, Callable[..., torch.Tensor]] = {
        "plain": lambda **kwargs: model.generate(**kwargs, assistant_early_exit=None),
        "custom_generate": lambda **kwargs: ours.generate(**kwargs, num_speculations=NUM_SPECULATIONS),
    }
    if args.batch == 1:  # transformers drafts for one prompt at a time only
        methods["assistant_early_exit"] = model.generate
        methods[f"assistant_early_exit, {NUM_SPECULATIONS} drafts"] = early_exit
    # Measure all methods in turns.
    clock: dict[str, list[float]] = {name: [] for name in methods}
    processor: dict[str, list[float]] = {name: [] for name in methods}
    equal = dict.fromkeys(methods, True)
    for repeat in range(args.repeats + 1):  # the first one warms up
        for batch in batches:
            inputs = tokenizer(batch, return_tensors="pt", padding=True, return_token_type_ids=False)
            expected = None
            for name, method in methods.items():
                set_seed(repeat)
                start, start_processor = time.perf_counter(), time.process_time()
                tokens = method(**inputs, **settings)
                if repeat:
                    clock[name].append(time.perf_counter() - start)
                    processor[name].append(time.process_time() - start_processor)
                expected = tokens if expected is None else expected
                equal[name] &= torch.equal(tokens, expected)
    # Print the table.
    versions = ", ".join(f"{package} {version(package)}" for package in ("torch", "transformers"))
    print(f"{args.folder}: exit {exit_layer} of {model.config.num_hidden_layers}, {versions}")
    print(f"{torch.get_num_threads()} threads, {len(prompts)} prompts, {args.batch} at a time, {args.new} new tokens")
    print("| method | tokens/s, clock | processor | speed-up, clock | processor | tokens of plain |")
    print("|---|---|---|---|---|---|")
    for name in methods:
        figures = []
        for seconds in (clock, processor):
            rate = args.batch * args.new / statistics.median(seconds[name])
            figures.append((rate, statistics.median(seconds["plain"]) / statistics.median(seconds[name])))
        (rate, speedup), (cpu_rate, cpu_speedup) = figures
        same = "-" if args.temperature else "yes" if equal[name] else "no"
        print(f"| {name} | {rate:.1f} | {cpu_rate:.1f} | {speedup:.2f}x | {cpu_speedup:.2f}x | {same} |")


if __name__ == "__main__":
    main()
