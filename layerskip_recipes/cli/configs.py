"""Which recipe a config is for, by the keys that it has."""

from omegaconf import DictConfig

from layerskip_recipes.benchmark.config import BenchmarkConfig
from layerskip_recipes.config.recipe_config import RecipeConfig
from layerskip_recipes.evaluation.config import EvalConfig
from layerskip_recipes.generation.config import GenerateConfig
from layerskip_recipes.training.config import FinetuneConfig

CONFIGS: dict[str, type[RecipeConfig]] = {
    "layerskip_finetune": FinetuneConfig,
    "layerskip_generate": GenerateConfig,
    "layerskip_benchmark": BenchmarkConfig,
    "layerskip_eval": EvalConfig,
}


def recipe_of(source: DictConfig) -> str:
    """The recipe that a merged config fits best.

    The best one knows the most of its keys; among equals it misses the fewest required ones, then it refuses the fewest
    (which may be inherited and switched off); then it is the first of CONFIGS.
    """
    given = {str(key) for key in source}

    def misfit(recipe: str) -> tuple[int, int, int]:
        config = CONFIGS[recipe]
        known, refused = set(config.model_fields), set(config.REFUSED)
        required = {name for name, field in config.model_fields.items() if field.is_required()}
        return len(given - known - refused), len(required - given), len(given & refused)

    return min(CONFIGS, key=misfit)


def validate(source: DictConfig) -> str:
    """Check a config by the recipe that it is for, whose name is returned: sections, keys, arguments of every
    component.

    Raises:
        ConfigError: the first thing that is wrong.
    """
    name = recipe_of(source)
    CONFIGS[name].load(source)
    return name
