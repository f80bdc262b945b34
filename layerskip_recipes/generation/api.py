"""`generate`: one call from prompts to tokens, for Python. The loop behind it is in engine.py."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torchtune.modules import TransformerDecoder

from layerskip_recipes.errors import ConfigError
from layerskip_recipes.generation.drafting.speculation import Speculation
from layerskip_recipes.generation.engine import Generation
from layerskip_recipes.generation.local_shards import is_split
from layerskip_recipes.generation.sampling import Sampler
from layerskip_recipes.generation.stats import GenerationStats
from layerskip_recipes.processes import from_rank_zero, same_on_all


@dataclass
class GenerationOutput:
    """tokens: [b, prompt + generated], left-padded prompts, rows padded after their stop token; and the statistics."""

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
    rng: torch.Generator | None = None,
    compile: bool = False,
    **speculation: Any,
) -> GenerationOutput:
    """Generate tokens: autoregressive, from an early exit, or self-speculatively with unchanged output.

    Args:
        model: a `LayerSkipDecoder`, or a plain torchtune decoder.
        prompt: token ids: [s], or [b, s] left-padded with pad_id, or a list of [s_i]; tensors or lists of integers. The
            same on all ranks that share a model (FSDP, tensor parallelism).
        max_generated_tokens: at most so many new tokens a row.
        exit_layer: E. Alone it decodes; with num_speculations it drafts, where None is the trained exit or the draft of
            a model from `load_model`. Without both the whole model decodes.
        num_speculations: d, the tokens to draft per round; 1 or more.
        temperature: 0 is greedy.
        top_k, top_p, min_p: filters, see `next_token_probs`; the same for draft and verification.
        repetition_penalty: above 1 makes tokens of the prompt and of the output less likely, see `penalise`.
        stop_tokens: a row ends with the first of them.
        pad_id: fills the output.
        rng: on the model's device, for reproducible sampling. Of ranks that share a model it takes rank 0's state.
            With num_speculations the times of rounds decide where to draft, so the same seed may give other tokens, of
            the same distribution.
        compile: compile the steps. On a GPU graphs are kept with the model for later calls; sampling takes other ones
            than greedy decoding, and so does each other set of filters and each other top_k.
        **speculation: draft_vocabulary, prompt_lookup, drafter, as in `Speculation`.

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
    if isinstance(prompt, torch.Tensor) and prompt.dim() == 2:
        rows = [strip_left_padding(row, pad_id) for row in prompt.tolist()]
        width = prompt.shape[1]
    else:
        one = isinstance(prompt, torch.Tensor) or (len(prompt) > 0 and isinstance(prompt[0], int))
        rows = [torch.as_tensor(row).tolist() for row in ([prompt] if one else prompt)]
        width = max((len(row) for row in rows), default=0)
    if num_speculations is not None and exit_layer is None and "drafter" not in speculation:
        known = getattr(model, "drafting", {})  # what `load_model` found
        exit_layer, speculation = known.get("exit_layer"), {**known, **speculation}
        speculation.pop("exit_layer", None)
    if num_speculations is not None and exit_layer is None:
        given = f"num_speculations: {num_speculations} needs exit_layer too"
        raise ConfigError(f"{given}, the exit that drafts, for example exit_layer=8")
    if speculation and num_speculations is None:
        Speculation(1, 1, **speculation)  # a TypeError for a name that nobody knows
        name = next(iter(speculation))
        raise ConfigError(f"{name}: needs num_speculations too, for example num_speculations=6")
    drafts = None
    if num_speculations is not None and exit_layer is not None:
        drafts = Speculation(exit_layer, num_speculations, **speculation)
    # Ranks that share a model draw and choose alike; others may each have a model and prompts of their own.
    shared = is_split(model)
    if shared and not same_on_all(rows):
        raise ConfigError("prompt: differs between ranks. Allowed: ranks that share a model decode the same prompts")
    if shared and temperature:
        if rng is None:
            rng = torch.Generator(model.tok_embeddings.weight.device).manual_seed(int(torch.randint(2**31, ())))
        rng.set_state(from_rank_zero(rng.get_state()))
    generation = Generation(
        model,
        rows,
        max_generated_tokens,
        exit_layer=exit_layer if drafts is None else None,
        speculation=drafts,
        sampler=Sampler(temperature, top_k, top_p, min_p, repetition_penalty, rng),
        stop_tokens=() if stop_tokens is None else stop_tokens,
        compile=compile,
        shared=shared,
    )
    for _ in generation:
        pass
    longest = max(len(row) for row in generation.generated)
    padded = [
        [pad_id] * (width - len(before)) + before + after + [pad_id] * (longest - len(after))
        for before, after in zip(rows, generation.generated, strict=True)
    ]
    return GenerationOutput(torch.tensor(padded, device=generation.context.device), generation.stats)


def strip_left_padding(row: list[int], pad_id: int) -> list[int]:
    """The row without the pad tokens at its start."""
    first = next((i for i, token in enumerate(row) if token != pad_id), len(row))
    return row[first:]
