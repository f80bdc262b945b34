"""Runs decoding methods in turns: all decode a batch before the next batch starts, so changes in the machine's speed
affect all of them."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from layerskip_recipes.generation.config import DecodingConfig
from layerskip_recipes.generation.drafting.speculation import Speculation
from layerskip_recipes.generation.llm import LLM
from layerskip_recipes.generation.stats import GenerationStats, is_looping
from layerskip_recipes.generation.text.text_stream import follow

TokenLists = Sequence[Sequence[int]]
Method = Speculation | None  # None: plain decoding, without drafts


@dataclass
class Run:
    """The result of one method on one batch in one repeat."""

    repeat: int
    outputs: list[list[int]]
    stats: GenerationStats

    @property
    def loops(self) -> int:
        """The number of outputs that end in a loop."""
        return sum(map(is_looping, self.outputs))


def longest_prompt(prompts: TokenLists) -> int:
    return max(map(len, prompts))


@dataclass
class Turns:
    """Runs all methods on the same batches with the same settings."""

    cfg: DecodingConfig
    llm: LLM  # without a tokenizer for random weights, which have no text
    batches: Sequence[TokenLists]
    limit: int  # maximum number of new tokens per prompt
    reserve: int  # KV-cache slots; the same for all methods, because compiled steps depend on it
    seed: int  # for the first batch, plus 1 for each later batch; the same for all methods
    spare_tokens: int = 0  # stop this many tokens before the limit, so that the limit shortens no draft
    predictions: Mapping[tuple[int, ...], Sequence[int]] = field(default_factory=dict)  # by prompt
    compile_s: dict[tuple[float, str], float] = field(default_factory=lambda: defaultdict(float))

    def decode(
        self, method: Method, temperature: float, batch: TokenLists, seed: int, always_draft: bool = True
    ) -> tuple[list, GenerationStats]:
        """Decode one batch: the new tokens of each row up to a stop string, and the statistics.

        Without `always_draft` the rule decides when to draft, as in generation.
        """
        strings = self.cfg.stop_strings
        texts = [self.llm.text_stream(stop=strings) for _ in batch] if strings else []
        generation = self.llm.start(
            batch,
            self.limit,
            method,
            compile=bool(self.cfg.compile),
            always_draft=always_draft,
            sampler=self.cfg.sampler(temperature, seed),
            reserve=self.reserve,
            predictions=[self.predictions.get(tuple(prompt), ()) for prompt in batch],
        )
        if texts:
            follow(generation, texts)
            return generation.generated, generation.stats
        rounds: Any = iter(generation)
        with closing(rounds):
            for _ in rounds:
                if self.spare_tokens and max(map(len, generation.generated)) >= self.limit - self.spare_tokens:
                    break
        return generation.generated, generation.stats

    def take(self, methods: dict[str, Method], temperature: float, repeats: int) -> Iterator[dict[str, Run]]:
        """Yield {} after the warm-up, then the runs by method name for each batch of each repeat."""
        # Warm up with two prompt lengths: for the second, torch compiles again, with dynamic shapes.
        for batch in (min(self.batches, key=longest_prompt), max(self.batches, key=longest_prompt)):
            self._turn(methods, temperature, batch, 0, self.seed, always_draft=True)
        yield {}
        # As in generation, a rule that has measured warm rounds decides when to draft. The acceptance of random weights
        # (no tokenizer) means nothing, so they always draft.
        self.llm.restart_rules()
        always_draft = self.llm.tokenizer is None
        for repeat in range(repeats):
            for i, batch in enumerate(self.batches):
                seed = self.seed + repeat * len(self.batches) + i
                yield self._turn(methods, temperature, batch, repeat, seed, always_draft)

    def _turn(
        self,
        methods: dict[str, Method],
        temperature: float,
        batch: TokenLists,
        repeat: int,
        seed: int,
        always_draft: bool,
    ) -> dict[str, Run]:
        runs = {}
        for name, method in methods.items():
            outputs, stats = self.decode(method, temperature, batch, seed, always_draft)
            runs[name] = Run(repeat, outputs, stats)
            self.compile_s[temperature, name] += stats.compile_s
        return runs
