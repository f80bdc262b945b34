"""What a recipe chooses before it loads weights: whether to compile, and how to draft."""

from collections.abc import Sequence
from typing import TypeVar

import torch
from torchtune import utils

from layerskip_recipes.config.auto import Choices
from layerskip_recipes.generation.config import AnswerConfig
from layerskip_recipes.generation.drafting.planner import DraftPlanner
from layerskip_recipes.generation.drafting.speculation import Speculation
from layerskip_recipes.generation.kernels.when_to_compile import compiling_pays
from layerskip_recipes.processes import num_processes

log = utils.get_logger("INFO")

C = TypeVar("C", bound=AnswerConfig)


def choose_decoding(
    cfg: C, device: torch.device, num_steps: int, prompts: Sequence[Sequence[int]] = (), batch_rows: int = 1
) -> tuple[C, Speculation | None]:
    """The config with its `compile` and `self_speculation` chosen, and the plan of drafts.

    `num_steps`: how many steps the run would have without drafts. `prompts`: their tokens, if they are known.
    """
    choices, planner = Choices(cfg), DraftPlanner.of_config(cfg, cfg.quantizer)
    plans = {
        compiled: planner.plan(cfg.self_speculation, cfg.temperature, compiled, prompts, batch_rows)
        for compiled in (False, True)
    }

    def pays() -> bool:
        if num_processes() > 1:
            return False
        eager_s, compiled_s = (planner.token_s(plans[c][0], c, batch_rows) for c in (False, True))
        compiled, why = compiling_pays(eager_s, compiled_s, num_steps, device)
        log.info(why)
        return compiled

    plan, why = plans[choices.pick("compile", pays)]
    if why is not None:
        log.info(why)
    choices.set("self_speculation", cfg.self_speculation and cfg.self_speculation.resolved(plan))
    return cfg.with_choices(choices), plan
