"""Runs llama.cpp on a GGUF file for the benchmark: xllamacpp's server in its own process.

In one process, both engines would share an OpenMP library. With more threads than processors, its threads sleep between
matrix products and slow both engines down.
"""

import json
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from layerskip_recipes.generation.sampling import Sampler
from layerskip_recipes.generation.stats import GenerationStats

SERVER = Path(__file__).with_name("llama_cpp_server.py")


class LlamaCppServer:
    """Decodes one prompt at a time and ends with this process; `room` is the most tokens of a prompt and its answer."""

    def __init__(self, gguf: str, room: int, threads: int, draft: str | None = None, num_speculations: int = 0) -> None:
        self.room = room
        command = [sys.executable, str(SERVER), json.dumps([gguf, room, threads, draft, num_speculations])]
        with tempfile.TemporaryFile("w+") as errors:
            # The server exits when its stdin closes, which happens when this process ends.
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
            )
            lines: Any = self.process.stdout
            self.address = next((line.strip() for line in lines if line.startswith("http")), None)
            if self.address is None:
                errors.seek(0)
                raise RuntimeError((errors.read().strip().splitlines() or ["llama.cpp did not start"])[-1])

    def complete(
        self, prompt: Sequence[int], limit: int, sampler: Sampler, seed: int, ignore_end: bool
    ) -> tuple[list[int], GenerationStats]:
        """Up to `limit` new tokens, and the server's times. `ignore_end` ignores the GGUF file's end-of-text token."""
        request = {
            "prompt": [*prompt],
            "n_predict": limit,
            "temperature": 0.0 if sampler.greedy else sampler.temperature,
            "top_k": sampler.top_k or 0,
            "top_p": sampler.top_p or 1.0,
            "min_p": sampler.min_p or 0.0,
            "repeat_penalty": sampler.repetition_penalty,
            "repeat_last_n": self.room,  # the whole text, like our sampler
            "seed": seed,
            "ignore_eos": ignore_end,
            "cache_prompt": False,
            "return_tokens": True,
        }
        url, headers = f"{self.address}/completion", {"Content-Type": "application/json"}
        local = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # never by a proxy
        with local.open(urllib.request.Request(url, json.dumps(request).encode(), headers)) as response:
            reply = json.load(response)
        tokens, times = reply["tokens"], reply["timings"]
        prefill_s, decode_s = times["prompt_ms"] / 1000, times["predicted_ms"] / 1000
        return tokens, GenerationStats(tokens=len(tokens), first_tokens=1, prefill_s=prefill_s, decode_s=decode_s)
