"""Speed of transformers on an exported folder: autoregressive, with `custom_generate`, and with its own drafting.

    layerskip export task/epoch_0 exported
    layerskip export task/epoch_0 draft --draft
    python tools/transformers_speed.py exported --draft draft [--prompts 8] [--threads 2] [--temperature 0.8]

    layerskip export quickstart/epoch_0 exported --exit-layer 3
    python tools/transformers_speed.py exported --code [--new 128] [--batch 1] [--threads 1]

The prompts are the task's held-out commands in the chat template, with answers up to their end; or with `--code` the
beginnings of held-out files of the standard library, with `--new` tokens each. All methods decode the same prompts in
turn, uncompiled, with transformers' default cache. The times are those of whole answers, prompt included; the table has
the sums over the prompts of the medians over the repeats. On a busy machine the CPU time of one thread is more reliable
than the wall-clock time.
"""

import argparse
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from layerskip_recipes.quickstart import heldout_prompts
from layerskip_recipes.tasks import commands

# transformers' fastest schedules. Its defaults are 20 drafts and a threshold of 0.4.
CONSTANT = {"num_assistant_tokens_schedule": "constant"}
EXIT = CONSTANT | {"num_assistant_tokens": 6, "assistant_confidence_threshold": 0.0}
DRAFT = CONSTANT | {"num_assistant_tokens": 8, "assistant_confidence_threshold": 0.4}


def main() -> None:
    """Print tokens per second, accepted drafts, and whether greedy outputs are equal."""
    parser = argparse.ArgumentParser(description="Plain decoding, custom_generate and transformers' own drafting")
    parser.add_argument("folder", help="what `layerskip export` wrote")
    for name, default in (("new", 128), ("prompts", 8), ("batch", 1), ("repeats", 3), ("threads", None)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--draft", help="what `layerskip export --draft` wrote, for assistant_model")
    parser.add_argument("--code", action="store_true", help="code as prompts, and answers of --new tokens")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    # Load the model twice, without and with the exported decoding loop, and read the prompts.
    tokenizer = AutoTokenizer.from_pretrained(args.folder, padding_side="left")
    load, dtype = AutoModelForCausalLM.from_pretrained, getattr(torch, args.dtype)
    model, ours = (load(args.folder, dtype=dtype, trust_remote_code=trust) for trust in (False, True))
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    settings: dict[str, Any] = {"max_new_tokens": args.new} | {
        "do_sample": args.temperature > 0,
        "temperature": args.temperature or None,
        "top_k": 0 if args.temperature else None,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if args.code:
        prompts = heldout_prompts(args.prompts)
        settings["min_new_tokens"] = args.new
    else:
        chats = [[{"role": "user", "content": example["prompt"]["user"]}] for example in commands(args.prompts)]
        prompts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
    batches = [prompts[i : i + args.batch] for i in range(0, len(prompts), args.batch)]

    accepted: dict[str, list[tuple[int, int]]] = defaultdict(list)  # accepted and drafted tokens of a round
    loop: Any = sys.modules[ours.generate.func.__module__]
    learn = loop.DraftLength.learn

    def count(self: Any, counts: list[int], drafted: int) -> None:
        accepted["custom_generate"].append((sum(counts), drafted * len(counts)))
        learn(self, counts, drafted)

    loop.DraftLength.learn = count

    def own_drafting(holder: Any, schedule: dict[str, Any], **kwargs: Any) -> torch.Tensor:
        # transformers reads the length of drafts in the settings of the model that drafts, and the rest in the call.
        vars(holder.generation_config).update(schedule)
        tokens = model.generate(**kwargs)
        vars(holder.generation_config).update(dict.fromkeys(schedule))
        return tokens

    methods: dict[str, Callable[..., torch.Tensor]] = {
        "plain": lambda **kwargs: model.generate(**kwargs, assistant_early_exit=None),
        "custom_generate": lambda **kwargs: ours.generate(**kwargs),
    }
    if args.batch == 1:  # transformers drafts for one prompt at a time only
        if model.generation_config.assistant_early_exit:
            methods["assistant_early_exit"] = model.generate
            methods["assistant_early_exit, 6 drafts"] = lambda **kwargs: own_drafting(model, EXIT, **kwargs)
        if args.draft:
            draft = load(args.draft, dtype=dtype)
            methods["assistant_model"] = lambda **kwargs: model.generate(**kwargs, assistant_model=draft)
            methods["assistant_model, up to 8 drafts"] = lambda **kwargs: own_drafting(
                draft, DRAFT, assistant_model=draft, **kwargs
            )
    # Measure all methods in turns.
    clock: dict[tuple[str, int], list[float]] = defaultdict(list)
    processor: dict[tuple[str, int], list[float]] = defaultdict(list)
    generated: dict[str, list[int]] = defaultdict(list)
    equal = dict.fromkeys(methods, 0)
    for repeat in range(args.repeats + 1):  # the first one warms up
        for number, batch in enumerate(batches):
            inputs = tokenizer(batch, return_tensors="pt", padding=True, return_token_type_ids=False)
            expected = None
            for name, method in methods.items():
                set_seed(repeat)
                start, start_processor = time.perf_counter(), time.process_time()
                tokens = method(**inputs, **settings)
                if repeat:
                    clock[name, number].append(time.perf_counter() - start)
                    processor[name, number].append(time.process_time() - start_processor)
                    generated[name].append(
                        int((tokens[:, inputs["input_ids"].shape[1] :] != tokenizer.pad_token_id).sum())
                    )
                expected = tokens if expected is None else expected
                equal[name] += not repeat and torch.equal(tokens, expected)
    # Print the table.
    versions = ", ".join(f"{package} {version(package)}" for package in ("torch", "transformers"))
    print(f"{args.folder}: {versions}, {args.dtype}, temperature {args.temperature}, {args.repeats} repeats")
    print(
        f"{torch.get_num_threads()} threads, {len(prompts)} prompts, {args.batch} at a time, at most {args.new} tokens"
    )
    print("| method | tokens/s, clock | processor | speed-up, clock | processor | best | accepted | texts of plain |")
    print("|---|---|---|---|---|---|---|---|")

    def seconds(of: dict[tuple[str, int], list[float]], name: str, best: Callable = statistics.median) -> float:
        return sum(best(of[name, number]) for number in range(len(batches)))

    for name in methods:
        tokens_per_repeat = sum(generated[name]) / args.repeats
        rates = [tokens_per_repeat / seconds(of, name) for of in (clock, processor)]
        speedups = [
            (sum(generated[name]) / seconds(of, name, best)) / (sum(generated["plain"]) / seconds(of, "plain", best))
            for of, best in ((clock, statistics.median), (processor, statistics.median), (clock, min))
        ]
        share = ""
        if accepted[name]:
            taken, drafted = (sum(part) for part in zip(*accepted[name], strict=True))
            share = f"{taken / max(drafted, 1):.2f} of {drafted / len(accepted[name]):.1f}"
        same = "-" if args.temperature else f"{equal[name]} of {len(batches)}"
        figures = [f"{rate:.1f}" for rate in rates] + [f"{speedup:.2f}x" for speedup in speedups]
        print(f"| {name} | {' | '.join(figures)} | {share} | {same} |")


if __name__ == "__main__":
    main()
