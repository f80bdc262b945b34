"""Chooses the `auto` keys of `self_speculation`, from prediction.py's predictions, and whether to compile."""

import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from layerskip_recipes.checkpoint.checkpointers import described_folder
from layerskip_recipes.checkpoint.drafts import own_draft, read_description
from layerskip_recipes.checkpoint.trained_exits import (
    DESCRIPTION,
    TokensPerRound,
    TrainedExits,
    read_trained_exits,
    usual_exit,
)
from layerskip_recipes.config.components import Component
from layerskip_recipes.config.recipe_config import RecipeConfig
from layerskip_recipes.config.schema import AUTO
from layerskip_recipes.distributed.tensor_parallel import ranks_per_matrix
from layerskip_recipes.generation.drafting.prediction import (
    ASSUMED,
    LEAST_GAIN,
    Costs,
    Prediction,
    Way,
    estimated_costs,
    known_ways,
    ranked,
    rates_of,
    with_int8,
)
from layerskip_recipes.generation.drafting.section import SelfSpeculation
from layerskip_recipes.generation.kernels.cpp_decoder import is_library_compiled
from layerskip_recipes.model.exit_quality import MIN_CONFIDENCE
from layerskip_recipes.processes import num_processes


@dataclass(frozen=True)
class Choice:
    """The settled section (None: no drafts), a log line if something was chosen, and the expected speed."""

    section: SelfSpeculation | None
    why: str | None
    step_s: float  # of the whole model
    stored: Sequence[int] | None = None  # the checkpoint's frequent tokens, for `SelfSpeculation.with_vocabulary`
    speedup: float = 1.0

    @property
    def token_s(self) -> float:
        return self.step_s / max(self.speedup, 1.0)


LOOKUP = 3  # tokens of prompt look-up
COMPILE_S = {"cpu": 30.0, "cuda": 180.0}  # compile time of a first run
LOAD_S = 5.0  # to load C++ that an earlier run compiled, and to move weights to huge pages


def choose_for(
    cfg: RecipeConfig,
    section: SelfSpeculation | None,
    temperature: float,
    compiled: bool,
    rows: int,
    quantizer: Component | None,
    key: str = "self_speculation",
) -> Choice:
    """`choose_drafts` for a config's model and device, and a batch of `rows` prompts."""
    gpu = not cfg.device.startswith("cpu")
    plain = quantizer is None and num_processes() == 1
    dtype = cfg.torch_dtype if quantizer is None else torch.int8
    costs = estimated_costs(cfg.meta_model, dtype, gpu, compiled, rows)
    int8, ends = plain and compiled and not gpu, num_processes() == 1 and not gpu
    folder = described_folder(cfg.checkpointer)
    own, unusable = _draft_beside(cfg, section, folder, quantizer)
    possible: dict[str, Any] = {"own": own, "unusable": unusable, "plain_head": plain, "int8": int8, "ends": ends}
    return choose_drafts(section, folder, costs, temperature, **possible, key=key)


def _draft_beside(
    cfg: RecipeConfig, section: SelfSpeculation | None, folder: Path | None, quantizer: Component | None
) -> tuple[str | None, str | None]:
    """The folder of the draft that was trained beside the model, or the reason why it cannot be used."""
    open_ = section is not None and section.exit_layer == section.draft == AUTO
    own = own_draft(folder) if open_ else None
    if own is None:
        return None, None
    parallel = ranks_per_matrix(*(getattr(cfg, f"tensor_parallel_{what}", None) for what in ("dim", "plan")))
    if quantizer is not None:
        why = "is not chosen with a quantizer. Set quantizer=null"
    elif parallel > 1:
        why = "does not go with tensor parallelism, which splits the layers that it copies"
    elif own_draft(folder, cfg.checkpointer.target) is None:
        why = "was trained for weights that another checkpointer reads"
    else:
        return own, None
    return None, f"the draft in {own} {why}"


