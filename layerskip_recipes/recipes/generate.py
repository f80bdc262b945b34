"""`tune run layerskip_generate`: from prompts to text, autoregressive, early exit or self-speculative. Wiring only.

The decoding lives in `generation/`; here are prompts, streaming, stop strings, the comparison and the report.
"""

import json
import resource
import sys
from dataclasses import dataclass, field
from typing import Any

import torch
from omegaconf import DictConfig
from torchtune import config, training, utils

from layerskip_recipes import checkpoint as ckpt
from layerskip_recipes.checks import check_choice
from layerskip_recipes.config import build_recipe, main_of
from layerskip_recipes.decoder import layerskip_decoder
from layerskip_recipes.generation import Generation, GenerationStats, is_looping
from layerskip_recipes.generation.engine import check_lengths, check_num_speculations
from layerskip_recipes.generation.sampling import Sampler
from layerskip_recipes.recipes.prompts import read_prompts, to_tokens
from layerskip_recipes.settings import (
    COMMON,
    anything,
    build,
    build_on_meta,
    check_device,
    check_dtype,
    check_one_process,
    check_section,
    check_settings,
    check_vocabulary,
    component,
    list_of,
    number,
    one_of,
    text,
)

log = utils.get_logger("INFO")

SETTINGS = COMMON | {
    "quantizer": component(optional=True),
    "cudnn_deterministic_mode": one_of(None, 0, 1, 2, "default", "warn", "error"),
    "prompt": anything,
    "prompts": component(optional=True),
    "prompt_file": text("prompts.jsonl"),
    "max_new_tokens": number(minimum=1, example=128),
    "temperature": anything,
    "top_k": anything,
    "top_p": anything,
    "stop_tokens": list_of(int, "[2]"),
    "stop_strings": list_of(str, "[END]"),
    "stream": one_of(True, False),
    "exit_layer": anything,
    "self_speculation": anything,
    "benchmark": anything,
    "enable_kv_cache": one_of(True, None),
    "log_level": one_of("INFO", "DEBUG", "WARNING", "ERROR"),
}
REQUIRED = ()
REFUSED = {
    "tensor_parallel_plan": "this version generates on one device",
    "tensor_parallel_dim": "this version generates on one device",
    "compile": "this version does not compile the decoding steps",
    "batch_size": "prompts are generated one after the other",
}


def self_speculation(exit_layer: int, num_speculations: int) -> dict[str, int]:
    """The `self_speculation` section: the exit that drafts (1..L) and the tokens it drafts per round."""
    return {"exit_layer": exit_layer, "num_speculations": num_speculations}


def benchmark(compare: bool = False) -> bool:
    """The `benchmark` section: whether the autoregressive baseline runs too."""
    check_choice("benchmark.compare", compare, (True, False))
    return compare


def decoding_mode(cfg: DictConfig) -> dict[str, int | None]:
    """exit_layer and num_speculations of the engine, from `exit_layer` alone or the `self_speculation` section.

    Raises:
        ValueError: if both are set, or the section is incomplete.
    """
    if cfg.get("self_speculation") is None:
        return {"exit_layer": cfg.get("exit_layer"), "num_speculations": None}
    arguments = check_section(cfg.self_speculation, "self_speculation", self_speculation)
    for key, example in (("exit_layer", 8), ("num_speculations", 6)):
        if arguments.get(key) is None:
            raise ValueError(
                f"self_speculation.{key}: missing; for example self_speculation.{key}={example}. To take all tokens "
                "from an early exit set exit_layer and self_speculation=null"
            )
    if cfg.get("exit_layer") is not None:
        raise ValueError(
            f"exit_layer: {cfg.exit_layer} is set beside self_speculation. For all tokens from that exit: "
            f"exit_layer={cfg.exit_layer} self_speculation=null"
        )
    return self_speculation(**arguments)


def check_config(cfg: DictConfig) -> None:
    """All of a generation config that can be wrong on any machine.

    Raises:
        ValueError: the key, what was given, what is allowed.
    """
    check_settings(cfg, SETTINGS, REFUSED)
    Sampler(cfg.get("temperature", 0.0), cfg.get("top_k"), cfg.get("top_p"))
    benchmark(**check_section(cfg.get("benchmark"), "benchmark", benchmark))
    model = layerskip_decoder(build_on_meta(cfg))
    ckpt.check_checkpointer(cfg, model)
    mode = decoding_mode(cfg)
    prefix = "" if mode["num_speculations"] is None else "self_speculation."
    if mode["exit_layer"] is not None:
        model.check_exit(mode["exit_layer"], f"{prefix}exit_layer")
    check_num_speculations(mode["num_speculations"], mode["exit_layer"], f"{prefix}num_speculations")
    if all(cfg.get(key) is None for key in ("prompt", "prompts", "prompt_file")):
        raise ValueError(
            'prompt: missing. Give prompt="text", prompt.user="question", or prompt_file=FILE (- reads stdin)'
        )


