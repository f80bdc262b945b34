"""The `layerskip` command: what `tune ls / cp / cat / validate` cannot do for our configs, and export."""

import argparse
import os
import re
import shutil
import sys
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from layerskip_recipes.benchmark import config as benchmark_config
from layerskip_recipes.checkpoint.export import export
from layerskip_recipes.cli.run import main_of
from layerskip_recipes.config.loading import load_config
from layerskip_recipes.config.names import find_config, our_configs, torchtune_configs
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.evaluation import recipe as eval
from layerskip_recipes.generation import config as generate_config
from layerskip_recipes.training import config as finetune_config

RECIPES = {
    "layerskip_finetune": finetune_config,
    "layerskip_benchmark": benchmark_config,
    "layerskip_generate": generate_config,
    "layerskip_eval": eval,
}


def list_configs() -> None:
    """Our configs with their recipes first, then torchtune's built-ins that a config can extend."""
    print("layerskip configs")
    # The first command of its header names the recipe: merging them all takes seconds.
    first_command = re.compile(rf"^# +tune run .*?\b({'|'.join(RECIPES)})\b", flags=re.M)
    width = max(map(len, our_configs()), default=0)
    for name, path in our_configs().items():
        found = first_command.search(path.read_text(encoding="utf-8"))
        print(f"  {name:<{width}}  {found[1] if found else ''}".rstrip())
    print("torchtune configs (for extends: and --config)")
    for name in sorted(torchtune_configs()):
        print(f"  {name}")


def copy_config(name: str, target: str) -> None:
    """Copy a config's file.

    Raises:
        ValueError: if there is no such config, or the target exists.
    """
    source, path = find_config(name), Path(target)
    path = path / source.name if path.is_dir() else path.with_suffix(path.suffix or ".yaml")
    if path.exists():
        raise ConfigError(f"cp: {str(path)!r} exists already; choose another name")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, path)
    except OSError as e:
        raise ConfigError(f"cp: {str(path)!r} cannot be written ({e.strerror}); choose another name") from e
    print(f"Copied to {path}")


def recipe_of(cfg: DictConfig) -> str:
    """The recipe that a config fits best: the fewest keys that it does not know; of equal ones the fewest that are
    missing, then the fewest that it refuses, which may be inherited and switched off; then the first of RECIPES."""

    def misfit(recipe: str) -> tuple[int, ...]:
        module, keys = RECIPES[recipe], set(cfg)
        unknown, refused = keys - {*module.SETTINGS, *module.REFUSED}, keys & {*module.REFUSED}
        return tuple(map(len, (unknown, {*module.REQUIRED} - keys, refused)))

    return min(RECIPES, key=misfit)


def validate(cfg: DictConfig) -> str:
    """Check a config by the recipe that it is for: its sections, its keys, every component's arguments.

    Returns:
        The recipe's name.

    Raises:
        ValueError: the first thing that is wrong.
    """
    name = recipe_of(cfg)
    RECIPES[name].check_config(cfg)
    return name


def main() -> None:
    """Entry point of the console script."""
    parser = argparse.ArgumentParser(
        prog="layerskip",
        description="Configs of layerskip-recipes: list, copy, print and check them; checkpoints for other programs.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("ls", help="list the configs, ours with their recipe")
    cp = commands.add_parser("cp", help="copy a config to a file")
    cp.add_argument("name", help="a config's name or path")
    cp.add_argument("file", help="where to copy it; a folder that exists gets it under its own name")
    cat = commands.add_parser("cat", help="print a config with its `extends` merged, without comments")
    check = commands.add_parser("validate", help="check sections and components without loading weights")
    for command in (cat, check):
        command.add_argument("name", help="a config's name or path")
        command.add_argument("overrides", nargs="*", metavar="key=value")
    out = commands.add_parser("export", help="a checkpoint for transformers, or its first layers as a draft model")
    out.add_argument("checkpoint", help="a Hugging Face folder, such as a finetuned epoch_0")
    out.add_argument("folder", help="where to write; must not exist")
    out.add_argument("--exit-layer", type=int, help="E for transformers' assistant_early_exit")
    out.add_argument("--draft", type=int, metavar="E", help="only the first E layers, with norm and head")
    args, rest = parser.parse_known_args()
    # argparse takes no more overrides behind an option.
    if any("=" not in word or word.startswith("-") for word in rest) or (rest and not hasattr(args, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides += rest
    sys.path.append(os.getcwd())  # as `tune run` does: components may lie beside a config

    def steps() -> None:
        if args.command == "ls":
            list_configs()
        elif args.command == "cp":
            copy_config(args.name, args.file)
        elif args.command == "export":
            print(f"Exported to {export(args.checkpoint, args.folder, args.exit_layer, args.draft)}")
        elif args.command == "cat":
            print(OmegaConf.to_yaml(load_config(args.name, args.overrides)), end="")
        else:
            recipe = validate(load_config(args.name, args.overrides))
            print(f"{args.name}: fine, for `tune run {recipe}`")

    main_of(steps)
