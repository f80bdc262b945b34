"""LayerSkip's self-speculative decoding for transformers; it needs only torch and transformers.

    model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
    model.generate(**inputs, max_new_tokens=128)

    model.generate(**inputs, custom_generate=FOLDER, trust_remote_code=True, exit_layer=6)  # a model loaded elsewhere

`layerskip export` copies this file to FOLDER/custom_generate/generate.py. In each round, the layers below the exit
draft a few tokens. The layers above the exit then verify all drafts in one pass, from the hidden states at the exit.
Both parts share one cache; rejected drafts are removed from it. Greedy decoding gives the tokens of plain greedy
decoding. Sampling has the distribution of plain sampling (speculative sampling, arXiv 2211.17192).
"""

import copy
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import DynamicCache, StoppingCriteriaList, StopStringCriteria
from transformers.generation import (
    GenerateDecoderOnlyOutput,
    SynthIDTextWatermarkLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from transformers.masking_utils import create_masks_for_generate

MODEL_TYPES = ("gemma", "gemma2", "llama", "mistral", "phi3", "qwen2", "qwen3", "smollm3")
MODES = ("greedy_search", "sample")
# Logits processors that keep a state between calls. This loop calls processors for drafts and again to verify them.
WITH_STATE: dict[type, str] = {
    SynthIDTextWatermarkLogitsProcessor: "a SynthID watermark",
    UnbatchedClassifierFreeGuidanceLogitsProcessor: "guidance_scale",
}


def generate(
    inputs: torch.Tensor | None = None,
    generation_config: Any = None,
    *,
    model: Any,
    exit_layer: int | None = None,
    num_speculations: int = 6,
    **kwargs: Any,
) -> Any:
    """`model.generate` with LayerSkip as its decoding loop.

    Args:
        inputs: left-padded prompts [b, s].
        generation_config: transformers' settings; they must ask for greedy decoding or sampling.
        model: a causal language model of one of MODEL_TYPES.
        exit_layer: E: the first E layers draft. None: `assistant_early_exit` of the settings.
        num_speculations: maximum number of tokens drafted per round; a low acceptance rate reduces the number.
        **kwargs: further arguments of `model.generate`. Your own logits processors must not keep a state: they are
            called for drafts, and again to verify them.

    Returns:
        The result of `model.generate`. For several prompts the returned dictionary has no cache.
    """
    # `model.generate` must not see the exit and the stop strings. A shallow copy of the model shares the weights, but
    # has its own settings.
    model, generation_config = copy.copy(model), copy.deepcopy(generation_config)
    model.generation_config = copy.deepcopy(model.generation_config)
    configs = [config for config in (generation_config, model.generation_config) if config is not None]

    def take(name: str) -> Any:
        values = [kwargs.pop(name, None), *(getattr(config, name) for config in configs)]
        for config in configs:
            setattr(config, name, None)
        return next((value for value in values if value is not None), None)

    early_exit, stop_strings = take("assistant_early_exit"), take("stop_strings")
    layers = PartialModel(model, early_exit if exit_layer is None else exit_layer)
    require(num_speculations >= 1, f"num_speculations: {num_speculations} must be 1 or more")
    require(kwargs.get("assistant_model") is None, "assistant_model: LayerSkip drafts with the model itself")
    if stop_strings is not None:  # `model.generate` drops the tokenizer if `custom_generate` is a function
        require(kwargs.get("tokenizer") is not None, "stop_strings: needs the model's tokenizer as tokenizer=")
        criteria = kwargs.get("stopping_criteria") or []
        stop = StopStringCriteria(stop_strings=stop_strings, tokenizer=kwargs["tokenizer"])
        kwargs["stopping_criteria"] = StoppingCriteriaList([*criteria, stop])

    def decoding_loop(model: Any, input_ids: torch.Tensor, **settings: Any) -> Any:
        return decode(model, input_ids, layers, num_speculations, **settings | {"streamer": kwargs.get("streamer")})

    return type(model).generate(model, inputs, generation_config, **kwargs | {"custom_generate": decoding_loop})


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


class PartialModel:
    """A transformers model whose layers below and above the exit run separately."""

    def __init__(self, model: Any, exit_layer: int | None) -> None:
        config, supported = model.config, ", ".join(MODEL_TYPES)
        known = config.model_type in MODEL_TYPES
        require(known, f"LayerSkip: cannot run {config.model_type} in part. Allowed: {supported}")
        if exit_layer is None:
            raise ValueError("LayerSkip: no exit. Give exit_layer=, or assistant_early_exit in generation_config.json")
        exits = range(1, config.num_hidden_layers)
        require(exit_layer in exits, f"exit_layer: {exit_layer} is not one of 1 to {exits.stop - 1}")
        self.decoder, self.head, self.config = model.model, model.lm_head, config
        self.kinds = getattr(config, "layer_types", None) or []
        self.below, self.above = range(exit_layer), range(exit_layer, config.num_hidden_layers)

    def draft_cost(self) -> float:
        """Weights read for a drafted token divided by weights read for a token of the whole model."""
        sizes = [sum(weight.numel() for weight in layer.parameters()) for layer in self.decoder.layers]
        head = self.head.weight.numel()
        return (sum(sizes[index] for index in self.below) + head) / (sum(sizes) + head)

    def rows_cost(self, batch: int) -> float:
        """Extra cost of a step with several tokens, divided by the cost of a step with one token.

        On a CPU (AVX2), torch's matrix products with two to eight rows take 1.5 to 2 times as long as with one row.
        """
        return 0.5 if batch == 1 and self.head.weight.device.type == "cpu" else 0.0

    def run(self, layers: range, hidden: torch.Tensor, masks: Any, **settings: Any) -> torch.Tensor:
        """Hidden states [b, s, d] after `layers`; `masks` is one attention mask, or a mask for each kind of layer."""
        for index in layers:
            mask = masks[self.kinds[index]] if isinstance(masks, dict) else masks
            hidden = self.decoder.layers[index](hidden, attention_mask=mask, use_cache=True, **settings)
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [b, s, v] in fp32 for hidden states [b, s, d] after any layer."""
        logits = self.head(self.decoder.norm(hidden))
        cap = getattr(self.config, "final_logit_softcapping", None)
        return (logits if cap is None else cap * torch.tanh(logits / cap)).float()


class Rows:
    """The texts of a batch, which may differ in length.

    Logits processors, stopping criteria and streamers expect texts of one length, so they run once for each length.
    """

    def __init__(self, prompts: torch.Tensor, width: int, pad_id: int, processors: Any, criteria: Any, streamer: Any):
        self.tokens = pad(prompts, (0, width - prompts.shape[1]), value=pad_id)  # [b, width]
        self.lengths = [prompts.shape[1]] * len(prompts)
        self.active = list(range(len(prompts)))  # rows that have not stopped
        self.pad_id, self.processors, self.criteria = pad_id, processors, criteria
        self.streamer, self.streamed = streamer, prompts.shape[1]

    def draft(self, drafts: torch.Tensor, number: int) -> None:
        """Store draft [b, 1] number `number`: processors of later positions read it."""
        if self.processors:
            for row in self.active:
                self.tokens[row, self.lengths[row] + number] = drafts[row, 0]

    def process(self, logits: torch.Tensor, first: int) -> torch.Tensor:
        """Apply the processors to logits [b, m, v]; position i follows a row and its first `first + i` drafts."""
        if not self.processors:
            return logits
        scores = logits.clone()
        starts = {row: self.lengths[row] + first for row in self.active}
        for length in range(min(starts.values()), max(starts.values()) + logits.shape[1]):
            rows = [row for row, start in starts.items() if start <= length < start + logits.shape[1]]
            if rows:
                at = [length - starts[row] for row in rows]
                batch = logits[:, 0].clone()  # all rows in their order: some processors count them
                batch[rows] = logits[rows, at]
                scores[rows, at] = self.processors(self.tokens[:, :length], batch)[rows]
        return scores

    def append(self, new: torch.Tensor, counts: list[int]) -> None:
        """Append the first counts[row] tokens of `new` [b, m] to each row, up to its first stop."""
        ends = list(self.lengths)
        for row in self.active:
            ends[row] += counts[row]
            self.tokens[row, self.lengths[row] : ends[row]] = new[row, : counts[row]]
        for length in range(min(self.lengths[row] for row in self.active) + 1, max(ends) + 1):
            reached = [row for row in self.active if self.lengths[row] < length <= ends[row]]
            if reached:
                stopped = self.criteria(self.tokens[:, :length], None).tolist()
                for row in filter(stopped.__getitem__, reached):
                    self.active.remove(row)
                    self.tokens[row, length:] = self.pad_id
                    ends[row] = length
        self.lengths = ends
        if self.streamer is not None:
            while self.streamed < min((ends[row] for row in self.active), default=max(ends)):
                self.streamer.put(self.tokens[:, self.streamed].cpu())
                self.streamed += 1


class DraftLength:
    """Chooses the number of drafts n with the most tokens per cost.

    With acceptance rate a, a round gives 1 + a + ... + a^n tokens and costs 1 + rows_cost + n * draft_cost, or 1
    without drafts. If n = 0 is best, some rounds still try one draft: the first round, a round 16 rounds later, one 32
    rounds after that, and so on. Drafting goes on while all drafts are accepted.
    """

    PAUSE = 16  # rounds
    MEMORY = 0.95  # decay of earlier rounds' counts

    def __init__(self, limit: int, draft_cost: float, rows_cost: float) -> None:
        self.limit, self.draft_cost, self.rows_cost = limit, draft_cost, rows_cost
        self.pause, self.waited, self.all_accepted = self.PAUSE, 0, True
        # Initial counts are small: one or two bad rounds outweigh them, since short answers have few rounds.
        self.accepted, self.tried = 2.8, 4.0

    def next(self) -> int:
        rate = self.accepted / self.tried

        def tokens_per_cost(n: int) -> float:
            return sum(rate**i for i in range(n + 1)) / (1 + (n > 0) * self.rows_cost + n * self.draft_cost)

        best = max(range(self.limit + 1), key=tokens_per_cost)
        if best:
            self.pause = self.PAUSE
        elif not self.all_accepted:
            self.waited += 1
            if self.waited < self.pause:
                return 0
            self.pause *= 2
        self.waited = 0
        return max(best, 1)

    def learn(self, accepted: list[int], drafted: int) -> None:
        if drafted:
            self.all_accepted = min(accepted) == drafted
            self.accepted = self.MEMORY * self.accepted + sum(accepted) / len(accepted)
            self.tried = self.MEMORY * self.tried + sum(min(n + 1, drafted) for n in accepted) / len(accepted)


def choose(scores: torch.Tensor, do_sample: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The next token [b, 1] for scores [b, 1, v], and its distribution [b, 1, v]."""
    if not do_sample:
        return scores.argmax(-1), scores
    probs = scores.softmax(-1)
    return torch.multinomial(probs[:, 0], 1), probs


def verify(
    scores: torch.Tensor, drafts: torch.Tensor, draft_probs: list[torch.Tensor], do_sample: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The number of accepted drafts [b], and the tokens [b, 1] that follow them.

    `scores` [b, n + 1, v] are the model's at `drafts` [b, n] and after the last; `draft_probs` has n times [b, 1, v].
    """
    if not do_sample:
        best = scores.argmax(-1)
        accepted = (drafts == best[:, :-1]).long().cumprod(1).sum(1)
        return accepted, best.gather(1, accepted[:, None])
    # Accept a draft x with probability min(1, p(x) / q(x)). Replace the first rejected draft by a sample from the
    # normalised max(0, p - q). After the last draft, q is 0.
    p = scores.softmax(-1)
    q = torch.cat([*draft_probs, torch.zeros_like(p[:, :1])], 1)
    p_drafts, q_drafts = (x[:, :-1].gather(2, drafts[..., None])[..., 0] for x in (p, q))
    accepted = (torch.rand_like(p_drafts) * q_drafts < p_drafts).long().cumprod(1).sum(1)
    row = torch.arange(len(p), device=p.device)
    rest = (p - q)[row, accepted].clamp(min=0)
    rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, p[row, accepted])  # p = q up to rounding
    return accepted, torch.multinomial(rest, 1)


def shift_right(columns: torch.Tensor, shifts: torch.Tensor, dim: int) -> torch.Tensor:
    """Move each row's columns to the right along `dim`; columns past the end are dropped."""
    size = columns.shape[dim]
    source = (torch.arange(size, device=columns.device) - shifts.to(columns.device)[:, None]).clamp(min=0)
    shape = [len(columns) if d == 0 else size if d == dim else 1 for d in range(columns.dim())]
    return columns.gather(dim, source.view(shape).expand_as(columns))


def decode(
    model: Any,
    input_ids: torch.Tensor,
    layers: PartialModel,
    num_speculations: int,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    streamer: Any = None,
    **model_kwargs: Any,
) -> Any:
    """The decoding loop, which `model.generate` calls with prepared inputs."""
    # 0. Refuse settings that this loop cannot honour.
    mode, do_sample = generation_config.get_generation_mode(), bool(generation_config.do_sample)
    require(mode in MODES, f"LayerSkip: {mode.value} is not supported. Allowed: {', '.join(MODES)}")
    for stateful, name in WITH_STATE.items():
        used = any(isinstance(processor, stateful) for processor in logits_processor)
        require(not used, f"LayerSkip: {name} is not supported, its processor keeps a state. Remove it")
    with_dict = generation_config.return_dict_in_generate
    for output in ("output_scores", "output_logits", "output_attentions", "output_hidden_states"):
        asked_for = with_dict and getattr(generation_config, output)
        require(not asked_for, f"LayerSkip: {output} is not supported. Allowed: {output}=False")
    batch, prompt_length = input_ids.shape
    longest, pad_id = stopping_criteria.max_length, generation_config._pad_token_tensor
    pad_id, width = 0 if pad_id is None else int(pad_id), longest + num_speculations + 1
    rope = getattr(model.config, "rope_parameters", None) or {}
    kind, switch = rope.get("rope_type"), rope.get("original_max_position_embeddings")
    switch = switch or model.config.max_position_embeddings
    changes = switch < longest and (kind == "dynamic" or (kind == "longrope" and prompt_length <= switch))
    require(not changes, f"LayerSkip: {kind} positions change after {switch} tokens. Allowed: max_length={switch}")
    rows = Rows(input_ids, width, pad_id, logits_processor, stopping_criteria, streamer)
    length = DraftLength(num_speculations, layers.draft_cost(), layers.rows_cost(batch))

    # 1. Run the whole model over the prompts and choose the first token.
    outputs = model._prefill(input_ids, generation_config, model_kwargs)
    cache: Any = outputs.cache
    padding: Any = model_kwargs.get("attention_mask")  # [b, cache columns]
    usable = isinstance(cache, DynamicCache) and not cache.offloading
    require(usable, f"LayerSkip: needs a DynamicCache on the model's device, not {type(cache).__name__}")
    cache.activate_past_recording()  # lets layers with a sliding window drop rejected drafts
    prompt_columns = cache.get_seq_length()
    if padding is None:
        padding = torch.ones(batch, prompt_columns, dtype=torch.long, device=input_ids.device)
    position = model_kwargs["position_ids"][:, -1:].expand(batch, 1)  # of the last token in the cache
    pending, _ = choose(rows.process(outputs.logits[:, -1:].float(), 0), do_sample)  # [b, 1]: not yet in the cache
    del outputs
    rows.append(pending, [1] * batch)

    while rows.active:
        drafted = min(length.next(), longest - min(rows.lengths[row] for row in rows.active) - 1)
        columns = cache.get_seq_length()
        padding = pad(padding, (0, drafted + 1), value=1)
        embedded = layers.decoder.embed_tokens(pending)
        # Only rows that have stopped, and drafts that will be cut, go beyond the limit. Dynamic positions must not.
        position_ids = position + 1 + torch.arange(drafted + 1, device=position.device)  # [b, drafted + 1]
        position_ids = position_ids.clamp(max=longest - 1)
        rotary = layers.decoder.rotary_emb(embedded, position_ids)
        places = embedded.expand(-1, drafted + 1, -1)
        masks = create_masks_for_generate(layers.config, places, padding, cache, position_ids)

        # 2. Draft token by token with the layers below the exit; the last draft runs through them too.
        exits, drafts, draft_probs = [], [], []
        for i in range(drafted + 1):
            at, seen = slice(i, i + 1), padding[:, : columns + i + 1]
            settings = {"position_ids": position_ids[:, at], "position_embeddings": tuple(x[:, at] for x in rotary)}
            mask = create_masks_for_generate(layers.config, embedded, seen, cache, position_ids[:, at])
            exits.append(layers.run(layers.below, embedded, mask, cache=cache, **settings))
            if i < drafted:
                draft, probs = choose(rows.process(layers.logits(exits[-1]), i), do_sample)
                rows.draft(draft, i)
                drafts.append(draft)
                draft_probs.append(probs)
                embedded = layers.decoder.embed_tokens(draft)

        # 3. Verify all drafts at once with the layers above the exit, from the hidden states at the exit.
        settings = {"position_ids": position_ids, "position_embeddings": rotary}
        hidden = layers.run(layers.above, torch.cat(exits, 1), masks, cache=cache, **settings)
        new = torch.cat([*drafts, pending], 1)  # the last column is a placeholder for the next token
        scores = rows.process(layers.logits(hidden), 0)
        accepted, pending = verify(scores, new[:, :drafted], draft_probs, do_sample)
        counts = accepted.tolist()
        length.learn([counts[row] for row in rows.active], drafted)

        # 4. Remove rejected drafts from the cache. Rows stay right-aligned: a row with fewer accepted drafts than the
        # best row moves to the right, and gets padding at the left.
        best = max(counts[row] for row in rows.active)
        shifts = (best - accepted).clamp(min=0)
        if any(counts[row] < best for row in rows.active):
            for layer in cache.layers:
                layer.keys, layer.values = (shift_right(x, shifts, dim=2) for x in (layer.keys, layer.values))
            is_text = torch.arange(padding.shape[1], device=padding.device) >= shifts[:, None]
            padding = shift_right(padding, shifts, dim=1) * is_text
        position = position + accepted[:, None] + 1
        old_length = rows.lengths[0]
        rows.append(new.scatter(1, accepted[:, None], pending), [count + 1 for count in counts])
        if batch == 1:  # after a stop among the drafts the cache lacks the last token, as in plain decoding
            best = rows.lengths[0] - old_length - 1
        cache.crop(best - drafted)
        padding = padding[:, : columns + best + 1]

    if streamer is not None:
        streamer.end()
    sequences: Any = rows.tokens[:, : max(rows.lengths)]
    if not with_dict:
        return sequences
    return GenerateDecoderOnlyOutput(sequences=sequences, cache=cache if batch == 1 else None)