@dataclass
class Totals:
    """What one way of decoding did over all prompts; the outputs that loop are counted apart."""

    stats: GenerationStats = field(default_factory=GenerationStats)
    straight: GenerationStats = field(default_factory=GenerationStats)
    looping: int = 0
    outputs: list[list[int]] = field(default_factory=list)

    def add(self, tokens: list[int], stats: GenerationStats) -> None:
        self.outputs.append(tokens)
        self.stats = self.stats + stats
        if is_looping(tokens):
            self.looping += 1
        else:
            self.straight = self.straight + stats


class LayerSkipGenerate:
    """Generates from each prompt and reports speed and acceptance.

    Args:
        cfg: the config, see the README; settings and prompts are all checked here.

    Raises:
        ValueError: for a wrong setting or prompt, before any weight is loaded.
    """

    def __init__(self, cfg: DictConfig) -> None:
        check_config(cfg)
        self.cfg = cfg
        log.setLevel(cfg.get("log_level", "INFO"))
        self.device = check_device(cfg)
        self.dtype = check_dtype(cfg, self.device)
        ckpt.check_checkpoint_files(cfg)
        ckpt.require_weights(cfg)
        torch.set_float32_matmul_precision(cfg.get("float32_matmul_precision", "highest"))
        self.seed = training.set_seed(seed=cfg.get("seed"), debug_mode=cfg.get("cudnn_deterministic_mode"))
        self.max_new_tokens = cfg.get("max_new_tokens", 128)
        self.compare = benchmark(**check_section(cfg.get("benchmark"), "benchmark", benchmark))
        self.mode = decoding_mode(cfg)
        check_one_process()
        model = build_on_meta(cfg)
        self.tokenizer = build(cfg.tokenizer, "tokenizer")
        check_vocabulary(self.tokenizer, model)
        self.prompts = read_prompts(cfg)
        self.prompt_tokens = [to_tokens(prompt, self.tokenizer) for prompt in self.prompts]
        lengths = [len(tokens) for tokens in self.prompt_tokens]
        check_lengths(model, lengths, self.max_new_tokens, key="max_new_tokens")
        self.stop_tokens = [*getattr(self.tokenizer, "stop_tokens", []), *(cfg.get("stop_tokens") or [])]
        self.stop_strings = list(cfg.get("stop_strings") or [])

    def setup(self) -> None:
        """Load the model."""
        config.log_config(recipe_name=type(self).__name__, cfg=self.cfg)
        self.model = ckpt.load_decoder(self.cfg, self.device, self.dtype)

    def generate(self) -> dict[str, Any]:
        """All prompts one after the other; with `benchmark.compare` each of them autoregressively first.

        Returns:
            The report that is also printed as the last line.
        """
        autoregressive = {"exit_layer": None, "num_speculations": None}
        if self.compare:
            # Warm-up, not counted: the first steps of a process allocate and tune.
            for mode in (autoregressive, self.mode):
                self._run(0, mode, limit=min(8, self.max_new_tokens), show=False)
        ours, baseline = Totals(), Totals()
        for i in range(len(self.prompts)):
            if self.compare:
                baseline.add(*self._run(i, autoregressive, self.max_new_tokens, show=False))
            ours.add(*self._run(i, self.mode, self.max_new_tokens, show=True))
        report = self._report(ours, baseline if self.compare else None)
        _print_block(report)
        print(json.dumps(report), flush=True)
        return report

    def _run(self, i: int, mode: dict[str, int | None], limit: int, show: bool) -> tuple[list[int], GenerationStats]:
        """One prompt: its tokens up to a stop, and what it took."""
        rng = torch.Generator(device=self.device).manual_seed(self.seed + i)
        generation = Generation(
            self.model,
            [self.prompt_tokens[i]],
            limit,
            **mode,
            sampler=Sampler(self.cfg.get("temperature", 0.0), self.cfg.get("top_k"), self.cfg.get("top_p"), rng),
            stop_tokens=self.stop_tokens,
        )
        if show:
            prompt = self.prompts[i] if isinstance(self.prompts[i], str) else self.prompts[i]["user"]
            print(f"\n--- prompt {i + 1} of {len(self.prompts)}\n{prompt}", end="\n>>> ", flush=True)
        stream = show and self.cfg.get("stream", True)
        shown = ""
        for (new,) in generation:
            stopped = self._cut_at_stop_string(generation.generated[0], len(new))
            if stream:
                shown += self._print_more(generation.generated[0], shown, last=stopped or generation.finished[0])
            if stopped:
                break
        tokens = generation.generated[0]
        generation.stats.tokens = len(tokens)
        if show:
            print("" if stream else self._text(tokens), flush=True)
        return tokens, generation.stats

    def _text(self, tokens: list[int]) -> str:
        """The generated text without its stop token, cut before a stop string."""
        if tokens and tokens[-1] in self.stop_tokens:
            tokens = tokens[:-1]
        text = self.tokenizer.decode(tokens)
        return text[: min((at for s in self.stop_strings if (at := text.find(s)) >= 0), default=len(text))]

    def _cut_at_stop_string(self, tokens: list[int], new: int) -> bool:
        """Shorten `tokens` to the first prefix whose text holds a stop string; only the last `new` are in question."""
        if not self.stop_strings or not any(s in self.tokenizer.decode(tokens) for s in self.stop_strings):
            return False
        for length in range(len(tokens) - new + 1, len(tokens) + 1):
            text = self.tokenizer.decode(tokens[:length])
            if any(s in text for s in self.stop_strings):
                del tokens[length:]
                return True
        return False

    def _print_more(self, tokens: list[int], shown: str, last: bool) -> str:
        """Print what `tokens` add to the text already shown, but no unfinished character and no stop string's start."""
        text = self._text(tokens)
        if not last:
            text = text.rstrip("�")
            held = max((n for s in self.stop_strings for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
            text = text[: len(text) - held]
        more = text[len(shown) :]
        print(more, end="", flush=True)
        return more

    def _report(self, ours: Totals, baseline: Totals | None) -> dict[str, Any]:
        stats, straight = ours.stats, ours.straight
        greedy = self.cfg.get("temperature", 0.0) == 0
        report = {
            **self.mode,
            "temperature": self.cfg.get("temperature", 0.0),
            "prompts": len(self.prompts),
            "tokens": stats.tokens,
            "prefill_s": stats.prefill_s,
            "decode_s": stats.decode_s,
            "tokens_per_second": stats.tokens_per_second,
            "drafted": stats.drafted,
            "accepted": stats.accepted,
            "acceptance_rate": stats.acceptance_rate,
            "rounds": stats.rounds,
            "accepted_per_round": stats.accepted / stats.rounds if stats.drafted else None,
            "accepted_histogram": stats.accepted_histogram,
            "looping_outputs": ours.looping,
            "acceptance_rate_not_looping": straight.acceptance_rate,
            "peak_memory_bytes": peak_memory_bytes(self.device),
        }
        if baseline is not None:
            report |= {
                "baseline_tokens_per_second": baseline.stats.tokens_per_second,
                "baseline_prefill_s": baseline.stats.prefill_s,
                "baseline_decode_s": baseline.stats.decode_s,
                "baseline_tokens": baseline.stats.tokens,
                "speedup": _ratio(stats, baseline.stats),
                "speedup_not_looping": _ratio(straight, baseline.straight),
                # Two samplings differ by chance; only greedy outputs can be the same tokens.
                "identical": ours.outputs == baseline.outputs if greedy else None,
            }
        return report


def _ratio(a: GenerationStats, b: GenerationStats) -> float | None:
    fast, slow = a.tokens_per_second, b.tokens_per_second
    return fast / slow if fast and slow else None


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory the device's allocator held; on a CPU the most this process had resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _print_block(report: dict[str, Any]) -> None:
    """The report for people: one line a figure."""

    def show(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    print(f"\n--- {report['prompts']} prompts, temperature {report['temperature']}")
    print(f"tokens             {report['tokens']}")
    print(f"prefill            {report['prefill_s']:.2f} s")
    print(f"decode             {report['decode_s']:.2f} s, {show(report['tokens_per_second'], '.1f')} tokens/s")
    print(
        f"acceptance         {show(report['acceptance_rate'], '.2f')} ({report['accepted']} of {report['drafted']}), "
        f"{show(report['accepted_per_round'], '.2f')} per round"
    )
    print(
        f"looping outputs    {report['looping_outputs']} of {report['prompts']}; without them acceptance "
        f"{show(report['acceptance_rate_not_looping'], '.2f')}"
    )
    print(f"peak memory        {report['peak_memory_bytes'] / 1e6:.0f} MB")
    if "speedup" in report:
        print(f"autoregressive     {show(report['baseline_tokens_per_second'], '.1f')} tokens/s")
        print(
            f"speed-up           {show(report['speedup'], '.2f')}x; without looping outputs "
            f"{show(report['speedup_not_looping'], '.2f')}x"
        )
        same = {True: "yes", False: "NO", None: "- (sampling)"}[report["identical"]]
        print(f"identical output   {same}")


def main() -> None:
    """Generate text with a torchtune model: autoregressive, early exit, or self-speculative (arXiv 2404.16710).

    tune run layerskip_generate --config quickstart/generate
    tune run layerskip_generate --config my.yaml prompt="def fibonacci(n):" self_speculation.exit_layer=4
    """

    def steps() -> None:
        recipe = build_recipe(LayerSkipGenerate, main.__doc__)
        recipe.setup()
        recipe.generate()

    main_of(steps)
