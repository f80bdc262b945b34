"""Predicts the fastest drafting method: expected tokens divided by seconds per round, for each exit, draft length,
draft vocabulary, end and precision.

    speed-up = m t / (n c + v + o)

m is the expected number of tokens in a round of n drafted tokens, t the time of a plain step, c of a draft step, v of
the verification pass over n + 1 tokens, and o the overhead of a round. Training stores m in the checkpoint for each
maximum of n, and where drafts end at low confidence the mean of n; `estimated_costs` estimates the times from the
weights' bytes. The tuner measures both.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import NamedTuple

import torch
from torchtune.modules import TransformerDecoder

from layerskip_recipes.acceptance.tokens_per_round import ALL_TOKENS, ASSUMED, Round, TokensPerRound
from layerskip_recipes.acceptance.trained_exits import LONGEST_DRAFT, TrainedExits
from layerskip_recipes.generation.drafting.speculation import Speculation

LEAST_GAIN = 1.02  # the least predicted speed-up for which to draft


Option = tuple[Speculation, TokensPerRound]  # a way to draft, and its measured acceptance


@dataclass(frozen=True)
class StepCost:
    """Seconds of a forward pass of one token: a constant, plus terms per layer and per row of the head."""

    step_s: float
    layer_s: float
    head_row_s: float

    def seconds(self, layers: int, head_rows: int) -> float:
        return self.step_s + layers * self.layer_s + head_rows * self.head_row_s


@dataclass(frozen=True)
class Costs:
    """Seconds of the parts of a round."""

    num_layers: int
    vocabulary: int
    plain_step_s: float  # a step of the whole model, one token per batch row
    draft: Mapping[bool, StepCost]  # keys: int8 or not
    further_row: float  # cost of one more token, as a share of a forward pass
    overhead_s: float  # of a round: bookkeeping on the host
    batch_rows: int = 1
    longest: int = LONGEST_DRAFT  # drafted tokens

    def round_s(self, plan: Speculation, num_drafted: float) -> float:
        """Seconds of n = `num_drafted` draft steps and of the verification pass over n + 1 tokens."""
        head_rows = plan.num_draft_tokens or self.vocabulary
        draft = self.draft[plan.draft_int8].seconds(plan.draft_layers or plan.model_layers, head_rows)
        draft += plan.model_layers * self.draft[False].layer_s if plan.draft_layers else 0.0
        verified = num_drafted * self.batch_rows * (1 - plan.shared_layers / self.num_layers)
        return num_drafted * draft + self.plain_step_s * (1 + self.further_row * verified) + self.overhead_s


class Machine(NamedTuple):
    """Rough figures of a device type; only their ratios matter."""

    bytes_per_s: float
    layer_s: float  # per layer, besides reading its weights
    step_s: float
    further_row: float
    overhead_s: float  # of a round
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
    model: TransformerDecoder,
    dtype: torch.dtype,
    gpu: bool,
    compiled: bool,
    batch_rows: int = 1,
    draft_dtype: torch.dtype | None = None,
) -> Costs:
    """Costs from the weights' bytes; `model` may be on the meta device. `draft_dtype` None: `dtype`."""
    machine = machine_for(dtype, gpu, compiled)
    layer = sum(parameter.numel() for parameter in model.layers[0].parameters())
    rows, width = model.tok_embeddings.num_embeddings, model.tok_embeddings.embedding_dim
    # Verifying several batch rows takes several passes over the weights, and costs 1.5 to 2.5 times as much per token.
    further_row = machine.further_row * (1 if batch_rows == 1 else 2)
    batch = 1 + further_row * (batch_rows - 1)

    def cost(itemsize: int) -> StepCost:
        read = itemsize * batch / machine.bytes_per_s
        return StepCost(machine.step_s, layer * read + machine.layer_s, width * read)

    full_precision = cost(dtype.itemsize)
    plain, num_layers = full_precision.seconds(len(model.layers), rows), len(model.layers)
    share = further_row / batch
    draft = {False: cost((draft_dtype or dtype).itemsize), True: cost(1)}
    return Costs(num_layers, rows, plain, draft, share, machine.overhead_s, batch_rows, machine.longest)


def variants(
    options: Iterable[Option], temperature: float, min_confidences: Sequence[float], precisions: Sequence[bool]
) -> list[tuple[Speculation, list[Round]]]:
    """Each option with each of these ends and precisions (int8 or not), and its rounds at a temperature.

    We measured no difference in acceptance between int8 and full precision.
    """
    return [
        (
            replace(plan, min_confidence=min_confidence, draft_int8=int8),
            measured.rounds(temperature, min_confidence > 0),
        )
        for plan, measured in options
        for min_confidence, int8 in product(min_confidences, precisions)
    ]


def ranked(
    rounds_by_plan: Iterable[tuple[Speculation, Sequence[Round]]], costs: Costs, lengths: Iterable[int] | None = None
) -> list[Speculation]:
    """All plans with all draft lengths and what to expect of them, fastest first.

    `lengths` None: the measured lengths, up to `costs.longest`.
    """
    plans = []
    for plan, rounds in rounds_by_plan:
        for length in range(1, min(len(rounds), costs.longest) + 1) if lengths is None else lengths:
            # Drafts that are longer than the measured ones give at least as many tokens.
            tokens, num_drafted = rounds[min(length, len(rounds)) - 1]
            seconds = costs.round_s(plan, num_drafted if plan.ends_early else length)
            speedup = tokens * costs.plain_step_s / seconds
            plans.append(replace(plan, num_speculations=length, tokens_per_round=tokens, speedup=speedup))
    return sorted(plans, key=lambda plan: -(plan.speedup or 0))


def known_options(exits: TrainedExits | None, num_layers: int, exit_layer: int | None = None) -> list[Option]:
    """The measured exits and draft vocabularies of a checkpoint, in full precision.

    Without a measurement: the given exit, or else the trained one that drafts, with an assumed acceptance. Without
    layerskip.json: none.
    """
    measured = exits.measured.exits if exits and exits.measured else {}
    frequent = (exits.vocabulary if exits else None) or []
    options = [
        (Speculation(e, draft_vocabulary=None if name == ALL_TOKENS else frequent[: int(name)]), rates)
        for e, by_vocabulary in measured.items()
        for name, rates in by_vocabulary.items()
        if e < num_layers and (exit_layer is None or e == exit_layer)
    ]
    if options:
        return options
    if exit_layer is None and exits is not None:
        exit_layer = exits.exit_that_drafts(num_layers)
    return [] if exit_layer is None else [(Speculation(exit_layer), ASSUMED)]
