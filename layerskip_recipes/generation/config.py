"""The keys of recipes that decode, and their checks.

`DecodingConfig` has the keys of all of them. `AnswerConfig` adds what generation and the server share, and
`PromptConfig` what generation and benchmarks share. `GenerateConfig` is `layerskip_generate`'s own.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from layerskip_recipes.checkpoint.checkpointer_checks import check_checkpointer
from layerskip_recipes.config.auto import Choices
from layerskip_recipes.config.components import Component, Takes
from layerskip_recipes.config.paths import check_file, check_folder
from layerskip_recipes.config.recipe_config import RecipeConfig
from layerskip_recipes.config.schema import AUTO, Auto, Flag, PositiveInt, Section, Text
from layerskip_recipes.distributed.tensor_parallel import EXAMPLE_PLAN, check_processes, ranks_per_matrix
from layerskip_recipes.errors import ConfigError, mistakes_of
from layerskip_recipes.generation.drafting.section import OptionalSpeculation
from layerskip_recipes.generation.sampling import MinP, Penalty, Sampler, Temperature, TopP
from layerskip_recipes.generation.text.prompts import INTERACTIVE
from layerskip_recipes.model.decoder import LayerSkipDecoder, layerskip_decoder
from layerskip_recipes.processes import num_processes


class DecodingConfig(RecipeConfig):
    """The keys of every recipe that decodes: what an `LLM` needs to load and to draft, without prompts and outputs."""

    IGNORED: ClassVar[Mapping[str, type]] = {"enable_kv_cache": bool}  # the cache is always on

    self_speculation: OptionalSpeculation = None
    """The draft; auto: all its keys; null decodes without drafts on the same engine."""
    max_new_tokens: Annotated[PositiveInt, Auto(), Field(examples=[128])] = 128
    """Maximum number of new tokens per prompt; auto: 300, capped at half of the model's context length."""
    top_k: PositiveInt | None = None
    """Sample from this many of the likeliest tokens."""
    top_p: TopP | None = None
    """Sample from the smallest set of likeliest tokens whose probabilities sum to this value."""
    min_p: MinP | None = None
    """Drop tokens less likely than this fraction of the likeliest token's probability."""
    repetition_penalty: Penalty | None = None
    """Above 1, tokens of the prompt and the output become less likely."""
    stop_tokens: Annotated[list[int], Field(examples=["[2]"])] | None = None
    """Token ids that end a text, in addition to the tokenizer's stop tokens."""
    stop_strings: Annotated[list[Text], Field(examples=["[END]"])] | None = None
    """A text ends before the first of these strings."""
    compile: Annotated[Flag, Auto()] = AUTO
    """Compile the decoding steps: to C++ on a CPU (needs a C++ compiler), to CUDA graphs on a GPU. The first run takes
    half a minute longer, on a GPU some minutes; later runs load the code from a cache. auto: on
    a CPU if that should save more time than it takes, on a GPU for runs of more than 300 tokens."""
    quantizer: Annotated[Component, Takes()] | None = None
    """Quantises the whole model: a torchtune quantizer, or a torchao config such as
    `torchao.quantization.Int8WeightOnlyConfig`."""

    def choose(self, choices: Choices) -> None:
        super().choose(choices)
        choices.pick("max_new_tokens", lambda: min(300, self.meta_model.max_seq_len // 2))

    def sampler(self, temperature: float, seed: int | None = None) -> Sampler:
        penalty = 1.0 if self.repetition_penalty is None else self.repetition_penalty
        return Sampler(temperature, self.top_k, self.top_p, self.min_p, penalty, seed)


class AnswerConfig(DecodingConfig):
    """The keys of recipes that answer questions: generation and the server."""

    exit_layer: int | None = None
    """Take every token from this exit without verification: faster, but the output differs from the full model's."""
    temperature: Temperature = 0.0
    """0 is greedy. Draft and verification use the same temperature and filters."""
    system_prompt: Annotated[Text, Field(examples=["Answer briefly."])] | None = None
    """The system message of a conversation."""
    log_level: Literal["INFO", "DEBUG", "WARNING", "ERROR"] = "INFO"
    """The lowest level that is logged."""

    @property
    def ranks_per_matrix(self) -> int:
        """How many processes share each matrix."""
        return 1

    def check_together(self) -> Iterator[str]:
        yield from mistakes_of(check_checkpointer, self)
        yield from mistakes_of(self._check_exit_or_drafts, layerskip_decoder(self.meta_model))

    def _check_exit_or_drafts(self, model: LayerSkipDecoder) -> None:
        """Check that `exit_layer` or `self_speculation` fits the model, and that only one of them is set."""
        if self.self_speculation is not None:
            self.self_speculation.check_against(model, parallel=self.ranks_per_matrix)
        if self.exit_layer is not None:
            model.check_exit(self.exit_layer)
            if self.self_speculation is not None:
                raise ConfigError(
                    f"exit_layer: {self.exit_layer} is set beside self_speculation. To take all tokens from that exit: "
                    f"exit_layer={self.exit_layer} self_speculation=null"
                )


class PromptConfig(RecipeConfig):
    """The keys of recipes that decode prompts of their config: generation and benchmarks."""

    prompt: Any = None
    """A text; `user:` and `system:` for the tokenizer's chat template (use `hf_tokenizer`: among torchtune's own
    tokenizers only Llama's leave the answer's turn open); or a list of these. In `layerskip_generate` also
    `interactive`: a conversation that keeps its KV cache between turns (`/new` starts another, `/exit` ends it)."""
    prompts: Annotated[Component, Takes()] | None = None
    """A component that returns prompts, such as `layerskip_recipes.quickstart.heldout_prompts`; `prompt` wins."""
    prompt_file: Annotated[Text, Field(examples=["prompts.jsonl"])] | None = None
    """A text file (one prompt), a `.jsonl` or `.ndjson` file of `{"prompt": ...}` lines, which may have a `prediction`,
    or `-` for stdin; overrides `prompt`."""
    batch_size: PositiveInt = 1
    """Number of prompts decoded together, grouped by length; each row accepts its own number of tokens. In
    `layerskip_generate` without a comparison, a row that has finished takes the next prompt."""

    @property
    def is_conversation(self) -> bool:
        return self.prompt == INTERACTIVE and self.prompt_file is None

    def check_prompts(self) -> Iterator[str]:
        if self.prompt is None and self.prompts is None and self.prompt_file is None:
            yield 'prompt: missing. Give prompt="text", prompt.user="question", or prompt_file=FILE (- reads stdin)'


class Comparison(Section):
    """Compares with decoding without drafts."""

    compare: bool = False
    """Also decode each prompt without drafts, in the same process, and report the speed-up."""


class GenerateConfig(AnswerConfig, PromptConfig):
    """A torchtune generation config and `self_speculation`."""

    on_bad_prompt: Literal["error", "skip"] | None = None
    """What to do with a broken, empty or too long prompt. `error` (the default): stop before the model is loaded;
    `skip`: answer the other prompts and write the error to `output_file` in its place."""
    output_file: Annotated[Text, Field(examples=["answers.jsonl"])] | None = None
    """One JSON line per prompt, in prompt order. During the run, finished lines are in FILE.partial, so a killed run
    loses none."""
    stream: Literal[True, False, "draft"] = True
    """`true` prints tokens as they come, `false` whole texts; `draft` also shows drafted tokens, dim until accepted."""
    benchmark: Comparison | None = None
    """Compares with decoding without drafts."""
    tensor_parallel_dim: PositiveInt | None = None
    """Number of processes that share each matrix. Across groups of this size the layers are sharded (FSDP). null with
    a plan: all processes."""
    tensor_parallel_plan: Annotated[Component, Takes()] | None = None
    """torchtune's tensor-parallel plan, such as `torchtune.models.llama3.base_llama_tp_plan`."""

    @property
    def compares(self) -> bool:
        return self.benchmark is not None and self.benchmark.compare

    @property
    def ranks_per_matrix(self) -> int:
        return ranks_per_matrix(self.tensor_parallel_dim, self.tensor_parallel_plan)

    def check_together(self) -> Iterator[str]:
        yield from super().check_together()
        yield from self.check_prompts()
        yield from self._check_conversation()
        if self.output_file is not None:
            yield from mistakes_of(check_file, "output_file", self.output_file)
            if os.path.isfile(self.output_file):  # its folder gets FILE.partial during the run
                yield from mistakes_of(check_folder, "output_file", Path(self.output_file).parent)
            yield from self._check_inputs(self.output_file)
        yield from mistakes_of(self._check_processes, layerskip_decoder(self.meta_model))

    def _check_conversation(self) -> Iterator[str]:
        if not self.is_conversation and self.system_prompt is not None:
            yield (
                f"system_prompt: {self.system_prompt!r} needs prompt=interactive. For a single prompt: "
                f"prompt.user=QUESTION prompt.system={self.system_prompt!r}"
            )
        if self.is_conversation and self.batch_size != 1:
            yield f"batch_size: {self.batch_size} does not work with prompt=interactive. Set batch_size=1"
        if self.is_conversation and self.output_file is not None:
            yield f"output_file: {self.output_file!r} does not work with prompt=interactive. Set output_file=null"

    def _check_inputs(self, output_file: str) -> Iterator[str]:
        """Check that the output replaces no file that this run reads."""
        # Components name their file differently: path, source, ...
        of_component = self.prompts.arguments if self.prompts else {}
        inputs = {"prompt_file": self.prompt_file} | {f"prompts.{key}": value for key, value in of_component.items()}
        for key, read in inputs.items():
            both_exist = isinstance(read, str) and os.path.exists(read) and os.path.exists(output_file)
            if both_exist and os.path.samefile(read, output_file):
                yield (
                    f"output_file: {output_file!r} would overwrite {key}. Allowed: another file; for example "
                    "output_file=answers.jsonl"
                )

    def _check_processes(self, model: LayerSkipDecoder) -> Iterator[str]:
        """Check what several processes cannot do."""
        parallel = check_processes(model, self.tensor_parallel_dim, self.tensor_parallel_plan)
        if num_processes() == 1:
            return
        if self.compile is True and parallel < num_processes():
            yield (
                f"compile: True needs one process (there are {num_processes()}), or tensor parallelism over all of "
                f"them. Set compile=false, or tensor_parallel_dim=null tensor_parallel_plan={EXAMPLE_PLAN}"
            )
        asks_int8 = self.self_speculation is not None and self.self_speculation.draft_int8 is True
        single_process_keys = {
            "quantizer": self.quantizer,
            "self_speculation.draft_int8": True if asks_int8 else None,
            "prompt": INTERACTIVE if self.is_conversation else None,
            "prompt_file": "-" if self.prompt_file == "-" else None,
        }
        for key, value in single_process_keys.items():
            if value is not None:
                yield f"{key}: {value} needs one process, and there are {num_processes()}. Leave it out"
