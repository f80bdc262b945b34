"""What a decoding step costs with more and more text before it: it reads the slots that are filled, not the cache.

    python docs/long_contexts.py [LENGTHS ...]

A Llama of 16 layers, 256 wide, random weights, compiled, fp32, on the CPU, one row: milliseconds of a plain step and
of a round of 4 drafts from exit 4 (how many are accepted does not change what a round costs), and what a step reads.
"""

import statistics
import sys

import torch
from torchtune.models.llama3._component_builders import llama3

from layerskip_recipes import Generation, Speculation

NEW = 48


def main(lengths: list[int]) -> None:
    """Print a row for each length."""
    torch.manual_seed(0)
    size = {"vocab_size": 2048, "num_layers": 16, "num_heads": 4, "num_kv_heads": 2, "embed_dim": 256}
    model = llama3(**size, max_seq_len=max(lengths) + NEW, intermediate_dim=768).eval()
    # One cache for all lengths, as a server would have it.
    reserve = max(lengths) + NEW
    print("text before   plain step   round of 4   read by a step")
    for length in lengths:
        prompt = [torch.randint(0, 2048, (length,)).tolist()]
        times, read = {}, 0.0
        for name, speculation in (("plain", None), ("round", Speculation(4, 4))):
            runs = []
            for _ in range(4):  # the first compiles
                generation = Generation(model, prompt, NEW, speculation=speculation, compile=True, reserve=reserve)
                for _ in generation:
                    pass
                runs.append(generation.stats)
            times[name] = statistics.median(1000 * run.decode_s / run.rounds for run in runs[1:])
            if speculation is None:
                read = runs[-1].bytes_per_token / 1e6
        print(f"{length:11d}   {times['plain']:7.2f} ms   {times['round']:7.2f} ms   {read:9.1f} MB")


if __name__ == "__main__":
    main([int(length) for length in sys.argv[1:]] or [512, 2048, 8192])
