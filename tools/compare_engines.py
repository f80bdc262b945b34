"""Decode the same prompts by this package and by other engines, in turns.

    python tools/compare_engines.py CONFIG [key=value ...] --engine "NAME ..." [--engine "NAME ..."]

CONFIG is a config of layerskip_benchmark or layerskip_generate; prompts, temperatures, batch_size, repeats, dtype and
compile come from it. Plain decoding and the config's variants are always measured. Each --engine adds a row:

    ours key=value ...                 this package with other settings, such as "ours dtype=bf16"
    torchtune [compile=true]           its own `generate`, with the weights of the config
    transformers [compile=true] [path=FOLDER]
                                       its own `generate`, with the folder of the config or another one
      exit_layer=E drafts=N            drafts of N tokens from an exit (`assistant_early_exit`)
      draft=FOLDER drafts=N            drafts of another model (`assistant_model`); confidence=P ends them
      custom_generate=true             the decoding loop in an exported folder
    llama.cpp -m model.gguf ...        its server from the package xllamacpp, with the arguments of llama_cpp_server.py
    llama.cpp COMMAND ...              a server of your own, such as "llama.cpp build/bin/llama-server -m model.gguf"
    ik_llama.cpp COMMAND ...           the server of ik_llama.cpp
    openvino path=FOLDER [draft=FOLDER drafts=N] [precision=f32]
                                       OpenVINO GenAI, with models that optimum-cli converted

A draft without N has its engine's own length. The servers of llama.cpp get the context, threads and port. All engines
run on the threads of torch; OMP_NUM_THREADS sets them. Stop strings are ignored. Times do not include compilation.
Speed-ups compare with the first row. The last line of the output is the table as JSON.
"""

import argparse
import importlib.metadata
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torchtune import training
from torchtune.generation import generate as torchtune_generate
from torchtune.generation import generate_next_token

from layerskip_recipes.benchmark.measuring import Run, TokenLists, longest_prompt
from layerskip_recipes.benchmark.recipe import LayerSkipBenchmark
from layerskip_recipes.benchmark.report import by_repeat, device_name, show, spread
from layerskip_recipes.checkpoint.checkpointers import weights_folder
from layerskip_recipes.config.loading import load_config
from layerskip_recipes.distributed.loading import make_position_tables
from layerskip_recipes.generation.report import ratio
from layerskip_recipes.generation.sampling import Sampler
from layerskip_recipes.generation.stats import GenerationStats, memory_bandwidth

SERVER = Path(__file__).with_name("llama_cpp_server.py")
START_S = 600  # the most seconds until a server answers
# The text of an answer stands in for its tokens where a server does not return them.
Output = list[int] | str
# (prompts, temperature, seed) -> the outputs and the statistics.
Decode = Callable[[TokenLists, float, int], tuple[Sequence[Output], GenerationStats]]


@dataclass(frozen=True, eq=False)
class Job:
    """What all engines decode."""

    recipe: LayerSkipBenchmark  # with the weights of the config

    @property
    def device(self) -> torch.device:
        return self.recipe.device

    @property
    def dtype(self) -> torch.dtype:
        return self.recipe.cfg.torch_dtype

    @property
    def room(self) -> int:
        """The most tokens of a prompt and its answer."""
        return longest_prompt(self.recipe.prompts) + self.recipe.limit

    def sampler(self, temperature: float, seed: int) -> Sampler:
        return self.recipe.cfg.sampler(temperature, seed)

    def until_stop(self, rows: TokenLists) -> list[list[int]]:
        """The new tokens of each row up to its first stop token."""
        stops = self.recipe.llm.stop_tokens
        ends = [next((i + 1 for i, token in enumerate(row) if token in stops), len(row)) for row in rows]
        return [list(row[:end]) for row, end in zip(rows, ends, strict=True)]


def yes(value: str) -> bool:
    return {"true": True, "false": False}[value]


# ---- this package ----


def our_recipe(config: str, overrides: Sequence[str]) -> LayerSkipBenchmark:
    fixed = ("tune=false", "metrics=null", "stop_strings=null", "report_dir=.")
    recipe = LayerSkipBenchmark(load_config(config, [*overrides, *fixed]))
    recipe.setup()
    return recipe


def our_methods(recipe: LayerSkipBenchmark, label: str) -> dict[str, Decode]:
    def decode(method: Any, batch: TokenLists, temperature: float, seed: int) -> tuple[list, GenerationStats]:
        return recipe.turns.decode(method, temperature, batch, seed)

    return {f"{label}: {name}": partial(decode, method) for name, method in recipe.methods.items()}


