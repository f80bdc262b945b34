"""`generate`: prompts to tokens in one call, and `stream`: a question to text. The decoding loop is in engine.py."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import dropwhile
from typing import Any, Literal

import torch
from torchtune.modules import TransformerDecoder

from layerskip_recipes.distributed.local_shards import is_split
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.generation.drafting.draft_model import DraftModel
from layerskip_recipes.generation.drafting.rule import DraftRule, kept_rule
from layerskip_recipes.generation.drafting.speculation import Speculation
from layerskip_recipes.generation.engine import Generation
from layerskip_recipes.generation.sampling import Sampler
from layerskip_recipes.generation.stats import GenerationStats
from layerskip_recipes.generation.text.text_stream import TextStream
from layerskip_recipes.model.decoder import as_layerskip_decoder
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
    draft: Literal["auto"] | None = "auto",
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
    compile: bool | None = None,
    **speculation: Any,
) -> GenerationOutput:
    """Generate tokens autoregressively, from an early exit, or by self-speculation, which does not change the output.

    Args:
        model: a `LayerSkipDecoder`, or a plain torchtune decoder.
        prompt: token ids: [s], or [b, s] left-padded with pad_id, or a list of [s_i]; tensors or lists of integers.
            Ranks that share a model (FSDP, tensor parallelism) must pass the same prompts.
        max_generated_tokens: maximum number of new tokens per row.
        draft: "auto" drafts as `layerskip_generate` would, if the model is from `load_model` and drafting pays; None
            decodes without drafts.
        exit_layer: E. With num_speculations, the exit of the draft. Without num_speculations, every token comes from
            this exit; None uses the whole model.
        num_speculations: the most tokens to draft per round; 1 or more.
        temperature: 0 is greedy.
        top_k, top_p, min_p: filters of draft and verification, see `token_scores`.
        repetition_penalty: above 1, tokens of the prompt and the output become less likely, see `penalise`.
        stop_tokens: a row ends with the first of these tokens; None: with the tokenizer's of a model from `load_model`.
        pad_id: fills the output; at the start of a row of [b, s] it is padding.
        seed: decides sampled tokens, together with the model, the prompt and the sampling settings. How tokens are
            drafted, and the other prompts, do not matter; equal prompts get different samples. None: a seed drawn from
            torch's global generator.
        compile: compile the steps; None: for a model from `load_model` whose drafts are chosen, if ten such calls gain
            more time than compiling takes. On a GPU the model keeps the graphs for later calls. Greedy decoding, each
            set of filters and each value of top_k need graphs of their own.
        **speculation: draft_vocabulary, prompt_lookup, min_confidence, draft_int8, as in `Speculation`;
            draft_model, as in `Generation`.

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
    generation, rule = prepare(
        model,
        rows,
        max_generated_tokens,
        draft=draft,
        exit_layer=exit_layer,
        num_speculations=num_speculations,
        sampler=Sampler(temperature, top_k, top_p, min_p, repetition_penalty, seed),
        stop_tokens=stop_tokens,
        compile=compile,
        **speculation,
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


def stream(
    model: TransformerDecoder,
    tokenizer: Any,
    prompt: str | Mapping[str, str],
    max_generated_tokens: int = 300,
    *,
    temperature: float = 0.0,
    seed: int | None = None,
    **arguments: Any,
) -> Iterator[str]:
    """The answer to one prompt as pieces of text, as they become final.

    Args:
        model, tokenizer: from `load_model`.
        prompt: a question, see `tokenizer.prompt`.
        **arguments: see `generate`; without `pad_id`.

    Example:
        >>> for text in stream(model, tokenizer, "Why is the sky blue?"):  # doctest: +SKIP
        ...     print(text, end="", flush=True)
    """
    filters = {
        name: arguments.pop(name) for name in ("top_k", "top_p", "min_p", "repetition_penalty") if name in arguments
    }
    sampler = Sampler(temperature, seed=seed, **filters)
    tokens = tokenizer.prompt(prompt)
    generation, _ = prepare(model, [tokens], max_generated_tokens, sampler=sampler, **arguments)
    goes_on = () if tokenizer.has_chat_template else tokens
    text = TextStream(tokenizer, sorted(generation.rows.stop_tokens), prompt=goes_on)
    for (new,) in generation:
        text.extend(new)
        if piece := text.new_text(last=generation.finished[0]):
            yield piece


def prepare(
    model: TransformerDecoder,
    prompts: Sequence[Sequence[int]],
    max_generated_tokens: int,
    *,
    sampler: Sampler,
    draft: Literal["auto"] | None = "auto",
    exit_layer: int | None = None,
    num_speculations: int | None = None,
    stop_tokens: Sequence[int] | None = None,
    compile: bool | None = None,
    **speculation: Any,
) -> tuple[Generation, DraftRule | None]:
    """A generation that has not started, and its rule of when to draft; see `generate`."""
    # How to draft: as the caller says, else as chosen for a model from `load_model`.
    chooser, drafts = getattr(model, "decoding_chooser", None), None
    draft_model: DraftModel | None = speculation.pop("draft_model", None)
    given = dict(speculation) if num_speculations is None else speculation | {"num_speculations": num_speculations}
    if given and draft is None:
        name = next(iter(given))
        raise ConfigError(f"{name}: is for drafts, and draft=None decodes without. Leave one of them out")
    if given:
        # This checks them; an exit or a number that is still open is valid.
        given_exit, given_number = (1 if number is None else number for number in (exit_layer, num_speculations))
        drafts = Speculation(given_exit, given_number, **speculation)
    if chooser is None or exit_layer is not None or draft_model is not None:
        _needs_both(exit_layer, num_speculations, speculation)
        if drafts is not None:
            drafts.check(as_layerskip_decoder(model))
    else:
        vocabulary = given.get("draft_vocabulary")
        if vocabulary is not None and not isinstance(vocabulary, int):
            given["draft_vocabulary"] = [int(token) for token in vocabulary]
        arguments = (prompts, sampler.temperature, max_generated_tokens, compile)
        compile, drafts, draft_model = chooser.choose(model, *arguments, None if draft is None else given)
    if stop_tokens is None:
        stop_tokens = () if chooser is None else chooser.stop_tokens
    # Ranks that share a model need the same prompts. Other ranks are independent.
    shared = is_split(model)
    if shared and not same_on_all(prompts):
        raise ConfigError("prompt: differs between ranks. Allowed: ranks that share a model decode the same prompts")
    rule = None
    if drafts is not None:
        num_to_draft = min(drafts.num_speculations, max_generated_tokens - 2)
        rule = kept_rule(model, (drafts.rule_key, num_to_draft, len(prompts), compile))
    generation = Generation(
        model,
        prompts,
        max_generated_tokens,
        exit_layer=exit_layer if drafts is None else None,
        speculation=drafts,
        draft_model=draft_model,
        sampler=sampler,
        stop_tokens=stop_tokens,
        compile=bool(compile),
        shared=shared,
        rule=rule,
        reuse=len(prompts[0]) if chooser is not None and len(prompts) == 1 else 0,
    )
    return generation, rule


def _needs_both(exit_layer: int | None, num_speculations: int | None, speculation: Mapping[str, Any]) -> None:
    """An exit drafts only with a draft length, and the reverse. An exit alone gives all tokens."""
    if num_speculations is not None and exit_layer is None:
        given = f"num_speculations: {num_speculations} needs exit_layer too"
        raise ConfigError(f"{given}, the exit that drafts, for example exit_layer=8")
    if speculation and num_speculations is None:
        name = next(iter(speculation))
        raise ConfigError(f"{name}: needs num_speculations too, for example num_speculations=6")
