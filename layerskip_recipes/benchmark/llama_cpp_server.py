"""The program that llama_cpp.py starts. It imports nothing from this package, because that would take seconds."""

import json
import sys
from typing import Any


def serve(gguf: str, room: int, threads: int, draft: str | None, num_speculations: int) -> None:
    """Start a server, print its address on stdout, and run until stdin closes."""
    import xllamacpp  # an optional dependency

    params: Any = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.port, params.verbosity = gguf, room, 0, 0  # port 0: any free port
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    if draft is not None:
        kinds, drafting = xllamacpp.common_speculative_type, params.speculative.draft
        params.speculative.types = [kinds.COMMON_SPECULATIVE_TYPE_DRAFT_SIMPLE]
        drafting.mparams.path, drafting.n_max = draft, num_speculations
        drafting.cpuparams.n_threads = drafting.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    serve(*json.loads(sys.argv[1]))
