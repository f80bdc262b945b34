"""Other decoders on the same checkpoint, for the benchmark: torchtune's and transformers' own generation.

How they are timed: like our engine, tokens after the first ones per second after the first ones. A watch notes when the
first new tokens are there: torchtune's `custom_generate_next_token` is called first for the second token, a stopping
criterion of transformers after the first tokens. So no second call is needed whose time is subtracted. Assisted
decoding drafts before its prefill, and gets several tokens from it: none of them counts, nor the time they took.

Each peer runs in the best of its settings, by a short trial. Weights, dtype, device and threads are ours.
"""

import importlib.util
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torchtune import training, utils
from torchtune.generation import generate as torchtune_generate
from torchtune.generation import generate_next_token
from torchtune.modules import TransformerDecoder

from layerskip_recipes.config.settings import build
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.generation.sampling import Sampler
from layerskip_recipes.generation.stats import GenerationStats
from layerskip_recipes.model.decoder import LayerSkipDecoder

log = utils.get_logger("INFO")

Rows = Sequence[Sequence[int]]
# (prompts, sampler, seed) -> the new tokens of each row, and what they took.
Decode = Callable[[Rows, Sampler, int], tuple[list[list[int]], GenerationStats]]


@dataclass(frozen=True, eq=False)
class Job:
    """What all peers decode.

    Args:
        cfg: sections model and checkpointer.
        model: ours, whose weights torchtune's decoder shares.
        prompts: the first batch, for trials.
        max_prompt: tokens of the longest of all prompts.
        limit: new tokens, at most.
        stop_tokens: a row ends with the first of them.
        compile: whether settings that compile are tried.
        draft: exit layer and draft length of transformers_early_exit.
    """

    cfg: DictConfig
    model: LayerSkipDecoder
    prompts: Rows
    max_prompt: int
    limit: int
    stop_tokens: Sequence[int]
    compile: bool
    draft: tuple[int, int] | None

    @property
    def device(self) -> torch.device:
        """Of the model."""
        return self.model.tok_embeddings.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the model."""
        return self.model.tok_embeddings.weight.dtype

    @cached_property
    def transformers_model(self) -> Any:
        """The checkpoint as transformers loads it, once for both of its peers."""
        import transformers  # seconds to import, and only for these peers

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        model = transformers.AutoModelForCausalLM.from_pretrained(
            self.cfg.checkpointer.checkpoint_dir, dtype=self.dtype
        )
        # Without the checkpoint's own defaults: each call says all that counts here.
        model.generation_config = transformers.GenerationConfig()
        return model.to(self.device).eval()

    def outputs(self, found: torch.Tensor, width: int) -> list[list[int]]:
        """The new tokens [b, width:] of each row, up to its first stop token."""
        rows = found[:, width:].tolist()
        ends = [next((i + 1 for i, token in enumerate(row) if token in self.stop_tokens), len(row)) for row in rows]
        return [row[:end] for row, end in zip(rows, ends, strict=True)]


class Watch:
    """When a call started, when its first new tokens were there, how many they were, and when it ended."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.count: int | None = None
        self.started = self.first_at = self._now()

    def first(self, count: int) -> None:
        """`count` tokens of all rows are there. Later calls change nothing."""
        if self.count is None:
            self.count, self.first_at = count, self._now()

    def stats(self, outputs: list[list[int]]) -> GenerationStats:
        """The call ended. `rows` are here the tokens that came first, which `tokens_per_second` leaves out."""
        ended = self._now()
        self.first(len(outputs))
        return GenerationStats(
            tokens=sum(map(len, outputs)),
            rows=self.count,
            prefill_s=self.first_at - self.started,
            decode_s=ended - self.first_at,
        )

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def left_padded(rows: Rows, device: torch.device) -> tuple[torch.Tensor, int]:
    """[b, s] prompts, and the id that pads them: one that is in none, since torchtune takes each of it for padding."""
    width = max(map(len, rows))
    used = {token for row in rows for token in row}
    pad = next(token for token in range(len(used) + 1) if token not in used)
    return torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows], device=device), pad


# ---- torchtune ----


def torchtune_settings(job: Job) -> dict[str, Decode]:
    """`torchtune.generation.generate` with its KV cache, its step as it is and compiled."""
    with training.set_default_dtype(job.dtype), job.device:
        model = build(job.cfg.model, "model")
        model.load_state_dict(job.model.state_dict(), assign=True)  # the same tensors, no copy
        model.setup_caches(len(job.prompts), job.dtype, decoder_max_seq_len=job.max_prompt + job.limit)
    steps = {"KV cache": generate_next_token}
    if job.compile:
        steps["KV cache, compiled"] = torch.compile(generate_next_token)
    return {name: partial(_run_torchtune, job, model.eval(), step) for name, step in steps.items()}


