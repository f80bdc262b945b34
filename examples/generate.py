"""Generate with self-speculation from Python.

    python examples/generate.py FOLDER

FOLDER is the output folder of `tune run layerskip_finetune`, for example quickstart, a Hugging Face folder, or a model
name on the hub. The script decodes one prompt four times: without drafts, with the settings chosen for the model, as a
stream of text, and with drafts from an exit as a stream of tokens. All four give the same tokens.
"""

import argparse

from layerskip_recipes import LLM, Generation, Speculation

PROMPT = "def read_file(path):"
NEW_TOKENS = 48


def main() -> None:
    """Load the model and its tokenizer, and decode a prompt in four ways."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    args = parser.parse_args()
    llm = LLM.load(args.folder)

    # One call from a prompt to its answer.
    plain = llm.generate(PROMPT, NEW_TOKENS, draft=None)
    chosen = llm.generate(PROMPT, NEW_TOKENS)
    speeds = [out.stats.tokens_per_second for out in (plain, chosen)]
    print("{:.0f} tokens/s without drafts, {:.0f} as chosen".format(*speeds))
    print(f"same tokens: {plain.tokens == chosen.tokens}")

    # The answer in pieces, as they become final.
    for text in llm.stream(PROMPT, NEW_TOKENS):
        print(text, end="", flush=True)

    # The decoding loop itself: each round makes some tokens of each row final.
    model, tokenizer = llm.model, llm.tokenizer
    speculation = Speculation(exit_layer=3, num_speculations=4)
    prompt, stop_tokens = tokenizer.prompt(PROMPT), tokenizer.stop_tokens
    generation = Generation(model, [prompt], NEW_TOKENS, speculation=speculation, stop_tokens=stop_tokens)
    for new in generation:
        print(tokenizer.decode(new[0]), end="", flush=True)
    stats, count = generation.stats, len(generation.generated[0])
    print(f"\n{stats.rounds} rounds for {count} tokens, acceptance {stats.acceptance_rate}")


if __name__ == "__main__":
    main()
