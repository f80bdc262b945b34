"""Answers to many prompts: batches of similar length through the engine, cut at stop strings, and what they took.

Evaluation asks for them: lm-eval's generate_until tasks (harness.py) and HumanEval (human_eval.py).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from tqdm import tqdm

from layerskip_recipes.generation.drafting.choice import DiscountedUCB
from layerskip_recipes.generation.drafting.section import build_speculation, with_vocabulary
from layerskip_recipes.generation.engine import Generation
from layerskip_recipes.generation.sampling import Sampler
from layerskip_recipes.generation.stats import GenerationStats
from layerskip_recipes.generation.text_stream import TextStream, follow
from layerskip_recipes.model.decoder import LayerSkipDecoder


class Answers:
    """Writes a text after each prompt.

    Args:
        model: in eval mode.
        tokenizer: decodes, and has the stop tokens.
        batch_size: prompts decoded together.
        exit_layer: all tokens come from that exit; None: from the last layer.
        draft: values of `check_speculation`, to decode self-speculatively; None: autoregressively.
        seed: of what is sampled.
    """

    def __init__(
        self,
        model: LayerSkipDecoder,
        tokenizer: Any,
        *,
        batch_size: int = 1,
        exit_layer: int | None = None,
        draft: Mapping[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.batch_size, self.exit_layer, self.draft, self.seed = batch_size, exit_layer, draft, seed
        self.device = model.tok_embeddings.weight.device

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        limit: int,
        stops: Sequence[str] = (),
        sampler: Sampler | None = None,
        name: str = "answers",
    ) -> tuple[list[str], GenerationStats]:
        """The text after each prompt, up to a stop token or string.

        Args:
            prompts: their tokens.
            limit: new tokens, at most.
            stops: an answer ends before the first of these strings.
            sampler: greedy by default; its rng is replaced by one of each batch.
            name: for the progress bar.

        Raises:
            ValueError: if a prompt is empty, or does not fit the model together with the new tokens.
        """
        speculation = None
        if self.draft:
            draft = with_vocabulary(self.draft, self.model, self.tokenizer, prompts)
            speculation = build_speculation(draft, self.model)
        choice = DiscountedUCB()
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        batches = [order[at : at + self.batch_size] for at in range(0, len(order), self.batch_size)]
        texts, stats = {}, GenerationStats()
        for batch in tqdm(batches, desc=name):
            rng = torch.Generator(device=self.device).manual_seed(self.seed + batch[0])
            generation = Generation(
                self.model,
                [prompts[i] for i in batch],
                limit,
                exit_layer=self.exit_layer,
                speculation=speculation,
                sampler=replace(sampler or Sampler(), rng=rng),
                stop_tokens=getattr(self.tokenizer, "stop_tokens", ()),
                choice=choice,
            )
            rows = [TextStream(self.tokenizer, generation.stop_tokens, stops, prompts[i]) for i in batch]
            follow(generation, rows)
            texts |= {i: row.text(tokens) for i, row, tokens in zip(batch, rows, generation.generated, strict=True)}
            stats = stats + generation.stats
        return [texts[i] for i in range(len(prompts))], stats


def speed(stats: GenerationStats) -> dict[str, Any]:
    """What a report says of the answers: tokens, tokens per second, and how many drafts were accepted, if any."""
    figures = {"tokens": stats.tokens, "tokens_per_second": stats.tokens_per_second}
    return figures | ({"acceptance_rate": stats.acceptance_rate} if stats.drafted else {})
