"""The decoding loop: prefill, then rounds of draft and verify (or plain steps), on one KV cache.

Self-speculation (paper, section 4.3): the layers below exit E draft d tokens one by one; their hidden states x_E are
kept; the layers from E up verify all of them in one pass, starting from those hidden states. A round costs d early
passes with head, one early pass without (the last draft must be verified too), and one late pass over d+1 tokens.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torchtune.modules import TransformerCrossAttentionLayer, TransformerDecoder
from torchtune.modules.model_fusion import FusionLayer

from layerskip_recipes.checks import check_number
from layerskip_recipes.decoder import LayerSkipDecoder
from layerskip_recipes.generation.sampling import Sampler
from layerskip_recipes.generation.stats import GenerationStats
from layerskip_recipes.kv_cache import DecodingCache


@dataclass
class GenerationOutput:
    """tokens: [b, prompt + generated], left-padded prompts, rows padded after their stop token; and the statistics."""

    tokens: torch.Tensor
    stats: GenerationStats


class Generation:
    """One generation as an iterator: each step yields, per row, the new tokens that are final.

    Stopping early (break) is fine: `stats` and `generated` hold what there is so far.

    Args and errors: see `generate`. `prompts` are rows of token ids without padding.
    """

    def __init__(
        self,
        model: TransformerDecoder,
        prompts: Sequence[Sequence[int]],
        max_generated_tokens: int,
        *,
        exit_layer: int | None = None,
        num_speculations: int | None = None,
        sampler: Sampler | None = None,
        stop_tokens: Sequence[int] = (),
    ) -> None:
        self.model = model if isinstance(model, LayerSkipDecoder) else LayerSkipDecoder(model)
        self.prompts = [list(prompt) for prompt in prompts]
        self.exit_layer = self.model.check_exit(self.model.num_layers if exit_layer is None else exit_layer)
        self.num_speculations = check_num_speculations(num_speculations, exit_layer)
        self.limit = max_generated_tokens
        check_lengths(self.model, [len(prompt) for prompt in self.prompts], max_generated_tokens)
        self.sampler = sampler or Sampler()
        self.stop_tokens = {int(token) for token in stop_tokens}
        self.device = self.model.tok_embeddings.weight.device
        self.generated: list[list[int]] = [[] for _ in self.prompts]
        self.finished = [False] * len(self.prompts)
        self.stats = GenerationStats(rows=len(self.prompts))

    @torch.inference_mode()
    def __iter__(self) -> Iterator[list[list[int]]]:
        if self.stats.prefill_s:
            raise RuntimeError("a Generation runs once; make another one to generate again")
        was_training = self.model.training
        self.model.eval()
        # The last generated token is never an input, so its slot is spare: see _positions.
        max_len = max(len(prompt) for prompt in self.prompts) + self.limit
        try:
            with DecodingCache(self.model, max_len, self.device) as cache:
                self.cache = cache
                started = time.perf_counter()
                new = self._prefill()
                self.stats.prefill_s = time.perf_counter() - started
                yield new
                while not all(self.finished):
                    started = time.perf_counter()
                    new = self._step() if self.num_speculations is None else self._round(self.num_speculations)
                    self.stats.rounds += 1
                    self.stats.decode_s += time.perf_counter() - started
                    yield new
        finally:
            self.model.train(was_training)

    def _prefill(self) -> list[list[int]]:
        """The prompts through the model, the head at each row's last position only."""
        width = max(len(prompt) for prompt in self.prompts)
        # Padded on the right: what stands after a row's prompt is overwritten before any of its queries sees it.
        tokens = torch.tensor([prompt + [0] * (width - len(prompt)) for prompt in self.prompts], device=self.device)
        inputs = self.cache.seek(self.cache.slots[None, :width], start=0, end=width)
        depth = self.model.num_layers if self.num_speculations is not None else self.exit_layer
        hidden = self.model(tokens, exit_layer=depth, unembed=False, **inputs)
        last = torch.tensor([len(prompt) - 1 for prompt in self.prompts], device=self.device)
        logits = self._head(hidden[torch.arange(len(self.prompts), device=self.device), last][:, None])
        self.last, _ = self.sampler.choose(logits[:, -1])
        return self._keep([[token] for token in self.last.tolist()])

    def _step(self) -> list[list[int]]:
        """One token of each row from exit E (E = L: the ordinary model)."""
        positions, start, end = self._positions(1)
        inputs = self.cache.seek(positions, start, end)
        logits = self.model(self.last[:, None], exit_layer=self.exit_layer, **inputs)
        self.last, _ = self.sampler.choose(logits[:, -1])
        return self._keep([[token] for token in self.last.tolist()])

    def _round(self, num_speculations: int) -> list[list[int]]:
        """Draft up to num_speculations tokens, verify them, keep the accepted ones and one of the full model."""
        room = [self.limit - len(row) for row in self.generated]
        n = min(num_speculations, max(r for r, done in zip(room, self.finished, strict=True) if not done) - 1)
        positions, start, end = self._positions(n + 1)

        # Draft: n early passes with head, one without.
        drafted, q, hidden = [self.last], [], []
        for i in range(n + 1):
            step_start = None if start is None else start + i
            inputs = self.cache.seek(positions[:, i : i + 1], step_start, end - n + i)
            hidden.append(self.model(drafted[-1][:, None], exit_layer=self.exit_layer, unembed=False, **inputs))
            if i < n:
                token, probs = self.sampler.choose(self._head(hidden[-1])[:, -1])
                drafted.append(token)
                q.append(probs)

        # Verify: one late pass over all positions, from the hidden states that the draft left.
        inputs = self.cache.seek(positions, start, end)
        logits = self.model(hidden=torch.cat(hidden, 1), start_layer=self.exit_layer, **inputs)
        drafts = torch.stack(drafted, 1)[:, 1:]
        accepted, self.last = self.sampler.accept(drafts, q, logits)

        # The only host synchronisation of the round.
        outcome = torch.cat([accepted[:, None], self.last[:, None], drafts], 1).tolist()
        running = [not done for done in self.finished]
        kept = self._keep([[*draft[:count], token] for count, token, *draft in outcome])
        for row in range(len(kept)):
            if running[row]:
                # The last token of a round is the full model's own; what stands behind a stop counts nowhere.
                accepted = len(kept[row]) - 1
                stopped = accepted < outcome[row][0]
                self.stats.count_round(accepted if stopped else min(n, room[row] - 1), accepted)
        return kept

    def _head(self, hidden: torch.Tensor) -> torch.Tensor:
        """g(x): [b, s, d] -> [b, s, v]."""
        return self.model(hidden=hidden, start_layer=self.model.num_layers)

    def _positions(self, count: int) -> tuple[torch.Tensor, int | None, int]:
        """Where each row's last token and the count-1 after it stand: [b, count], their common start, their end."""
        starts = [len(p) + len(g) - 1 for p, g in zip(self.prompts, self.generated, strict=True)]
        if len(set(starts)) == 1:
            return self.cache.slots[None, starts[0] : starts[0] + count], starts[0], starts[0] + count
        rows = torch.tensor(starts, device=self.device)[:, None] + self.cache.slots[:count]
        # A row near its limit, or finished, drafts along with the others: beyond its last slot it stays there.
        spare = torch.tensor([len(p) + self.limit - 1 for p in self.prompts], device=self.device)[:, None]
        return torch.minimum(rows, spare), None, max(starts) + count

    def _keep(self, new: list[list[int]]) -> list[list[int]]:
        """Append each row's new tokens, cut at a stop token and at the limit; none for rows that had finished."""
        kept = []
        for row, tokens in enumerate(new):
            if self.finished[row]:
                kept.append([])
                continue
            tokens = tokens[: self.limit - len(self.generated[row])]
            stop = next((i for i, token in enumerate(tokens) if token in self.stop_tokens), None)
            if stop is not None:
                tokens = tokens[: stop + 1]
            self.generated[row] += tokens
            self.stats.tokens += len(tokens)
            self.finished[row] = stop is not None or len(self.generated[row]) >= self.limit
            kept.append(tokens)
        return kept


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
    stop_tokens: Sequence[int] | None = None,
    pad_id: int = 0,
    rng: torch.Generator | None = None,
) -> GenerationOutput:
    """Generate tokens: autoregressive, from an early exit, or self-speculatively with unchanged output.

    Args:
        model: a `LayerSkipDecoder`, or a plain torchtune decoder.
        prompt: token ids: [s], or [b, s] left-padded with pad_id, or a list of [s_i]; tensors or lists of integers.
        max_generated_tokens: at most so many new tokens a row.
        exit_layer: E. None decodes with the whole model. With num_speculations it drafts, alone it decodes.
        num_speculations: d, the tokens to draft per round; 1 or more.
        temperature: 0 is greedy.
        top_k, top_p: filters, see `next_token_probs`; the same for draft and verification.
        stop_tokens: a row ends with the first of them.
        pad_id: fills the output.
        rng: on the model's device, for reproducible sampling.

    Returns:
        `tokens` [b, s + generated] in the layout of `torchtune.generation.generate`, and `stats`.

    Raises:
        ValueError: if an argument is out of range, a prompt is empty, or prompt and new tokens do not fit the model.

    Example:
        >>> from torchtune.models.llama3_2 import llama3_2_1b
        >>> model = layerskip_decoder(llama3_2_1b())
        >>> out = generate(model, torch.tensor([1, 2, 3]), 16, exit_layer=4, num_speculations=6)
        >>> out.tokens.shape, out.stats.acceptance_rate
    """
    if isinstance(prompt, torch.Tensor) and prompt.dim() == 2:
        rows = [strip_left_padding(row, pad_id) for row in prompt.tolist()]
        width = prompt.shape[1]
    else:
        one = isinstance(prompt, torch.Tensor) or (len(prompt) > 0 and isinstance(prompt[0], int))
        rows = [torch.as_tensor(row).tolist() for row in ([prompt] if one else prompt)]
        width = max((len(row) for row in rows), default=0)
    generation = Generation(
        model,
        rows,
        max_generated_tokens,
        exit_layer=exit_layer,
        num_speculations=num_speculations,
        sampler=Sampler(temperature, top_k, top_p, rng),
        stop_tokens=() if stop_tokens is None else stop_tokens,
    )
    for _ in generation:
        pass
    longest = max(len(row) for row in generation.generated)
    padded = [
        [pad_id] * (width - len(before)) + before + after + [pad_id] * (longest - len(after))
        for before, after in zip(rows, generation.generated, strict=True)
    ]
    return GenerationOutput(torch.tensor(padded, device=generation.device), generation.stats)


