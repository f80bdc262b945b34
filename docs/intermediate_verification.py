"""Would it pay to check drafts at an exit in between before the whole model does? Decided by replay, not by belief.

    python docs/intermediate_verification.py quickstart/benchmark

Decodes the prompts of a benchmark config greedily, keeps what every exit would have predicted at every position, and
measures what 1 .. 13 positions cost in one compiled step. With both, each way of drafting can be replayed: in one stage
(exit E drafts d tokens, the model verifies) and in two (exit E drafts d, exit M keeps those that it would have chosen
and adds its own, until there are D, then the model verifies). Printed are the best settings of both and their ideal
speed-ups: no call, host synchronisation or acceptance costs anything here. Behind a token that the model refuses the
drafts are taken to fare as on its own text: that moves what is spent, never what is accepted.
"""

import itertools
import statistics
import sys
import time

import torch

from layerskip_recipes import generate
from layerskip_recipes.checkpoint.checkpointers import ready
from layerskip_recipes.checkpoint.weights import load_decoder
from layerskip_recipes.config.loading import load_config
from layerskip_recipes.config.settings import build
from layerskip_recipes.generation.drafting.chain import chain_logits
from layerskip_recipes.generation.kernels.compiling import compiled_steps
from layerskip_recipes.generation.prompts import read_examples, to_tokens
from layerskip_recipes.generation.sampling import Sampler
from layerskip_recipes.generation.steps import Step, StepContext

POSITIONS = (1, 2, 4, 7, 13)


def predictions(model, prompt: list[int], count: int) -> dict[int, list[int]]:
    """{exit: what it chooses after each position of the model's own greedy text}."""
    text = generate(model, torch.tensor(prompt), count).tokens
    depth = model.num_layers
    _, hidden = model.hidden_states(text, range(1, depth + 1))
    places = slice(len(prompt) - 1, text.shape[1] - 1)
    return {e: model(hidden=x[:, places], start_layer=depth).argmax(-1)[0].tolist() for e, x in hidden.items()}


@torch.inference_mode()
def costs(model) -> dict[int, float]:
    """{positions: what they cost in one compiled pass, in steps of one position}."""
    device = model.tok_embeddings.weight.device
    graphs = compiled_steps(model)
    cache = graphs.cache(model, 1, 512)
    with cache.used_by(model):
        context = StepContext(model, cache, Sampler(), graphs)
        step = Step(context, chain_logits, model.num_layers, choice=False)
        start, slots = torch.tensor([200], device=device), cache.slots[:256]
        tokens = {k: torch.zeros(1, k, dtype=torch.long, device=device) for k in POSITIONS}
        step.run(slots, tokens[1], None, start)  # makes the cache's memory

        def seconds(k: int) -> float:
            began = time.perf_counter()
            step(slots, tokens[k], None, start).sum().item()
            return time.perf_counter() - began

        for k in POSITIONS * 3:
            seconds(k)
        times = {k: [] for k in POSITIONS}
        for k in POSITIONS * 100:
            times[k].append(seconds(k))
    one = statistics.median(times[1])
    return {k: statistics.median(of) / one for k, of in times.items()}


class Replay:
    """Speed-ups of ways of drafting, by what the exits predicted and what positions cost."""

    def __init__(self, texts: list[dict[int, list[int]]], cost: dict[int, float]) -> None:
        self.texts, self.cost, self.depth = texts, cost, max(texts[0])

    def walk(self, layers: int, positions: int) -> float:
        """Layers over positions, in steps of the whole model."""
        known = sorted(self.cost)
        low = max(k for k in known if k <= positions)
        high = min((k for k in known if k >= positions), default=low)
        share = (positions - low) / (high - low) if high > low else 0.0
        return layers / self.depth * (self.cost[low] + share * (self.cost[high] - self.cost[low]))

    def one_stage(self, exit_layer: int, d: int) -> float:
        """Exit E drafts d tokens, the late layers verify them all."""
        tokens, spent, late = 0, 0.0, self.depth - exit_layer
        for text in self.texts:
            draft, truth, at = text[exit_layer], text[self.depth], 0
            while at < len(truth):
                kept = same(draft[at : at + d], truth[at : at + d])
                spent += (d + 1) * self.walk(exit_layer, 1) + self.walk(late, d + 1)
                at, tokens = at + kept + 1, tokens + min(kept + 1, len(truth) - at)
        return tokens / spent

    def two_stages(self, exit_layer: int, middle: int, d: int, enough: int) -> float:
        """Exit E drafts d tokens at a time for exit M, until there are `enough` that M stands for."""
        tokens, spent = 0, 0.0
        for text in self.texts:
            draft, judge, truth, at = text[exit_layer], text[middle], text[self.depth], 0
            while at < len(truth):
                have = 0
                while have < enough:
                    here = slice(at + have, at + have + d)
                    spent += (d + 1) * self.walk(exit_layer, 1) + self.walk(middle - exit_layer, d + 1)
                    have += same(draft[here], judge[here]) + 1
                spent += self.walk(middle, 1) + self.walk(self.depth - middle, have + 1)
                kept = same(judge[at : at + have], truth[at : at + have])
                at, tokens = at + kept + 1, tokens + min(kept + 1, len(truth) - at)
        return tokens / spent


def same(one: list[int], other: list[int]) -> int:
    """How many tokens two texts share at their beginning."""
    return sum(itertools.takewhile(bool, (a == b for a, b in zip(one, other, strict=True))))


def main() -> None:
    """Print the best of one stage and of two."""
    cfg = load_config(sys.argv[1], sys.argv[2:])
    device, dtype = ready(cfg)
    model, tokenizer = load_decoder(cfg, device, dtype), build(cfg.tokenizer, "tokenizer")
    prompts = [to_tokens(example.prompt, tokenizer) for example in read_examples(cfg)]
    with torch.inference_mode():
        texts = [predictions(model, prompt, cfg.get("max_new_tokens", 128)) for prompt in prompts]
    cost = costs(model)
    print("cost of positions:", ", ".join(f"{k}: {of:.2f}" for k, of in cost.items()))
    replay, half = Replay(texts, cost), model.num_layers // 2
    exits, lengths = range(1, half + 1), (1, 2, 3, 4, 6, 8, 10, 12)
    single = ((replay.one_stage(e, d), f"exit {e}, {d} drafts") for e in exits for d in lengths)
    double = (
        (replay.two_stages(e, m, d, enough), f"exit {e} drafts {d} for exit {m}, until there are {enough}")
        for e in range(1, half)
        for m in range(e + 1, half + 1)
        for d, enough in itertools.product((1, 2, 3, 4), (2, 4, 6, 8))
    )
    for name, ways in (("one stage", single), ("two stages", double)):
        speedup, how = max(ways)
        print(f"{name}: {speedup:.2f}x ({how})")


if __name__ == "__main__":
    main()
