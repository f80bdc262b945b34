"""Load a config by name: read the YAML, merge `extends`, apply overrides."""

import re
from collections.abc import Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from layerskip_recipes.config.components import parameter_names
from layerskip_recipes.config.names import find_config, torchtune_configs
from layerskip_recipes.errors import ConfigError, first_line

# Keys that hold paths.
PATH_KEYS = re.compile("(dir|path|file|files|checkpoint|report|picture|source|draft|gguf)$")

_SafeLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # C is faster, but optional


class _Loader(_SafeLoader):
    """Reads YAML as OmegaConf does: 2e-5 is a number, and there are no dates. Duplicate keys are an error.

    Base-60 numbers and leading zeros stay text: YAML 1.1 reads layers 1:5 as 65 and file number 00003 as 3.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"duplicate key {twice[0]!r}", node.start_mark)
        return super().construct_mapping(node, deep)


_NUMBERS = {
    "int": r"[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F][0-9a-fA-F_]*)$",
    "float": r"[-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)([eE][-+]?[0-9]+)?$|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$"
    r"|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$",
}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] not in (*_NUMBERS, "timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _kind, _pattern in _NUMBERS.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(_pattern), list("-+.0123456789"))


def load_config(name: str, overrides: Sequence[str] = ()) -> DictConfig:
    """The config with `extends` and overrides merged, ~/ in paths expanded, and interpolations unresolved.

    An override is "dotted.key=value", or "~key" to remove a key. Text for a component's key sets its `_component_`.
    torchtune's own training configs get LayerSkip's default sections.
    """
    file = find_config(name)
    cfg = _load_chain(file, ())
    if "optimizer" in cfg and file in torchtune_configs().values():
        cfg = _with_layerskip(cfg, file, trains_draft=any(re.match("draft[.=]", override) for override in overrides))
    later: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if key.startswith("~") and not equals:
            _remove((later, cfg), key[1:])
        elif equals and key:
            value = parse_value(text)
            section = _select(cfg, path := key.split("."))
            if isinstance(value, str) and isinstance(section, dict) and "_component_" in section:
                value = {"_component_": value}
            change = reduce(lambda inner, name: {name: inner}, reversed(path), value)
            later = _merge(later, change)
            if value is None:  # so that later keys of this section do not inherit
                cfg = _merge(cfg, change)
            cfg = _without_other_datasets(cfg, change)
        else:
            raise ConfigError(f"override: {override!r} is not of the form key=value (or ~key to remove a key)")
    try:
        return OmegaConf.create(_at_home(_merge(cfg, later)))
    except OmegaConfBaseException as e:
        raise ConfigError(f"config: {name}: {first_line(e)}") from e


def _at_home(content: Any, key: str = "") -> Any:
    """Expand a leading ~/ in the values of path keys."""
    if isinstance(content, dict):
        return {name: _at_home(value, str(name)) for name, value in content.items()}
    if isinstance(content, list):
        return [_at_home(value, key) for value in content]
    if isinstance(content, str) and content.startswith("~/") and PATH_KEYS.search(key):
        return str(Path(content).expanduser())
    return content


def _load_chain(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if path in seen:
        chain = " -> ".join(p.name for p in (*seen, path))
        raise ConfigError(f"extends: {chain} is a cycle. A config cannot extend itself")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as e:
        raise ConfigError(f"config: {path} cannot be read as YAML: {e}") from e
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ConfigError(f"config: {path} does not map keys to values")
    bases = content.pop("extends", None)
    if bases is None:
        return content
    files = [
        find_config(str(base), relative_to=path.parent, key="extends")
        for base in (bases if isinstance(bases, list) else [bases])
    ]
    contents = [*(_load_chain(file, (*seen, path)) for file in files), content]
    return reduce(lambda merged, later: _merge(_without_other_datasets(merged, later), later), contents)


def _with_layerskip(cfg: dict[str, Any], file: Path, trains_draft: bool) -> dict[str, Any]:
    """torchtune's training config with LayerSkip's sections, an optimizer that moves bf16 weights without bitsandbytes,
    and Hugging Face's format."""
    from torchtune.utils import get_logger  # slow, and other configs do not need it

    optimizer, checkpointer = (str(cfg.get(key, {}).get("_component_")) for key in ("optimizer", "checkpointer"))
    bases = [] if trains_draft else ["_layerskip"]
    if optimizer.startswith("bitsandbytes."):
        bases.append("_adamw_8bit")
    elif optimizer == "torch.optim.AdamW" and "lora_attn_modules" not in cfg.get("model", {}):
        bases.append("_adamw")
    if checkpointer.endswith(".FullModelMetaCheckpointer"):
        bases.append("_llama3_8B_checkpoint")
    contents = [_load_chain(find_config(base), ()) for base in bases]
    added = ", ".join(f"{key}={value}" for content in contents for key, value in content.items())
    get_logger("INFO").info(f"Added to torchtune's {file.parent.name}/{file.stem}, or replaced in it: {added}.")
    return reduce(_merge, contents, cfg)


def _without_other_datasets(base: dict[str, Any], later: dict[str, Any]) -> dict[str, Any]:
    """`base` without the arguments of datasets that `later` replaces: a split or a count is meant for one dataset."""
    base = dict(base)
    for key in ("dataset", "dataset_val"):
        old, new = base.get(key), later.get(key)
        if (
            isinstance(old, dict)
            and isinstance(new, dict)
            and {**old, **new}.get("_component_") != old.get("_component_")
        ):
            base[key] = {"_component_": old.get("_component_")}
    return base


def _merge(base: dict[str, Any], later: dict[str, Any]) -> dict[str, Any]:
    """Merge `later` into `base`. A section with a new `_component_` drops inherited arguments that it does not take."""
    merged = dict(base)
    for key, new in later.items():
        old = base.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            component = new.get("_component_", old.get("_component_"))
            if component != old.get("_component_", component):
                taken = parameter_names(component)
                old = {name: value for name, value in old.items() if taken is None or name in taken}
            new = _merge(old, new)
        merged[key] = new
    return merged


def parse_value(text: str) -> Any:
    """Parse an override's value: YAML if it is a list, a mapping or quoted, else a single scalar."""
    if text == "None":
        return None
    if text[:1] in ("[", "{", '"', "'"):
        try:
            return yaml.load(text, Loader=_Loader)
        except (yaml.YAMLError, ValueError):
            return text
    loader = _Loader("")
    tag = loader.resolve(yaml.ScalarNode, text, (True, False))
    try:
        return loader.construct_object(yaml.ScalarNode(tag, text))
    except yaml.YAMLError:  # "=" and "<<" have a meaning only in a mapping
        return text


def _select(content: Any, path: Sequence[str]) -> Any:
    """The value at a path of keys; None if there is none."""
    for name in path:
        content = content.get(name) if isinstance(content, dict) else None
    return content


def _remove(contents: Sequence[dict[str, Any]], key: str) -> None:
    """Remove a dotted key from each of the mappings."""
    *parents, leaf = key.split(".")
    nodes = [node for content in contents if isinstance(node := _select(content, parents), dict) and leaf in node]
    for node in nodes:
        del node[leaf]
    if not nodes:
        raise ConfigError(f"override: ~{key} removes nothing: the config has no key {key!r}")
