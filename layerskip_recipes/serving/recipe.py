"""`tune run layerskip_serve`: the model and the drafts of `layerskip_generate`, behind an HTTP server."""

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from importlib.util import find_spec
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from torchtune import utils
from torchtune.data import Message

from layerskip_recipes.errors import ConfigError
from layerskip_recipes.generation.recipe import LayerSkipGenerate
from layerskip_recipes.generation.text.prompts import to_tokens
from layerskip_recipes.model.limits import check_prompt_lengths, most_positions
from layerskip_recipes.serving.config import ServeConfig
from layerskip_recipes.serving.requests import ChatRequest, CompletionRequest, messages_of

log = utils.get_logger("INFO")

KEY = "LAYERSKIP_API_KEY"  # the environment variable
PIECE = 2**14  # characters that are tokenized at once to see whether a prompt fits


class LayerSkipServe(LayerSkipGenerate):
    """Answers requests with the settings of a generation config. Mistakes are found before any weight is loaded."""

    config_class, turns = ServeConfig, 1000
    cfg: ServeConfig

    def __init__(self, source: DictConfig) -> None:
        if find_spec("starlette") is None or find_spec("uvicorn") is None:
            raise ConfigError('layerskip_serve: needs starlette and uvicorn. Install them: pip install ".[serve]"')
        super().__init__(source)
        self.name = Path(self.cfg.model_dir or self.cfg.output_dir or self.cfg.given_folder or "model").name
        self.api_key = os.environ.get(KEY)
        if self.cfg.allowed_origins and not self.api_key:
            raise ConfigError(f"allowed_origins: {self.cfg.allowed_origins} needs a key. Set {KEY}, which pages send")
        self.context = most_positions(self.cfg.meta_model)[0]
        self.max_body_bytes = 2**16 + 32 * self.context  # few texts have so many bytes per token
        # Clients are refused until the model is ready, as this socket does not listen yet.
        host, port = self.cfg.host, self.cfg.port
        self.socket = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self.socket.bind((host, port))
        except OSError as e:
            self.socket.close()
            raise ConfigError(f"port: {port} at {host} cannot be used ({e.strerror}); for example port=8001") from e
        self.is_local = ip_address(self.socket.getsockname()[0].partition("%")[0]).is_loopback

    def serve(self) -> None:
        """Answer requests until SIGTERM or Ctrl-C; what runs or waits is finished first."""
        import uvicorn  # optional

        from layerskip_recipes.serving.http import make_app  # imports starlette

        # No log of requests.
        quiet: dict[str, Any] = {"log_config": None, "log_level": "warning", "access_log": False}
        server = uvicorn.Server(uvicorn.Config(make_app(self), lifespan="off", ws="none", **quiet))
        # uvicorn handles SIGTERM while it runs, and raises it once more at its end.
        signal.signal(signal.SIGTERM, lambda *_: setattr(server, "should_exit", True))
        host, port = self.socket.getsockname()[:2]
        if not (self.api_key or self.is_local):
            log.warning(f"host: {self.cfg.host} lets other machines in without a key. Set {KEY} to ask for one")
        log.info(f"Serving {self.name} at http://{f'[{host}]' if ':' in host else host}:{port}/v1")
        server.run(sockets=[self.socket])

    # ---- in the thread that decodes ----

    def warm_up(self) -> None:
        """Compile, and measure rounds anew once everything is warm."""
        short = CompletionRequest.parse({"prompt": "?", "max_tokens": min(24, self.max_new_tokens)})
        list(self.answer(short, threading.Event()))
        self.llm.state.rules.clear()

    def answer(self, asked: ChatRequest | CompletionRequest, gone: threading.Event) -> Iterator[str | dict[str, Any]]:
        """Pieces of text as they become final, then the finish reason and the usage. Fails once `gone` is set."""

        def check(*_: Any) -> None:
            if gone.is_set():
                raise ConnectionAbortedError

        prompt = self._prompt(asked, check)
        # Without a wish of the client, the answer is shorter at the end of the model's context.
        room = self.context - len(prompt)
        limit = asked.max_completion_tokens or asked.max_tokens or max(1, min(self.max_new_tokens, room))
        check_prompt_lengths(self.llm.model, [len(prompt)], limit, "max_tokens")
        sampler = self.cfg.sampler(self.cfg.temperature if asked.temperature is None else asked.temperature, asked.seed)
        sampler = sampler if asked.top_p is None else replace(sampler, top_p=asked.top_p)
        strings = [*self.stop_strings, *([asked.stop] if isinstance(asked.stop, str) else asked.stop)]
        goes_on = prompt if isinstance(asked, CompletionRequest) else ()
        text = self.llm.text_stream(goes_on, strings)
        reserve = self.llm.reserved_slots(len(prompt) + limit, self.plan)
        generation = self._generation([prompt], limit, sampler=sampler, reserve=reserve, reuse=len(prompt))
        kept = None
        with closing(iter(generation)) as rounds, ExitStack() as hooks:  # type: ignore[type-var]
            generation.context.before_chunk = check
            for layer in self.llm.model.layers:  # torch may read a long chunk for seconds
                hooks.callback(layer.register_forward_pre_hook(check).remove)
            for (new,) in rounds:
                hooks.close()
                check()
                if (kept := text.extend(new)) is not None:
                    generation.stop(0, len(generation.generated[0]) - len(new) + kept)
                if piece := text.new_text(last=generation.finished[0]):
                    yield piece
        tokens, stats = generation.generated[0], generation.stats
        usage: dict[str, Any] = {"prompt_tokens": len(prompt), "completion_tokens": len(tokens)}
        usage |= {"total_tokens": len(prompt) + len(tokens)}
        usage |= {"drafted_tokens": stats.drafted, "accepted_tokens": stats.accepted}
        usage |= {"prompt_tokens_details": {"cached_tokens": stats.reused_tokens}}
        ended = kept is not None or tokens[-1] in self.llm.stop_tokens
        yield {"finish_reason": "stop" if ended else "length", "usage": usage}

    def _prompt(self, asked: ChatRequest | CompletionRequest, check: Callable[[], None]) -> list[int]:
        if isinstance(asked, CompletionRequest):
            self._check_size(asked.prompt, check)
            return to_tokens(asked.prompt, self.tokenizer)
        messages, system = messages_of(asked), self.cfg.system_prompt
        if system and messages[0].role != "system":
            messages.insert(0, Message(role="system", content=system))
        self._check_size("".join(message.text_content for message in messages), check)
        # Clients write the assistant's messages, too: no text of theirs may hold a special token.
        guarded = getattr(self.tokenizer, "guarded", str)
        messages = [Message(role=m.role, content=guarded(m.text_content)) for m in messages]
        return to_tokens([*messages, Message(role="assistant", content="")], self.tokenizer)

    def _check_size(self, text: str, check: Callable[[], None]) -> None:
        """Refuse a text that cannot fit, before all of it is tokenized and before the template adds more tokens."""
        num_tokens = 0
        for start in range(0, len(text), PIECE):
            check()
            num_tokens += len(to_tokens(text[start : start + PIECE], self.tokenizer))
            if num_tokens > self.context + self.context // 8:  # cut into pieces, a text may have more tokens
                check_prompt_lengths(self.llm.model, [num_tokens], 1)
