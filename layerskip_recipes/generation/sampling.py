"""From logits to tokens: penalty, temperature, filters, and noise that makes sampling replayable.

A token is the argmax of log p + Gumbel noise, where a hash of seed, prompt, position and token id makes the noise. That
is exact sampling from p (the Gumbel-max trick). Draft and model use the same noise, so a drafted token is accepted
exactly if it is the model's own choice. Sampled output therefore equals plain sampling token for token (Daliri, Musco
and Suresh, arXiv 2408.07978). Greedy decoding is the case without noise.
"""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated

import torch
from pydantic import Field

from layerskip_recipes.config.schema import Fraction, PositiveInt, check

# Types that configs share.
Temperature = Annotated[float, Field(ge=0, examples=[0.8])]
TopP = Annotated[float, Field(gt=0, le=1, examples=[0.9])]
MinP = Annotated[Fraction, Field(examples=[0.05])]
Penalty = Annotated[float, Field(gt=0, examples=[1.1])]


# ---- scores ----


def token_scores(
    logits: torch.Tensor,
    temperature: float | torch.Tensor,
    top_k: int | None = None,
    top_p: float | torch.Tensor | None = None,
    min_p: torch.Tensor | None = None,
) -> torch.Tensor:
    """log p up to a constant in fp32, [..., v] -> [..., v]; -inf for tokens that top_k, then min_p, then top_p remove.

    p is softmax(logits / temperature). top_k keeps the k likeliest tokens and ties, min_p the tokens of at least min_p
    times the largest probability, top_p the smallest set of tokens with this mass. All but top_k may be tensors [], so
    that one graph serves all values.
    """
    logits = logits.float()
    # The largest score is 0, which no temperature moves.
    scores = (logits - logits.amax(-1, keepdim=True)) / temperature
    if top_k is not None and top_k < scores.shape[-1]:
        kth = scores.topk(top_k, dim=-1).values[..., -1:]
        scores = scores.masked_fill(scores < kth, -torch.inf)
    if min_p is not None:
        scores = scores.masked_fill(scores < min_p.log(), -torch.inf)
    if top_p is not None:
        ranked, order = scores.softmax(-1).sort(dim=-1, descending=True, stable=True)
        # Keep a token while the mass of likelier tokens is below top_p; the first one always stays.
        beyond = ranked.cumsum(-1) - ranked >= top_p
        scores = scores.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), -torch.inf)
    return scores


def penalise(logits: torch.Tensor, seen: torch.Tensor, penalty: float | torch.Tensor) -> torch.Tensor:
    """Make `seen` tokens (bool [..., v]) less likely: divide positive logits by the penalty, multiply negative ones.

    Keskar et al., CTRL, arXiv 1909.05858, section 4.1, extended to negative logits. A penalty of 1 changes nothing.
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def confidence(scores: torch.Tensor) -> torch.Tensor:
    """The probability of the draft's likeliest token, [b, v'] -> [b]; the product over a draft is its confidence.

    An exit trained on labels is roughly calibrated: the model accepts the token with about this probability.
    """
    return scores.softmax(-1).amax(-1)


# ---- noise ----


def noise_keys(seed: int, prompts: Sequence[Sequence[int]], numbers: Sequence[int] | None = None) -> list[list[int]]:
    """Two 32-bit keys per prompt, [p][2], from the seed, the prompt's tokens and its number.

    Equal prompts need different `numbers` for different samples; None counts the equal prompts before each one.
    """
    numbers = copies_before(prompts) if numbers is None else numbers
    keys = []
    for prompt, number in zip(prompts, numbers, strict=True):
        text = repr((seed, number, [int(token) for token in prompt]))
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        keys.append([int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")])
    return keys


def copies_before(prompts: Sequence[Sequence[int]]) -> list[int]:
    """How many equal prompts come before each prompt."""
    seen: Counter[tuple[int, ...]] = Counter()
    numbers = []
    for prompt in map(tuple, prompts):
        numbers.append(seen[prompt])
        seen[prompt] += 1
    return numbers


def mixed(x: torch.Tensor) -> torch.Tensor:
    """A bijection of 32-bit numbers (in int64) that turns small differences into unrelated numbers.

    Shifts and constants are those of lowbias32 in Wellons' hash-prospector. The second constant is 0xd35a2d97 - 2**32,
    so that no product needs more than 63 bits.
    """
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * -0x2CA5D269) & 0xFFFFFFFF
    return x ^ (x >> 15)


def gumbel(key: torch.Tensor, other_key: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Gumbel noise in fp32 of token ids at a position with two keys; the three shapes broadcast."""
    bits = mixed(mixed(key ^ ids) ^ other_key)
    # -log(1 - u) is most precise near u = 0, where tokens win. The largest u must not round to 1.
    uniform = ((bits.float() + 0.5) * 2**-32).clamp(max=1 - 2**-24)
    return -torch.log(-torch.log1p(-uniform))


