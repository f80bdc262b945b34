"""llama.cpp's server from the package xllamacpp, with some of the arguments of `llama-server`.

    python tools/llama_cpp_server.py -m model.gguf [-md draft.gguf --spec-draft-n-max 6] --port 8080

It ends when its stdin closes. It does not import torch: in one process, torch and llama.cpp would share an OpenMP
library, and with more threads than processors, its threads sleep between matrix products and slow both engines down.
"""

import argparse
import sys
from typing import Any

import xllamacpp


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", required=True, help="a GGUF file")
    parser.add_argument("-md", help="a GGUF file of a draft model")
    parser.add_argument("--spec-draft-n-max", type=int, default=6, help="tokens of a draft")
    parser.add_argument("--spec-draft-p-min", type=float, default=0.0, help="least probability of a drafted token")
    parser.add_argument("-t", type=int, default=2, help="threads")
    parser.add_argument("-c", type=int, default=2048, help="the most tokens of a prompt and its answer")
    parser.add_argument("--port", type=int, default=8080)
    args = parser.parse_args()
    params: Any = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.port, params.verbosity = args.m, args.c, args.port, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = args.t
    if args.md is not None:
        kinds, drafting = xllamacpp.common_speculative_type, params.speculative.draft
        params.speculative.types = [kinds.COMMON_SPECULATIVE_TYPE_DRAFT_SIMPLE]
        drafting.mparams.path, drafting.n_max, drafting.p_min = args.md, args.spec_draft_n_max, args.spec_draft_p_min
        drafting.cpuparams.n_threads = drafting.cpuparams_batch.n_threads = args.t
    server = xllamacpp.Server(params)  # runs in threads of its own until this process ends
    print(server.listening_address, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
