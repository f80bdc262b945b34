"""ServeConfig: the keys of `layerskip_serve`."""

import copy
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar

from omegaconf import DictConfig, OmegaConf
from pydantic import Field
from typing_extensions import Self

from layerskip_recipes.config.schema import Text
from layerskip_recipes.generation.config import AnswerConfig, GenerateConfig
from layerskip_recipes.processes import num_processes

API_KEY = "LAYERSKIP_API_KEY"  # the environment variable with the key that clients send
Origin = Annotated[str, Field(pattern=r"^(\*|[a-z-]+://[^/A-Z]+)$")]  # without a path, as browsers send it


class ServeConfig(AnswerConfig):
    """The keys of a generation config without those for prompts, outputs and several processes, and these."""

    # Requests bring the prompts, clients take the answers, and a server is one process.
    DROPPED: ClassVar = [key for key in GenerateConfig.model_fields if key not in AnswerConfig.model_fields]
    IGNORED: ClassVar = {**AnswerConfig.IGNORED, **dict.fromkeys(DROPPED, object)}  # of any type

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
        """Check a merged config, which may be a generation config."""
        source = copy.deepcopy(source)
        for key in cls.DROPPED:
            source.pop(key, None)  # may be missing (???), as the prompts of a template
        if OmegaConf.is_missing(source, "data_dir"):
            source["data_dir"] = None  # the configs qa/* need it for their prompts only
        return super().load(source, stored)

    def check_together(self) -> Iterator[str]:
        yield from super().check_together()
        if (count := num_processes()) > 1:
            yield (
                f"nproc_per_node: {count} processes, and layerskip_serve takes one. Leave it out; with several GPUs, "
                "serve the exported model with vLLM (docs/serving.md)"
            )
