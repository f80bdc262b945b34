"""EvalConfig: the keys of `layerskip_eval` and the checks across keys."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, Field
from typing_extensions import Self

from layerskip_recipes.checkpoint.checkpointer_checks import check_checkpointer
from layerskip_recipes.config.auto import Choices
from layerskip_recipes.config.components import Component, Takes
from layerskip_recipes.config.layer_strings import select_exits
from layerskip_recipes.config.recipe_config import RecipeConfig
from layerskip_recipes.config.schema import Auto, Exits, Flag, Picture, PositiveInt, Text
from layerskip_recipes.data.datasets import CollateFn, Datasets
from layerskip_recipes.errors import ConfigError, mistakes_of
from layerskip_recipes.generation.config import GenerateConfig, check_exit_or_drafts
from layerskip_recipes.generation.drafting.section import OptionalSpeculation
from layerskip_recipes.model.decoder import layerskip_decoder


def _are_folders(paths: str | list[str] | None) -> str | list[str] | None:
    for path in [paths] if isinstance(paths, str) else paths or ():
        if not Path(path).is_dir():
            raise ConfigError(
                f": {path!r} is not a folder. Allowed: folders of task files; for example task_path=tasks"
            )
    return paths


Checkpoints = Annotated[dict[str, dict[str, Any]], Field(examples=["{before: {checkpoint_dir: /tmp/model}}"])]


class EvalConfig(RecipeConfig):
    """Measures every exit of a checkpoint on a `dataset`, runs lm-eval's `tasks`, or both."""

    IGNORED: ClassVar[Mapping[str, type]] = {"enable_kv_cache": bool}  # the cache is always on
    REFUSED: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(GenerateConfig.model_fields, "it measures a dataset or tasks, and prints figures only"),
        "human_eval": "HumanEval is one of lm-eval's tasks: tasks=[humaneval] confirm_run_unsafe_code=true",
    }
    REQUIRES: ClassVar = {
        "dataset": ("collate_fn", "max_batches", "exits", "num_speculations"),
        "tasks": (
            *("task_path", "num_fewshot", "limit", "apply_chat_template", "confirm_run_unsafe_code", "exit_layer"),
            *("self_speculation", "max_new_tokens"),
        ),
    }
    quantizer: Annotated[Component, Takes()] | None = None
    """Quantises the whole model, as in `layerskip_generate`."""
    batch_size: PositiveInt = 1
    """The number of samples or prompts in a batch."""

    dataset: Datasets | None = None
    """Any torchtune dataset, or a list of them. One pass measures the loss, perplexity, accuracy and agreement with the
    last layer of every exit."""
    collate_fn: CollateFn = None
    """The function that makes a batch of samples; null is `torchtune.data.padded_collate_sft`."""
    max_batches: PositiveInt | None = None
    """Use only the first `max_batches` batches of the dataset; null for all."""
    exits: Exits | None = None
    """The exits to measure, such as "4::4" or "4,8"; null for all. The last one is always measured."""
    num_speculations: Annotated[int, Field(ge=1, examples=[6])] = 6
    """The draft length for the expected number of accepted tokens per round."""
    picture: Picture | None = None
    """A .png, .pdf or .svg file for a plot of loss and agreement over the exits of every checkpoint."""

    tasks: Annotated[list[Text], Field(min_length=1, examples=["[arc_easy]"])] | None = None
    """Names of lm-eval tasks, groups or tags, or of your own task files; needs `pip install lm-eval`."""
    task_path: Annotated[str | list[str] | None, AfterValidator(_are_folders)] = None
    """A folder, or a list of folders, with your own task files."""
    num_fewshot: Annotated[int, Field(ge=0)] | None = None
    """The number of examples before each question; null for each task's own number."""
    limit: PositiveInt | None = None
    """Use only the first `limit` documents of each task; null for all."""
    apply_chat_template: Flag = False
    """Ask each question as a conversation; needs `hf_tokenizer` and a model with a chat template."""
    confirm_run_unsafe_code: Flag = False
    """Allow tasks such as `humaneval` that run programs written by the model. They run without a sandbox, so use a
    container or a virtual machine."""
    exit_layer: int | None = None
    """The exit that answers the tasks; null for the last layer."""
    self_speculation: OptionalSpeculation = None
    """Decode generation tasks self-speculatively. Greedy answers stay the same; the report has speed and acceptance."""
    max_new_tokens: Annotated[int, Field(ge=1, examples=[256]), Auto()] | None = 256
    """The maximum answer length for tasks that set no limit; auto and null are 256."""

    compare: Checkpoints | None = None
    """Other checkpoints of the same model: a name for each, with the checkpointer keys to change."""
    report: Annotated[Text, Field(examples=["exits.json"])] | None = None
    """A JSON file for the report. The report is also the last line of the output."""

    def choose(self, choices: Choices) -> None:
        super().choose(choices)
        choices.pick("max_new_tokens", lambda: 256)

    def check_together(self) -> Iterator[str]:
        if self.dataset is None and self.tasks is None:
            yield (
                "dataset: None, and tasks is None, so there is nothing to measure. Allowed: one or both; for example "
                "dataset={_component_: ...} or tasks=[arc_easy]"
            )
        draft = self.self_speculation and self.self_speculation.given.get("draft")
        if self.quantizer is not None and draft is not None:
            yield (
                "self_speculation.draft: it was trained for unquantised weights, and layerskip_eval quantises them "
                "before reading the draft. Set quantizer=null; draft_int8=true quantises the draft"
            )
        if self.compare and draft is not None:
            yield "self_speculation.draft: it was trained for one checkpoint. Set compare=null"
        yield from mistakes_of(check_checkpointer, self)
        for name, other in [*self.checkpoints().items()][1:]:  # without its own
            yield from mistakes_of(other.checkpointer.check)
            yield from (f"compare.{name}: {mistake}" for mistake in mistakes_of(check_checkpointer, other))
        model = layerskip_decoder(self.meta_model)
        yield from mistakes_of(select_exits, self.exits or ":", model.num_layers)
        yield from mistakes_of(check_exit_or_drafts, self, model)

    def checkpoints(self) -> dict[str, Self]:
        """The config for its own checkpoint and for each checkpoint in `compare`, by name."""
        own = Path(str(self.given_folder)).name
        compare = self.compare or {}
        if own in compare:
            raise ConfigError(
                f"compare.{own}: the name is that of the config's own checkpoint. Give another; for example "
                '"compare={before: ...}"'
            )
        return {own: self} | {name: self._with_checkpointer(f"compare.{name}", part) for name, part in compare.items()}

    def _with_checkpointer(self, key: str, changes: Mapping[str, Any]) -> Self:
        section = dict(self.checkpointer.section)
        for name, value in changes.items():
            # checkpoint_files can be a list in one section and a mapping in the other.
            both = isinstance(section.get(name), Mapping) and isinstance(value, Mapping)
            section[name] = {**section[name], **value} if both else value
        checkpointer = self.checkpointer.replace(**section)
        checkpointer.key = key
        return self.model_copy(update={"checkpointer": checkpointer})
