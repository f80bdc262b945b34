"""GenerateConfig: the keys of `layerskip_generate`, and what goes together."""

import os
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field

from layerskip_recipes.checkpoint.checkpointers import check_checkpointer
from layerskip_recipes.config.choices import Choices
from layerskip_recipes.config.components import Component, Takes
from layerskip_recipes.config.paths import check_file
from layerskip_recipes.config.recipe_config import RecipeConfig
from layerskip_recipes.config.schema import Auto, Flag, PositiveInt, Section, Text
from layerskip_recipes.distributed.tensor_parallel import EXAMPLE_PLAN, check_processes
from layerskip_recipes.errors import ConfigError, mistakes_of
from layerskip_recipes.generation.drafting.section import OptionalSpeculation, check_draft_fits
from layerskip_recipes.generation.sampling import MinP, Penalty, Sampler, Temperature, TopP
from layerskip_recipes.generation.text.prompts import INTERACTIVE
from layerskip_recipes.model.decoder import LayerSkipDecoder, layerskip_decoder
from layerskip_recipes.processes import num_processes


class DecodingConfig(RecipeConfig):
    """What generation and benchmarks have in common: prompts, lengths, filters."""

    IGNORED: ClassVar[Mapping[str, type]] = {"enable_kv_cache": bool}  # the cache is always on

    prompt: Any = None
    """A text; `user:` and `system:` for the tokenizer's chat template (of torchtune's own tokenizers only Llama's leave
    the turn of the answer open: take `hf_tokenizer`); a list of these; or, in `layerskip_generate`, `interactive`: a
    conversation whose cache is kept between turns (`/exit` ends it)."""
    prompts: Annotated[Component, Takes()] | None = None
    """A component that returns prompts, such as `layerskip_recipes.quickstart.heldout_prompts`; `prompt` replaces
    it."""
    prompt_file: Annotated[Text, Field(examples=["prompts.jsonl"])] | None = None
    """A text file (one prompt), a `.jsonl` file of `{"prompt": ...}` lines, or `-` for standard input; replaces
    `prompt`."""
    max_new_tokens: Annotated[PositiveInt, Auto(), Field(examples=[128])] = 128
    """At most so many new tokens for each prompt; null: 300, and at most half of the model's longest text."""
    batch_size: PositiveInt = 1
    """Prompts decoded together, those of similar length; each row accepts its own number of tokens. In
    `layerskip_generate` without a comparison, a row whose answer has ended takes the next prompt."""
    top_k: PositiveInt | None = None
    """Sample from the so many likeliest tokens."""
    top_p: TopP | None = None
    """Sample from the likeliest tokens that have this probability together."""
    min_p: MinP | None = None
    """Leave out tokens with less than this part of the likeliest one's probability."""
    repetition_penalty: Penalty | None = None
    """Above 1 makes tokens of the prompt and of the output less likely."""
    stop_tokens: Annotated[list[int], Field(examples=["[2]"])] | None = None
    """Ids of tokens that end a text, beside the tokenizer's."""
    stop_strings: Annotated[list[Text], Field(examples=["[END]"])] | None = None
    """A text ends before the first of these strings."""
    compile: Flag = False
    """Compile the decoding steps: for a CPU in C++ (needs a C++ compiler), for a GPU as CUDA graphs. The first run
    takes half a minute more, on a GPU some minutes; torch keeps the code for the next. Without this key
    `layerskip_generate` compiles where that should save more time than it takes."""
    quantizer: Annotated[Component, Takes()] | None = None
    """Quantises the whole model: one of torchtune's quantizers, or a torchao configuration such as
    `torchao.quantization.Int8WeightOnlyConfig`."""

    def choose(self, choices: Choices) -> None:
        super().choose(choices)
        choices.pick("max_new_tokens", lambda: min(300, self.meta_model.max_seq_len // 2))

    def sampler(self, temperature: float, rng: torch.Generator | None = None) -> Sampler:
        """How tokens are chosen at a temperature."""
        penalty = 1.0 if self.repetition_penalty is None else self.repetition_penalty
        return Sampler(temperature, self.top_k, self.top_p, self.min_p, penalty, rng)

    @property
    def is_conversation(self) -> bool:
        """Whether the prompts are typed."""
        return self.prompt == INTERACTIVE and self.prompt_file is None

    def check_prompts(self) -> None:
        """Raises a ConfigError if there is none."""
        if self.prompt is None and self.prompts is None and self.prompt_file is None:
            raise ConfigError(
                'prompt: missing. Give prompt="text", prompt.user="question", or prompt_file=FILE (- reads stdin)'
            )


class Comparison(Section):
    """What a generation is compared with."""

    compare: bool = False
    """Decode each prompt autoregressively too, in the same process, and report the speed-up."""


class GenerateConfig(DecodingConfig):
    """A torchtune generation config and `self_speculation`."""

    self_speculation: OptionalSpeculation = None
    """How drafts are made; null decodes autoregressively on the same engine."""
    exit_layer: int | None = None
    """Take every token from this exit, without verification: fast, and another output."""
    temperature: Temperature = 0.0
    """0 is greedy. Filters and temperature are the same for drafts and verification."""
    system_prompt: Annotated[Text, Field(examples=["Answer briefly."])] | None = None
    """The system message of a conversation."""
    on_bad_prompt: Literal["error", "skip"] | None = None
    """`error` (the default): a prompt that is broken, empty or too long stops the run before the model is loaded;
    `skip`: the others are answered, and `output_file` has the error in its place."""
    output_file: Annotated[Text, Field(examples=["answers.jsonl"])] | None = None
    """A JSON line for each prompt, in the order of the prompts. Until the end the lines stand in FILE.partial as they
    come, so that a run that is killed loses none."""
    stream: Literal[True, False, "draft"] = True
    """`false` prints each text at once; `draft` shows drafted tokens dim until they are accepted."""
    benchmark: Comparison | None = None
    """The comparison with autoregressive decoding."""
    tensor_parallel_dim: PositiveInt | None = None
    """How many processes share each matrix; over the groups of so many the layers are sharded (FSDP). null with a plan:
    all processes."""
    tensor_parallel_plan: Annotated[Component, Takes()] | None = None
    """torchtune's plan for it, such as `torchtune.models.llama3.base_llama_tp_plan`."""
    log_level: Literal["INFO", "DEBUG", "WARNING", "ERROR"] = "INFO"
    """What is logged."""

    @property
    def compares(self) -> bool:
        """Whether the autoregressive baseline runs too."""
        return self.benchmark is not None and self.benchmark.compare

    def check_together(self) -> Iterator[str]:
        yield from mistakes_of(check_checkpointer, self)
        yield from mistakes_of(self.check_prompts)
        yield from mistakes_of(self._check_conversation)
        yield from mistakes_of(self._check_output_file)
        model = layerskip_decoder(self.meta_model)
        yield from mistakes_of(check_exit_or_drafts, self, model)
        yield from mistakes_of(self._check_processes, model)

    def _check_conversation(self) -> None:
        """Raises a ConfigError for what goes only with a conversation, or not with one."""
        if not self.is_conversation:
            if self.system_prompt is not None:
                raise ConfigError(
                    f"system_prompt: {self.system_prompt!r} is for prompt=interactive. For one prompt: "
                    f"prompt.user=QUESTION prompt.system={self.system_prompt!r}"
                )
            return
        if self.batch_size > 1:
            raise ConfigError(f"batch_size: {self.batch_size} does not go with prompt=interactive; batch_size=1")
        if self.output_file is not None:
            raise ConfigError(
                f"output_file: {self.output_file!r} does not go with prompt=interactive; output_file=null, or a "
                "prompt_file"
            )

    def _check_output_file(self) -> None:
        """Raises a ConfigError if `output_file` cannot be written, or is a file that the run reads."""
        name = self.output_file
        if name is None:
            return
        check_file("output_file", name)
        draft = self.self_speculation
        inputs = {
            "prompt_file": self.prompt_file,
            "self_speculation.draft_vocabulary_file": draft and draft.draft_vocabulary_file,
            # Whatever a component calls its file: path, source, ...
            **{f"prompts.{key}": value for key, value in (self.prompts.arguments if self.prompts else {}).items()},
        }
        for key, read in inputs.items():
            if isinstance(read, str) and os.path.exists(read) and os.path.exists(name) and os.path.samefile(read, name):
                raise ConfigError(
                    f"output_file: {name!r} would overwrite {key}. Allowed: another file; for example "
                    "output_file=answers.jsonl"
                )

    def _check_processes(self, model: LayerSkipDecoder) -> None:
        """Raises a ConfigError for what several processes cannot do."""
        parallel = check_processes(model, self.tensor_parallel_dim, self.tensor_parallel_plan, self.device)
        check_draft_fits(self.self_speculation, self.quantizer, model, parallel)
        if self.compile and parallel < num_processes():
            raise ConfigError(
                f"compile: True works with one process, and there are {num_processes()}, or where all of them share "
                f"each matrix. Set compile=false, or tensor_parallel_dim=null tensor_parallel_plan={EXAMPLE_PLAN}"
            )
        alone = {
            "quantizer": self.quantizer,
            "self_speculation.draft": self.self_speculation and self.self_speculation.draft,
            "self_speculation.draft_quantizer": self.self_speculation and self.self_speculation.draft_quantizer,
            "prompt": INTERACTIVE if self.is_conversation else None,
            "prompt_file": "-" if self.prompt_file == "-" else None,
        }
        for key, value in alone.items() if num_processes() > 1 else ():
            if value is not None:
                raise ConfigError(
                    f"{key}: {value} works with one process, and there are {num_processes()}. Leave it out"
                )


def check_exit_or_drafts(cfg: Any, model: LayerSkipDecoder) -> None:
    """Raises a ConfigError if a config's `exit_layer` or `self_speculation` does not fit the model, or both are set."""
    if cfg.self_speculation is not None:
        cfg.self_speculation.check_against(model)
    if cfg.exit_layer is not None:
        model.check_exit(cfg.exit_layer)
        if cfg.self_speculation is not None:
            raise ConfigError(
                f"exit_layer: {cfg.exit_layer} is set beside self_speculation. For all tokens from that exit: "
                f"exit_layer={cfg.exit_layer} self_speculation=null"
            )
