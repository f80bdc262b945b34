"""EvalConfig: the keys of `layerskip_eval` and the checks across keys."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field
from typing_extensions import Self

from layerskip_recipes.checkpoint.checkpointer_checks import check_checkpointer
from layerskip_recipes.config.components import Component, Takes
from layerskip_recipes.config.layer_strings import select_exits
from layerskip_recipes.config.recipe_config import RecipeConfig
from layerskip_recipes.config.schema import Exits, Picture, PositiveInt, Text
from layerskip_recipes.data.datasets import CollateFn, Datasets
from layerskip_recipes.errors import ConfigError, mistakes_of
from layerskip_recipes.generation.config import GenerateConfig

Checkpoints = Annotated[dict[str, dict[str, Any]], Field(examples=["{before: {checkpoint_dir: /tmp/model}}"])]


class EvalConfig(RecipeConfig):
    """Measures every exit of a checkpoint on a dataset."""

    IGNORED: ClassVar[Mapping[str, type]] = {"enable_kv_cache": bool}  # the cache is always on
    REFUSED: ClassVar = dict.fromkeys(GenerateConfig.model_fields, "it measures a dataset, and prints figures only")
    quantizer: Annotated[Component, Takes()] | None = None
    """Quantises the whole model, as in `layerskip_generate`."""
    batch_size: PositiveInt = 1
    """The number of samples in a batch."""

    dataset: Datasets
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

    compare: Checkpoints | None = None
    """Other checkpoints of the same model: a name for each, with the checkpointer keys to change."""
    report: Annotated[Text, Field(examples=["exits.json"])] | None = None
    """A JSON file for the report. The report is also the last line of the output."""

    def check_together(self) -> Iterator[str]:
        yield from mistakes_of(check_checkpointer, self)
        for name, other in [*self.checkpoints().items()][1:]:  # without its own
            yield from mistakes_of(other.checkpointer.check)
            yield from (f"compare.{name}: {mistake}" for mistake in mistakes_of(check_checkpointer, other))
        yield from mistakes_of(select_exits, self.exits or ":", len(self.meta_model.layers))

    def checkpoints(self) -> dict[str, Self]:
        """The config for its own checkpoint and for each checkpoint in `compare`, by name."""
        name_of_self = Path(str(self.given_folder)).name
        compare = self.compare or {}
        if name_of_self in compare:
            raise ConfigError(
                f"compare.{name_of_self}: the name is that of the config's own checkpoint. Give another; for example "
                '"compare={before: ...}"'
            )
        others = {name: self._with_checkpointer(f"compare.{name}", part) for name, part in compare.items()}
        return {name_of_self: self} | others

    def _with_checkpointer(self, key: str, changes: Mapping[str, Any]) -> Self:
        section = dict(self.checkpointer.section)
        for name, value in changes.items():
            # checkpoint_files can be a list in one section and a mapping in the other.
            are_mappings = isinstance(section.get(name), Mapping) and isinstance(value, Mapping)
            section[name] = {**section[name], **value} if are_mappings else value
        checkpointer = self.checkpointer.replace(**section)
        checkpointer.key = key
        return self.model_copy(update={"checkpointer": checkpointer})