# ---- engines in this process ----


class Timer:
    """Splits the time of a call at its first new tokens. Drafts can give several of them at once."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.count: int | None = None
        self.started = self.first_at = self._read_clock()

    def first(self, count: int) -> None:
        """Note that the batch has its first `count` new tokens; later calls are ignored."""
        if self.count is None:
            self.count, self.first_at = count, self._read_clock()

    def stats(self, outputs: Sequence[Output]) -> GenerationStats:
        ended = self._read_clock()
        self.first(len(outputs))
        prefill_s, decode_s = self.first_at - self.started, ended - self.first_at
        return GenerationStats(sum(map(len, outputs)), self.count or 0, prefill_s=prefill_s, decode_s=decode_s)

    def _read_clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def left_padded(rows: TokenLists, device: torch.device) -> tuple[torch.Tensor, int]:
    """The prompts [b, s] and a padding id that no prompt contains, because torchtune masks every such token."""
    width = max(map(len, rows))
    used = {token for row in rows for token in row}
    pad = next(token for token in range(len(used) + 1) if token not in used)
    return torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows], device=device), pad


def timed(job: Job, generate: Callable[[torch.Tensor, int, Sampler, Timer], torch.Tensor]) -> Decode:
    """Decode with generate(prompts [b, s], padding id, sampler, timer), which returns prompts and new tokens."""

    def decode(batch: TokenLists, temperature: float, seed: int) -> tuple[Sequence[Output], GenerationStats]:
        tokens, pad = left_padded(batch, job.device)
        torch.manual_seed(seed)
        timer = Timer(job.device)
        generated = generate(tokens, pad, job.sampler(temperature, seed), timer)
        outputs = job.until_stop(generated[:, tokens.shape[1] :].tolist())
        return outputs, timer.stats(outputs)

    return decode


def torchtune(job: Job, *, compile: str = "false") -> Decode:
    """`torchtune.generation.generate` with its KV cache; it has only temperature and top_k."""
    recipe = job.recipe
    with training.set_default_dtype(job.dtype), torch.device("meta"):
        model = recipe.cfg.model.build()
    model.load_state_dict(recipe.llm.model.state_dict(), assign=True)  # the same tensors, no copy
    make_position_tables(model, job.device, job.dtype)
    with job.device:
        model.setup_caches(recipe.cfg.batch_size, job.dtype, decoder_max_seq_len=job.room)
    model.eval()
    next_token = torch.compile(generate_next_token) if yes(compile) else generate_next_token

    def generate(tokens: torch.Tensor, pad: int, sampler: Sampler, timer: Timer) -> torch.Tensor:
        if sampler.penalises or (not sampler.greedy and (sampler.top_p or sampler.min_p)):
            raise ValueError("torchtune has no top_p, min_p or repetition_penalty")

        def timed_next_token(*args: Any, **kwargs: Any) -> Any:
            timer.first(len(tokens))  # the first call is for the second token
            return next_token(*args, **kwargs)

        model.reset_caches()
        return torchtune_generate(
            model,
            tokens,
            max_generated_tokens=recipe.limit,
            pad_id=pad,
            # torchtune turns temperature 0 into 1e-5, which can still sample another token; top_k=1 cannot.
            temperature=1.0 if sampler.greedy else sampler.temperature,
            top_k=1 if sampler.greedy else sampler.top_k,
            stop_tokens=recipe.llm.stop_tokens,
            custom_generate_next_token=timed_next_token,
        )[0]

    return timed(job, generate)


def transformers(
    job: Job,
    *,
    path: str | None = None,
    compile: str = "false",
    exit_layer: str | None = None,
    draft: str | None = None,
    drafts: str | None = None,
    confidence: str = "0",
    custom_generate: str = "false",
) -> Decode:
    """transformers' `generate` on a folder, plain or with one of its ways of drafting."""
    from transformers import AutoModelForCausalLM  # takes seconds to import, as below

    def load(folder: str, trust: bool = False) -> Any:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=job.dtype, trust_remote_code=trust)
        return model.to(job.device).eval()

    model = load(path or str(weights_folder(job.recipe.cfg.checkpointer)), yes(custom_generate))
    assistant = load(draft) if draft else None
    early_exit = int(exit_layer) if exit_layer else None
    if yes(custom_generate):
        early_exit = early_exit or model.generation_config.assistant_early_exit
    schedule: dict[str, Any] = {}
    if drafts is not None:
        schedule = {"num_assistant_tokens": int(drafts), "num_assistant_tokens_schedule": "constant"}
        schedule |= {"assistant_confidence_threshold": float(confidence)}
    return transformers_decode(job, model, yes(compile), early_exit, assistant, schedule)


