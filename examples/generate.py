"""Generate with self-speculation from Python, with the model of a generation config.

    python examples/generate.py CONFIG [key=value ...]

CONFIG is a name or file for `tune run layerskip_generate`, such as quickstart/generate after the quickstart's training.
One prompt is decoded three times: autoregressively, with drafts from an early exit, and so again as a stream. The
tokens are the same.
"""

import argparse
import time
from typing import Any

import torch
from torchtune.config import instantiate

from layerskip_recipes import Generation, LayerSkipDecoder, Speculation, generate, layerskip_decoder
from layerskip_recipes.config import load_config

PROMPT = "def read_file(path):\n"
NEW_TOKENS = 48


def main() -> None:
    """Load the model and the tokenizer of the config, and decode a prompt in three ways."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    model, tokenizer = load_model(args.config, args.overrides)
    prompt = torch.tensor(tokenizer.encode(PROMPT, add_bos=True, add_eos=False))
    exit_layer = max(1, model.num_layers // 8)
    stop_tokens = tokenizer.stop_tokens

    # One call from a prompt to tokens. Without exit_layer and num_speculations it decodes autoregressively.
    began = time.perf_counter()
    plain = generate(model, prompt, NEW_TOKENS, stop_tokens=stop_tokens)
    middle = time.perf_counter()
    drafted = generate(model, prompt, NEW_TOKENS, exit_layer=exit_layer, num_speculations=4, stop_tokens=stop_tokens)
    ended = time.perf_counter()
    print(f"autoregressive: {middle - began:.2f} s; drafts from exit {exit_layer}: {ended - middle:.2f} s")
    print(f"acceptance {drafted.stats.acceptance_rate:.2f}; same tokens: {plain.tokens.equal(drafted.tokens)}")

    # The same as an iterator, for streaming: each round makes some tokens of each row final.
    speculation = Speculation(exit_layer=exit_layer, num_speculations=4)
    generation = Generation(model, [prompt.tolist()], NEW_TOKENS, speculation=speculation, stop_tokens=stop_tokens)
    for new in generation:
        print(tokenizer.decode(new[0]), end="", flush=True)
    print(f"\n{generation.stats.rounds} rounds for {len(generation.generated[0])} tokens")


def load_model(name: str, overrides: list[str]) -> tuple[LayerSkipDecoder, Any]:
    """The decoder with its weights, and the tokenizer, of a config: all three are torchtune components."""
    cfg = load_config(name, overrides)
    base = instantiate(cfg.model)
    base.load_state_dict(instantiate(cfg.checkpointer).load_checkpoint()["model"])
    return layerskip_decoder(base.eval()), instantiate(cfg.tokenizer)


if __name__ == "__main__":
    main()
