"""The JSON schema of a recipe's YAML files, for editors that complete and check YAML."""

from typing import Any

from layerskip_recipes.config.recipe_config import RecipeConfig

EXTENDS = {
    "description": "The config that this one extends: a name, a path, or a list of them.",
    "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
}
INTERPOLATION = {"type": "string", "pattern": r"\$\{.+\}"}  # any value may refer to another key


def json_schema(config: type[RecipeConfig]) -> dict[str, Any]:
    """The JSON schema of a recipe's YAML files.

    It allows more than `RecipeConfig.load`, because a file describes a config before merging. Any key may be missing or
    null, any value may be an interpolation, and unknown top-level keys may hold plain values for interpolations.
    """
    schema = _relaxed(config.model_json_schema())
    properties = {"extends": EXTENDS} | schema.pop("properties")
    refused = {key: f"Not honoured: {why}." for key, why in config.REFUSED.items()}
    for key, why in (dict.fromkeys(config.IGNORED, "Ignored.") | refused).items():
        properties.setdefault(key, {"description": why})
    variables = {"type": ["string", "number", "boolean", "null"]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | schema | {
        "properties": properties,
        "additionalProperties": variables,
    }  # fmt: skip


def _relaxed(schema: Any) -> Any:
    """The schema without required keys, where each value may also be null or an interpolation."""
    if isinstance(schema, list):
        return [_relaxed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    relaxed = {key: _relaxed(value) for key, value in schema.items() if key not in ("required", "properties", "title")}
    for name, value in schema.get("properties", {}).items():
        described = {key: value[key] for key in ("description", "default") if key in value}
        value_schema = {key: part for key, part in _relaxed(value).items() if key not in described}
        relaxed.setdefault("properties", {})[name] = described | {
            "anyOf": [value_schema, INTERPOLATION, {"type": "null"}]
        }
    return relaxed
