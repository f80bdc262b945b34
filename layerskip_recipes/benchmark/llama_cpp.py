"""llama.cpp on a GGUF file: the server of the package xllamacpp in a process of its own, for the benchmark.

In this process it would slow down both: it shares the OpenMP library of compiled steps, whose threads sleep between
products, instead of waiting for the next, as soon as there are more of them than processors.
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
    """A server for one prompt at a time, with `room` tokens for it and its answer; it ends with this process.

    `gguf` and `draft` are files. A server that does not start raises a RuntimeError with its last line.
    """

    def __init__(self, gguf: str, room: int, threads: int, draft: str | None = None, num_speculations: int = 0) -> None:
        self.room = room
        command = [sys.executable, str(SERVER), json.dumps([gguf, room, threads, draft, num_speculations])]
        with tempfile.TemporaryFile("w+") as said:
            # Its stdin ends with this process, and it with its stdin.
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True
            )
            lines: Any = self.process.stdout
            self.address = next((line.strip() for line in lines if line.startswith("http")), None)
            if self.address is None:
                said.seek(0)
                raise RuntimeError((said.read().strip().splitlines() or ["llama.cpp did not start"])[-1])

    def complete(
        self, prompt: Sequence[int], limit: int, sampler: Sampler, seed: int, ignore_end: bool
    ) -> tuple[list[int], GenerationStats]:
        """At most `limit` new tokens, with the server's times; `ignore_end` goes on after the file's end of text."""
        asked = {
            "prompt": [*prompt],
            "n_predict": limit,
            "temperature": 0.0 if sampler.greedy else sampler.temperature,
            "top_k": sampler.top_k or 0,
            "top_p": sampler.top_p or 1.0,
            "min_p": sampler.min_p or 0.0,
            "repeat_penalty": sampler.repetition_penalty,
            "repeat_last_n": self.room,  # the whole text, as ours
            "seed": seed,
            "ignore_eos": ignore_end,
            "cache_prompt": False,
            "return_tokens": True,
        }
        url, kind = f"{self.address}/completion", {"Content-Type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(url, json.dumps(asked).encode(), kind)) as answer:
            found = json.load(answer)
        times = found["timings"]
        stats = GenerationStats(
            tokens=len(found["tokens"]),
            first_tokens=1,
            prefill_s=times["prompt_ms"] / 1000,
            decode_s=times["predicted_ms"] / 1000,
        )
        return found["tokens"], stats
