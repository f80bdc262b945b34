"""Other libraries on the same model: torchtune's, transformers' and llama.cpp's own generation.

Peers are timed like our engine: tokens after the first ones, per second of decoding. Assisted decoding gets several
tokens from its prefill; neither they nor their time count. Short trials find each peer's fastest setting at each
temperature. Weights, dtype, device and thread count are ours; only llama.cpp reads its own weights from a GGUF file.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torchtune import training
from torchtune.generation import generate as torchtune_generate
from torchtune.generation import generate_next_token

from layerskip_recipes.benchmark.llama_cpp import LlamaCppServer
from layerskip_recipes.checkpoint.checkpointers import weights_folder
from layerskip_recipes.config.components import Component
from layerskip_recipes.distributed.loading import make_position_tables
from layerskip_recipes.errors import first_line
from layerskip_recipes.folders.model_folder import holds_adapters
from layerskip_recipes.generation.sampling import Sampler
from layerskip_recipes.generation.stats import GenerationStats
from layerskip_recipes.model.decoder import LayerSkipDecoder

TokenLists = Sequence[Sequence[int]]
# (prompts, sampler, seed) -> the new tokens of each row, and the statistics.
Decode = Callable[[TokenLists, Sampler, int], tuple[list[list[int]], GenerationStats]]
LENGTHS = (2, 4, 6)  # draft lengths to try


@dataclass(frozen=True, eq=False)
class Job:
    """The model, prompts and limits that all peers share."""

    cfg: Any  # the BenchmarkConfig, whose module imports this one
    model: LayerSkipDecoder  # torchtune's decoder shares its weights
    prompts: TokenLists  # the first batch, for trials
    max_prompt: int  # length of the longest prompt
    limit: int  # maximum number of new tokens
    stop_tokens: Sequence[int]
    exits: Sequence[int]  # exits that transformers_early_exit tries

    @property
    def device(self) -> torch.device:
        return self.model.tok_embeddings.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.tok_embeddings.weight.dtype

    @cached_property
    def transformers_model(self) -> Any:
        """The checkpoint loaded by transformers, shared by its two peers."""
        import transformers  # takes seconds to import

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            str(weights_folder(self.cfg.checkpointer)), dtype=self.dtype
        )
        # Drop the checkpoint's own defaults: each call gives all settings.
        model.generation_config = transformers.GenerationConfig()
        return model.to(self.device).eval()

    def outputs(self, rows: TokenLists) -> list[list[int]]:
        """The new tokens of each row up to its first stop token."""
        ends = [next((i + 1 for i, token in enumerate(row) if token in self.stop_tokens), len(row)) for row in rows]
        return [list(row[:end]) for row, end in zip(rows, ends, strict=True)]


class PeerTimer:
    """Splits the time of a call at its first new tokens."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.count: int | None = None
        self.started = self.first_at = self._now()

    def first(self, count: int) -> None:
        """Note that the batch has its first `count` new tokens; later calls are ignored."""
        if self.count is None:
            self.count, self.first_at = count, self._now()

    def stats(self, outputs: list[list[int]]) -> GenerationStats:
        ended = self._now()
        self.first(len(outputs))
        prefill_s, decode_s = self.first_at - self.started, ended - self.first_at
        return GenerationStats(sum(map(len, outputs)), self.count or 0, prefill_s=prefill_s, decode_s=decode_s)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def left_padded(rows: TokenLists, device: torch.device) -> tuple[torch.Tensor, int]:
    """The prompts [b, s] and a padding id that no prompt contains, because torchtune masks every such token."""
    width = max(map(len, rows))
    used = {token for row in rows for token in row}
    pad = next(token for token in range(len(used) + 1) if token not in used)
    return torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows], device=device), pad


# ---- one decoder per library ----


