"""BenchmarkConfig: the keys of `layerskip_benchmark` and the checks across keys."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from pydantic import BeforeValidator, Field

from layerskip_recipes.benchmark.text_metrics import Metric
from layerskip_recipes.checkpoint.checkpointer_checks import check_checkpointer
from layerskip_recipes.config.auto import Choices
from layerskip_recipes.config.loading import load_config
from layerskip_recipes.config.names import find_config
from layerskip_recipes.config.schema import AUTO, Auto, Flag, Picture, PositiveInt, Text
from layerskip_recipes.errors import ConfigError, mistakes_of
from layerskip_recipes.generation.config import DecodingConfig, GenerateConfig, PromptConfig
from layerskip_recipes.generation.drafting.section import OptionalSpeculation, SelfSpeculation
from layerskip_recipes.generation.drafting.speculation import SPECULATION_DEFAULTS
from layerskip_recipes.generation.kernels.when_to_compile import has_compiler
from layerskip_recipes.generation.sampling import Temperature
from layerskip_recipes.model.decoder import layerskip_decoder

BASELINE = "baseline"
VARIANT_EXAMPLE = "for example variants.chain.exit_layer=3 variants.chain.num_speculations=5"
NEW_TOKENS = 128


def _parse_variants(value: Any) -> dict[str, SelfSpeculation]:
    """Parse the sections by name. null drops a variant of the extended config."""
    if not isinstance(value, Mapping):
        raise ConfigError(f": {value!r} is not allowed. Allowed: named sections; {VARIANT_EXAMPLE}")
    variants: dict[str, SelfSpeculation] = {}
    for name, section in value.items():
        if section is None:
            continue
        key = f"variants.{name}"
        if name == BASELINE:
            raise ConfigError(f"{key}: the name is taken. Allowed: any except {BASELINE}; {VARIANT_EXAMPLE}")
        variants[name] = SelfSpeculation.parse(_with_defaults({} if section == AUTO else section), key)
    return variants


def _with_defaults(section: Any) -> Any:
    """With an exit or a draft, missing keys are not `auto`."""
    keys = dict(section) if isinstance(section, Mapping) else {}
    has_draft = keys.get("draft", AUTO) not in (None, AUTO)
    if not has_draft and keys.get("exit_layer", AUTO) == AUTO:
        return section
    return SPECULATION_DEFAULTS | ({"draft_vocabulary": AUTO} if has_draft else {}) | keys


class BenchmarkConfig(DecodingConfig, PromptConfig):
    """A checkpoint, prompts, and the decoding methods to compare."""

    IGNORED: ClassVar = {**DecodingConfig.IGNORED, "benchmark": dict}  # this recipe always compares
    REFUSED: ClassVar = {
        key: "it measures variants, and prints figures only"
        for key in GenerateConfig.model_fields
        if key != "benchmark"
    }

    variants: Annotated[dict[str, Annotated[SelfSpeculation, Auto()]], BeforeValidator(_parse_variants)] | None = None
    """Methods to compare with decoding without drafts: named sections with the keys of `self_speculation`. auto: as
    `layerskip_generate` would choose. In a section with an exit or a draft, missing keys have defaults: 6 drafted
    tokens, and nothing else. null drops a variant of the extended config."""
    self_speculation: OptionalSpeculation = None
    """The only variant if `variants` is missing, so a generation config can be measured unchanged."""
    temperatures: Annotated[list[Temperature], Field(min_length=1, examples=["[0.0,0.8]"])] | None = None
    """Temperatures to measure, each with its own table. The default is [0.0, 0.8]."""
    temperature: Temperature | None = None
    """The only temperature if `temperatures` is missing, so a generation config can be measured unchanged."""
    max_new_tokens: Annotated[int, Field(ge=2, examples=[NEW_TOKENS]), Auto()] = NEW_TOKENS
    """The maximum number of new tokens per prompt; auto is 128."""
    compile: Annotated[Flag, Auto()] = False
    """Compile the decoding steps, as in `layerskip_generate`; auto: if this machine can."""
    repeats: Annotated[PositiveInt, Auto()] = AUTO
    """How many times each method decodes all prompts. The report has the median and the range. auto: as many as
    decode 12 prompts, at most 3."""
    metrics: Annotated[list[Metric], Field(examples=["[rougeL]"])] | None = None
    """Scores of the outputs against the prompts' references."""
    random_weights: Flag = False
    """Measure the cost of rounds without a checkpoint or tokenizer: weights and prompts are random. The report has the
    times, and the speed-ups at accept rates of 0.5, 0.7 and 0.9."""
    prompt_tokens: PositiveInt = 128
    """The length of each random prompt, for `random_weights`."""
    tune: Flag = False
    """Predict the speed of every exit, draft length and draft vocabulary (and of int8 drafts if compiled for a
    CPU), then measure the best few instead of `variants`. For a trained draft (`self_speculation.draft`, or the one
    beside the model) it chooses length and precision. Writes tune.json, a table in .md, and a picture."""
    tune_extends: Annotated[Text, Field(examples=["quickstart/generate"])] | None = None
    """The generation config that the tuned config, `report_dir`/tuned.yaml, extends. null: `tune` writes no config."""
    report_dir: Annotated[Text, Field(examples=["benchmark"])] | None = None
    """The folder for benchmark.json, benchmark.md and tuned.yaml. Required except with `random_weights`."""
    picture: Picture | None = None
    """A bar chart of tokens per second. With `tune` the file is named tune."""

    def choose(self, choices: Choices) -> None:
        choices.pick("max_new_tokens", lambda: NEW_TOKENS)
        super().choose(choices)
        choices.pick("compile", lambda: has_compiler(torch.device(choices.value("device"))))

    @property
    def compared(self) -> dict[str, SelfSpeculation]:
        """The variants by name; empty with `tune`, which chooses them after loading the model."""
        if self.tune:
            return {}
        return self.variants or ({"self_speculation": self.self_speculation} if self.self_speculation else {})

    def key_of(self, variant: str) -> str:
        return f"variants.{variant}" if self.variants else "self_speculation"

    @property
    def all_temperatures(self) -> list[float]:
        temperatures = self.temperatures or ([0.0, 0.8] if self.temperature is None else [self.temperature])
        return list(dict.fromkeys(temperatures))

    @property
    def tuned_path(self) -> Path | None:
        """Where the tuned config goes; None if no config is written."""
        if not self.tune or self.tune_extends is None:
            return None
        return Path(self.report_dir or "") / "tuned.yaml"

    def check_together(self) -> Iterator[str]:
        yield from self._check_methods()
        # Each variant against the model.
        model = layerskip_decoder(self.meta_model)
        for name, variant in self.compared.items():
            yield from mistakes_of(variant.check_against, model, self.key_of(name))
        if self.tune and self.self_speculation is not None:
            yield from mistakes_of(self.self_speculation.check_against, model)
        if self.random_weights:
            for key in ("metrics", "tune", "stop_strings"):
                if value := getattr(self, key):
                    yield f"{key}: {value} needs a checkpoint, and random_weights has none. Set {key}=null"
            for name, variant in self.compared.items():
                if variant.given.get("draft") is not None:
                    key = f"{self.key_of(name)}.draft"
                    yield f"{key}: {variant.draft!r} needs its model, and random_weights has none. Set {key}=null"
                if self.quantizer is not None:
                    yield from mistakes_of(variant.check_quantised, self.key_of(name))
            return
        # Checkpoint, files and prompts.
        if self.report_dir is None:
            yield "report_dir: None is not allowed. Allowed: text; for example report_dir=benchmark"
        if self.is_conversation:
            yield (
                f"prompt: {self.prompt!r} is a conversation, which layerskip_benchmark does not support. Allowed: "
                'texts; for example prompt=["def main(", "import os"]'
            )
        yield from mistakes_of(check_checkpointer, self)
        if self.tune:
            yield from mistakes_of(self._check_tune)
        yield from self.check_prompts()

    def _check_methods(self) -> Iterator[str]:
        if not (self.variants or self.self_speculation or self.tune):
            yield f"variants: {self.variants or None} has nothing to compare. Allowed: sections; {VARIANT_EXAMPLE}"
        if self.variants and self.self_speculation is not None and not self.tune:
            yield (
                f"self_speculation: {self.self_speculation!r} has no effect beside variants. Set self_speculation=null"
            )
        if self.tune and self.quantizer is not None:
            yield "quantizer: tune only supports an unquantised checkpoint. Set quantizer=null or tune=false"
        if self.temperatures is not None and self.temperature is not None:
            yield f"temperature: {self.temperature} has no effect: temperatures lists them. Set temperature=null"

    def _check_tune(self) -> Iterator[str]:
        if self.tuned_path is None or self.tune_extends is None:
            return
        if find_config(self.tune_extends, key="tune_extends") == self.tuned_path.resolve():
            yield f"tune_extends: the tuned config would replace {self.tune_extends}. Give another report_dir"
        try:
            model = [f"model_dir={self.model_dir}"] if self.model_dir else []
            GenerateConfig.load(load_config(self.tune_extends, model))
        except ValueError as e:
            yield (
                f"tune_extends: {self.tune_extends} is not a valid generation config ({e}). For example "
                "tune_extends=quickstart/generate"
            )
