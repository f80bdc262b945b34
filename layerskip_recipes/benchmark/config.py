"""BenchmarkConfig: the keys of `layerskip_benchmark`, and what goes together."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from layerskip_recipes.benchmark.peers import PEERS
from layerskip_recipes.benchmark.text_metrics import Metric
from layerskip_recipes.checkpoint.checkpointers import check_checkpointer
from layerskip_recipes.config.loading import load_config
from layerskip_recipes.config.names import find_config
from layerskip_recipes.config.paths import PICTURES, check_ending
from layerskip_recipes.config.schema import Flag, PositiveInt, Section, Text
from layerskip_recipes.errors import ConfigError, mistakes_of
from layerskip_recipes.generation.config import DecodingConfig, GenerateConfig, Temperature
from layerskip_recipes.generation.drafting.section import SelfSpeculation, check_draft_fits
from layerskip_recipes.model.decoder import layerskip_decoder

BASELINE = "baseline"
EXAMPLE = "for example variants.chain.exit_layer=3 variants.chain.num_speculations=5"


class EarlyExitVariant(Section):
    """Every token from an exit, without verification: fast, and another output."""

    early_exit: PositiveInt
    """E: the number of layers that run for a token, 1 to L."""


Variant = SelfSpeculation | EarlyExitVariant


def _parse_variants(value: Any) -> dict[str, Variant]:
    """The sections by name. A null drops a variant that an extended config has."""
    if not isinstance(value, Mapping):
        raise ConfigError(f": {value!r} has nothing to compare. Allowed: sections by names; {EXAMPLE}")
    variants: dict[str, Variant] = {}
    for name, section in value.items():
        if section is None:
            continue
        key = f"variants.{name}"
        if name == BASELINE or name in PEERS:
            raise ConfigError(f"{key}: the name is taken. Allowed: any but {', '.join([BASELINE, *PEERS])}; {EXAMPLE}")
        if not isinstance(section, Mapping):
            raise ConfigError(f"{key}: {section!r} is no section. Allowed: the keys of self_speculation; {EXAMPLE}")
        if "early_exit" in section:
            variants[name] = EarlyExitVariant.parse(section, key)
        else:
            variants[name] = SelfSpeculation.parse(section, key)
    return variants


class FastestSetting(Section):
    """Nothing to set: a trial finds the fastest setting."""


class LlamaCpp(Section):
    """llama.cpp, by the package xllamacpp, on a CPU and for one prompt at a time."""

    gguf: Annotated[Text, Field(examples=["model.gguf"])]
    """The file of the same model, in any precision; docs/serving.md says how it is made."""
    draft: Annotated[Text, Field(examples=["draft.gguf"])] | None = None
    """The file of a draft, which is tried with 2, 4 and 6 tokens beside plain decoding."""

    def check_files(self) -> None:
        """Raises a ConfigError for a file that is not there."""
        for key in ("gguf", "draft"):
            file = getattr(self, key)
            if file is not None and not Path(file).is_file():
                raise ConfigError(
                    f"peers.llama_cpp.{key}: {file!r} is no file. Allowed: a GGUF file of this model; for example "
                    f"peers.llama_cpp.{key}={'model' if key == 'gguf' else 'draft'}.gguf"
                )


class Peers(Section):
    """Other libraries by their names."""

    torchtune: FastestSetting | None = None
    """Its own generation with its KV cache."""
    transformers: FastestSetting | None = None
    """`generate`."""
    transformers_early_exit: FastestSetting | None = None
    """`generate(assistant_early_exit=E)` with 2, 4 and 6 drafts, from the exit of the first variant that has one and
    from twice as deep an exit."""
    llama_cpp: LlamaCpp | None = None
    """llama.cpp on a GGUF file."""

    @property
    def names(self) -> list[str]:
        """Of those that run."""
        return [name for name in PEERS if getattr(self, name) is not None]


def _parse_peers(value: Any) -> Any:
    """A list of names stands for sections without keys; an empty one for nothing."""
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        value = {name: {} for name in value}
    return None if value == {} else value


class BenchmarkConfig(DecodingConfig):
    """A checkpoint, prompts, and the methods of decoding that are compared."""

    IGNORED: ClassVar = {**DecodingConfig.IGNORED, "benchmark": dict}  # this recipe always compares
    REFUSED: ClassVar = {
        "exit_layer": "variants lists what is compared",
        "stream": "it prints figures, no texts",
        "output_file": "it keeps figures, no texts",
        "on_bad_prompt": "it measures all prompts or none",
        "system_prompt": "it has no conversation",
        "log_level": "its log has a few lines only",
        "tensor_parallel_plan": "it measures one device",
        "tensor_parallel_dim": "it measures one device",
    }
    REQUIRES: ClassVar = {"metrics": ("stop_strings",), "tune_extends": ("tune_file",)}

    variants: Annotated[dict[str, Variant], BeforeValidator(_parse_variants)] | None = None
    """What is compared with autoregressive decoding: sections like `self_speculation` by names of your own, or
    `{early_exit: E}`, which takes every token from an exit. null drops one that an extended config has."""
    self_speculation: SelfSpeculation | None = None
    """The only variant if there are no `variants`, so that a generation config can be measured as it is."""
    peers: Annotated[
        Peers | None,
        BeforeValidator(_parse_peers, json_schema_input_type=Peers | list[Literal[tuple(PEERS)]] | None),
        Field(examples=["[torchtune]"]),
    ] = None
    """Other libraries on the same model: a list of names, or sections by names. One that is not installed, or cannot do
    what the config asks for, is left out."""
    temperatures: Annotated[list[Temperature], Field(min_length=1, examples=["[0.0,0.8]"])] | None = None
    """Each is a measurement of its own, with a table of its own. The default is [0.0, 0.8]."""
    temperature: Temperature | None = None
    """The only temperature if there are no `temperatures`, so that a generation config can be measured as it is."""
    max_new_tokens: Annotated[int, Field(ge=2, examples=[128])] = 128
    """At most so many new tokens for each prompt."""
    repeats: PositiveInt = 3
    """How often all prompts are decoded by each method; the medians count, and the ranges are reported."""
    metrics: Annotated[list[Metric], Field(examples=["[rougeL]"])] | None = None
    """How near outputs come to the prompts' references."""
    random_weights: Flag = False
    """What will rounds cost, before there is a checkpoint? Weights and prompt are random, and neither checkpoint nor
    tokenizer is read. Reported are the times, and the speed-up that acceptances of .5, .7 and .9 would bring."""
    prompt_tokens: PositiveInt = 128
    """The length of the random prompt of `random_weights`."""
    tune: Literal[True, False, "grid"] = False
    """`true` predicts the speed of every exit, draft length, draft vocabulary and, compiled for a CPU, int8 drafts, and
    measures the best few in place of the variants; with a trained draft, `self_speculation.draft`, its lengths and
    precisions. `grid` measures all lengths of every exit. Writes tune.json (grid.json) and .md, and a picture."""
    tune_extends: Annotated[Text, Field(examples=["quickstart/generate"])] | None = None
    """With `tune`: the generation config that the written config extends; null writes none."""
    tune_file: Annotated[Text, Field(examples=["tuned.yaml"])] | None = None
    """Where the config of the fastest way goes; the default is tuned.yaml in `report_dir`."""
    report_dir: Annotated[Text, Field(examples=["benchmark"])] | None = None
    """The folder of benchmark.json, a table in benchmark.md, and tuned.yaml; required but with `random_weights`."""
    picture: Annotated[Text, Field(examples=["benchmark.png"])] | None = None
    """A bar chart of tokens per second, or the heat map of a grid. With `tune` the file is called tune or grid."""

    @property
    def compared(self) -> dict[str, Variant]:
        """The variants by name; none where `tune` chooses them when the model is loaded."""
        if self.tune:
            return {}
        return self.variants or ({"self_speculation": self.self_speculation} if self.self_speculation else {})

    @property
    def tuned_draft(self) -> SelfSpeculation | None:
        """The section of a trained draft whose length and precision `tune` chooses."""
        given = self.self_speculation
        return given if self.tune and given is not None and given.draft is not None else None

    def key_of(self, variant: str) -> str:
        """The key of a variant, for messages."""
        return f"variants.{variant}" if self.variants else "self_speculation"

    @property
    def all_temperatures(self) -> list[float]:
        """The temperatures, in the order of their tables."""
        given = self.temperatures or ([0.0, 0.8] if self.temperature is None else [self.temperature])
        return list(dict.fromkeys(given))

    @property
    def writes_choice(self) -> bool:
        """Whether a generation config is written with what was fastest."""
        return bool(self.tune) and self.tune_extends is not None

    @property
    def tuned_path(self) -> Path:
        """Where the config of the fastest way goes."""
        return Path(self.tune_file or Path(self.report_dir or "") / "tuned.yaml")

    def check_together(self) -> Iterator[str]:
        yield from mistakes_of(check_ending, "picture", self.picture, PICTURES)
        yield from mistakes_of(self._check_what_is_compared)
        model = layerskip_decoder(self.meta_model)
        for name, variant in self.compared.items():
            key = self.key_of(name)
            if isinstance(variant, SelfSpeculation):
                yield from mistakes_of(variant.check_against, model, key)
                yield from mistakes_of(check_draft_fits, variant, self.quantizer, model, key=key)
            else:
                yield from mistakes_of(model.check_exit, variant.early_exit, f"{key}.early_exit")
        if self.tuned_draft is not None:
            yield from mistakes_of(self.tuned_draft.check_against, model)
        if self.random_weights:
            yield from mistakes_of(self._check_random_weights)
            return
        if self.report_dir is None:
            yield "report_dir: None is not allowed. Allowed: text; for example report_dir=benchmark"
        if self.is_conversation:
            yield (
                f"prompt: {self.prompt!r} is a conversation, and layerskip_benchmark has none. Allowed: texts; for "
                'example prompt=["def main(", "import os"]'
            )
        yield from mistakes_of(check_checkpointer, self)
        if self.peers is not None and self.peers.llama_cpp is not None:
            yield from mistakes_of(self.peers.llama_cpp.check_files)
        yield from mistakes_of(self._check_chooser, len(model.layers))
        yield from mistakes_of(self.check_prompts)

    def _check_what_is_compared(self) -> None:
        """Raises a ConfigError if nothing is compared, or a key of a generation config stands beside ours."""
        peers = self.peers is not None and self.peers.names
        if not (self.variants or self.self_speculation or self.tune or peers):
            raise ConfigError(
                f"variants: {self.variants or None} has nothing to compare. Allowed: sections by names, or peers; "
                f"{EXAMPLE}"
            )
        if self.variants and self.self_speculation is not None and not self.tune:
            raise ConfigError(
                f"self_speculation: {self.self_speculation!r} is not honoured beside variants, which lists what is "
                "compared. Set self_speculation=null"
            )
        if self.tune and self.quantizer is not None:
            raise ConfigError(
                "quantizer: tune chooses drafts for a checkpoint as it is. Set quantizer=null or tune=false"
            )
        if self.temperatures is not None and self.temperature is not None:
            raise ConfigError(
                f"temperature: {self.temperature} is not honoured: temperatures lists them. Set temperature=null"
            )

    def _check_random_weights(self) -> None:
        """Raises a ConfigError for what needs a checkpoint or texts."""
        for key in ("peers", "metrics", "tune"):
            if value := getattr(self, key):
                raise ConfigError(f"{key}: {value} needs a checkpoint, and random_weights has none. Set {key}=null")

    def _check_chooser(self, num_layers: int) -> None:
        """Raises a ConfigError for settings of `tune` that do not go together."""
        if self.tune and num_layers < 4:
            raise ConfigError(f"tune: a model of {num_layers} layers has nothing to choose. Set tune=false")
        if not self.tune or self.tune_extends is None:
            return
        if find_config(self.tune_extends, key="tune_extends") == self.tuned_path.resolve():
            raise ConfigError(f"tune_extends: {self.tune_extends} is the file that is written. Give another tune_file")
        try:
            model = [f"model_dir={self.model_dir}"] if self.model_dir else []
            GenerateConfig.load(load_config(self.tune_extends, model))
        except ValueError as e:
            raise ConfigError(
                f"tune_extends: {self.tune_extends} is no generation config that works ({e}). For example "
                "tune_extends=quickstart/generate"
            ) from e
