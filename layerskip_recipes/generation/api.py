"""`generate`: prompts to tokens in one call. The decoding loop is in engine.py."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import dropwhile
from typing import Any

import torch
from torchtune.modules import TransformerDecoder

from layerskip_recipes.errors import ConfigError
from layerskip_recipes.generation.drafting.rule import kept_rule
from layerskip_recipes.generation.drafting.speculation import Speculation
from layerskip_recipes.generation.engine import Generation
from layerskip_recipes.generation.local_shards import is_split
from layerskip_recipes.generation.sampling import Sampler
from layerskip_recipes.generation.stats import GenerationStats
from layerskip_recipes.processes import same_on_all


@dataclass
class GenerationOutput:
    """tokens: [b, prompt + generated], prompts padded on the left, rows padded after their stop token."""

    tokens: torch.Tensor
    stats: GenerationStats


def generate(
    model: TransformerDecoder,
    prompt: torch.Tensor | Sequence[torch.Tensor],
    max_generated_tokens: int,
    *,
    exit_layer: int | None = None,
    num_speculations: int | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    stop_tokens: Sequence[int] | None = None,
    pad_id: int = 0,
    seed: int | None = None,
    compile: bool = False,
    **speculation: Any,
) -> GenerationOutput:
    """Generate tokens autoregressively, from an early exit, or by self-speculation, which does not change the output.

    Args:
        model: a `LayerSkipDecoder`, or a plain torchtune decoder.
        prompt: token ids: [s], or [b, s] left-padded with pad_id, or a list of [s_i]; tensors or lists of integers.
            Ranks that share a model (FSDP, tensor parallelism) must pass the same prompts.
        max_generated_tokens: maximum number of new tokens per row.
        exit_layer: E. With num_speculations, the exit of the draft; None takes the trained exit or draft of a model
            from `load_model`. Without num_speculations, every token comes from this exit; None uses the whole model.
        num_speculations: d, the most tokens to draft per round; 1 or more.
        temperature: 0 is greedy.
        top_k, top_p, min_p: filters of draft and verification, see `next_token_probs`.
        repetition_penalty: above 1, tokens of the prompt and the output become less likely, see `penalise`.
        stop_tokens: a row ends with the first of these tokens.
        pad_id: fills the output; at the start of a row of [b, s] it is padding.
        seed: decides sampled tokens, together with the model, the prompt and the sampling settings. How tokens are
            drafted, and the batch, do not matter. None: a seed drawn from torch's global generator.
        compile: compile the steps. On a GPU the model keeps the graphs for later calls. Greedy decoding, each set of
            filters and each value of top_k need graphs of their own.
        **speculation: draft_vocabulary, prompt_lookup, min_confidence, drafter, as in `Speculation`.

    Returns:
        `tokens` [b, s + generated] in the layout of `torchtune.generation.generate`, and `stats`.

    Raises:
        ConfigError: if an argument is out of range, a prompt is empty, or prompt and new tokens do not fit the model.

    Example:
        >>> from torchtune.models.llama3._component_builders import llama3
        >>> model = llama3(vocab_size=50, num_layers=4, num_heads=2, num_kv_heads=1, embed_dim=8, max_seq_len=64)
        >>> out = generate(model, torch.tensor([1, 2, 3]), 16, exit_layer=2, num_speculations=6)
        >>> out.tokens.shape
        torch.Size([1, 19])
        >>> out.stats.accepted <= out.stats.drafted
        True
    """
    # The prompts as lists of tokens.
    if isinstance(prompt, str):
        raise ConfigError(f"prompt: {prompt!r} is a text. Allowed: token ids, for example tokenizer.prompt({prompt!r})")
    if hasattr(prompt, "__array__"):  # numpy's arrays too
        prompt = torch.as_tensor(prompt)
    if isinstance(prompt, torch.Tensor) and prompt.dim() == 2:
        rows = [list(dropwhile(lambda token: token == pad_id, row)) for row in prompt.tolist()]
        width = prompt.shape[1]
    else:
        # A list of integers or of tensors [] is one prompt.
        lists = all(hasattr(row, "__len__") and getattr(row, "ndim", 1) for row in prompt)
        one = isinstance(prompt, torch.Tensor) or not lists
        rows = [torch.as_tensor(row).tolist() for row in ([prompt] if one else prompt)]
        width = max((len(row) for row in rows), default=0)
    # How to draft.
    drafts = None
    if num_speculations is not None:
        if exit_layer is None and "drafter" not in speculation:
            speculation = {**getattr(model, "drafting", {}), **speculation}  # what `load_model` found
            exit_layer = speculation.pop("exit_layer", None)
        if exit_layer is None:
            given = f"num_speculations: {num_speculations} needs exit_layer too"
            raise ConfigError(f"{given}, the exit that drafts, for example exit_layer=8")
        drafts = Speculation(exit_layer, num_speculations, **speculation)
    elif speculation:
        Speculation(1, 1, **speculation)  # a TypeError for an unknown name
        name = next(iter(speculation))
        raise ConfigError(f"{name}: needs num_speculations too, for example num_speculations=6")
    # Ranks that share a model need the same prompts. Other ranks are independent.
    shared = is_split(model)
    if shared and not same_on_all(rows):
        raise ConfigError("prompt: differs between ranks. Allowed: ranks that share a model decode the same prompts")
    generation = Generation(
        model,
        rows,
        max_generated_tokens,
        exit_layer=exit_layer if drafts is None else None,
        speculation=drafts,
        sampler=Sampler(temperature, top_k, top_p, min_p, repetition_penalty, seed),
        stop_tokens=() if stop_tokens is None else stop_tokens,
        compile=compile,
        shared=shared,
        rule=None if drafts is None else kept_rule(model, (drafts.settings, len(rows), compile)),
    )
    for _ in generation:
        pass
    # Pad the outputs.
    longest = max(len(row) for row in generation.generated)
    padded = [
        [pad_id] * (width - len(before)) + before + after + [pad_id] * (longest - len(after))
        for before, after in zip(rows, generation.generated, strict=True)
    ]
    return GenerationOutput(torch.tensor(padded, device=generation.context.device), generation.stats)
