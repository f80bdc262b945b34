"""`tune run layerskip_serve`: an `LLM` behind an HTTP server, with the settings of a generation config."""

import logging
import os
import signal
import socket
from importlib.util import find_spec
from ipaddress import ip_address

from omegaconf import DictConfig
from torchtune import config, utils

from layerskip_recipes.errors import ConfigError
from layerskip_recipes.serving.answers import Answerer
from layerskip_recipes.serving.config import API_KEY, ServeConfig

log = utils.get_logger("INFO")


class LayerSkipServe:
    """Serves one model. Mistakes are found before any weight is loaded."""

    def __init__(self, source: DictConfig) -> None:
        if find_spec("starlette") is None or find_spec("uvicorn") is None:
            raise ConfigError('layerskip_serve: needs starlette and uvicorn. Install them: pip install ".[serve]"')
        cfg = ServeConfig.load(source)
        log.setLevel(cfg.log_level)
        self.api_key = os.environ.get(API_KEY)
        if cfg.allowed_origins and not self.api_key:
            raise ConfigError(f"allowed_origins: {cfg.allowed_origins} needs a key. Set {API_KEY}, which pages send")
        self.answers = Answerer(cfg)
        self.cfg = self.answers.cfg
        # Clients are refused until the model is ready, as this socket does not listen yet.
        self.socket = socket.socket(socket.AF_INET6 if ":" in cfg.host else socket.AF_INET)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self.socket.bind((cfg.host, cfg.port))
        except OSError as e:
            self.socket.close()
            line = f"port: {cfg.port} at {cfg.host} cannot be used ({e.strerror}); for example port=8001"
            raise ConfigError(line) from e
        self.is_local = ip_address(self.socket.getsockname()[0].partition("%")[0]).is_loopback

    def serve(self) -> None:
        """Answer requests until SIGTERM or Ctrl-C; what runs or waits is finished first."""
        import uvicorn  # optional, as starlette is, which http.py imports

        from layerskip_recipes.serving.http import Access, make_app

        if log.isEnabledFor(logging.INFO):
            config.log_config(recipe_name=type(self).__name__, cfg=self.cfg.source)
        log.setLevel(self.cfg.log_level)  # which torchtune has set to DEBUG
        access = Access(self.api_key, self.is_local, self.cfg.allowed_origins or [])
        app = make_app(self.answers, access, self.cfg.max_waiting)
        # No log of requests.
        settings = uvicorn.Config(
            app, lifespan="off", ws="none", log_config=None, log_level="warning", access_log=False
        )
        server = uvicorn.Server(settings)
        # uvicorn handles SIGTERM while it runs, and raises it once more at its end.
        signal.signal(signal.SIGTERM, lambda *_: setattr(server, "should_exit", True))
        host, port = self.socket.getsockname()[:2]
        if not (self.api_key or self.is_local):
            log.warning(f"host: {self.cfg.host} lets other machines in without a key. Set {API_KEY} to ask for one")
        log.info(f"Serving {self.answers.name} at http://{f'[{host}]' if ':' in host else host}:{port}/v1")
        server.run(sockets=[self.socket])
