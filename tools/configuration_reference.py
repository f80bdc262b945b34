"""Make the tables of docs/configuration.md from the config classes of the recipes.

    python tools/configuration_reference.py

The introduction of the page is written by hand; what follows the marker is replaced. A test compares the page with what
this script makes.
"""

from pathlib import Path

from layerskip_recipes.benchmark.config import BenchmarkConfig
from layerskip_recipes.config.reference import markdown
from layerskip_recipes.evaluation.config import EvalConfig
from layerskip_recipes.generation.config import GenerateConfig
from layerskip_recipes.training.config import FinetuneConfig

MARKER = "<!-- Made by tools/configuration_reference.py from here on; do not edit. -->\n"
PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"
RECIPES = {
    "layerskip_finetune": FinetuneConfig,
    "layerskip_generate": GenerateConfig,
    "layerskip_eval": EvalConfig,
    "layerskip_benchmark": BenchmarkConfig,
}


def page() -> str:
    """The page as it should be: its own introduction and fresh tables."""
    introduction = PAGE.read_text(encoding="utf-8").partition(MARKER)[0]
    return f"{introduction}{MARKER}\n{markdown(RECIPES)}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