def choose_tokens(
    scores: torch.Tensor, keys: torch.Tensor | None, positions: torch.Tensor, ids: torch.Tensor | None = None
) -> torch.Tensor:
    """The index of each chosen token, [b, s, v'] -> [b, s]: the argmax of scores plus noise.

    keys: [b, 2], see `noise_keys`; None is greedy. positions: [b or 1, s], of the chosen tokens in their texts. ids:
    the token ids [v'] of a draft vocabulary.
    """
    if keys is None:
        return scores.argmax(-1)
    key, other_key = (mixed(keys[:, i, None] ^ positions)[..., None] for i in (0, 1))
    ids = torch.arange(scores.shape[-1], device=scores.device) if ids is None else ids
    return (scores + gumbel(key, other_key, ids)).argmax(-1)


def accept(drafted: torch.Tensor, chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Accept drafted tokens [b, n] while they equal the model's choices [b, n + 1].

    Returns the number of accepted tokens [b], and the model's choice behind them [b].
    """
    num_accepted = (drafted == chosen[:, :-1]).long().cumprod(1).sum(1)
    return num_accepted, chosen.gather(1, num_accepted[:, None])[:, 0]


# ---- settings ----


@dataclass  # not frozen: torch 2.6 would treat its numbers as constants of each graph
class Sampler:
    """How to choose tokens: greedily at temperature 0, else from the filtered distribution, see `token_scores`.

    `seed` decides all noise; None: a seed drawn from torch's global generator for each generation. Raises a ConfigError
    for a setting out of range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int | None = None
    greedy: bool = field(init=False, repr=False)

    def __post_init__(self) -> None:
        check("temperature", self.temperature, Temperature)
        check("top_k", self.top_k, PositiveInt | None)
        check("top_p", self.top_p, TopP | None)
        check("min_p", self.min_p, MinP | None)
        check("repetition_penalty", self.repetition_penalty, Penalty)
        # Stored: a compiled graph that read the temperature would be valid for one temperature only. Numbers that
        # vanish in fp32 are greedy.
        self.greedy = self.temperature < torch.finfo(torch.float32).tiny
        self.top_k = None if self.greedy else self.top_k
        self.top_p = None if self.greedy or self.top_p == 1 else self.top_p
        self.min_p = None if self.greedy else self.min_p or None

    @property
    def penalises(self) -> bool:
        """Whether choices depend on the tokens so far (`seen`)."""
        return self.repetition_penalty != 1

    @property
    def only_temperature(self) -> bool:
        """Whether choices depend on logits, temperature and noise only."""
        return not self.penalises and self.top_k is None and self.top_p is None and self.min_p is None

    def tensors(self, device: torch.device) -> dict[str, torch.Tensor]:
        """Its numbers as tensors [] by name, inputs of a graph rather than constants in it."""
        numbers = {name: getattr(self, name) for name in ("temperature", "top_p", "min_p", "repetition_penalty")}
        return {
            name: torch.tensor(number, dtype=torch.float32, device=device)
            for name, number in numbers.items()
            if number is not None
        }

    @property
    def constants(self) -> tuple:
        """What a graph of `scores` depends on besides `tensors`."""
        return self.greedy, self.penalises, self.top_k, self.top_p is None, self.min_p is None

    def scores(
        self, logits: torch.Tensor, seen: torch.Tensor | None, tensors: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        """Penalised logits if greedy, else their `token_scores`; [..., v] -> [..., v]."""
        if seen is not None:
            logits = penalise(logits, seen, tensors["repetition_penalty"])
        if self.greedy:
            return logits
        return token_scores(logits, tensors["temperature"], self.top_k, tensors.get("top_p"), tensors.get("min_p"))