def transformers_decode(
    job: Job,
    model: Any,
    compiled: bool = False,
    exit_layer: int | None = None,
    assistant: Any = None,
    schedule: Mapping[str, Any] | None = None,
) -> Decode:
    """`generate` of a loaded model; the compiled version uses a static cache. `schedule`: of the drafts' lengths."""
    from transformers import CompileConfig, GenerationConfig

    stops, limit = job.recipe.llm.stop_tokens, job.recipe.limit
    settings: dict[str, Any] = {"assistant_early_exit": exit_layer}
    if compiled:
        compile_config: Any = CompileConfig(mode="reduce-overhead" if job.device.type == "cuda" else "default")
        compile_config._compile_all_devices = True  # otherwise transformers compiles only on GPUs
        # All prompts share one cache size, because each size is compiled separately.
        settings |= {"cache_implementation": "static", "max_cache_len": job.room, "compile_config": compile_config}
    # Drop the folder's own defaults: each call gives all settings. Only the lengths of drafts are read in the settings
    # of the model that drafts, which can be the model itself.
    model.generation_config = GenerationConfig()
    vars((assistant or model).generation_config).update(schedule or {})
    helper = {} if assistant is None else {"assistant_model": assistant}

    def generate(tokens: torch.Tensor, pad: int, sampler: Sampler, timer: Timer) -> torch.Tensor:
        generation_config = GenerationConfig(
            max_new_tokens=limit,
            eos_token_id=list(stops) or None,
            pad_token_id=pad,
            repetition_penalty=sampler.repetition_penalty,
            do_sample=not sampler.greedy,
            **settings,
        )
        if not sampler.greedy:
            filters = {"top_k": sampler.top_k or 0, "top_p": sampler.top_p or 1.0, "min_p": sampler.min_p}
            generation_config.update(temperature=sampler.temperature, **filters)

        def note_first_tokens(input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            timer.first((input_ids.shape[1] - tokens.shape[1]) * len(tokens))
            return torch.zeros(len(input_ids), dtype=torch.bool, device=job.device)

        return model.generate(
            tokens,
            attention_mask=(tokens != pad).long(),
            generation_config=generation_config,
            stopping_criteria=[note_first_tokens],
            **helper,
        )

    return timed(job, generate)


def openvino(job: Job, *, path: str, draft: str | None = None, drafts: str = "3", precision: str = "") -> Decode:
    """OpenVINO GenAI on a CPU, one prompt at a time. `precision` is f32 or bf16; without it, OpenVINO chooses."""
    import numpy as np
    import openvino as ov
    import openvino_genai as genai

    settings: dict[str, Any] = {"INFERENCE_NUM_THREADS": torch.get_num_threads()}
    if precision:
        settings |= {"INFERENCE_PRECISION_HINT": precision, "KV_CACHE_PRECISION": precision}
    helper = {"draft_model": genai.draft_model(draft, "CPU", **settings)} if draft else {}
    pipe = genai.LLMPipeline(path, "CPU", **settings, **helper)

    def decode(batch: TokenLists, temperature: float, seed: int) -> tuple[Sequence[Output], GenerationStats]:
        (prompt,), sampler = batch, job.sampler(temperature, seed)
        config = genai.GenerationConfig()
        config.max_new_tokens, config.repetition_penalty = job.recipe.limit, sampler.repetition_penalty
        config.stop_token_ids, config.ignore_eos = set(job.recipe.llm.stop_tokens), not job.recipe.llm.stop_tokens
        config.do_sample, config.rng_seed = not sampler.greedy, seed
        if not sampler.greedy:
            config.temperature, config.top_p = sampler.temperature, sampler.top_p or 1.0
            config.min_p = sampler.min_p or 0.0
            if sampler.top_k:
                config.top_k = sampler.top_k
        if draft:
            config.num_assistant_tokens = int(drafts)
        started = time.perf_counter()
        result = pipe.generate(ov.Tensor(np.array([prompt], dtype=np.int64)), config)
        seconds = time.perf_counter() - started
        outputs = job.until_stop([list(result.tokens[0])])
        prefill_s = result.perf_metrics.get_ttft().mean / 1000
        stats = GenerationStats(len(outputs[0]), 1, prefill_s=prefill_s, decode_s=seconds - prefill_s)
        if draft:
            stats.accepted = result.extended_perf_metrics.get_num_accepted_tokens()
            # Its metrics do not count drafted tokens: the draft model runs once for each.
            steps = result.extended_perf_metrics.draft_model_metrics.raw_metrics.m_batch_sizes
            stats.drafted = sum(steps)
        return outputs, stats

    return decode


# ---- llama.cpp's servers ----


def llama_server(job: Job, *command: str) -> Decode:
    """A server of llama.cpp or ik_llama.cpp, one prompt at a time; it ends with this process."""
    command = command if not command[0].startswith("-") else (sys.executable, str(SERVER), *command)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    longest_draft = 32  # the last draft may reach beyond the end of the answer
    sizes = ["-c", str(job.room + longest_draft), "-t", str(torch.get_num_threads()), "--port", str(port)]
    local = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # never by a proxy
    with tempfile.TemporaryFile("w+") as log:
        # The server of xllamacpp exits when its stdin closes, which happens when this process ends.
        process = subprocess.Popen([*command, *sizes], stdin=subprocess.PIPE, stdout=log, stderr=log, text=True)
        RUNNING.append(process)
        for _ in range(START_S * 10):
            try:
                local.open(f"http://127.0.0.1:{port}/health").close()
                break
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.1)
            if process.poll() is not None:
                log.seek(0)
                raise RuntimeError(f"{' '.join(command)} ended:\n{log.read()[-2000:]}")
        else:
            raise RuntimeError(f"{' '.join(command)}: no answer at port {port} after {START_S} seconds")

    def decode(batch: TokenLists, temperature: float, seed: int) -> tuple[Sequence[Output], GenerationStats]:
        (prompt,), sampler = batch, job.sampler(temperature, seed)
        request = {
            "prompt": [*prompt],
            "n_predict": job.recipe.limit,
            "temperature": 0.0 if sampler.greedy else sampler.temperature,
            "top_k": sampler.top_k or 0,
            "top_p": sampler.top_p or 1.0,
            "min_p": sampler.min_p or 0.0,
            "repeat_penalty": sampler.repetition_penalty,
            "repeat_last_n": job.room,  # the whole text, like our sampler
            "seed": seed,
            "ignore_eos": not job.recipe.llm.stop_tokens,
            "cache_prompt": False,
            "return_tokens": True,
        }
        headers = {"Content-Type": "application/json"}
        url = f"http://127.0.0.1:{port}/completion"
        with local.open(urllib.request.Request(url, json.dumps(request).encode(), headers)) as response:
            reply = json.load(response)
        times = reply["timings"]
        stats = GenerationStats(times["predicted_n"], 1)
        stats.prefill_s, stats.decode_s = times["prompt_ms"] / 1000, times["predicted_ms"] / 1000
        stats.drafted, stats.accepted = times.get("draft_n", 0), times.get("draft_n_accepted", 0)
        tokens = reply.get("tokens")  # which ik_llama.cpp does not return
        return job.until_stop([tokens]) if tokens else [reply["content"]], stats

    return decode


