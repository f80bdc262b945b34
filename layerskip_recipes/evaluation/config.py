"""EvalConfig: the keys of `layerskip_eval`, and which keys go together."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field
from typing_extensions import Self

from layerskip_recipes.checkpoint.checkpointers import check_checkpointer
from layerskip_recipes.config.components import Component, Takes
from layerskip_recipes.config.layer_strings import select_exits
from layerskip_recipes.config.paths import PICTURES, check_ending
from layerskip_recipes.config.recipe_config import RecipeConfig
from layerskip_recipes.config.schema import Flag, Layers, PositiveInt, Text
from layerskip_recipes.data.datasets import CollateFn, Datasets
from layerskip_recipes.errors import ConfigError, mistakes_of
from layerskip_recipes.generation.config import check_exit_or_drafts
from layerskip_recipes.generation.drafting.section import SelfSpeculation, check_draft_fits
from layerskip_recipes.model.decoder import layerskip_decoder


def _as_folders(value: Any) -> list[str] | None:
    folders = value if isinstance(value, list) or value is None else [value]
    for folder in folders or ():
        if not isinstance(folder, str) or not Path(folder).is_dir():
            raise ConfigError(f": {folder!r} is no folder. Allowed: folders of task files; for example task_path=tasks")
    return folders


def _by_name(value: Any) -> Any:
    if not isinstance(value, Mapping) or not all(isinstance(part, Mapping) for part in value.values()):
        raise ConfigError(
            f": {value!r} is not allowed. Allowed: names, each with the keys of the checkpointer section that differ; "
            'for example "compare={before: {checkpoint_dir: /tmp/model, checkpoint_files: [model.safetensors]}}"'
        )
    return {str(name): part for name, part in value.items()}


class EvalConfig(RecipeConfig):
    """Measures a checkpoint: every exit on a `dataset`, or lm-eval's `tasks`, or both."""

    IGNORED: ClassVar[Mapping[str, type]] = {"enable_kv_cache": bool}  # the cache is always on
    REFUSED: ClassVar[Mapping[str, str]] = {
        "human_eval": "HumanEval is one of lm-eval's tasks: tasks=[humaneval] confirm_run_unsafe_code=true",
        **dict.fromkeys(("prompt", "prompts", "prompt_file"), "it measures a dataset or tasks"),
        **dict.fromkeys(("stream", "output_file"), "it prints figures, no texts"),
        **dict.fromkeys(
            ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "stop_tokens", "stop_strings"),
            "each task has its own",
        ),
        **dict.fromkeys(("tensor_parallel_plan", "tensor_parallel_dim"), "it measures on one device"),
        "on_bad_prompt": "it answers no prompts of a config",
        "benchmark": "a comparison is for layerskip_generate or layerskip_benchmark",
        "system_prompt": "it has no conversation",
        "compile": "its steps are not compiled",
        "log_level": "it logs little",
    }
    REQUIRES: ClassVar = {
        "dataset": ("collate_fn", "max_batches", "layers", "num_speculations", "picture"),
        "tasks": (
            "task_path",
            "num_fewshot",
            "limit",
            "apply_chat_template",
            "confirm_run_unsafe_code",
            "exit_layer",
            "self_speculation",
            "max_new_tokens",
        ),
    }

    quantizer: Annotated[Component, Takes()] | None = None
    """Quantises the whole model, as in `layerskip_generate`."""
    batch_size: PositiveInt = 1
    """Samples or prompts that are computed together."""

    dataset: Datasets | None = None
    """Any torchtune dataset, or a list of them: loss, perplexity, accuracy and agreement with the last layer of every
    exit, in one pass."""
    collate_fn: CollateFn = None
    """Makes a batch of the dataset's samples; null is `torchtune.data.padded_collate_sft`."""
    max_batches: PositiveInt | None = None
    """The first so many batches of the dataset; null for all."""
    layers: Layers | None = None
    """The layers whose outputs are measured as exits, such as "0::4" or "3,7"; null for all. The last exit is always
    measured."""
    num_speculations: Annotated[int, Field(ge=1, examples=[6])] | None = None
    """The draft length of the column that says how many tokens in a row an exit agrees on with the last layer; null is
    6."""
    picture: Annotated[Text, Field(examples=["exits.png"])] | None = None
    """A .png, .pdf or .svg of loss and agreement over the exits of every checkpoint."""

    tasks: Annotated[list[Text], Field(min_length=1, examples=["[arc_easy]"])] | None = None
    """Names of lm-eval's tasks, groups or tags, or of your own task files; needs `pip install lm-eval`."""
    task_path: Annotated[list[str] | None, BeforeValidator(_as_folders)] = None
    """A folder, or a list of folders, with task files of your own."""
    num_fewshot: Annotated[int, Field(ge=0)] | None = None
    """Examples before each question; null for each task's own number."""
    limit: PositiveInt | None = None
    """The first so many documents of each task; null for all."""
    apply_chat_template: Flag = False
    """Ask each question as a conversation; needs `hf_tokenizer` and a model with a chat template."""
    confirm_run_unsafe_code: Flag = False
    """Allow tasks that run programs which the model writes, such as `humaneval`. They run on this machine without a
    sandbox, so take a container or a virtual machine."""
    exit_layer: int | None = None
    """All answers of tasks come from this exit; null for the last layer."""
    self_speculation: SelfSpeculation | None = None
    """Tasks that generate are decoded self-speculatively; greedy answers stay the same, and the report has speed and
    acceptance."""
    max_new_tokens: Annotated[int, Field(ge=1, examples=[256])] | None = None
    """The longest answer of a task that does not name its limit; null is 256."""

    compare: Annotated[dict[str, dict[str, Any]], BeforeValidator(_by_name)] | None = None
    """Other checkpoints of the same model, by names of your own: the keys of the checkpointer section that differ."""
    report: Annotated[Text, Field(examples=["exits.json"])] | None = None
    """A JSON file for the report, which is also the last line of the output."""

    def check_together(self) -> Iterator[str]:
        if self.dataset is None and self.tasks is None:
            yield (
                "dataset: None, and tasks too, so there is nothing to measure. Allowed: one or both; for example "
                "dataset={_component_: ...} or tasks=[arc_easy]"
            )
        if self.quantizer is not None and self.self_speculation is not None and self.self_speculation.draft is not None:
            yield (
                "self_speculation.draft: it is trained for the weights as they are, and layerskip_eval quantises them "
                "before it reads the draft. Set quantizer=null; draft_quantizer quantises the draft"
            )
        yield from mistakes_of(check_ending, "report", self.report, [".json"])
        yield from mistakes_of(check_ending, "picture", self.picture, PICTURES)
        yield from mistakes_of(check_checkpointer, self)
        for name, other in self.checkpoints().items():
            yield from mistakes_of(other.checkpointer.check)
            yield from (f"compare.{name}: {mistake}" for mistake in mistakes_of(check_checkpointer, other))
        model = layerskip_decoder(self.meta_model)
        yield from mistakes_of(select_exits, self.layers or ":", model.num_layers, key="layers")
        yield from mistakes_of(check_exit_or_drafts, self, model)
        yield from mistakes_of(check_draft_fits, self.self_speculation, self.quantizer, model)

    def checkpoints(self) -> dict[str, Self]:
        """The config once for its own checkpoint, and once for each of `compare`, by name.

        Raises:
            ConfigError: if two have the same name.
        """
        own = Path(str(self.given_folder)).name
        compare = self.compare or {}
        if own in compare:
            raise ConfigError(
                f"compare.{own}: the name is that of the config's own checkpoint. Give another; for example "
                '"compare={before: ...}"'
            )
        others = {name: self._with_checkpointer(f"compare.{name}", section) for name, section in compare.items()}
        return {own: self, **others}

    def _with_checkpointer(self, key: str, changes: Mapping[str, Any]) -> Self:
        """The config with other values in its checkpointer section."""
        section = dict(self.checkpointer.section)
        for name, value in changes.items():
            # checkpoint_files may be a list in one section, and a mapping in the other.
            both = isinstance(section.get(name), Mapping) and isinstance(value, Mapping)
            section[name] = {**section[name], **value} if both else value
        checkpointer = self.checkpointer.replace(**section)
        checkpointer.key = key
        return self.model_copy(update={"checkpointer": checkpointer})