def _run_torchtune(job: Job, model: TransformerDecoder, step: Callable, rows: Rows, sampler: Sampler, seed: int):
    tokens, pad = left_padded(rows, job.device)
    torch.manual_seed(seed)
    model.reset_caches()
    watch = Watch(job.device)

    def timed_step(*args: Any, **kwargs: Any) -> Any:
        watch.first(len(rows))
        return step(*args, **kwargs)

    found, _ = torchtune_generate(
        model,
        tokens,
        max_generated_tokens=job.limit,
        pad_id=pad,
        # Its temperature 0 is 1e-5, which can still take another token; the likeliest one alone cannot.
        temperature=1.0 if sampler.greedy else sampler.temperature,
        top_k=1 if sampler.greedy else sampler.top_k,
        stop_tokens=list(job.stop_tokens),
        custom_generate_next_token=timed_step,
    )
    outputs = job.outputs(found, tokens.shape[1])
    return outputs, watch.stats(outputs)


# ---- transformers ----


def transformers_settings(job: Job) -> dict[str, Decode]:
    """`generate` of transformers: as it is, and with the static cache that it compiles for."""
    settings: dict[str, dict[str, Any]] = {"dynamic cache": {}}
    if job.compile:
        settings["static cache, compiled"] = _compiled(job)
    return {name: partial(_run_transformers, job, extra) for name, extra in settings.items()}


def _compiled(job: Job) -> dict[str, Any]:
    from transformers import CompileConfig

    how = CompileConfig(mode="reduce-overhead" if job.device.type == "cuda" else "default")
    how._compile_all_devices = True  # else on GPUs only
    # One size of the cache for all prompts: the next size would be compiled again.
    size = job.max_prompt + job.limit
    return {"cache_implementation": "static", "max_cache_len": size, "compile_config": how}


def early_exit_settings(job: Job) -> dict[str, Decode]:
    """`generate(assistant_early_exit=E)` with drafts of d tokens by its schedules, and without its threshold."""
    exit_layer, length = job.draft
    settings = {
        "constant": {"num_assistant_tokens_schedule": "constant"},
        "heuristic": {"num_assistant_tokens_schedule": "heuristic"},
        "constant, no threshold": {"num_assistant_tokens_schedule": "constant", "assistant_confidence_threshold": 0.0},
    }
    extra = {"assistant_early_exit": exit_layer}
    runs = {
        name: partial(_run_early_exit, job, extra, how | {"num_assistant_tokens": length})
        for name, how in settings.items()
    }
    if job.compile:
        how = settings["constant, no threshold"] | {"num_assistant_tokens": length}
        runs["constant, no threshold, static cache, compiled"] = partial(
            _run_early_exit, job, extra | _compiled(job), how
        )
    return runs


def _run_early_exit(job: Job, extra: dict[str, Any], how: dict[str, Any], rows: Rows, sampler: Sampler, seed: int):
    # transformers reads them from the assistant's defaults, and here the assistant is the model itself.
    defaults = job.transformers_model.generation_config
    vars(defaults).update(how)
    out = _run_transformers(job, extra, rows, sampler, seed)
    how["num_assistant_tokens"] = defaults.num_assistant_tokens  # the heuristic goes on from there
    vars(defaults).update(dict.fromkeys(how))
    return out


