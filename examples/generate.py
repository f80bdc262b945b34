"""Generate with self-speculation from Python.

    python examples/generate.py FOLDER

FOLDER is a run of `tune run layerskip_finetune`, such as quickstart after the quickstart's training, a Hugging Face
folder, or a name on the hub. One prompt is decoded three times: autoregressively, with drafts from an early exit, and
again with drafts as a stream. The tokens are the same.
"""

import argparse
import time

import torch

from layerskip_recipes import Generation, Speculation, generate, load_model

PROMPT = "def read_file(path):\n"
NEW_TOKENS = 48


def main() -> None:
    """Load the model and its tokenizer, and decode a prompt in three ways."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    args = parser.parse_args()
    model, tokenizer = load_model(args.folder)
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
    print(f"acceptance {drafted.stats.acceptance_rate}; same tokens: {plain.tokens.equal(drafted.tokens)}")

    # The same as an iterator, for streaming: each round makes some tokens of each row final.
    speculation = Speculation(exit_layer=exit_layer, num_speculations=4)
    generation = Generation(model, [prompt.tolist()], NEW_TOKENS, speculation=speculation, stop_tokens=stop_tokens)
    for new in generation:
        print(tokenizer.decode(new[0]), end="", flush=True)
    print(f"\n{generation.stats.rounds} rounds for {len(generation.generated[0])} tokens")


if __name__ == "__main__":
    main()
