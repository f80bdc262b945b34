"""LayerSkip's speculative decoding for transformers; it needs only torch and transformers.

    model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
    model.generate(**inputs, max_new_tokens=128)

    model.generate(**inputs, custom_generate=FOLDER, trust_remote_code=True, exit_layer=6)  # a model loaded elsewhere

`layerskip export` copies this file to FOLDER/custom_generate/generate.py. In each round, a few tokens are drafted, and
one pass of the model verifies them. There are two kinds of drafts. With an early exit, the first layers of the model
draft, and the layers above the exit verify from the hidden states at the exit; both share one cache. A trained copy of
the first layers (FOLDER/draft) has a cache of its own, and often a small vocabulary. Rejected drafts are removed from
the caches. Greedy decoding gives the tokens of plain greedy decoding. Sampling has the distribution of plain sampling
(speculative sampling, arXiv 2211.17192).
"""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from safetensors.torch import load_file
from torch.nn.functional import linear, pad
from transformers import DynamicCache, StoppingCriteriaList, StopStringCriteria
from transformers.generation import (
    GenerateDecoderOnlyOutput,
    SynthIDTextWatermarkLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from transformers.masking_utils import create_masks_for_generate
from transformers.utils import cached_file

MODEL_TYPES = (
    "exaone4",
    "gemma",
    "gemma2",
    "gemma3_text",
    "granite",
    "granitemoehybrid",
    "llama",
    "mistral",
    "olmo2",
    "olmo3",
    "phi3",
    "qwen2",
    "qwen3",
    "smollm3",
)
DRAFT_FILES = ("draft.json", "model.safetensors")  # in the folder `draft`
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
    num_speculations: int | None = None,
    min_confidence: float | None = None,
    revision: str | None = None,
    subfolder: str = "",
    token: str | bool | None = None,
    **kwargs: Any,
) -> Any:
    """`model.generate` with LayerSkip as its decoding loop.

    Args:
        inputs: left-padded prompts [b, s].
        generation_config: transformers' settings; they must ask for greedy decoding or sampling.
        model: a causal language model of one of MODEL_TYPES.
        exit_layer: E: the first E layers draft. None: `assistant_early_exit` of the settings, or else the trained copy
            in the folder `draft` beside the model's files.
        num_speculations: maximum number of tokens drafted per round; a low acceptance rate reduces the number. None:
            the copy's own setting, or 6 for an exit.
        min_confidence: a draft ends where the product of its tokens' probabilities falls below this. None: the copy's
            own setting, or 0 for an exit.
        revision: with `subfolder` and `token`, as given to `from_pretrained` for the model; they find the trained copy
            of a model on the hub. None: the commit that this file comes from, if it comes with the model.
        subfolder: see `revision`; the model does not remember it.
        token: see `revision`; for a private model without a login.
        **kwargs: further arguments of `model.generate`. Your own logits processors must not keep a state: they are
            called for drafts, and again to verify them.

    Returns:
        The result of `model.generate`. For several prompts the returned dictionary has no cache.
    """
    model_type, supported = model.config.model_type, ", ".join(MODEL_TYPES)
    require(model_type in MODEL_TYPES, f"LayerSkip: cannot run {model_type} in part. Allowed: {supported}")
    # `model.generate` must not see the exit, the stop strings and token healing. A shallow copy of the model shares the
    # weights, but has its own settings.
    original, model, generation_config = model, copy.copy(model), copy.deepcopy(generation_config)
    model.generation_config = copy.deepcopy(model.generation_config)
    model.__dict__.pop("generate", None)  # may be this function; token healing decodes without drafts
    configs = [config for config in (generation_config, model.generation_config) if config is not None]

    def take(name: str) -> Any:
        values = [kwargs.pop(name, None), *(getattr(config, name) for config in configs)]
        for config in configs:
            setattr(config, name, None)
        return next((value for value in values if value is not None), None)

    # `model.generate` drops the tokenizer if `custom_generate` is a function, so what needs it happens here.
    early_exit, stop_strings, healing = map(take, ("assistant_early_exit", "stop_strings", "token_healing"))
    exit_layer = early_exit if exit_layer is None else exit_layer
    where = {"revision": revision, "subfolder": subfolder, "token": token}
    draft = copy_draft(original, where) if exit_layer is None else exit_draft(original, exit_layer)
    draft.num_speculations = draft.num_speculations if num_speculations is None else num_speculations
    draft.min_confidence = draft.min_confidence if min_confidence is None else min_confidence
    require(draft.num_speculations >= 1, f"num_speculations: {num_speculations} must be 1 or more")
    require(kwargs.get("assistant_model") is None, "assistant_model: LayerSkip has its own drafts")
    if stop_strings is not None:
        require(kwargs.get("tokenizer") is not None, "stop_strings: needs the model's tokenizer as tokenizer=")
        criteria = kwargs.get("stopping_criteria") or []
        stop = StopStringCriteria(stop_strings=stop_strings, tokenizer=kwargs["tokenizer"])
        kwargs["stopping_criteria"] = StoppingCriteriaList([*criteria, stop])

    if healing:
        require(kwargs.get("tokenizer") is not None, "token_healing: needs the model's tokenizer as tokenizer=")
        prompts = kwargs.pop("input_ids", None) if inputs is None else inputs
        require(prompts is not None, "token_healing: needs input_ids")
        inputs = model.heal_tokens(prompts, kwargs["tokenizer"])

    def decoding_loop(model: Any, input_ids: torch.Tensor, **settings: Any) -> Any:
        return decode(model, input_ids, draft, **settings | {"streamer": kwargs.get("streamer")})

    return type(model).generate(model, inputs, generation_config, **kwargs | {"custom_generate": decoding_loop})


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


