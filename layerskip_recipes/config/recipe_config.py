"""RecipeConfig: what the configs of all recipes have, read once from the merged YAML into one typed object."""

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import AfterValidator, Field, PrivateAttr
from torchtune import training
from torchtune.modules import TransformerDecoder
from typing_extensions import Self

from layerskip_recipes.config.choices import DEVICES, Choices, computes_in_bf16, devices_here, with_values
from layerskip_recipes.config.components import Component, Takes
from layerskip_recipes.config.schema import Auto, Section, Text, allowed
from layerskip_recipes.errors import ConfigError, first_line, mistakes_of


def _is_device(name: str) -> str:
    if not re.fullmatch(rf"({'|'.join(DEVICES)})(:\d+)?", name):
        raise ConfigError(f": {name!r} is no device. Allowed: {', '.join(DEVICES)}; for example device=cpu")
    return name


DeviceName = Annotated[str, AfterValidator(_is_device), Field(examples=["cpu"])]
Seed = Annotated[int, Field(ge=0, le=2**31 - 1)]  # each rank adds its number to the seed


class RecipeConfig(Section):
    """The keys that every recipe has.

    `load` makes one from a merged config. The constructor of a recipe does so first, and asks the YAML no more.
    """

    IGNORED: ClassVar[Mapping[str, type]] = {}  # keys of other configs that need no honouring, and what they hold
    REFUSED: ClassVar[Mapping[str, str]] = {}  # torchtune's keys that a recipe does not honour, and why
    REQUIRES: ClassVar[Mapping[str, Sequence[str]]] = {}  # keys that do nothing without another one, by that one

    model: Annotated[Component, Takes()]
    """`layerskip_recipes.hf_decoder` with the `path` of a Hugging Face folder, or a torchtune builder and its
    arguments, such as `torchtune.models.llama3_2.llama3_2_1b`."""
    checkpointer: Annotated[Component, Takes("output_dir")]
    """`layerskip_recipes.hf_checkpointer` with the same `path`, a torchtune checkpointer of whole models, or
    `layerskip_recipes.checkpoint.scratch_checkpointer`."""
    tokenizer: Annotated[Component, Takes()]
    """A torchtune tokenizer, or `layerskip_recipes.hf_tokenizer` with the `path` of any Hugging Face folder."""
    dtype: Annotated[Literal["fp32", "bf16"], Auto()]
    """The type of weights and of computation. null: bf16 on a GPU, else fp32; a training of all weights takes fp32 on a
    GPU too where that fits."""
    model_dir: Annotated[Text, Field(examples=["~/models/Qwen3-0.6B"])] | None = None
    """The model of the configs `hf/*`: a Hugging Face folder, a run of `layerskip_finetune` (its newest checkpoint), or
    a name on the hub. Other keys read it."""
    output_dir: Annotated[Text, Field(examples=["/tmp/layerskip"])] | None = None
    """Where a training writes; elsewhere a variable for other keys."""
    device: Annotated[DeviceName, Auto()] = None  # type: ignore[assignment]
    """Where to compute; null: the best device of the machine."""
    seed: Seed | None = None
    """The seed of all random numbers; null draws one."""
    float32_matmul_precision: Literal["highest", "high", "medium"] = "highest"
    """The precision of fp32 products; `medium` uses bf16 where the processor has it."""

    _source: DictConfig = PrivateAttr()
    _chosen: dict[str, Any] = PrivateAttr(default_factory=dict)

    @classmethod
    def load(cls, source: DictConfig) -> Self:
        """The typed config of a merged YAML config, checked without loading or writing anything.

        Raises:
            ConfigError: with all mistakes of the keys; once there are none, with all keys that do not go together.
        """
        try:
            return cls._load(source)
        except ConfigError as e:  # a model that cannot be built is found by several checks
            raise ConfigError(*dict.fromkeys(_by_the_users_key(mistake, source) for mistake in e.args)) from e

    @classmethod
    def _load(cls, source: DictConfig) -> Self:
        if missing := [cls._missing(key) for key in _missing_keys(source)]:
            raise ConfigError(*missing)
        try:
            content = OmegaConf.to_container(source, resolve=True, throw_on_missing=True)
        except OmegaConfBaseException as e:
            first = first_line(e)
            of_resolver = first.rpartition("ConfigError raised while resolving interpolation: ")[2]
            raise ConfigError(of_resolver if of_resolver != first else f"{e.full_key or 'config'}: {first}") from e
        assert isinstance(content, dict)
        text = OmegaConf.to_yaml(source)
        refused = [key for key in map(str, content) if key in cls.REFUSED and key not in cls.model_fields]
        ignored = [key for key, kind in cls.IGNORED.items() if isinstance(content.get(key), kind | None)]
        # A plain value may be the user's own variable, if an interpolation reads it.
        variables = [key for key in map(str, content) if re.search(r"\$\{" + re.escape(key) + r"[.}\[]", text)]
        kept = {k: v for k, v in content.items() if k in cls.model_fields or k not in refused + ignored + variables}
        mistakes = [
            f"{key}: {content[key]!r} is not honoured by this recipe: {cls.REFUSED[key]}. Set {key}=null"
            for key in refused
            if not (_is_off(content[key]) or (key.endswith("_dim") and content[key] == 1))
        ]
        try:
            cfg = cls.parse(kept)
        except ConfigError as e:
            raise ConfigError(*mistakes, *e.args) from e
        cfg._source = source
        for key, component in _components(cfg, ""):
            component.key = key
        try:
            cfg = cfg._with_choices()
        except ConfigError as e:
            raise ConfigError(*mistakes, *e.args) from e
        if mistakes := [*mistakes, *cfg._needs(), *mistakes_of(cfg.check_together)]:
            raise ConfigError(*mistakes)
        return cfg

    @classmethod
    def _missing(cls, key: str) -> str:
        field = cls.model_fields.get(key)
        words, example = allowed(field.annotation, field) if field else ("a value", "...")
        return f"{key}: missing. Allowed: {words.removesuffix(' (or null)')}; for example {key}={example}"

    def _needs(self) -> Iterator[str]:
        """Mistakes by `REQUIRES`."""
        for needed, keys in self.REQUIRES.items():
            for key in keys if getattr(self, needed) is None else ():
                value = getattr(self, key)
                if key in self.model_fields_set and value is not None and value is not False:
                    yield f"{key}: {value!r} needs {needed}. Set that, or {key}=null"

    @property
    def source(self) -> DictConfig:
        """The merged YAML, for logs."""
        return self._source

    def _with_choices(self) -> Self:
        """The config with a value for each null that asks for a choice."""
        choices = Choices(self)
        self.choose(choices)
        cfg = with_values(self, choices.chosen)
        cfg.__dict__.pop("meta_model", None)  # of another dtype
        cfg._chosen = choices.chosen
        cfg._source = copy.deepcopy(self._source)
        for key, value in choices.chosen.items():
            OmegaConf.update(cfg._source, key, value.section if isinstance(value, Component) else value, merge=False)
        return cfg

    def choose(self, choices: Choices) -> None:
        """Choose values for the keys that are null; each recipe adds its own keys."""
        device = choices.device
        choices.pick("dtype", lambda: "bf16" if computes_in_bf16(device) else "fp32")

    @property
    def chosen(self) -> dict[str, Any]:
        """The values that the recipe has chosen, by dotted keys."""
        return self._chosen

    def check_together(self) -> Iterator[str]:
        """The messages for keys that do not go together; each recipe has its own."""
        yield from ()

    @cached_property
    def meta_model(self) -> TransformerDecoder:
        """The model without memory for its weights, to look at: its depth, its length, the names of its parameters."""
        return self.build_on_meta()

    def build_on_meta(self) -> TransformerDecoder:
        """A model without memory for its weights, to be changed by the caller."""
        with training.set_default_dtype(self.torch_dtype), torch.device("meta"):
            model = _unquantised(self.model).build()
        if not isinstance(model, TransformerDecoder) or len(model.layers) == 0:
            layers = f" of {len(model.layers)} layers" if isinstance(model, TransformerDecoder) else ""
            raise ConfigError(
                f"model: {self.model.path} builds a {type(model).__name__}{layers}. Allowed: a TransformerDecoder of "
                "1 layer or more"
            )
        if not isinstance(model.max_seq_len, int) or model.max_seq_len < 1:
            raise ConfigError(
                f"model.max_seq_len: {model.max_seq_len!r} is not allowed. Allowed: an integer of 1 or more; for "
                "example model.max_seq_len=2048"
            )
        return model

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype` as torch's type."""
        return torch.bfloat16 if self.dtype == "bf16" else torch.float32

    @property
    def given_folder(self) -> str | None:
        """The folder of the weights as the config names it: `checkpoint_dir`, or `path` of an `hf_checkpointer`."""
        return self.checkpointer.get("checkpoint_dir", self.checkpointer.get("path"))

    def find_device(self) -> torch.device:
        """The device of the config, from here on the current one."""
        there = devices_here()
        wanted = self.device
        kind, _, index = wanted.partition(":")
        count = getattr(torch, kind).device_count() if kind in there and kind not in ("cpu", "mps") else 1
        if kind not in there or (index and not (index.isdigit() and int(index) < count)):
            raise ConfigError(
                f"device: {wanted!r} is not there. On this machine: {', '.join(there)}; for example device={there[-1]}"
            )
        if kind == "cuda" and index:
            torch.cuda.set_device(int(index))  # torchtune and torch say "cuda" in places
        device = torch.device(wanted)
        if self.dtype == "bf16" and kind == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
            name = torch.cuda.get_device_name(device)
            raise ConfigError(f"dtype: bf16 is not there on {name}; for example dtype=fp32")
        return device


def _missing_keys(source: DictConfig) -> list[str]:
    """The keys of the top level whose value is ???."""
    keys = map(str, source)
    return [key for key in keys if OmegaConf.is_missing(source, key) and not OmegaConf.is_interpolation(source, key)]


def _by_the_users_key(mistake: str, source: DictConfig) -> str:
    """A message about a key that only reads another one, such as `path: ${model_dir}`, as one about that other key."""
    key = mistake.partition(":")[0]
    raw: Any = OmegaConf.to_container(source, resolve=False)
    for name in key.split("."):
        raw = raw.get(name) if isinstance(raw, dict) else None
    read = re.fullmatch(r"\$\{(\w+)\}", raw) if isinstance(raw, str) else None
    return re.sub(rf"(?<![\w.]){re.escape(key)}\b", read[1], mistake) if read and read[1] in source else mistake


def _is_off(value: Any) -> bool:
    """Whether a setting of torchtune's asks for nothing: null, false, 0, or a section of such."""
    if isinstance(value, dict):
        return all(_is_off(part) for part in value.values())
    return value is None or (isinstance(value, int | float) and value == 0)


def _components(value: Any, key: str) -> Iterator[tuple[str, Component]]:
    """The components in a config with their keys."""
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


def _unquantised(model: Component) -> Component:
    """A model's section without quantised weights: QLoRA's builders would quantise on the meta device too."""
    changes: dict[str, Any] = {"quantize_base": False} if model.takes("quantize_base") else {}
    if isinstance(model.get("lora"), dict):
        changes["lora"] = {**model.get("lora"), "quantize_base": False}
    base = model.get("base")
    if isinstance(base, dict) and "_component_" in base:
        changes["base"] = _unquantised(Component(base)).section
    return model.replace(**changes)