def timed(job: Job, generate: Callable[[torch.Tensor, int, Sampler, PeerTimer], torch.Tensor]) -> Decode:
    """Decode with generate(prompts [b, s], padding id, sampler, timer), which returns prompts and new tokens."""

    def decode(rows: TokenLists, sampler: Sampler, seed: int) -> tuple[list[list[int]], GenerationStats]:
        tokens, pad = left_padded(rows, job.device)
        torch.manual_seed(seed)
        timer = PeerTimer(job.device)
        generated = generate(tokens, pad, sampler, timer)
        outputs = job.outputs(generated[:, tokens.shape[1] :].tolist())
        return outputs, timer.stats(outputs)

    return decode


def torchtune_decoder(job: Job, compiled: bool) -> Decode:
    """`torchtune.generation.generate` with its KV cache; it supports only temperature and top_k."""
    with training.set_default_dtype(job.dtype), torch.device("meta"):
        model = job.cfg.model.build()
    model.load_state_dict(job.model.state_dict(), assign=True)  # the same tensors, no copy
    make_position_tables(model, job.device, job.dtype)
    with job.device:
        model.setup_caches(len(job.prompts), job.dtype, decoder_max_seq_len=job.max_prompt + job.limit)
    model.eval()
    next_token = torch.compile(generate_next_token) if compiled else generate_next_token

    def generate(tokens: torch.Tensor, pad: int, sampler: Sampler, timer: PeerTimer) -> torch.Tensor:
        if sampler.penalises or (not sampler.greedy and (sampler.top_p or sampler.min_p)):
            raise ValueError("torchtune has no top_p, min_p or repetition_penalty")

        def timed_next_token(*args: Any, **kwargs: Any) -> Any:
            timer.first(len(tokens))  # the first call is for the second token
            return next_token(*args, **kwargs)

        model.reset_caches()
        return torchtune_generate(
            model,
            tokens,
            max_generated_tokens=job.limit,
            pad_id=pad,
            # torchtune turns temperature 0 into 1e-5, which can still sample another token; top_k=1 cannot.
            temperature=1.0 if sampler.greedy else sampler.temperature,
            top_k=1 if sampler.greedy else sampler.top_k,
            stop_tokens=list(job.stop_tokens),
            custom_generate_next_token=timed_next_token,
        )[0]

    return timed(job, generate)


