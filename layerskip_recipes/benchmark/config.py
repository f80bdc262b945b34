"""The config of `layerskip_benchmark`: which keys there are, and all that can be wrong on any machine."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig
from torchtune import utils
from torchtune.modules import TransformerDecoder

from layerskip_recipes.benchmark.peers import PEERS, check_peers
from layerskip_recipes.benchmark.sweep import check_sweep
from layerskip_recipes.benchmark.text_metrics import check_names
from layerskip_recipes.benchmark.tuner import config_path
from layerskip_recipes.checkpoint.checkpointers import check_checkpointer
from layerskip_recipes.config import settings
from layerskip_recipes.config.checks import PICTURES, check_ending, check_number
from layerskip_recipes.config.loading import load_config
from layerskip_recipes.config.names import find_config
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.generation import config as generate_config
from layerskip_recipes.generation.drafting.section import FILTERS, check_speculation, sampler_of, self_speculation
from layerskip_recipes.model.decoder import layerskip_decoder

log = utils.get_logger("INFO")

BASELINE = "baseline"


def check_temperatures(key: str, value: Any) -> None:
    """Raises a ValueError unless it is a list of different numbers of 0 or more."""
    listed = list(value) if isinstance(value, ListConfig) else []
    if not listed or any(temperature in listed[:at] for at, temperature in enumerate(listed)):
        raise ConfigError(f"{key}: {value!r} is not allowed. Allowed: a list of different numbers of 0 or more; for "
                         f"example {key}=[0.0,0.8]")  # fmt: skip
    for temperature in value:
        check_number(key, temperature, minimum=0, integer=False, example="[0.0,0.8]")


SETTINGS = settings.COMMON | {
    "prompt": settings.anything,
    "prompts": settings.component(optional=True),
    "prompt_file": settings.text("prompts.jsonl"),
    "max_new_tokens": settings.number(minimum=2, example=128),
    "temperatures": check_temperatures,
    **dict.fromkeys(FILTERS, settings.anything),
    "compile": settings.one_of(True, False),
    "repeats": settings.number(minimum=1, example=3),
    "batch_size": settings.number(minimum=1),
    "variants": settings.anything,
    "peers": settings.list_of(str, "[torchtune]"),
    "metrics": settings.list_of(str, "[rougeL]"),
    "stop_strings": settings.list_of(str, "[END]"),
    "stop_tokens": settings.list_of(int, "[2]"),
    "report_dir": settings.text("benchmark", optional=False),
    "picture": settings.text("benchmark.png"),
    "sweep": settings.anything,
    "tune": settings.flag,
    "tune_extends": settings.text("quickstart/generate"),
    "tune_file": settings.text("tuned.yaml"),
    "enable_kv_cache": settings.one_of(True, None),
}
REQUIRED = ("variants", "report_dir")
REFUSED = {
    "temperature": "temperatures lists them",
    "self_speculation": "variants lists what is compared",
    "exit_layer": "variants lists what is compared",
    "quantizer": "all ways decode the checkpoint as it is; draft_quantizer of a variant quantises its draft",
    "benchmark": "it always compares",
    "stream": "it prints figures, no texts",
    "output_file": "it keeps figures, no texts",
    "on_bad_prompt": "it measures all prompts or none",
    "system_prompt": "it has no conversation",
    "log_level": "it says little",
    "cudnn_deterministic_mode": "it measures the kernels that torch takes by itself",
    "tensor_parallel_plan": "it measures one device",
    "tensor_parallel_dim": "it measures one device",
}


def early_exit_variant(early_exit: int | None = None) -> dict[str, int | None]:
    """A variant that takes all tokens from an exit, without verification: fast, and another output."""
    return {"early_exit": early_exit}


def read_variants(cfg: DictConfig, model: TransformerDecoder) -> dict[str, dict[str, Any]]:
    """The variants by name: {"early_exit": E}, or what `check_speculation` makes of a section. null drops one.

    Raises:
        ValueError: the key, what was given, what is allowed.
    """
    if cfg.get("sweep") is not None:
        return {}  # it measures other things
    given = cfg.get("variants")
    sections = {k: v for k, v in given.items() if v is not None} if isinstance(given, DictConfig) else {}
    example = "for example variants.chain.exit_layer=3 variants.chain.num_speculations=5"
    if not sections:
        raise ConfigError(f"variants: {given!r} has nothing to compare. Allowed: sections by names; {example}")
    variants = {}
    for name, section in sections.items():
        key = f"variants.{name}"
        if name == BASELINE or name in PEERS:
            raise ConfigError(f"{key}: the name is taken. Allowed: any but {', '.join([BASELINE, *PEERS])}; {example}")
        if not isinstance(section, DictConfig):
            raise ConfigError(f"{key}: {section!r} is no section. Allowed: the keys of self_speculation; {example}")
        if "early_exit" in section:
            variants[name] = settings.check_section(section, key, early_exit_variant)
            model.check_exit(section.early_exit, f"{key}.early_exit")
            continue
        settings.check_section(section, key, self_speculation)
        for needed, value in (("exit_layer", 3), ("num_speculations", 5)):
            if section.get(needed) is None:
                raise ConfigError(
                    f"{key}.{needed}: missing; for example {key}.{needed}={value}, or for all tokens from an exit, "
                    f"without verification, {key}={{early_exit: 3}}"
                )
        variants[name] = check_speculation(section, model, key)
    return variants


def first_draft(variants: dict[str, dict[str, Any]]) -> tuple[int, int] | None:
    """Exit layer and draft length of the first variant that drafts."""
    for values in variants.values():
        if "early_exit" not in values:
            exits = values["exit_layer"]
            return exits[0] if isinstance(exits, list) else exits, values["num_speculations"]
    return None


def check_config(cfg: DictConfig) -> None:
    """All of a benchmark config that can be wrong on any machine.

    Raises:
        ValueError: the key, what was given, what is allowed.
    """
    settings.check_settings(cfg, SETTINGS, REFUSED, REQUIRED)
    check_names(cfg.get("metrics") or [])
    check_ending("picture", cfg.get("picture"), PICTURES)
    sampler = sampler_of(cfg, 0.0)
    model = layerskip_decoder(settings.build_on_meta(cfg))
    check_checkpointer(cfg, model)
    variants = read_variants(cfg, model)
    if cfg.get("sweep") is None:
        check_peers(cfg.get("peers") or [], sampler, cfg.get("batch_size", 1), first_draft(variants))
    if cfg.get("sweep") is not None:
        check_sweep(cfg.sweep, model, cfg.get("max_new_tokens", 128))
    _check_choice(cfg, len(model.layers))
    if cfg.get("stop_strings") and not cfg.get("metrics") and cfg.get("sweep") is None:
        raise ConfigError(
            f"stop_strings: {list(cfg.stop_strings)} end texts for metrics, and there are none; for example "
            "metrics=[rougeL] stop_strings=[END], or stop_strings=null"
        )
    if all(cfg.get(key) is None for key in ("prompt", "prompts", "prompt_file")):
        raise ConfigError('prompt: missing. Give prompt="text", prompt=[text, text], or prompt_file=FILE')
    if generate_config.is_conversation(cfg):
        raise ConfigError(
            f"prompt: {cfg.prompt!r} is a conversation, and layerskip_benchmark has none. Allowed: texts; for example "
            'prompt=["def main(", "import os"]'
        )


def _check_choice(cfg: DictConfig, layers: int) -> None:
    """Raises a ValueError for settings of `tune` and `sweep` that do not go together."""
    chooses = [key for key in ("tune", "sweep") if cfg.get(key) not in (None, False)]
    if len(chooses) > 1:
        raise ConfigError("tune: it cannot go with sweep; one after the other. Set tune=false or sweep=null")
    if chooses == ["tune"] and cfg.get("tune_extends") is None:
        raise ConfigError(f"tune: {cfg.tune} needs the generation config that it extends; for example "
                         "tune_extends=quickstart/generate")  # fmt: skip
    if chooses == ["tune"] and layers < 4:
        raise ConfigError(f"tune: a model of {layers} layers has nothing to choose. Set tune=false")
    needs = {"tune_extends": chooses, "tune_file": chooses and cfg.get("tune_extends")}
    for key, there in needs.items():
        if cfg.get(key) is not None and not there:
            wants = "tune or sweep" if not chooses else "tune_extends"
            raise ConfigError(f"{key}: {cfg[key]} needs {wants}, which is not there. Set {key}=null")
    if cfg.get("tune_extends") is not None:
        extended = find_config(cfg.tune_extends, key="tune_extends")
        if extended == config_path(cfg).resolve():
            raise ConfigError(f"tune_extends: {cfg.tune_extends} is the file that is written. Give another tune_file")
    if not chooses:
        return
    if cfg.get("repetition_penalty") not in (None, 1):
        raise ConfigError(
            f"repetition_penalty: {cfg.repetition_penalty} is not allowed with {chooses[0]}, which takes acceptance "
            "from the text as it is. Set repetition_penalty=null"
        )
    for key in ("metrics", "stop_strings") if chooses == ["sweep"] else ():
        if cfg.get(key) is not None:
            raise ConfigError(f"{key}: {cfg[key]} is not for a sweep, whose outputs are all the same. Set {key}=null")
    if cfg.get("tune_extends") is not None:
        _check_extended(cfg, chooses[0])


def _check_extended(cfg: DictConfig, chooses: str) -> None:
    """Raises a ValueError unless `tune_extends` is a generation config that decodes as it is measured here."""
    name = cfg.tune_extends
    try:
        extended = load_config(name)
        generate_config.check_config(extended)
    except ValueError as e:
        raise ConfigError(
            f"tune_extends: {name} is no generation config that works ({e}). For example "
            "tune_extends=quickstart/generate"
        ) from e
    ours = _decoding(cfg, cfg.get("temperatures", [0.0])[0])
    theirs = _decoding(extended, extended.get("temperature", 0.0))
    for key, value in theirs.items():
        if value != ours[key]:
            value, here = ("null" if side is None else side for side in (value, ours[key]))
            examples = {"temperature": f"temperatures=[{value}]", "repetition_penalty": "repetition_penalty=null there"}
            raise ConfigError(
                f"tune_extends: {name} has {key}={value}, and {chooses} would choose for {here}. Allowed: the same in "
                f"both; for example {examples.get(key, f'{key}={value}')}"
            )
    there, here = bool(extended.get("compile")), cfg.get("compile", False)
    if there != here:  # quick, and rough
        message = "tune_extends: %s has compile=%s, here it is %s, which the choice is for and what is written"
        log.warning(message, name, there, here)
    ours, theirs = _model(cfg), _model(extended)
    for key in ours:
        if ours[key] != theirs[key]:
            message = "tune_extends: %s has %s=%s, which is kept, and the choice is for %s, as it is here"
            log.warning(message, name, key, theirs[key], ours[key])


def _model(cfg: DictConfig) -> dict[str, Any]:
    """What the model is that decodes."""
    section, quantizer = cfg.checkpointer, cfg.get("quantizer")
    folders = {key: section.get(key) for key in ("checkpoint_dir", "adapter_checkpoint")}
    return {
        **{f"checkpointer.{key}": folder and str(Path(folder).absolute()) for key, folder in folders.items()},
        "dtype": cfg.get("dtype"),
        "quantizer": quantizer and quantizer.get("_component_"),
    }


def _decoding(cfg: DictConfig, temperature: float) -> dict[str, Any]:
    """What decides beside the model which draft is fastest; None is off. Greedy decoding has no filters."""
    off = {"repetition_penalty": 1} | ({"top_k": None, "top_p": 1, "min_p": 0} if temperature > 0 else {})
    filters = {key: None if cfg.get(key) == nothing else cfg.get(key) for key, nothing in off.items()}
    return {"temperature": temperature, "batch_size": cfg.get("batch_size") or 1, **filters}
