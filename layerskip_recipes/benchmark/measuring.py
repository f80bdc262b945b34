"""Runs decoding methods in turns: all decode a batch before the next batch starts, so changes in the machine's speed
affect all of them."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from torchtune import utils

from layerskip_recipes.benchmark.peers import Peer, TokenLists, type_and_line
from layerskip_recipes.generation.config import DecodingConfig
from layerskip_recipes.generation.drafting.draft_model import DraftModels
from layerskip_recipes.generation.drafting.rule import DraftRule
from layerskip_recipes.generation.drafting.speculation import Speculation
from layerskip_recipes.generation.engine import Generation
from layerskip_recipes.generation.stats import GenerationStats, is_looping
from layerskip_recipes.generation.text.text_stream import TextStream, follow
from layerskip_recipes.model.decoder import LayerSkipDecoder

log = utils.get_logger("INFO")

Method = Speculation | Peer | None  # self-speculation, another library, autoregressive


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
    model: LayerSkipDecoder  # in eval mode
    batches: Sequence[TokenLists]
    limit: int  # maximum number of new tokens per prompt
    tokenizer: Any  # for stop strings; None for random weights, which have no text
    stop_tokens: Sequence[int]
    reserve: int  # KV-cache slots; the same for all methods, because compiled steps depend on it
    seed: int  # for the first batch, plus 1 for each later batch; the same for all methods
    spare_tokens: int = 0  # stop this many tokens before the limit, so that the limit shortens no draft
    draft_models: DraftModels = field(default_factory=DraftModels)
    compile_s: dict[tuple[float, str], float] = field(default_factory=lambda: defaultdict(float))
    failed: dict[str, str] = field(default_factory=dict)

    def decode(
        self, method: Method, temperature: float, batch: TokenLists, seed: int, rule: DraftRule | None = None
    ) -> tuple[list, GenerationStats]:
        """Decode one batch: the new tokens of each row up to a stop string, and the statistics.

        Without a `rule` there is a draft in every round. Peers do not see stop strings, so their statistics count the
        tokens after them.
        """
        strings = self.cfg.stop_strings
        texts = [TextStream(self.tokenizer, self.stop_tokens, strings) for _ in batch] if strings else []
        if isinstance(method, Peer):
            rows, stats = method.decode(batch, self.cfg.sampler(temperature), seed)
            return [row[: text.extend(row)] for row, text in zip(rows, texts, strict=True)] if texts else rows, stats
        generation = Generation(
            self.model,
            batch,
            self.limit,
            speculation=method,
            draft_model=self.draft_models.of(method, self.model),
            sampler=self.cfg.sampler(temperature, seed),
            stop_tokens=self.stop_tokens,
            compile=self.cfg.compile,
            reserve=self.reserve,
            rule=rule,
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
        """Yield {} after the warm-up, then the runs by method name for each batch of each repeat.

        A peer that fails is removed from `methods` and recorded in `failed`.
        """
        # Warm up with two prompt lengths: for the second, torch compiles again, with dynamic shapes.
        for batch in (min(self.batches, key=longest_prompt), max(self.batches, key=longest_prompt)):
            self._turn(methods, temperature, batch, 0, self.seed, {})
        yield {}
        # As in generation, a rule that has measured warm rounds decides when to draft. The acceptance of random weights
        # (no tokenizer) means nothing, so they always draft.
        rules = {} if self.tokenizer is None else {name: DraftRule() for name in methods}
        for repeat in range(repeats):
            for i, batch in enumerate(self.batches):
                yield self._turn(methods, temperature, batch, repeat, self.seed + repeat * len(self.batches) + i, rules)

    def _turn(
        self,
        methods: dict[str, Method],
        temperature: float,
        batch: TokenLists,
        repeat: int,
        seed: int,
        rules: Mapping[str, DraftRule],
    ) -> dict[str, Run]:
        runs = {}
        for name, method in list(methods.items()):
            try:
                runs[name] = Run(repeat, *self.decode(method, temperature, batch, seed, rules.get(name)))
            except Exception as e:  # a peer can raise anything, and the other methods go on
                if not isinstance(method, Peer):
                    raise
                del methods[name]
                self.leave_out(name, e, temperature)
            else:
                self.compile_s[temperature, name] += runs[name].stats.compile_s
        return runs

    def leave_out(self, peer: str, error: Exception, temperature: float) -> None:
        self.failed[peer] = f"{type_and_line(error)}, at temperature {temperature}"
        log.warning("peers: %s is left out (%s)", peer, self.failed[peer])
