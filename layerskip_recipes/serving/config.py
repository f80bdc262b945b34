"""ServeConfig: the keys of `layerskip_serve`."""

import copy
from collections.abc import Iterator
from typing import Annotated

from omegaconf import DictConfig, OmegaConf
from pydantic import Field
from typing_extensions import Self

from layerskip_recipes.config.schema import PositiveInt, Text
from layerskip_recipes.generation.config import GenerateConfig
from layerskip_recipes.model.decoder import LayerSkipDecoder
from layerskip_recipes.processes import num_processes

# Keys of generation configs that a server ignores: prompts and the output come with requests.
IGNORED = ("prompt", "prompts", "prompt_file", "batch_size", "on_bad_prompt", "output_file", "stream", "benchmark")


class ServeConfig(GenerateConfig):
    """Any generation config. A request replaces its temperature, top_p and max_new_tokens."""

    host: Text = "127.0.0.1"
    """The address to listen at. `0.0.0.0` lets other machines in: then set LAYERSKIP_API_KEY as well."""
    port: Annotated[int, Field(ge=0, le=65535, examples=[8000])] = 8000
    """The port to listen at; 0: any free one, which the log names."""
    max_waiting: Annotated[int, Field(ge=0, examples=[32])] = 32
    """The most requests that wait while another one is answered. Further ones get status 503."""
    max_body_bytes: PositiveInt = 2**20
    """The largest body of a request."""

    @classmethod
    def load(cls, source: DictConfig) -> Self:
        source = copy.deepcopy(source)
        missing = [key for key in ("data_dir",) if key in source and OmegaConf.is_missing(source, key)]
        for key in (*IGNORED, *missing):  # data_dir is for the prompts
            source.pop(key, None)
        return super().load(source)

    @property
    def is_conversation(self) -> bool:
        return True

    def check_prompts(self) -> Iterator[str]:
        yield from ()

    def _check_processes(self, model: LayerSkipDecoder) -> Iterator[str]:
        if num_processes() > 1:
            yield (
                f"nproc_per_node: {num_processes()} processes, but layerskip_serve needs one. Leave it out; for several "
                "GPUs, serve the exported model with vLLM (docs/serving.md)"
            )
