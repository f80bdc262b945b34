"""The `layerskip` command: list, copy, print and check configs, print their schema, export checkpoints."""

import argparse
import json
import os
import shutil
import sys
from pathlib import Path

from layerskip_recipes.cli.configs import RECIPES, config_class, resolved, validate
from layerskip_recipes.cli.run import run_cli
from layerskip_recipes.config.names import find_config, our_configs, torchtune_configs
from layerskip_recipes.config.paths import check_folder
from layerskip_recipes.errors import ConfigError


def list_configs() -> None:
    """Print our configs with the recipe that each header names, then torchtune's configs."""
    print("layerskip configs")
    ours = our_configs()
    width = max(map(len, ours), default=0)
    for name, path in ours.items():
        recipe = next((word for word in path.read_text(encoding="utf-8").split() if word in RECIPES), "")
        print(f"  {name:<{width}}  {recipe}".rstrip())
    print("torchtune configs (for extends; to those that train, --config NAME adds LayerSkip's sections)")
    for name in sorted(torchtune_configs()):
        print(f"  {name}")


def copy_config(name: str, target: str) -> None:
    """Copy a config's file, but never over an existing file."""
    source, path = find_config(name), Path(target)
    path = path / source.name if path.is_dir() else path.with_suffix(path.suffix or ".yaml")
    if path.exists():
        raise ConfigError(f"cp: {str(path)!r} exists already; choose another name")
    check_folder("cp", path.parent)
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, path)
    print(f"Copied to {path}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="layerskip",
        description="List, copy, print and check layerskip-recipes configs, and export checkpoints.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("ls", help="list the configs; ours are shown with their recipe")
    cp = commands.add_parser("cp", help="copy a config to a file")
    cp.add_argument("name", help="a config's name or path")
    cp.add_argument("file", help="the target file or an existing folder")
    cat = commands.add_parser("cat", help="print a config with its `extends` merged, without comments")
    check = commands.add_parser("validate", help="check a config without loading weights")
    for command in (cat, check):
        command.add_argument("name", help="a config's name or path")
        command.add_argument("overrides", nargs="*", metavar="key=value")
    cat.add_argument("--resolved", action="store_true", help="check it, and print what `auto` means here")
    schema = commands.add_parser("schema", help="print the JSON schema of a recipe's config, for editors")
    schema.add_argument("recipe", choices=[name.removeprefix("layerskip_") for name in sorted(RECIPES)])
    out = commands.add_parser("export", help="export a checkpoint for transformers, or its draft as a model of its own")
    out.add_argument("checkpoint", help="a model's folder, a run, LoRA adapters, or a trained draft of kind copy")
    out.add_argument("folder", help="the output folder, which must not exist")
    exit_help = "the exit for transformers' assistant_early_exit; without E, the trained exit"
    draft_help = "export the first E layers with norm and head; without E, up to the trained exit, or a trained draft"
    for key, text in (("--exit-layer", exit_help), ("--draft", draft_help)):
        out.add_argument(key, type=int, metavar="E", nargs="?", const=0, help=text)
    return parser


def main() -> None:
    args = _parser().parse_args()
    sys.path.append(os.getcwd())  # as `tune run` does, for components in the working directory
    run_cli(lambda: _run(args))


def _run(args: argparse.Namespace) -> None:
    """Run a command. Each imports only what it needs, because importing torch takes seconds."""
    if args.command == "ls":
        list_configs()
    elif args.command == "cp":
        copy_config(args.name, args.file)
    elif args.command == "cat":
        from omegaconf import OmegaConf

        from layerskip_recipes.config.loading import load_config

        source = load_config(args.name, args.overrides)
        print(OmegaConf.to_yaml(resolved(source) if args.resolved else source, resolve=args.resolved), end="")
    elif args.command == "schema":
        from layerskip_recipes.config.json_schema import json_schema

        print(json.dumps(json_schema(config_class(f"layerskip_{args.recipe}")), indent=2))
    elif args.command == "export":
        from layerskip_recipes.checkpoint.export import export, how_to_run

        which = {"exit_layer": args.exit_layer, "draft": args.draft}
        out = export(args.checkpoint, args.folder, **which)
        print(f"Exported to {out}\n{how_to_run(args.checkpoint, out, **which)}".rstrip())
    else:
        from layerskip_recipes.config.loading import load_config

        recipe = validate(load_config(args.name, args.overrides))
        print(f"{args.name}: fine, for `tune run {recipe}`")
