"""FinetuneConfig: a finetune config whose `auto` keys are chosen and whose keys are checked."""

from collections.abc import Iterator

from layerskip_recipes.config.auto import Choices
from layerskip_recipes.model.adapters import check_lora_arguments
from layerskip_recipes.training.auto_settings import choose_training
from layerskip_recipes.training.config_checks import conflicts
from layerskip_recipes.training.keys import FinetuneKeys


class FinetuneConfig(FinetuneKeys):
    """The config of `layerskip_finetune`. keys.py has the keys, auto_settings.py the choices for `auto`, and
    config_checks.py the rules that involve several keys."""

    def choose(self, choices: Choices) -> None:
        check_lora_arguments(self.model)  # the choices build the model
        choose_training(self, choices)

    def check_together(self) -> Iterator[str]:
        return conflicts(self)