class Part:
    """Successive layers of a model, or a copy of them, which run on their own over a cache."""

    def __init__(self, model: Any, layers: Any, first: int, cache: DynamicCache) -> None:
        self.config, self.rotary = model.config, model.model.rotary_emb
        self.kinds = getattr(self.config, "layer_types", None) or []
        self.layers, self.first, self.cache = layers, first, cache
        # A mask is sized by the first cache layer of its kind. The other layers may have read more or fewer tokens.
        self.sizes = copy.copy(cache)
        self.sizes.layers = [*cache.layers[first:], *cache.layers[:first]]

    def run(self, hidden: torch.Tensor, padding: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Hidden states [b, s, d] after the layers, at positions [b, s]; padding [b, columns] ends at the last one."""
        masks = create_masks_for_generate(self.config, hidden, padding, self.sizes, positions)
        # Masks, and in some models positions, depend on the kind of layer.
        by_kind = isinstance(self.config.rope_parameters.get("full_attention"), dict)
        tables = {
            kind: self.rotary(hidden, positions, *[kind] * by_kind) for kind in ({*self.kinds} if by_kind else [""])
        }
        for number, layer in enumerate(self.layers, self.first):
            mask = masks[self.kinds[number]] if isinstance(masks, dict) else masks
            settings = {"position_ids": positions, "position_embeddings": tables[self.kinds[number] if by_kind else ""]}
            hidden = layer(hidden, attention_mask=mask, cache=self.cache, use_cache=True, **settings)
        return hidden


class DraftLayers:
    """Layers that draft token by token, and the layers of the model that verify the drafts in one pass.

    `shared`: the layers are the model's first ones. Then the other layers go on from their hidden states, in the same
    cache. Otherwise the whole model verifies, and the layers have a cache of their own.
    """

    num_speculations, min_confidence = 6, 0.0
    vocabulary: torch.Tensor | None = None  # the tokens that are drafted; None: all
    OUTSIDE = -1e4  # the logit of all other tokens; finite, since a processor may allow only these

    def __init__(self, model: Any, layers: Any, norm: Any, shared: bool) -> None:
        self.model, self.layers, self.norm, self.shared = model, layers, norm, shared
        self.head = model.lm_head

    def cost(self) -> float:
        """Weights read for a drafted token divided by weights read for a token of the whole model."""
        drafting, all_layers = (
            sum(w.numel() for w in part.parameters()) for part in (self.layers, self.model.model.layers)
        )
        head = self.head.weight.numel()
        share = 1 if self.vocabulary is None else len(self.vocabulary) / self.model.config.vocab_size
        return (drafting + share * head) / (all_layers + head)

    def rows_cost(self, batch: int) -> float:
        """Extra cost of a step with several tokens, divided by the cost of a step with one token.

        On a CPU (AVX2), torch's matrix products with two to eight rows take 1.5 to 2 times as long as with one row.
        """
        return 0.5 if batch == 1 and self.head.weight.device.type == "cpu" else 0.0

    def begin(self, cache: DynamicCache, unknown: int) -> None:
        """Begin texts with the model's cache; the draft cannot read the tokens of its first `unknown` columns."""
        first, draft_cache, self.unknown = len(self.layers), cache, 0
        if not self.shared:
            first, draft_cache, self.unknown = 0, DynamicCache(config=self.model.config), unknown
            draft_cache.layers = draft_cache.layers[: len(self.layers)]
            draft_cache.activate_past_recording()
        self.drafting = Part(self.model, self.layers, 0, draft_cache)
        self.verifying = Part(self.model, self.model.model.layers[first:], first, cache)
        self.states: list[torch.Tensor] = []  # of this round's drafts
        self.rows: Any = None if self.vocabulary is None else self.head.weight[self.vocabulary]  # of the head

    def unread(self, columns: int) -> int:
        """How many of the first `columns` tokens the layers have not read."""
        return columns - self.unknown - self.drafting.cache.get_seq_length()

    def next_logits(self, tokens: torch.Tensor, padding: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Read tokens [b, s], and return the next token's logits [b, 1, v]."""
        self.states.append(self.drafting.run(self.embed(tokens), padding[:, self.unknown :], positions)[:, -1:])
        hidden = self.norm(self.states[-1])
        if self.vocabulary is None:
            return self.capped(self.head(hidden))
        logits = self.capped(linear(hidden, self.rows))
        everything = logits.new_full((*logits.shape[:2], len(self.head.weight)), self.OUTSIDE)
        return everything.index_copy_(2, self.vocabulary, logits)

    def verify(self, tokens: torch.Tensor, padding: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """The model's logits [b, n + 1, v] at the last token of the text and n drafts."""
        if self.shared:
            last = self.drafting.run(self.embed(tokens[:, -1:]), padding, positions[:, -1:])
            hidden = torch.cat([*self.states, last], 1)
        else:
            hidden = self.embed(tokens)
        self.states = []
        return self.capped(self.head(self.model.model.norm(self.verifying.run(hidden, padding, positions))))

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.model.model.embed_tokens(tokens) * getattr(self.model.config, "embedding_multiplier", 1)

    def capped(self, logits: torch.Tensor) -> torch.Tensor:
        logits = logits / getattr(self.model.config, "logits_scaling", 1)
        cap = getattr(self.model.config, "final_logit_softcapping", None)
        return (logits if cap is None else cap * torch.tanh(logits / cap)).float()

    def keep(self, shifts: torch.Tensor, columns: int) -> None:
        """Move each row to the right by `shifts` [b], and keep the first `columns` of the caches."""
        keep_columns(self.verifying.cache, shifts, columns)
        if not self.shared:
            keep_columns(self.drafting.cache, shifts, columns - self.unknown)


def exit_draft(model: Any, exit_layer: int) -> DraftLayers:
    exits = range(1, model.config.num_hidden_layers)
    require(exit_layer in exits, f"exit_layer: {exit_layer} is not one of 1 to {exits.stop - 1}")
    return DraftLayers(model, model.model.layers[:exit_layer], model.model.norm, shared=True)


COPIES: WeakKeyDictionary[Any, tuple[Any, Any]] = WeakKeyDictionary()  # what `read_copy` returned, by model


def copy_draft(model: Any, where: Mapping[str, Any]) -> DraftLayers:
    """Drafts with a trained copy of the first layers, which the folder `draft` beside the model's files holds.

    It is read once per model. `where` has the arguments of `cached_file`.
    """
    if model not in COPIES:
        COPIES[model] = read_copy(model, where)
    described, part = COPIES[model]
    part.to(model.lm_head.weight.device, model.lm_head.weight.dtype)
    draft = DraftLayers(model, part.layers, part.norm, shared=False)
    draft.num_speculations, draft.min_confidence = described["num_speculations"], described["min_confidence"]
    if described["vocabulary"] is not None:
        draft.vocabulary = torch.tensor(described["vocabulary"], device=draft.head.weight.device)
    return draft


def commit_of_this_file(repository: str) -> str | None:
    """The commit of `repository` on the hub from which transformers loaded this file; None: it did not."""
    commit = Path(__file__).parents[1].name  # transformers copies it to OWNER/NAME/COMMIT/custom_generate/generate.py
    try:
        cached_file(repository, "custom_generate/generate.py", revision=commit, local_files_only=True)
    except OSError:
        return None
    return commit


def read_copy(model: Any, where: Mapping[str, Any]) -> tuple[Any, Any]:
    """The description of the copy, and its layers and norm."""
    where = {**where, "revision": where["revision"] or commit_of_this_file(model.name_or_path)}
    try:
        settings, weights = (cached_file(model.name_or_path, f"draft/{name}", **where) for name in DRAFT_FILES)
    except OSError as e:
        raise ValueError(
            f"LayerSkip: no exit, and no draft in {model.name_or_path!r}. Give exit_layer=, or assistant_early_exit in "
            "generation_config.json"
        ) from e
    with open(settings, encoding="utf-8") as file:
        described = json.load(file)
    part = torch.nn.Module()
    with torch.device("meta"):
        layers = enumerate(model.model.layers[: described["num_layers"]])
        part.layers = torch.nn.ModuleList(type(layer)(model.config, number) for number, layer in layers)
        part.norm = copy.deepcopy(model.model.norm)
    tensors = {name.removeprefix("model."): tensor for name, tensor in load_file(weights).items()}
    part.load_state_dict(tensors, assign=True)
    return described, part.requires_grad_(False).eval()


class BatchTexts:
    """The texts of a batch, which may differ in length.

    Logits processors, stopping criteria and streamers expect texts of one length, so they run once for each length.
    """

    def __init__(self, prompts: torch.Tensor, width: int, pad_id: int, processors: Any, criteria: Any, streamer: Any):
        self.tokens = pad(prompts, (0, width - prompts.shape[1]), value=pad_id)  # [b, width]
        self.lengths = [prompts.shape[1]] * len(prompts)
        self.active = list(range(len(prompts)))  # rows that have not stopped
        self.pad_id, self.processors, self.criteria = pad_id, processors, criteria
        self.streamer, self.streamed = streamer, prompts.shape[1]

    def last(self, count: int) -> torch.Tensor:
        """The last tokens [b, count] of each row; rows that have stopped may repeat their first one."""
        at = torch.tensor(self.lengths)[:, None] - count + torch.arange(count)
        return self.tokens.gather(1, at.clamp(min=0).to(self.tokens.device))

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


class Columns:
    """The columns of the model's cache. Rows are right-aligned, with padding at the left.

    padding: [b, columns], 0 for a column without text. position: [b, 1], of the last token in the cache. last_position:
    only rows that have stopped, and drafts that will be cut, go beyond it. Dynamic positions must not.
    """

    def __init__(self, padding: torch.Tensor, position: torch.Tensor, last_position: int) -> None:
        self.padding, self.position, self.last_position = padding, position, last_position

    @property
    def count(self) -> int:
        return self.padding.shape[1]

    def up_to(self, end: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The padding with `end` tokens after the cache, and the positions [b, count] of the last `count` tokens."""
        positions = self.position + end + torch.arange(1 - count, 1, device=self.position.device)
        return pad(self.padding, (0, end), value=1), positions.clamp(0, self.last_position)

    def keep(self, accepted: torch.Tensor, shifts: torch.Tensor, added: int) -> None:
        """Add `added` columns after a round that accepted [b] drafts; rows move to the right by `shifts` [b]."""
        self.position = self.position + accepted[:, None] + 1
        padding = pad(self.padding, (0, added), value=1)
        is_text = torch.arange(padding.shape[1], device=padding.device) >= shifts[:, None]
        self.padding = shift_right(padding, shifts, dim=1) * is_text


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


def keep_columns(cache: DynamicCache, shifts: torch.Tensor, columns: int) -> None:
    """Move each row's columns to the right by `shifts` [b], and keep the first `columns`."""
    if cache.get_seq_length():
        if shifts.any():
            for layer in cache.layers:
                layer.keys, layer.values = (shift_right(x, shifts, dim=2) for x in (layer.keys, layer.values))
        cache.crop(min(columns - cache.get_seq_length(), 0))


def shift_right(columns: torch.Tensor, shifts: torch.Tensor, dim: int) -> torch.Tensor:
    """Move each row's columns to the right along `dim`; columns past the end are dropped."""
    size = columns.shape[dim]
    source = (torch.arange(size, device=columns.device) - shifts.to(columns.device)[:, None]).clamp(min=0)
    shape = [len(columns) if d == 0 else size if d == dim else 1 for d in range(columns.dim())]
    return columns.gather(dim, source.view(shape).expand_as(columns))


def check_settings(model: Any, logits_processor: Any, generation_config: Any, prompt_length: int, longest: int) -> None:
    """Refuse settings that `decode` cannot honour."""
    mode = generation_config.get_generation_mode()
    require(mode in MODES, f"LayerSkip: {mode.value} is not supported. Allowed: {', '.join(MODES)}")
    for stateful, name in WITH_STATE.items():
        used = any(isinstance(processor, stateful) for processor in logits_processor)
        require(not used, f"LayerSkip: {name} is not supported, its processor keeps a state. Remove it")
    for output in ("output_scores", "output_logits", "output_attentions", "output_hidden_states"):
        asked_for = generation_config.return_dict_in_generate and getattr(generation_config, output)
        require(not asked_for, f"LayerSkip: {output} is not supported. Allowed: {output}=False")
    rope = getattr(model.config, "rope_parameters", None) or {}
    rope_type, switch = rope.get("rope_type"), rope.get("original_max_position_embeddings")
    switch = switch or model.config.max_position_embeddings
    changes = switch < longest and (rope_type == "dynamic" or (rope_type == "longrope" and prompt_length <= switch))
    require(not changes, f"LayerSkip: {rope_type} positions change after {switch} tokens. Allowed: max_length={switch}")


def decode(
    model: Any,
    input_ids: torch.Tensor,
    draft: DraftLayers,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    streamer: Any = None,
    **model_kwargs: Any,
) -> Any:
    """The decoding loop, which `model.generate` calls with prepared inputs."""
    do_sample, longest = bool(generation_config.do_sample), stopping_criteria.max_length
    batch, prompt_length = input_ids.shape
    check_settings(model, logits_processor, generation_config, prompt_length, longest)
    pad_id = 0 if generation_config._pad_token_tensor is None else int(generation_config._pad_token_tensor)
    width = longest + draft.num_speculations + 1
    rows = BatchTexts(input_ids, width, pad_id, logits_processor, stopping_criteria, streamer)
    length = DraftLength(draft.num_speculations, draft.cost(), draft.rows_cost(batch))
    logits, cache, columns = read_prompts(model, input_ids, generation_config, model_kwargs, longest)
    draft.begin(cache, unknown=columns.count - prompt_length)
    pending, _ = choose(rows.process(logits, 0), do_sample)  # [b, 1]: the last tokens, which are not yet in the cache
    rows.append(pending, [1] * batch)

    while rows.active:
        most = min(length.next(), longest - min(rows.lengths[row] for row in rows.active) - 1)
        drafts, draft_probs = draft_tokens(draft, rows, columns, pending, most, do_sample)
        tokens = torch.cat([pending, *drafts], 1)
        logits = draft.verify(tokens, *columns.up_to(tokens.shape[1], tokens.shape[1]))
        accepted, pending = verify(rows.process(logits, 0), tokens[:, 1:], draft_probs, do_sample)
        counts = accepted.tolist()
        active_counts = [counts[row] for row in rows.active]
        length.learn(active_counts, len(drafts))

        old_length = rows.lengths[0]
        rows.append(
            torch.cat([tokens[:, 1:], pending], 1).scatter(1, accepted[:, None], pending), [n + 1 for n in counts]
        )
        # Rows stay right-aligned: a row with fewer accepted drafts than the best one moves to the right. After a stop
        # among the drafts of a single text, the cache lacks the last token, as in plain decoding.
        best = max(active_counts)
        shifts = (best - accepted).clamp(min=0) * (min(active_counts) < best)
        columns.keep(accepted, shifts, rows.lengths[0] - old_length if batch == 1 else best + 1)
        draft.keep(shifts, columns.count)

    if streamer is not None:
        streamer.end()
    sequences: Any = rows.tokens[:, : max(rows.lengths)]
    if not generation_config.return_dict_in_generate:
        return sequences
    return GenerateDecoderOnlyOutput(sequences=sequences, cache=cache if batch == 1 else None)


def read_prompts(
    model: Any, input_ids: torch.Tensor, generation_config: Any, model_kwargs: dict[str, Any], longest: int
) -> tuple[torch.Tensor, Any, Columns]:
    """Run the whole model over the prompts [b, s]: logits [b, 1, v] of the next tokens, the cache, and its columns."""
    outputs = model._prefill(input_ids, generation_config, model_kwargs)
    cache: Any = outputs.cache
    usable = isinstance(cache, DynamicCache) and not cache.offloading
    require(usable, f"LayerSkip: needs a DynamicCache on the model's device, not {type(cache).__name__}")
    cache.activate_past_recording()  # lets layers with a sliding window drop rejected drafts
    batch, prompt_length = input_ids.shape
    size = cache.get_seq_length()  # more than the prompt if tokens are only in the cache or in `inputs_embeds`
    padding = model_kwargs.get("attention_mask")
    if padding is None:
        padding = torch.ones(batch, size, dtype=torch.long, device=input_ids.device)
    position = model_kwargs["position_ids"][:, -1:].expand(batch, 1)
    return outputs.logits[:, -1:].float(), cache, Columns(padding, position, longest + size - prompt_length - 1)


def draft_tokens(
    draft: DraftLayers, rows: BatchTexts, columns: Columns, pending: torch.Tensor, most: int, do_sample: bool
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Up to `most` drafts [b, 1] after the texts, and their distributions [b, 1, v].

    They end once it is unlikely for every row that the model accepts all of them.
    """
    drafts: list[torch.Tensor] = []
    draft_probs: list[torch.Tensor] = []
    confidence = torch.ones(len(pending), device=pending.device)
    new = rows.last(draft.unread(columns.count + 1)) if most else pending
    for i in range(most):
        scores = rows.process(draft.next_logits(new, *columns.up_to(i + 1, new.shape[1])), i)
        new, probs = choose(scores, do_sample)
        rows.draft(new, i)
        drafts.append(new)
        draft_probs.append(probs)
        if draft.min_confidence:
            confidence = confidence * scores.softmax(-1).amax(-1)[:, 0]
            if confidence[rows.active].max() < draft.min_confidence:
                break
    return drafts, draft_probs