RUNNING: list[subprocess.Popen] = []  # servers, which `main` ends
ENGINES: dict[str, Callable[..., Decode]] = {
    "torchtune": torchtune,
    "transformers": transformers,
    "llama.cpp": llama_server,
    "ik_llama.cpp": llama_server,
    "openvino": openvino,
}


def make_engine(job: Job, words: Sequence[str]) -> Decode:
    name, *settings = words
    if name not in ENGINES:
        raise ValueError(f"--engine: {name!r} is not allowed. Allowed: ours, {', '.join(ENGINES)}")
    if ENGINES[name] is llama_server:
        return llama_server(job, *settings)
    return ENGINES[name](job, **dict(word.split("=", 1) for word in settings))


# ---- turns and table ----


@dataclass
class Turn(Run):
    """One engine on one batch."""

    outputs: Any  # a sequence of Output
    processor_s: float = 0.0


def take_turns(
    engines: Mapping[str, Decode], batches: Sequence[TokenLists], temperature: float, repeats: int, seed: int
) -> dict[str, list[Turn]]:
    """All engines decode a batch before the next batch starts. The batches of the shortest and the longest prompts are
    for warming up: for the second length, torch compiles again, with dynamic shapes."""
    turns = defaultdict[str, list[Turn]](list)
    warm_up = [(-1, min(batches, key=longest_prompt)), (-1, max(batches, key=longest_prompt))]
    measured = [(repeat, batch) for repeat in range(repeats) for batch in batches]
    for number, (repeat, batch) in enumerate([*warm_up, *measured]):
        for name, decode in engines.items():
            before = time.process_time()
            outputs, stats = decode(batch, temperature, seed + number)
            if repeat >= 0:
                turns[name].append(Turn(repeat, outputs, stats, time.process_time() - before))
    return turns