def transformers_decoder(job: Job, compiled: bool, exit_layer: int | None = None, length: int = 0) -> Decode:
    """transformers' `generate`; the compiled version uses a static cache.

    With an exit it is `generate(assistant_early_exit=E)` with a constant draft length, its fastest schedule.
    """
    from transformers import CompileConfig, GenerationConfig  # takes seconds to import

    settings: dict[str, Any] = {"assistant_early_exit": exit_layer}
    if compiled:
        compile_config: Any = CompileConfig(mode="reduce-overhead" if job.device.type == "cuda" else "default")
        compile_config._compile_all_devices = True  # otherwise transformers compiles only on GPUs
        # All prompts share one cache size, because each size is compiled separately.
        size = job.max_prompt + job.limit
        settings |= {"cache_implementation": "static", "max_cache_len": size, "compile_config": compile_config}
    # transformers reads these from the assistant's defaults, and the assistant is the model itself.
    schedule = {
        "num_assistant_tokens": length,
        "num_assistant_tokens_schedule": "constant",
        "assistant_confidence_threshold": 0.0,
    }

    def generate(tokens: torch.Tensor, pad: int, sampler: Sampler, timer: PeerTimer) -> torch.Tensor:
        generation_config = GenerationConfig(
            max_new_tokens=job.limit,
            eos_token_id=list(job.stop_tokens) or None,
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
            return never

        never = torch.zeros(len(tokens), dtype=torch.bool, device=job.device)
        defaults = vars(job.transformers_model.generation_config)
        defaults.update(schedule if exit_layer else {})
        try:
            return job.transformers_model.generate(
                tokens,
                attention_mask=(tokens != pad).long(),
                generation_config=generation_config,
                stopping_criteria=[note_first_tokens],
            )
        finally:
            defaults.update(dict.fromkeys(schedule))

    return timed(job, generate)


def llama_cpp_decoder(job: Job, compiled: bool, length: int = 0) -> Decode:
    """llama.cpp's server on the CPU, with drafts of `length` tokens if length > 0."""
    if job.device.type != "cpu" or len(job.prompts) > 1:
        raise ValueError("it decodes one prompt at a time on a CPU here")
    files = job.cfg.peers.llama_cpp
    drafting = (files.draft, length) if length else ()
    server = LlamaCppServer(files.gguf, job.max_prompt + job.limit + length + 1, torch.get_num_threads(), *drafting)

    def decode(rows: TokenLists, sampler: Sampler, seed: int) -> tuple[list[list[int]], GenerationStats]:
        tokens, stats = server.complete(rows[0], job.limit, sampler, seed, ignore_end=not job.stop_tokens)
        return job.outputs([tokens]), stats

    return decode


@dataclass(frozen=True)
class PeerKind:
    package: str
    decoder: Callable[..., Decode]  # (job, compiled, **arguments)
    compiles: bool = True


PEERS: dict[str, PeerKind] = {
    "torchtune": PeerKind("torchtune", torchtune_decoder),
    "transformers": PeerKind("transformers", transformers_decoder),
    "transformers_early_exit": PeerKind("transformers", transformers_decoder),
    "llama_cpp": PeerKind("xllamacpp", llama_cpp_decoder, compiles=False),
}


def settings_to_try(name: str, job: Job) -> dict[str, dict[str, int]]:
    """The arguments of a peer's decoder by the name of the setting."""
    if name == "transformers_early_exit":
        return {f"exit {e}, {n} drafts": {"exit_layer": e, "length": n} for e in job.exits for n in LENGTHS}
    if name == "llama_cpp":
        drafts = LENGTHS if job.cfg.peers.llama_cpp.draft else ()
        return {"plain": {}} | {f"{n} drafts": {"length": n} for n in drafts}
    return {"eager": {}}


# ---- finding the fastest setting ----


@dataclass(frozen=True)
class Peer:
    """A peer in its fastest setting."""

    decode: Decode
    setting: str
    trial: dict[str, float | str]  # each setting's tokens per second, or its error


def check_same_model(package: str, checkpointer: Component, quantised: bool = False) -> None:
    """Raise ValueError if a peer would run a different model than ours because of adapters or a quantizer."""
    if quantised and package != "xllamacpp":
        raise ValueError("it would run the weights without quantizer")
    if checkpointer.get("adapter_checkpoint") is not None:
        raise ValueError("it would run the base without checkpointer.adapter_checkpoint")
    folder = weights_folder(checkpointer)
    beside = folder is not None and (folder / "adapter_config.json").is_file() and not holds_adapters(folder)
    if package == "transformers" and beside:
        raise ValueError(
            f"it would add the adapters in {folder} to weights that contain them; `layerskip export` removes them"
        )


def fastest_setting(name: str, job: Job, sampler: Sampler, compile: bool) -> Peer:
    """Try each setting on the first batch, then the fastest one compiled."""
    kind, settings, found = PEERS[name], settings_to_try(name, job), dict[str, Decode]()
    rates, trial = dict[str, float](), dict[str, float | str]()

    def try_out(setting: str, compiled: bool, arguments: dict[str, int]) -> None:
        try:
            found[setting] = kind.decoder(job, compiled, **arguments)
            for _ in range(2):  # the first call is a warm-up
                _, stats = found[setting](job.prompts, sampler, 0)
            trial[setting] = rates[setting] = stats.tokens_per_second or 0.0
        except Exception as e:  # for example, no compiler
            trial[setting] = type_and_line(e)

    for setting, arguments in settings.items():
        try_out(setting, False, arguments)
    if not rates:
        failed = "; ".join(f"{setting}: {why}" for setting, why in trial.items())
        raise RuntimeError(failed or "no variant has an exit_layer")
    fastest = max(rates, key=rates.__getitem__)
    if compile and kind.compiles:
        try_out("compiled" if fastest == "eager" else f"{fastest}, compiled", True, settings[fastest])
        fastest = max(rates, key=rates.__getitem__)
    return Peer(found[fastest], fastest, trial)


def type_and_line(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"[:300]
