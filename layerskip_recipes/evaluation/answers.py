"""Answers to many prompts, for lm-eval's tasks: batches of similar length, cut at stop strings, with statistics."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from tqdm import tqdm

from layerskip_recipes.generation.drafting.choice import DiscountedUCB
from layerskip_recipes.generation.drafting.section import SelfSpeculation
from layerskip_recipes.generation.engine import Generation
from layerskip_recipes.generation.sampling import Sampler
from layerskip_recipes.generation.stats import GenerationStats
from layerskip_recipes.generation.text.text_stream import TextStream, follow
from layerskip_recipes.model.decoder import LayerSkipDecoder


class Answers:
    """Writes a text after each prompt.

    Args:
        model: in eval mode.
        tokenizer: decodes, and has the stop tokens.
        batch_size: prompts decoded together.
        exit_layer: all tokens come from that exit; None: from the last layer.
        self_speculation: how drafts are made; None decodes autoregressively.
    """

    def __init__(
        self,
        model: LayerSkipDecoder,
        tokenizer: Any,
        *,
        batch_size: int = 1,
        exit_layer: int | None = None,
        self_speculation: SelfSpeculation | None = None,
        seed: int = 0,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.batch_size, self.exit_layer, self.seed = batch_size, exit_layer, seed
        self.self_speculation = self_speculation
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
            limit: the most new tokens of an answer.
            stops: an answer ends before the first of these strings.
            sampler: greedy by default; the generator of random numbers is made here.

        Raises:
            ConfigError: if a prompt is empty, or does not fit the model together with the new tokens.
        """
        speculation = None
        if self.self_speculation is not None:
            section = self.self_speculation.with_vocabulary(self.model, self.tokenizer, prompts)
            speculation = section.build(self.model, rows=self.batch_size)
        # Prompts of similar length beside each other: attention sees as many slots as the longest text needs.
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        rng = torch.Generator(device=self.device).manual_seed(self.seed)
        generation = Generation(
            self.model,
            [prompts[i] for i in order],
            limit,
            exit_layer=self.exit_layer,
            speculation=speculation,
            sampler=replace(sampler or Sampler(), rng=rng),
            stop_tokens=getattr(self.tokenizer, "stop_tokens", ()),
            rows=self.batch_size,
            choice=DiscountedUCB(),
        )
        streams = [TextStream(self.tokenizer, sorted(generation.rows.stop_tokens), stops, prompts[i]) for i in order]
        with tqdm(total=len(order), desc=name) as progress:
            follow(generation, streams, on_end=lambda prompt: progress.update())
        rows = zip(order, streams, generation.generated, strict=True)
        texts = {i: stream.text(tokens) for i, stream, tokens in rows}
        return [texts[i] for i in range(len(prompts))], generation.stats


def speed(stats: GenerationStats) -> dict[str, Any]:
    """The statistics of answers for a report: tokens, tokens per second, and the acceptance rate of drafts, if any."""
    figures = {"tokens": stats.tokens, "tokens_per_second": stats.tokens_per_second}
    return figures | ({"acceptance_rate": stats.acceptance_rate} if stats.drafted else {})
