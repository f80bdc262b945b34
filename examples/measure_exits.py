"""Measure from Python how good each exit of a model is: loss, and agreement with the last layer.

    python examples/measure_exits.py FOLDER

FOLDER is the output folder of `tune run layerskip_finetune`, for example quickstart. The text is the held-out part of
Python's standard library. `tune run layerskip_eval` measures any dataset, and draws a picture.
"""

import argparse

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from torchtune.data import padded_collate_sft

from layerskip_recipes import LLM
from layerskip_recipes.quickstart import StdlibDataset


@torch.inference_mode()
def main() -> None:
    """Load the model and its tokenizer, and print a line for each exit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--samples", type=int, default=32)
    args = parser.parse_args()
    llm = LLM.load(args.folder)
    model, tokenizer = llm.model, llm.tokenizer
    data = StdlibDataset(tokenizer, split="heldout", seq_len=64, max_samples=args.samples)
    exits = range(1, model.num_layers + 1)
    losses, agreements, tokens = torch.zeros(len(exits)), torch.zeros(len(exits)), 0
    for batch in DataLoader(data, batch_size=4, collate_fn=padded_collate_sft):
        labels = batch["tokens"][:, 1:]
        # One pass through the layers gives the hidden states at all exits; the head reads each of them.
        final, hidden = model.hidden_states(batch["tokens"][:, :-1], exits=exits)
        last = model.unembed(final).argmax(-1)
        for i, exit_layer in enumerate(exits):
            logits = model.unembed(hidden[exit_layer])
            losses[i] += F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
            agreements[i] += (logits.argmax(-1) == last).sum()
        tokens += labels.numel()

    print("exit   loss   agreement with the last layer")
    for exit_layer, loss, agreement in zip(exits, losses / tokens, agreements / tokens, strict=True):
        print(f"{exit_layer:4d}  {loss:5.2f}   {agreement:.2f}")


if __name__ == "__main__":
    main()
