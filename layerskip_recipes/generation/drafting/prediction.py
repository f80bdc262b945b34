"""Predicts the fastest drafting method: expected tokens divided by seconds per round, for each exit, draft length,
draft vocabulary, end and precision.

    speed-up = m t / (n c + v + o)

m is the expected number of tokens in a round of n drafted tokens, t the time of a plain step, c of a draft step, v of
the verification pass over n + 1 tokens, and o the overhead of a round. Training stores m in the checkpoint for each
maximum of n, and where drafts end at low confidence the mean of n; `estimated_costs` estimates the times from the
weights' bytes. The tuner measures both.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import torch
from torchtune.modules import TransformerDecoder

from layerskip_recipes.acceptance.tokens_per_round import ALL_TOKENS, ASSUMED, Round, TokensPerRound
from layerskip_recipes.acceptance.trained_exits import LONGEST_DRAFT, TrainedExits

LEAST_GAIN = 1.02  # the least predicted speed-up for which to draft


class DraftMethod(NamedTuple):
    """A drafting method, except for the draft length."""

    model_layers: int  # how many of the model's layers draft; 0 if a trained draft uses its own layers only
    vocabulary: int | None = None  # size of the draft vocabulary; None: all tokens
    int8: bool = False
    draft_layers: int = 0  # of a trained draft, which run after the model's first `model_layers` layers
    ends: bool = False  # at low confidence, see `self_speculation.min_confidence`

    @property
    def shared_layers(self) -> int:
        """The layers whose states verification takes from the draft; quantised layers have other states."""
        return 0 if self.int8 and not self.draft_layers else self.model_layers

    def __str__(self) -> str:
        tokens = "" if self.vocabulary is None else f"{self.vocabulary}-token vocabulary"
        where = "trained draft" if self.draft_layers else f"exit {self.model_layers}"
        return ", ".join(part for part in (where, tokens, "int8" if self.int8 else "") if part)


class Prediction(NamedTuple):
    method: DraftMethod
    num_speculations: int
    tokens_per_round: float
    round_s: float
    speedup: float  # over autoregressive decoding


@dataclass(frozen=True)
class StepCost:
    """Seconds of a forward pass of one token: a constant, plus terms per layer and per row of the head."""

    step: float
    layer: float
    head_row: float

    def seconds(self, layers: int, head_rows: int) -> float:
        return self.step + layers * self.layer + head_rows * self.head_row


@dataclass(frozen=True)
class Costs:
    """Seconds of the parts of a round."""

    num_layers: int
    vocabulary: int
    plain_step_s: float  # a step of the whole model, one token per batch row
    draft: Mapping[bool, StepCost]  # keys: int8 or not
    further_row: float  # cost of one more token, as a share of a forward pass
    round: float  # bookkeeping on the host
    batch_rows: int = 1
    longest: int = LONGEST_DRAFT  # drafted tokens

    def round_s(self, method: DraftMethod, num_drafted: float) -> float:
        """Seconds of n = `num_drafted` draft steps and of the verification pass over n + 1 tokens."""
        rows = self.vocabulary if method.vocabulary is None else method.vocabulary
        draft = self.draft[method.int8].seconds(method.draft_layers or method.model_layers, rows)
        draft += method.model_layers * self.draft[False].layer if method.draft_layers else 0.0
        verified = num_drafted * self.batch_rows * (1 - method.shared_layers / self.num_layers)
        return num_drafted * draft + self.plain_step_s * (1 + self.further_row * verified) + self.round


class Machine(NamedTuple):
    """Rough figures of a device type; only their ratios matter."""

    bytes_per_s: float
    layer: float  # seconds per layer besides reading its weights
    step: float
    further_row: float
    round: float
    longest: int = 8  # drafted tokens: verification of 10 tokens and more is much slower


# Keys: (GPU, compiled). An eager layer also costs the launches of its operations.
MACHINES = {
    (False, False): Machine(2e10, 4e-4, 3e-4, 0.06, 2e-4),
    (False, True): Machine(2e10, 5e-6, 2e-5, 0.06, 2e-4),
    (True, False): Machine(1.5e12, 3e-4, 2e-4, 0.01, 2e-4),
    (True, True): Machine(1.5e12, 1e-5, 2e-5, 0.01, 1e-4),
}
# In matrix tiles (kernels/tiles.cpp), 16 tokens take almost as long as one.
TILES = MACHINES[False, True]._replace(further_row=0.02, longest=LONGEST_DRAFT)


def machine_for(dtype: torch.dtype, gpu: bool, compiled: bool) -> Machine:
    """This machine's figures for weights of a dtype; that is int8 for a quantised model."""
    tiles = compiled and not gpu and dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported()
    return TILES if tiles else MACHINES[gpu, compiled]


