"""Make the tables of docs/configuration.md from the config classes of the recipes.

    python tools/configuration_reference.py

The introduction is written by hand; all text after the marker is generated. A test checks that the page is current.
"""

import inspect
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from layerskip_recipes.cli.configs import RECIPES, config_class
from layerskip_recipes.config.components import Component
from layerskip_recipes.config.recipe_config import RecipeConfig
from layerskip_recipes.config.schema import Section, allowed, alternatives
from layerskip_recipes.generation.config import GenerateConfig
from layerskip_recipes.serving.config import ServeConfig

MARKER = "<!-- Made by tools/configuration_reference.py from here on; do not edit. -->\n"
PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"


def page() -> str:
    introduction = PAGE.read_text(encoding="utf-8").partition(MARKER)[0]
    return f"{introduction}{MARKER}\n{markdown({name: config_class(name) for name in RECIPES})}"


def markdown(recipes: dict[str, type[RecipeConfig]]) -> str:
    """The keys as Markdown: first those of all recipes, then each recipe's own."""
    tables: dict[type[Section], str] = {}
    parts = ["## All recipes", *_tables(RecipeConfig.model_fields, tables)]
    for name, config in recipes.items():
        common = GenerateConfig if config is ServeConfig else RecipeConfig
        shown = {key: field for key, field in config.model_fields.items() if not _is_common(key, field, common)}
        parts.append(f"## {name}")
        if config is ServeConfig:
            dropped = ", ".join(f"`{key}`" for key in ServeConfig.DROPPED)
            parts.append(f"All keys of [layerskip_generate](#layerskip_generate), of which it ignores {dropped}; and:")
        parts += _tables(shown, tables)
        if refused := {key: why for key, why in config.REFUSED.items() if key not in config.model_fields}:
            rows = [[f"`{key}`", why] for key, why in refused.items()]
            parts += ["These keys of other configs are refused unless they are switched off:"]
            parts += [_table(["key", "why"], rows)]
    return "\n\n".join(parts) + "\n"


def _is_common(key: str, field: FieldInfo, config: type[RecipeConfig]) -> bool:
    common = config.model_fields.get(key)
    return common is not None and (_row(key, common) == _row(key, field))


def _tables(fields: Mapping[str, FieldInfo], known: dict[type[Section], str]) -> Iterator[str]:
    """A table of the keys and one for each section. `known` maps documented sections to their keys, and is extended."""
    if fields:
        yield _table(["key", "allowed", "default", "meaning"], [_row(key, field) for key, field in fields.items()])
    for key, field in fields.items():
        sections = [section for section in _sections(field.annotation) if section.model_fields]
        new = [section for section in sections if section not in known]
        for section in sections:
            # In a mapping of sections, a name of the user's choice stands between the key and a section's keys.
            prefix = f"{key}." if section in _direct(field.annotation) else f"{key}.NAME."
            if section in known:
                yield f"The keys `{prefix}KEY` are those of [{known[section]}](#{known[section]})."
                continue
            if section is new[0]:
                yield f"### {key}"
            known[section] = key
            if summary := _summary(section):
                yield summary
            yield from _tables({prefix + name: part for name, part in section.model_fields.items()}, known)


def _direct(annotation: Any) -> list[type[Section]]:
    """The sections among the types of an annotation."""
    kinds = [kind for kind, _ in alternatives(annotation)]
    return [kind for kind in kinds if inspect.isclass(kind) and issubclass(kind, Section)]


def _sections(annotation: Any) -> list[type[Section]]:
    """The sections in an annotation, including those inside a mapping or list."""
    inner = [part for kind, _ in alternatives(annotation) for item in get_args(kind) for part in _sections(item)]
    return list(dict.fromkeys([*_direct(annotation), *inner]))


def _summary(section: type[Section]) -> str:
    """The first sentence of a section's docstring."""
    return (section.__doc__ or "").partition("\n\n")[0].replace("\n", " ").strip()


def _row(key: str, field: FieldInfo) -> list[str]:
    words = "any value" if field.annotation is Any else allowed(field.annotation, field)[0]
    words = words.replace(Component.ALLOWED[0], "a component")
    return [f"`{key}`", words, _default(field), " ".join((field.description or "").split())]


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined or isinstance(value, Section):
        return ""
    return f"`{value if isinstance(value, str) else json.dumps(value, default=str)}`"


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
