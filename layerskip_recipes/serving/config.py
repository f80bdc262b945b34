"""ServeConfig: the keys of `layerskip_serve`."""

import copy
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from omegaconf import DictConfig, OmegaConf
from pydantic import Field
from typing_extensions import Self

from layerskip_recipes.config.schema import Text
from layerskip_recipes.generation.config import GenerateConfig
from layerskip_recipes.generation.text.prompts import INTERACTIVE
from layerskip_recipes.model.decoder import LayerSkipDecoder
from layerskip_recipes.processes import num_processes

# Keys of generation configs that a server ignores: prompts and outputs belong to requests.
IGNORED = ("prompt", "prompts", "prompt_file", "batch_size", "on_bad_prompt", "output_file", "stream", "benchmark")

Origin = Annotated[str, Field(pattern=r"^(\*|[a-z-]+://[^/A-Z]+)$")]  # without a path, as browsers send it


class ServeConfig(GenerateConfig):
    """A generation config. Requests may replace `temperature`, `top_p` and `max_new_tokens`."""

    host: Text = "127.0.0.1"
    """The address to listen at. `0.0.0.0` lets other machines in; then set LAYERSKIP_API_KEY, too."""
    port: Annotated[int, Field(ge=0, le=65535, examples=[8000])] = 8000
    """The port to listen at; 0: a free one, which the log names."""
    allowed_origins: Annotated[list[Origin], Field(examples=["[https://app.example]"])] | None = None
    """Web pages of these origins may use the server (CORS), with the key in LAYERSKIP_API_KEY. `["*"]` allows all."""
    max_waiting: Annotated[int, Field(ge=0, examples=[32])] = 32
    """The most requests that wait while one is answered. Further ones get status 503."""

    @classmethod
    def load(cls, source: DictConfig, stored: Mapping[str, Any] | None = None) -> Self:
        source = copy.deepcopy(source)
        # data_dir has the prompts of the configs qa/*.
        for key in (*IGNORED, *["data_dir"] * OmegaConf.is_missing(source, "data_dir")):
            source.pop(key, None)
        source["prompt"] = INTERACTIVE  # as in a conversation, the questions come later
        return super().load(source, stored)

    def _check_processes(self, model: LayerSkipDecoder) -> Iterator[str]:
        if (count := num_processes()) > 1:
            what = f"nproc_per_node: {count} processes, and layerskip_serve takes one. Leave it out"
            yield f"{what}; with several GPUs, serve the exported model with vLLM (docs/serving.md)"
