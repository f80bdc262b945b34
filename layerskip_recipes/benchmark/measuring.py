"""Runs several decoding methods in turns, and records the outputs and times of each on each batch of prompts.

For each repeat and each batch all methods decode one after the other, so that a machine that gets slower or faster does
so for all of them. Compilation counts in `compile_s` only.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torchtune import utils

from layerskip_recipes.benchmark.peers import Peer, Rows, first_line
from layerskip_recipes.generation.drafting.choice import DiscountedUCB
from layerskip_recipes.generation.drafting.speculation import Speculation
from layerskip_recipes.generation.engine import Generation
from layerskip_recipes.generation.sampling import Sampler
from layerskip_recipes.generation.stats import GenerationStats, is_looping
from layerskip_recipes.model.decoder import LayerSkipDecoder

log = utils.get_logger("INFO")

# A fixed way of drafting is measured, also where plain decoding would be faster.
_always_drafting = partial(DiscountedUCB, plain=False)
Method = int | Speculation | Peer | None  # an exit without verification, drafts, another library, or the whole model


@dataclass
class Run:
    """Outputs and statistics of one method on one batch of prompts in one repeat."""

    repeat: int
    outputs: list[list[int]]
    stats: GenerationStats

    @property
    def loops(self) -> int:
        """Outputs that end in a loop."""
        return sum(map(is_looping, self.outputs))


def longest_prompt(prompts: Rows) -> int:
    """Tokens of the longest prompt."""
    return max(map(len, prompts))


@dataclass
class Turns:
    """Runs the methods on the same batches with the same settings."""

    model: LayerSkipDecoder  # in eval mode
    batches: Sequence[Rows]  # prompts that are decoded together
    limit: int  # new tokens of a prompt, at most
    sampler: Callable[[float, torch.Generator | None], Sampler]  # of a temperature
    stop_tokens: Sequence[int]
    compile: bool
    reserve: int  # slots of the cache: one size for all methods, since compiled steps are made for a size
    seed: int  # of the first batch; all methods draw the same numbers, and other ones in each repeat
    # A generation ends so many tokens before its limit. With the longest draft's length the limit cuts no round short.
    spare_tokens: int = 0
    choices: dict[tuple[float, str], DiscountedUCB] = field(default_factory=lambda: defaultdict(_always_drafting))
    compile_s: dict[tuple[float, str], float] = field(default_factory=lambda: defaultdict(float))
    failed: dict[str, str] = field(default_factory=dict)

    def decode(
        self, method: Method, temperature: float, batch: Rows, seed: int, choice: DiscountedUCB | None = None
    ) -> tuple[list, GenerationStats]:
        """One batch by one method: the new tokens of each row, and the counts and times."""
        if isinstance(method, Peer):
            return method.decode(batch, self.sampler(temperature, None), seed)
        rng = torch.Generator(self.model.tok_embeddings.weight.device).manual_seed(seed)
        generation = Generation(
            self.model,
            batch,
            self.limit,
            exit_layer=method if isinstance(method, int) else None,
            speculation=method if isinstance(method, Speculation) else None,
            sampler=self.sampler(temperature, rng),
            stop_tokens=self.stop_tokens,
            compile=self.compile,
            reserve=self.reserve,
            choice=choice or _always_drafting(),
        )
        rounds: Any = iter(generation)
        with closing(rounds):
            for _ in rounds:
                if self.spare_tokens and max(map(len, generation.generated)) >= self.limit - self.spare_tokens:
                    break
        return generation.generated, generation.stats

    def take(self, methods: dict[str, Method], temperature: float, repeats: int) -> Iterator[dict[str, Run]]:
        """A warm-up of each method, which yields {}, then the runs of each batch by name, in each repeat.

        A peer that fails is taken out of `methods`, and noted in `failed`.
        """
        # Warm up at two lengths: torch compiles again for the second one, and from then on for any.
        for batch in (min(self.batches, key=longest_prompt), max(self.batches, key=longest_prompt)):
            self._turn(methods, temperature, batch, 0, self.seed)
        yield {}
        for repeat in range(repeats):
            for i, batch in enumerate(self.batches):
                yield self._turn(methods, temperature, batch, repeat, self.seed + repeat * len(self.batches) + i)

    def _turn(
        self, methods: dict[str, Method], temperature: float, batch: Rows, repeat: int, seed: int
    ) -> dict[str, Run]:
        """One batch by every method."""
        runs = {}
        for name, method in list(methods.items()):
            try:
                choice = self.choices[temperature, name]
                runs[name] = Run(repeat, *self.decode(method, temperature, batch, seed, choice))
            except Exception as e:  # another library may fail in any way, and ours are measured without it
                if not isinstance(method, Peer):
                    raise
                del methods[name]
                self.failed[name] = f"{first_line(e)}, at temperature {temperature}"
                log.warning("peers: %s is left out (%s)", name, self.failed[name])
            else:
                self.compile_s[temperature, name] += runs[name].stats.compile_s
        return runs