def choose_drafts(
    section: SelfSpeculation | None,
    folder: Path | None,
    costs: Costs,
    temperature: float,
    *,
    own: str | None = None,
    asked: bool = False,
    unusable: str | None = None,
    plain_head: bool = True,
    int8: bool = False,
    ends: bool = False,
    key: str = "self_speculation",
) -> Choice:
    """Replace `auto` in the section's keys.

    Args:
        folder: the folder of the weights or adapters; it may lack layerskip.json.
        own: the folder of a draft that was trained beside the model.
        asked: draft even if it should not pay, as a section with an exit or a draft does.
        unusable: the reason why the draft beside the model cannot be used.
        plain_head: a draft vocabulary can take rows of the model's head.
        int8: an int8 draft is faster on this machine.
        ends: drafts of one prompt can end at low confidence.
        key: the section's name in messages.
    """
    if section is None:
        return Choice(None, None, costs.plain)
    given_exit, given_draft = section.exit_layer != AUTO, section.draft not in (None, AUTO)
    asked = asked or given_exit or given_draft
    trained, draft = None, section.draft if given_draft else own
    if folder is not None and not given_draft:
        trained = read_trained_exits(folder, costs.num_layers, costs.vocabulary)
    stored = trained.vocabulary if trained else None
    section = section.model_copy(update={"draft": draft})
    if section.only_looks_up(costs.num_layers):
        return Choice(section.settled(), None, costs.plain, stored)
    if draft is not None:
        ways = _trained_draft(draft, f"{key}.draft")
    else:
        if given_exit and not (trained and trained.measured):
            return Choice(section.settled(), None, costs.plain, stored)  # no measurement to choose by
        ways = known_ways(trained, costs.num_layers, section.exit_layer if given_exit else None)
    if not ways:
        return _without_exit(section, unusable or _untrained(folder, trained, costs.num_layers, key), costs)

    # Rank the vocabularies, precisions, ends and lengths that the user left open.
    if section.draft_vocabulary != AUTO:
        ways = _of_vocabulary(ways, section.draft_vocabulary)
    elif draft is None and not (plain_head and stored):
        ways = _of_vocabulary(ways, None)
    endings = [False, True] if ends and costs.batch_rows == 1 else [False]
    if section.min_confidence != AUTO and len(endings) > 1:
        endings = [section.min_confidence > 0]
    rates = rates_of(ways, temperature, endings)
    precisions = [False, True] if int8 else [False]
    if section.draft_int8 != AUTO:
        precisions = [section.draft_int8]
    lengths = None if section.num_speculations == AUTO else [section.num_speculations]
    best = ranked(with_int8(rates, precisions), costs, lengths)[0]

    # Draft if it should pay, or if the user asked for it.
    said = (
        f"{best.way}, {'up to ' if best.way.ends else ''}{best.num_speculations} drafted tokens per round; expected "
        f"speed-up {best.speedup:.2f}x ({best.tokens_per_round:.1f} tokens per round, which costs "
        f"{best.round_s / costs.plain:.2f} plain steps; acceptance "
        f"{'assumed' if ASSUMED in ways.values() else 'as in training'}, costs estimated)"
    )
    if best.speedup < LEAST_GAIN and not asked:
        nothing = "no exit should pay" if draft is None else "the trained draft should not pay"
        return _without_exit(section, f"{nothing}. The best would be {said}", costs)
    # Rows of a batch rarely have a match at the same time. The whole model with look-ups would be look-ups alone.
    lookup = LOOKUP if costs.batch_rows == 1 and best.way.exit_layer < costs.num_layers else None
    chosen = section.model_copy(update=prediction_keys(best, lookup) | section.given)
    also = "" if chosen.prompt_lookup is None else f"; look-ups of the last {chosen.prompt_lookup} tokens"
    why = f"Drafts: {said}{also}" if section.is_open else None
    return Choice(chosen, why, costs.plain, stored, best.speedup)


