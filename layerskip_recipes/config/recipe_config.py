"""RecipeConfig: the typed form of a merged YAML config, with the keys of all recipes."""

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field, PrivateAttr
from torchtune import training
from torchtune.modules import TransformerDecoder
from typing_extensions import Self

from layerskip_recipes.config.auto import Choices, best_device, computes_in_bf16, devices_here, unusable_gpu
from layerskip_recipes.config.components import Component, Takes
from layerskip_recipes.config.schema import AUTO, Auto, DeviceName, Section, Text, allowed, check
from layerskip_recipes.errors import ConfigError, first_line, mistakes_of
from layerskip_recipes.processes import num_processes

Seed = Annotated[int, Field(ge=0, le=2**31 - 1)]  # each rank adds its rank number


class RecipeConfig(Section):
    """The keys that every recipe has. A recipe's constructor calls `load` first and then reads no YAML."""

    IGNORED: ClassVar[Mapping[str, type]] = {}  # ignored keys of other configs, and the types of their values
    REFUSED: ClassVar[Mapping[str, str]] = {}  # torchtune's keys that this recipe does not support, and why
    REQUIRES: ClassVar[Mapping[str, Sequence[str]]] = {}  # {key: keys that do nothing without it}

    model: Annotated[Component, Takes()]
    """`layerskip_recipes.hf_decoder` with the `path` of a Hugging Face folder, or a torchtune builder and its
    arguments, such as `torchtune.models.llama3_2.llama3_2_1b`."""
    checkpointer: Annotated[Component, Takes("output_dir")]
    """`layerskip_recipes.hf_checkpointer` with the same `path`, a torchtune checkpointer of whole models, or
    `layerskip_recipes.checkpoint.scratch_checkpointer`."""
    tokenizer: Annotated[Component, Takes()]
    """A torchtune tokenizer, or `layerskip_recipes.hf_tokenizer` with the `path` of any Hugging Face folder."""
    dtype: Annotated[Literal["fp32", "bf16"], Auto()]
    """The dtype of weights and computation. auto: bf16 on a GPU, else fp32. Training of all weights also uses fp32 on a
    GPU if it fits."""
    model_dir: Annotated[Text, Field(examples=["~/models/Qwen3-0.6B"])] | None = None
    """The model of the configs `hf/*`: a Hugging Face folder, an output folder of `layerskip_finetune` (its newest
    checkpoint; for a draft, also its model), a folder of PEFT's LoRA adapters, which are merged into their base model,
    or a name on the Hugging Face Hub. Other keys refer to it."""
    data_dir: Annotated[Text, Field(examples=["my_data"])] | None = None
    """The data of the configs `qa/*`: a folder with `train.jsonl` and `test.jsonl`. Other keys refer to it."""
    output_dir: Annotated[Text, Field(examples=["/tmp/layerskip"])] | None = None
    """The folder that training writes to. For other recipes, a variable that other keys refer to."""
    device: Annotated[DeviceName, Auto()] = AUTO
    """The device to compute on. auto: the best one of this machine."""
    seed: Seed | None = None
    """The random seed. null: a random one."""
    float32_matmul_precision: Literal["highest", "high", "medium"] = "highest"
    """The precision of fp32 matrix products. `medium` uses bf16 if the processor supports it."""

    _source: DictConfig = PrivateAttr()
    _chosen: dict[str, Any] = PrivateAttr(default_factory=dict)
    _asked: list[str] = PrivateAttr(default_factory=list)

    @classmethod
    def load(cls, source: DictConfig, stored: Mapping[str, Any] | None = None) -> Self:
        """Check a merged config. The ConfigError lists all mistakes in single keys, or else all conflicts of keys.

        `stored`: see `Choices`.
        """
        try:
            return cls._load(source, stored)
        except ConfigError as e:  # several checks may report the same mistake
            raise ConfigError(*dict.fromkeys(_by_the_users_key(mistake, source) for mistake in e.args)) from e

    @classmethod
    def _load(cls, source: DictConfig, stored: Mapping[str, Any] | None) -> Self:
        # Resolve interpolations. An interpolation of a missing value is missing too, but only that value is reported.
        plain = [key for key in map(str, source) if not OmegaConf.is_interpolation(source, key)]
        if missing := [key for key in plain if OmegaConf.is_missing(source, key)]:
            raise ConfigError(*map(cls._missing, missing))
        try:
            content = OmegaConf.to_container(source, resolve=True, throw_on_missing=True)
        except OmegaConfBaseException as e:
            first = first_line(e)
            of_resolver = first.rpartition("ConfigError raised while resolving interpolation: ")[2]
            raise ConfigError(of_resolver if of_resolver != first else f"{e.full_key or 'config'}: {first}") from e
        assert isinstance(content, dict)
        # Set aside the keys that this recipe ignores or refuses.
        text = OmegaConf.to_yaml(source)
        refused = [key for key in map(str, content) if key in cls.REFUSED and key not in cls.model_fields]
        ignored = [
            key for key, ignored_type in cls.IGNORED.items() if isinstance(content.get(key), ignored_type | None)
        ]
        # An unknown key may be a variable of the user's, if an interpolation refers to it.
        variables = [key for key in map(str, content) if re.search(r"\$\{" + re.escape(key) + r"[.}\[]", text)]
        known = {k: v for k, v in content.items() if k in cls.model_fields or k not in refused + ignored + variables}
        mistakes = [
            f"{key}: {content[key]!r} is not honoured by this recipe: {cls.REFUSED[key]}. Set {key}=null"
            for key in refused
            if not (_is_off(content[key]) or (key.endswith("_dim") and content[key] == 1))
        ]
        # Check each key, then choose values for the keys that are `auto`.
        try:
            cfg = cls.parse(known)
            cfg._source = source
            for key, component in _components(cfg, ""):
                component.key = key
            choices = Choices(cfg, stored)
            cfg.choose(choices)
            cfg = cfg.with_choices(choices)
        except ConfigError as e:
            raise ConfigError(*mistakes, *e.args) from e
        # Check the keys together.
        if mistakes := [*mistakes, *cfg._needs(), *mistakes_of(cfg.check_together)]:
            raise ConfigError(*mistakes)
        return cfg

    @classmethod
    def _missing(cls, key: str) -> str:
        field = cls.model_fields.get(key)
        words, example = allowed(field.annotation, field) if field else ("a value", "...")
        return f"{key}: missing. Allowed: {words.removesuffix(' (or null)')}; for example {key}={example}"

    def _needs(self) -> Iterator[str]:
        for needed, keys in self.REQUIRES.items():
            for key in keys if getattr(self, needed) is None else ():
                value = getattr(self, key)
                if key in self.model_fields_set - self._chosen.keys() and value is not None and value is not False:
                    yield f"{key}: {value!r} needs {needed}. Set that, or {key}=null"

    @property
    def source(self) -> DictConfig:
        """The merged YAML, for logs."""
        return self._source

    def with_choices(self, choices: Choices) -> Self:
        """A copy in which keys have their chosen values, also in its YAML."""
        cfg = choices.cfg
        cfg.__dict__.pop("meta_model", None)  # its dtype may have changed
        cfg._chosen, cfg._asked = self._chosen | choices.chosen, self._asked + choices.asked
        cfg._source = copy.deepcopy(self._source)
        for key, value in choices.chosen.items():
            OmegaConf.update(cfg._source, key, as_yaml(value), merge=False)
        return cfg

    def choose(self, choices: Choices) -> None:
        """Choose values for keys that are `auto`. Each recipe adds its own keys."""
        device = choices.pick("device", best_device)
        choices.pick("dtype", lambda: "bf16" if computes_in_bf16(device) else "fp32")
        if "max_seq_len" in self.tokenizer.arguments:
            choices.pick("tokenizer.max_seq_len", lambda: None)  # only training cuts texts

    @property
    def chosen(self) -> dict[str, Any]:
        """The values that the recipe chose, by dotted key."""
        return self._chosen

    @property
    def values(self) -> dict[str, Any]:
        """The values of all keys that may be `auto`, by dotted key."""
        choices = Choices(self)
        return {key: choices.value(key) for key in self._asked}

    def check_together(self) -> Iterator[str]:
        """Yield a message for each conflict between keys. Each recipe has its own checks."""
        yield from ()

    @cached_property
    def meta_model(self) -> TransformerDecoder:
        """The model on the meta device, for reading its depth, context length and parameter names."""
        return self.build_on_meta()

    def build_on_meta(self) -> TransformerDecoder:
        """A new model on the meta device, which the caller may change."""
        with training.set_default_dtype(self.torch_dtype), torch.device("meta"):
            model = _unquantized(self.model).build()
        if not isinstance(model, TransformerDecoder) or len(model.layers) == 0:
            layers = f" of {len(model.layers)} layers" if isinstance(model, TransformerDecoder) else ""
            raise ConfigError(
                f"model: {self.model.path} builds a {type(model).__name__}{layers}. Allowed: a TransformerDecoder of "
                "1 layer or more"
            )
        check("model.max_seq_len", model.max_seq_len, Annotated[int, Field(ge=1, examples=[2048])])
        return model

    @property
    def torch_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.dtype == "bf16" else torch.float32

    @property
    def given_folder(self) -> str | None:
        """The checkpointer's `checkpoint_dir`, or the `path` of an `hf_checkpointer`."""
        return self.checkpointer.get("checkpoint_dir", self.checkpointer.get("path"))

    def find_device(self) -> torch.device:
        """Check that the config's device exists, and make it the current one."""
        available = devices_here()
        wanted = self.device
        device_type, _, index = wanted.partition(":")
        count = (
            getattr(torch, device_type).device_count()
            if device_type in available and device_type not in ("cpu", "mps")
            else 1
        )
        if device_type not in available or (index and int(index) >= count):
            reason = unusable_gpu() if device_type == "cuda" else None
            raise ConfigError(
                f"device: {wanted!r} is not available{'' if reason is None else f': {reason}'}. Allowed here: "
                f"{', '.join(available)}; for example device={available[-1]}"
            )
        if index and num_processes() > 1:
            raise ConfigError(
                f"device: {wanted!r} is one device for {num_processes()} processes. Set device={device_type}"
            )
        if device_type == "cuda" and index:
            torch.cuda.set_device(int(index))  # torchtune and torch use plain "cuda" in places
        device = torch.device(wanted)
        if self.dtype == "bf16" and device_type == "cuda" and not computes_in_bf16(wanted):
            name = torch.cuda.get_device_name(device)
            raise ConfigError(f"dtype: {name} does not support bf16; for example dtype=fp32")
        return device


