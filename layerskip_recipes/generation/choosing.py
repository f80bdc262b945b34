"""What a recipe chooses before it loads weights: whether to compile, and how to draft."""

from collections.abc import Sequence
from typing import TypeVar

from torchtune import utils

from layerskip_recipes.config.auto import Choices
from layerskip_recipes.config.schema import AUTO
from layerskip_recipes.generation.config import AnswerConfig
from layerskip_recipes.generation.drafting.planner import DraftPlanner
from layerskip_recipes.generation.drafting.speculation import Speculation

log = utils.get_logger("INFO")

C = TypeVar("C", bound=AnswerConfig)


def choose_decoding(
    cfg: C,
    planner: DraftPlanner,
    num_steps: int,
    prompts: Sequence[Sequence[int]] = (),
    batch_rows: int = 1,
    has_predictions: bool = False,
) -> tuple[C, Speculation | None]:
    """The config with its `compile` and `self_speculation` chosen, and the plan of drafts.

    `num_steps`: how many steps the run would have without drafts. `prompts`: their tokens, if they are known.
    """
    section, compile = cfg.self_speculation, None if cfg.compile == AUTO else bool(cfg.compile)
    plan, compile, reasons = planner.choose(
        section, cfg.temperature, compile, num_steps, prompts, batch_rows, has_predictions=has_predictions
    )
    for reason in reasons:
        log.info(reason)
    choices = Choices(cfg)
    choices.set("compile", compile)
    choices.set("self_speculation", section and section.resolved(plan))
    return cfg.with_choices(choices), plan
