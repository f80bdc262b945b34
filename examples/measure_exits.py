"""Measure from Python how good each exit of a model is: loss, and agreement with the last layer.

    python examples/measure_exits.py CONFIG [key=value ...]

CONFIG is a name or file for `tune run layerskip_generate`, such as quickstart/generate after the quickstart's training.
The text is the held-out part of Python's standard library. `tune run layerskip_eval` measures any dataset, and draws a
picture.
"""

import argparse

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from torchtune.config import instantiate
from torchtune.data import padded_collate_sft

from layerskip_recipes import layerskip_decoder
from layerskip_recipes.config import load_config
from layerskip_recipes.quickstart import StdlibDataset


@torch.inference_mode()
def main() -> None:
    """Load the model and the tokenizer of the config, and print a line for each exit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--samples", type=int, default=32)
    args = parser.parse_args()
    cfg = load_config(args.config, args.overrides)
    base = instantiate(cfg.model)
    base.load_state_dict(instantiate(cfg.checkpointer).load_checkpoint()["model"])
    model = layerskip_decoder(base.eval())

    data = StdlibDataset(instantiate(cfg.tokenizer), split="heldout", seq_len=64, max_samples=args.samples)
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