def _by_the_users_key(mistake: str, source: DictConfig) -> str:
    """Name the key that the user sets: for `path: ${model_dir}`, a mistake in `path` is one in `model_dir`."""
    key = mistake.partition(":")[0]
    raw: Any = OmegaConf.to_container(source, resolve=False)
    for name in key.split("."):
        raw = raw.get(name) if isinstance(raw, dict) else None
    read = re.fullmatch(r"\$\{(\w+)\}", raw) if isinstance(raw, str) else None
    return re.sub(rf"(?<![\w.]){re.escape(key)}\b", read[1], mistake) if read and read[1] in source else mistake


def as_yaml(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: as_yaml(part) for name, part in value.items()}
    return value.section if isinstance(value, Component) else value.given if isinstance(value, Section) else value


def _is_off(value: Any) -> bool:
    """Whether a torchtune setting is off: null, false, 0, or a section of such values."""
    if isinstance(value, dict):
        return all(_is_off(part) for part in value.values())
    return value is None or (isinstance(value, int | float) and value == 0)


def _components(value: Any, key: str) -> Iterator[tuple[str, Component]]:
    """Yield each component in a config with its dotted key."""
    if isinstance(value, Component):
        yield key, value
    elif isinstance(value, Section):
        for name in type(value).model_fields:
            yield from _components(getattr(value, name), f"{key}.{name}" if key else name)
    elif isinstance(value, list):
        for part in value:
            yield from _components(part, key)
    elif isinstance(value, dict):
        for name, part in value.items():
            yield from _components(part, f"{key}.{name}")


def _unquantized(model: Component) -> Component:
    """The model's section without quantization, which QLoRA's builders would also run on the meta device."""
    changes: dict[str, Any] = {"quantize_base": False} if model.takes("quantize_base") else {}
    if isinstance(model.get("lora"), dict):
        changes["lora"] = {**model.get("lora"), "quantize_base": False}
    base = model.get("base")
    if isinstance(base, dict) and "_component_" in base:
        changes["base"] = _unquantized(Component(base)).section
    return model.replace(**changes)