def rows(
    turns: Mapping[str, Sequence[Turn]], temperature: float, text_of: Callable[[list[int]], str]
) -> Iterator[dict[str, Any]]:
    """A row of figures for each engine. The first engine's tokens are compared with the others' if greedy."""
    first, *_ = turns.values()
    plain = by_repeat(first)
    for name, taken in turns.items():
        repeats = by_repeat(taken)
        pairs = [*zip(repeats, plain, strict=True)]
        same = [
            output == (text_of(tokens) if isinstance(output, str) else tokens)
            for turn, expected in zip(taken, first, strict=True)
            for output, tokens in zip(turn.outputs, expected.outputs, strict=True)
        ]
        drafted = sum(turn.stats.drafted for turn in taken)
        elsewhere = name.partition(" ")[0] in ("llama.cpp", "ik_llama.cpp")
        processor_s = None if elsewhere else sum(turn.processor_s for turn in taken)
        yield {
            "temperature": temperature,
            "engine": name,
            "answer_tokens_per_second": spread([stats.answer_tokens_per_second for stats in repeats]),
            "answer_speedup": spread([ratio(*pair, "answer_tokens_per_second") for pair in pairs]),
            "tokens_per_second": spread([stats.tokens_per_second for stats in repeats]),
            "speedup": spread([ratio(*pair) for pair in pairs]),
            "first_token_s": statistics.median(turn.stats.prefill_s for turn in taken),
            "tokens_per_processor_second": processor_s and sum(stats.tokens for stats in repeats) / processor_s,
            "accepted": sum(turn.stats.accepted for turn in taken) / drafted if drafted else None,
            "same": None if temperature else sum(same),
            "outputs": len(same),
        }


COLUMNS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "engine": lambda row: row["engine"],
    "answers, tokens/s": lambda row: show(row["answer_tokens_per_second"], ".1f"),
    "speed-up of answers": lambda row: show(row["answer_speedup"], ".2f"),
    "decoding, tokens/s": lambda row: show(row["tokens_per_second"], ".1f"),
    "speed-up": lambda row: show(row["speedup"], ".2f"),
    "first token, ms": lambda row: show(row["first_token_s"], ".0f", 1e3),
    "tokens per processor second": lambda row: show(row["tokens_per_processor_second"], ".1f"),
    "accepted": lambda row: show(row["accepted"], ".2f"),
    "same outputs": lambda row: "-" if row["same"] is None else f"{row['same']} of {row['outputs']}",
}


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--engine", action="append", default=[], metavar="'NAME ...'")
    args = parser.parse_intermixed_args(arguments)
    recipe = our_recipe(args.config, args.overrides)
    engines, job = our_methods(recipe, "ours"), Job(recipe)
    try:
        for engine in args.engine:
            words = engine.split()
            if words[0] == "ours":
                engines |= our_methods(our_recipe(args.config, [*args.overrides, *words[1:]]), engine)
            else:
                engines[engine] = make_engine(job, words)
        table: list[dict[str, Any]] = []
        for temperature in recipe.cfg.all_temperatures:
            turns = take_turns(engines, recipe.batches, temperature, recipe.repeats, recipe.seed)
            table += rows(turns, temperature, partial(without_stop, recipe))
    finally:
        for process in RUNNING:
            process.terminate()
    print_page(recipe, table)
    print(json.dumps(table), flush=True)


def without_stop(recipe: LayerSkipBenchmark, tokens: list[int]) -> str:
    return recipe.tokenizer.decode([token for token in tokens if token not in recipe.llm.stop_tokens])


def print_page(recipe: LayerSkipBenchmark, table: Sequence[Mapping[str, Any]]) -> None:
    versions = []
    for package in ("torch", "torchtune", "transformers", "xllamacpp", "openvino-genai"):
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    print(
        f"{recipe.cfg.given_folder} on {device_name(recipe.device)}, {torch.get_num_threads()} threads, "
        f"{memory_bandwidth(recipe.device) / 1e9:.1f} GB/s, {', '.join(versions)}: {len(recipe.prompts)} prompts of "
        f"{statistics.mean(map(len, recipe.prompts)):.0f} tokens on average, {len(recipe.batches[0])} at a time, "
        f"at most {recipe.limit} new tokens, {recipe.repeats} repeats"
    )
    for temperature in dict.fromkeys(row["temperature"] for row in table):
        print(f"\nTemperature {temperature}:\n\n| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
        for row in table:
            if row["temperature"] == temperature:
                print(f"| {' | '.join(column(row) for column in COLUMNS.values())} |")


if __name__ == "__main__":
    main(sys.argv[1:])
