"""Train a model for early exit from Python, without a recipe: layer dropout, early-exit loss, and a short loop.

    python examples/finetune.py [--steps 200] [--out FOLDER]

The script trains a small Llama from scratch on the source of Python's standard library. For a real training, use
`tune run layerskip_finetune`, which adds loading and saving, schedules, validation, resuming and several GPUs.
"""

import argparse
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from torchtune.data import padded_collate_sft
from torchtune.models.llama3_2._component_builders import llama3_2

from layerskip_recipes import EarlyExitLoss, layerskip_decoder
from layerskip_recipes.quickstart import StdlibDataset, stdlib_tokenizer

SIZE = {"vocab_size": 512, "num_layers": 8, "num_heads": 2, "num_kv_heads": 2, "embed_dim": 64, "max_seq_len": 128}


def main() -> None:
    """Train, and save the weights under torchtune's names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path("example"))
    args = parser.parse_args()
    torch.manual_seed(0)

    tokenizer = stdlib_tokenizer(str(args.out / "tokenizer"), vocab_size=SIZE["vocab_size"])
    # The held-out split is small, so it is tokenized in seconds. Use split="train" for a real training.
    data = StdlibDataset(tokenizer, split="heldout", seq_len=SIZE["max_seq_len"], max_samples=4 * args.steps)
    loader = DataLoader(data, batch_size=4, shuffle=True, collate_fn=padded_collate_sft)

    # The decoder has the base model's parameters under the same names. In training it skips layers for some samples.
    base = llama3_2(**SIZE, intermediate_dim=192, scale_factor=1)
    model = layerskip_decoder(base, layer_dropout={"prob": 0.1})
    # Each step trains the last layer and every fourth exit. The following steps train the other exits.
    loss_fn = EarlyExitLoss(scale=0.5, curriculum="rotational", interval=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)

    step = 0
    while step < args.steps:
        for batch in loader:
            if step == args.steps:
                break
            # Labels are shifted: the label of a token is the next token.
            tokens, labels = batch["tokens"][:, :-1], batch["labels"][:, 1:]
            loss, per_exit = loss_fn(model, tokens, labels, step=step, total_steps=args.steps)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            exits = ", ".join(f"exit {exit_layer}: {value.item():.2f}" for exit_layer, value in per_exit.items())
            print(f"step {step + 1}: {exits}")
            step += 1

    torch.save(model.state_dict(), args.out / "model.pt")
    print(f"Saved {args.out / 'model.pt'}")


if __name__ == "__main__":
    main()
