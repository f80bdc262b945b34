"""`generate`: prompts to tokens with any torchtune decoder and settings given by hand. llm.py chooses settings."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import dropwhile

import torch
from torchtune.modules import TransformerDecoder

from layerskip_recipes.distributed.local_shards import is_split
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.generation.drafting.speculation import Speculation
from layerskip_recipes.generation.engine import Generation
from layerskip_recipes.generation.sampling import Sampler
from layerskip_recipes.generation.state import state_of
from layerskip_recipes.generation.stats import GenerationStats
from layerskip_recipes.processes import same_on_all


@dataclass
class GenerationOutput:
    """tokens: [b, prompt + generated], prompts padded on the left, rows padded after their stop token.

    speedup: decoding with drafts over the plain steps that were measured; None without drafts.
    """

    tokens: torch.Tensor
    stats: GenerationStats
    speedup: float | None = None


def generate(
    model: TransformerDecoder,
    prompt: torch.Tensor | Sequence[torch.Tensor],
    max_generated_tokens: int,
    *,
    exit_layer: int | None = None,
    num_speculations: int | None = None,
    pad_id: int = 0,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    stop_tokens: Sequence[int] | None = None,
    seed: int | None = None,
    compile: bool = False,
    draft_vocabulary: torch.Tensor | Sequence[int] | None = None,
    prompt_lookup: int | None = None,
    min_confidence: float = 0.0,
    draft_int8: bool = False,
) -> GenerationOutput:
    """Generate tokens without drafts, from an early exit, or by self-speculation, which does not change the output.

    Args:
        model: a `LayerSkipDecoder`, or a plain torchtune decoder.
        prompt: token ids: [s], or [b, s] left-padded with pad_id, or a list of [s_i]; tensors or lists of integers.
            Ranks that share a model (FSDP, tensor parallelism) must pass the same prompts.
        max_generated_tokens: maximum number of new tokens per row.
        exit_layer: E. With num_speculations, the exit of the draft. Without num_speculations, every token comes from
            this exit; None uses the whole model.
        num_speculations: the most tokens to draft per round, 1 or more; None decodes without drafts.
        pad_id: fills the output; at the start of a row of [b, s] it is padding.
        temperature: 0 is greedy.
        top_k, top_p, min_p: filters of draft and verification, see `token_scores`.
        repetition_penalty: above 1, tokens of the prompt and the output become less likely, see `penalise`.
        stop_tokens: a row ends with the first of these tokens; None: only with the limit.
        seed: decides sampled tokens, together with the model, the prompt and the sampling settings. How tokens are
            drafted, and the other prompts, do not matter; equal prompts get different samples. None: a seed drawn from
            torch's global generator.
        compile: compile the steps, which the model keeps for later calls. On a GPU, greedy decoding, each set of
            filters and each value of top_k need graphs of their own.
        draft_vocabulary, prompt_lookup, min_confidence, draft_int8: as in `Speculation`, beside num_speculations.

    Returns:
        `tokens` [b, s + generated] in the layout of `torchtune.generation.generate`, `stats` and `speedup`.

    Example:
        >>> from torchtune.models.llama3._component_builders import llama3
        >>> model = llama3(vocab_size=50, num_layers=4, num_heads=2, num_kv_heads=1, embed_dim=8, max_seq_len=64)
        >>> out = generate(model, torch.tensor([1, 2, 3]), 16, exit_layer=2, num_speculations=6)
        >>> out.tokens.shape
        torch.Size([1, 19])
        >>> out.stats.accepted <= out.stats.drafted
        True
    """
    rows, width = _rows(prompt, pad_id)
    plan = None
    if num_speculations is not None:
        plan = Speculation(exit_layer, num_speculations, draft_vocabulary, prompt_lookup, min_confidence, draft_int8)
    elif draft_vocabulary is not None or prompt_lookup is not None or min_confidence or draft_int8:
        raise ConfigError("num_speculations: None, beside settings of drafts. Allowed: 1 or more; num_speculations=6")
    # Ranks that share a model need the same prompts. Other ranks are independent.
    shared = is_split(model)
    if shared and not same_on_all(rows):
        raise ConfigError("prompt: differs between ranks. Allowed: ranks that share a model decode the same prompts")
    state = state_of(model)
    rule = None if plan is None else state.rule(plan, max_generated_tokens, len(rows), compile)
    generation = Generation(
        model,
        rows,
        max_generated_tokens,
        exit_layer=exit_layer if plan is None else None,
        speculation=plan,
        sampler=Sampler(temperature, top_k, top_p, min_p, repetition_penalty, seed),
        stop_tokens=stop_tokens or (),
        compile=compile,
        shared=shared,
        rule=rule,
        state=state,
    )
    for _ in generation:
        pass
    # Pad the outputs.
    longest = max(len(row) for row in generation.generated)
    padded = [
        [pad_id] * (width - len(before)) + before + after + [pad_id] * (longest - len(after))
        for before, after in zip(rows, generation.generated, strict=True)
    ]
    tokens = torch.tensor(padded, device=generation.context.device)
    return GenerationOutput(tokens, generation.stats, None if rule is None else rule.speedup(generation.stats))


def _rows(prompt: torch.Tensor | Sequence[torch.Tensor], pad_id: int) -> tuple[list[list[int]], int]:
    """The prompts as lists of tokens, and the width of the padded prompts."""
    if isinstance(prompt, str):
        raise ConfigError(f"prompt: {prompt!r} is a text. Allowed: token ids, for example tokenizer.prompt({prompt!r})")
    if hasattr(prompt, "__array__"):  # numpy's arrays too
        prompt = torch.as_tensor(prompt)
    if isinstance(prompt, torch.Tensor) and prompt.dim() == 2:
        return [list(dropwhile(lambda token: token == pad_id, row)) for row in prompt.tolist()], prompt.shape[1]
    # A list of integers or of tensors [] is one prompt.
    are_rows = not isinstance(prompt, torch.Tensor) and all(
        hasattr(row, "__len__") and getattr(row, "ndim", 1) for row in prompt
    )
    rows = [torch.as_tensor(row).tolist() for row in (prompt if are_rows else [prompt])]
    return rows, max((len(row) for row in rows), default=0)