def estimated_costs(
    model: TransformerDecoder, dtype: torch.dtype, gpu: bool, compiled: bool, batch_rows: int = 1
) -> Costs:
    """Costs from the weights' bytes; `model` may be on the meta device."""
    machine = machine_for(dtype, gpu, compiled)
    layer = sum(parameter.numel() for parameter in model.layers[0].parameters())
    rows, width = model.tok_embeddings.num_embeddings, model.tok_embeddings.embedding_dim
    # Verifying several batch rows takes several passes over the weights, and costs 1.5 to 2.5 times as much per token.
    further_row = machine.further_row * (1 if batch_rows == 1 else 2)
    batch = 1 + further_row * (batch_rows - 1)

    def cost(itemsize: int) -> StepCost:
        read = itemsize * batch / machine.bytes_per_s
        return StepCost(machine.step, layer * read + machine.layer, width * read)

    own = cost(dtype.itemsize)
    plain, num_layers = own.seconds(len(model.layers), rows), len(model.layers)
    share = further_row / batch
    draft = {False: own, True: cost(1)}
    return Costs(num_layers, rows, plain, draft, share, machine.round, batch_rows, machine.longest)


def rounds_of(
    methods: Mapping[DraftMethod, TokensPerRound],
    temperature: float,
    endings: Sequence[bool],
    precisions: Sequence[bool],
) -> dict[DraftMethod, Sequence[Round]]:
    """The rounds of each method without and with an end at low confidence, as in `endings`, in each precision.

    We measured no difference in acceptance between int8 and full precision.
    """
    return {
        method._replace(ends=ends, int8=int8): measured.rounds(temperature, ends)
        for method, measured in methods.items()
        for ends, int8 in product(endings, precisions)
    }


def ranked(
    rates: Mapping[DraftMethod, Sequence[Round]], costs: Costs, lengths: Iterable[int] | None = None
) -> list[Prediction]:
    """All methods with all draft lengths, fastest first; None: the measured lengths, up to `costs.longest`.

    `rates` has the methods' rounds.
    """
    found = []
    for method, rounds in rates.items():
        for length in range(1, min(len(rounds), costs.longest) + 1) if lengths is None else lengths:
            # Drafts that are longer than the measured ones give at least as many tokens.
            tokens, num_drafted = rounds[min(length, len(rounds)) - 1]
            seconds = costs.round_s(method, num_drafted if method.ends else length)
            found.append(Prediction(method, length, tokens, seconds, tokens * costs.plain_step_s / seconds))
    return sorted(found, key=lambda prediction: -prediction.speedup)


def known_methods(
    exits: TrainedExits | None, num_layers: int, exit_layer: int | None = None
) -> dict[DraftMethod, TokensPerRound]:
    """The measured exits and draft vocabularies of a checkpoint, in full precision.

    Without a measurement: `exit_that_drafts`, with an assumed acceptance. Without layerskip.json: none.
    """
    measured = exits.measured.exits if exits and exits.measured else {}
    methods = {
        DraftMethod(e, None if name == ALL_TOKENS else int(name)): rates
        for e, by_vocabulary in measured.items()
        for name, rates in by_vocabulary.items()
        if e < num_layers and (exit_layer is None or e == exit_layer)
    }
    if methods:
        return methods
    if exit_layer is None and exits is not None:
        exit_layer = exits.exit_that_drafts(num_layers)
    return {} if exit_layer is None else {DraftMethod(exit_layer): ASSUMED}