def _without_exit(section: SelfSpeculation, why: str, costs: Costs) -> Choice:
    """Drafts by look-ups alone if the user asked for look-ups, else no drafts."""
    if section.prompt_lookup in (None, AUTO):
        return Choice(None, f"No drafts: {why}", costs.plain)
    alone = {"exit_layer": costs.num_layers, "draft": None, "draft_vocabulary": None, "draft_int8": False}
    said = f"Drafts: look-ups of the last {section.prompt_lookup} tokens alone, because {why}"
    return Choice(section.model_copy(update=alone).settled(), said, costs.plain)


def prediction_keys(best: Prediction, lookup: int | None) -> dict[str, Any]:
    """A prediction as keys of the section."""
    keys = {
        "num_speculations": best.num_speculations,
        "min_confidence": MIN_CONFIDENCE if best.way.ends else 0.0,
        "draft_vocabulary": best.way.vocabulary,
        "draft_int8": best.way.int8,
        "prompt_lookup": lookup,
    }
    return keys if best.way.own_layers is not None else keys | {"exit_layer": best.way.exit_layer}


def _trained_draft(folder: str, key: str) -> dict[Way, TokensPerRound]:
    read = read_description(folder, key)
    below, rows = 0 if read.kind == "copy" else read.exit_layer, read.vocabulary and len(read.vocabulary)
    return {Way(below, rows or None, own_layers=read.num_layers): (read.measured and read.measured.draft) or ASSUMED}


def _of_vocabulary(ways: Mapping[Way, TokensPerRound], given: int | list[int] | None) -> dict[Way, TokensPerRound]:
    """Each exit with the user's vocabulary, and the acceptance measured for the next smaller vocabulary."""
    if given is None:
        whole = {way: rates for way, rates in ways.items() if way.vocabulary is None or way.own_layers is not None}
        return {way._replace(vocabulary=None): rates for way, rates in whole.items()}
    size = given if isinstance(given, int) else len(given)
    found: dict[Way, TokensPerRound] = {}
    by_size = sorted(ways.items(), key=lambda item: item[0].vocabulary or math.inf)
    for way, rates in by_size:
        wanted = way._replace(vocabulary=size)
        if (way.vocabulary or math.inf) <= size or wanted not in found:
            found[wanted] = rates
    return found


def _untrained(folder: Path | None, trained: TrainedExits | None, num_layers: int, key: str) -> str:
    if trained is None:
        why = f"{folder or 'the model'} has no {DESCRIPTION}, so no exit is known to be trained"
    else:
        why = f"{DESCRIPTION} in {folder} names no trained exit before the last one"
    return f"{why}. To draft anyway: {key}.exit_layer={usual_exit(num_layers)}"


def has_compiler(device: torch.device) -> bool:
    """Whether steps can be compiled, which needs a C++ compiler on a CPU, and triton on a GPU."""
    if device.type == "cpu":
        return shutil.which(os.environ.get("CXX", "g++")) is not None
    return device.type == "cuda" and find_spec("triton") is not None


def compiling_pays(eager_s: float, compiled_s: float, steps: int, device: torch.device) -> tuple[bool, str]:
    """Whether compiling saves more time than it takes, given the seconds per token of both; and a log line."""
    if not has_compiler(device):
        why = {"cpu": "no C++ compiler was found", "cuda": "triton is not installed"}
        return False, f"Not compiled, and so slower: {why.get(device.type, f'not possible on {device.type}')}"
    first = device.type != "cpu" or not is_library_compiled()
    saved, needed = steps * (eager_s - compiled_s), COMPILE_S[device.type] if first else LOAD_S
    faster = f"makes decoding about {eager_s / compiled_s:.1f}x faster"
    if saved > needed:
        return True, f"Compiled: it {faster} here, and saves about {saved:.0f} s. compile=false leaves it out"
    return False, (
        f"Not compiled: that would save about {saved:.0f} s of at most {steps} tokens, and take about {needed:.0f} s"
        f"{' the first time' if first else ''}. For longer runs set compile=true"
    )