def strip_left_padding(row: list[int], pad_id: int) -> list[int]:
    """The row without the pad tokens at its start."""
    first = next((i for i, token in enumerate(row) if token != pad_id), len(row))
    return row[first:]


def check_num_speculations(
    num_speculations: int | None, exit_layer: int | None, key: str = "num_speculations"
) -> int | None:
    """Raises a ValueError unless it is None, or 1 or more with an exit layer to draft from."""
    if num_speculations is None:
        return None
    check_number(key, num_speculations, minimum=1, example=6)
    if exit_layer is None:
        raise ValueError(f"{key}: {num_speculations} needs exit_layer too, the exit that drafts, e.g. exit_layer=8")
    return num_speculations


def check_lengths(
    model: TransformerDecoder,
    prompt_lengths: Sequence[int],
    max_generated_tokens: int,
    key: str = "max_generated_tokens",
) -> None:
    """Raises a ValueError unless each prompt has a token and fits the model together with the new tokens.

    Args:
        model: the decoder.
        prompt_lengths: tokens of each prompt.
        max_generated_tokens: new tokens, at most.
        key: what an error message calls them.
    """
    check_number(key, max_generated_tokens, minimum=1, example=128)
    if not prompt_lengths or min(prompt_lengths) == 0:
        raise ValueError("prompt: it has no token. Allowed: at least one token in each prompt")
    if any(isinstance(module, FusionLayer | TransformerCrossAttentionLayer) for module in model.modules()):
        raise ValueError("model: generation supports decoders of self-attention layers only, no fusion layers")
    # torchtune's gemma2 attention places its sliding window by the query's row, which is wrong with a cache: up to
    # the window's size nothing is cut, so there it does no harm.
    windows = [getattr(layer.attn, "sliding_window_size", None) for layer in model.layers]
    limit, what = min(
        [(w, "the attention's sliding window") for w in windows if w] + [(model.max_seq_len, "max_seq_len")]
    )
    longest = max(prompt_lengths)
    if longest + 1 > limit:
        raise ValueError(f"prompt: its {longest} tokens leave no room in the model's {limit} ({what})")
    if longest + max_generated_tokens > limit:
        raise ValueError(
            f"{key}: a prompt of {longest} tokens and {max_generated_tokens} new ones make "
            f"{longest + max_generated_tokens}, more than the model's {limit} ({what}). Allowed here: up to "
            f"{limit - longest}, for example {key}={limit - longest}"
        )
