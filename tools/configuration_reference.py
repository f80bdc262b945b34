"""Make the tables of docs/configuration.md from the config classes of the recipes.

    python tools/configuration_reference.py

The introduction of the page is written by hand; what follows the marker is replaced. A test compares the page with what
this script makes.
"""

from pathlib import Path

from layerskip_recipes.cli.configs import CONFIGS
from layerskip_recipes.config.reference import markdown

MARKER = "<!-- Made by tools/configuration_reference.py from here on; do not edit. -->\n"
PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"
RECIPES = ("layerskip_finetune", "layerskip_generate", "layerskip_eval", "layerskip_benchmark")


def page() -> str:
    """The page as it should be: its own introduction and fresh tables."""
    introduction = PAGE.read_text(encoding="utf-8").partition(MARKER)[0]
    return f"{introduction}{MARKER}\n{markdown({name: CONFIGS[name] for name in RECIPES})}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