def _run_transformers(job: Job, extra: dict[str, Any], rows: Rows, sampler: Sampler, seed: int):
    from transformers import GenerationConfig

    tokens, pad = left_padded(rows, job.device)
    how = GenerationConfig(
        max_new_tokens=job.limit,
        eos_token_id=list(job.stop_tokens) or None,
        pad_token_id=pad,
        repetition_penalty=sampler.repetition_penalty,
        do_sample=not sampler.greedy,
        **extra,
    )
    if not sampler.greedy:
        filters = {"top_k": sampler.top_k or 0, "top_p": sampler.top_p or 1.0, "min_p": sampler.min_p}
        how.update(temperature=sampler.temperature, **filters)
    torch.manual_seed(seed)
    watch = Watch(job.device)
    go_on = torch.zeros(len(rows), dtype=torch.bool, device=job.device)

    def never_stop(input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        watch.first((input_ids.shape[1] - tokens.shape[1]) * len(rows))
        return go_on

    found = job.transformers_model.generate(
        tokens, attention_mask=(tokens != pad).long(), generation_config=how, stopping_criteria=[never_stop]
    )
    outputs = job.outputs(found, tokens.shape[1])
    return outputs, watch.stats(outputs)


# ---- all of them ----

PEERS: dict[str, Callable[[Job], dict[str, Decode]]] = {
    "torchtune": torchtune_settings,
    "transformers": transformers_settings,
    "transformers_early_exit": early_exit_settings,
}


def check_peers(names: Sequence[str], sampler: Sampler, rows: int, draft: tuple[int, int] | None) -> None:
    """Raises a ValueError if a peer is unknown, stands twice, or cannot do what the others do.

    Args:
        names: of `peers`.
        sampler: its filters.
        rows: the batch size.
        draft: exit layer and draft length of the first variant that drafts.
    """
    for name in names:
        if name not in PEERS or list(names).count(name) > 1:
            said = "stands twice" if name in PEERS else "is unknown"
            raise ConfigError(f"peers: {name!r} {said}. Allowed: {', '.join(PEERS)}; for example peers=[torchtune]")
    for key, off in {"top_p": (None, 1), "min_p": (None, 0), "repetition_penalty": (1,)}.items():
        if "torchtune" in names and getattr(sampler, key) not in off:
            raise ConfigError(
                f"peers: torchtune samples by temperature and top_k only, not by {key}={getattr(sampler, key)}. "
                "Allowed: one without the other; for example peers=[transformers]"
            )
    if "transformers_early_exit" in names and rows > 1:
        raise ConfigError(
            f"peers: transformers_early_exit decodes one prompt at a time, and batch_size is {rows}. Allowed: one "
            "without the other; for example batch_size=1"
        )
    if "transformers_early_exit" in names and draft is None:
        raise ConfigError(
            "peers: transformers_early_exit drafts like the first variant that drafts, and none does. Allowed: with "
            "such a variant; for example variants.chain.exit_layer=8 variants.chain.num_speculations=6"
        )


def check_peer_files(names: Sequence[str], section: DictConfig) -> None:
    """Raises a ValueError if a peer is asked for that cannot open the checkpoint of a `checkpointer` section."""
    folder = section.get("checkpoint_dir")
    if names and section.get("adapter_checkpoint") is not None:
        raise ConfigError(
            f"peers: {', '.join(names)} would run the base without checkpointer.adapter_checkpoint, another model. "
            "Allowed: none, or the merged checkpoint with its plain model section; for example peers=[]"
        )
    for name in names:
        if not name.startswith("transformers"):
            continue
        if not (folder and Path(folder, "config.json").is_file()):
            raise ConfigError(
                f"peers: {name} needs config.json in checkpointer.checkpoint_dir, and {folder!r} has none. Allowed: "
                "peers that do not; for example peers=[torchtune]"
            )
        if Path(folder, "adapter_config.json").is_file():
            raise ConfigError(
                f"peers: {name} would add the adapters in checkpointer.checkpoint_dir {folder!r} to weights that have "
                "them already. Allowed: peers that do not, for example peers=[torchtune]; or a folder without "
                f"adapters: `layerskip export {folder} exported`, then checkpointer.checkpoint_dir=exported and "
                "checkpointer.checkpoint_files with the names of its weights, [model.safetensors] if they are one file"
            )


@dataclass(frozen=True)
class Peer:
    """A peer in the setting that won its trial; `trial` has each setting's tokens per second, or why it failed."""

    decode: Decode
    setting: str
    trial: dict[str, float | str]


def find_peers(
    names: Sequence[str], job: Job, samplers: dict[float, Sampler]
) -> tuple[dict[float, dict[str, Peer]], dict[str, str]]:
    """The peers that run here at all temperatures, each in its best setting; and why the others do not run.

    Args:
        names: the peers asked for.
        job: what they decode.
        samplers: by temperature.
    """
    found: dict[float, dict[str, Peer]] = {temperature: {} for temperature in samplers}
    left_out = {}
    for name in names:
        package = name.partition("_")[0]
        try:
            if importlib.util.find_spec(package) is None:
                raise ModuleNotFoundError(f"{package} is not installed")
            settings = PEERS[name](job)
            best = {temperature: _best(settings, job, sampler) for temperature, sampler in samplers.items()}
        except Exception as e:  # whatever another library says on this machine, our figures stand without it
            left_out[name] = first_line(e)
            log.warning("peers: %s is left out (%s)", name, left_out[name])
        else:
            for temperature, peer in best.items():
                found[temperature][name] = peer
    return found, left_out


def _best(settings: dict[str, Decode], job: Job, sampler: Sampler) -> Peer:
    """The fastest setting on the first prompts, which each decodes twice: the first time it may have to compile."""
    trial: dict[str, float | str] = {}
    for setting, decode in settings.items():
        try:
            for _ in range(2):
                _, stats = decode(job.prompts, sampler, 0)
            trial[setting] = stats.tokens_per_second or 0.0
        except Exception as e:  # such as a machine without a compiler
            trial[setting] = first_line(e)
    rates = {setting: rate for setting, rate in trial.items() if isinstance(rate, float)}
    if not rates:
        raise RuntimeError("; ".join(f"{setting}: {why}" for setting, why in trial.items()))
    setting = max(rates, key=rates.__getitem__)
    return Peer(settings[setting], setting, trial)


def first_line(error: Exception) -> str:
    """What an error says, briefly."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:300]
