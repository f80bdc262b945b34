"""How tokens are drafted: the settings of a speculation, and the checks of what a user asks of a generation."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Integral

import torch
from torchtune.modules import TransformerCrossAttentionLayer, TransformerDecoder
from torchtune.modules.model_fusion import FusionLayer

from layerskip_recipes.config.checks import check_number
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.generation.drafting.choice import Policy, check_threshold
from layerskip_recipes.model.decoder import LayerSkipDecoder


@dataclass
class Speculation:
    """How tokens are drafted. Everything here is lossless: the output is that of the full model.

    Args:
        exit_layer: E (1..L), or several, of which the fastest is found by measuring.
        num_speculations: d, drafted tokens of a round; of a tree its depth.
        tree_width: nodes that each level of a draft tree expands; 1 is a chain.
        tree_children: candidates from each of them.
        threshold: a draft stops below this confidence, in [0, 1]; "auto" finds out whether and where; None never.
        draft_vocabulary: ids of the tokens that can be drafted; None: all.
        prompt_lookup: draft from the text where its last so many tokens occurred before, if that pays; None: never.
        drafter: a decoder whose early layers and head draft in the model's place, such as a quantised copy.
        policy: what was learned; kept with this object.

    Raises:
        ValueError: if a value is out of range, or two of them do not go together.
    """

    exit_layer: int | Sequence[int]
    num_speculations: int
    tree_width: int = 1
    tree_children: int = 1
    threshold: float | str | None = None
    draft_vocabulary: torch.Tensor | Sequence[int] | None = None
    prompt_lookup: int | None = None
    drafter: LayerSkipDecoder | None = None
    policy: Policy = field(init=False, repr=False)

    def __post_init__(self) -> None:
        check_number("num_speculations", self.num_speculations, minimum=1, example=6)
        check_number("tree_width", self.tree_width, minimum=1, example=4)
        check_number("tree_children", self.tree_children, minimum=1, example=2)
        check_number("prompt_lookup", self.prompt_lookup, minimum=1, optional=True, example=3)
        check_threshold(self.threshold)
        if self.threshold is not None and (self.tree_width, self.tree_children) != (1, 1):
            raise ConfigError(
                f"threshold: {self.threshold} stops a chain of drafts, and tree_width or tree_children make a tree. "
                "Leave out one of them: threshold=null, or tree_width=1 tree_children=1"
            )
        self.policy = Policy(self.exits, self.threshold, self.prompt_lookup is not None)

    @property
    def exits(self) -> list[int]:
        """The exits that may draft."""
        return list(self.exit_layer) if isinstance(self.exit_layer, Sequence) else [self.exit_layer]

    def check(self, model: LayerSkipDecoder, prefix: str = "") -> None:
        """Raises a ValueError if an exit, or a token of the draft vocabulary, is none of the model's."""
        if not self.exits:
            raise ConfigError(f"{prefix}exit_layer: [] holds no exit; for example {prefix}exit_layer=[4,8]")
        for exit_layer in self.exits:
            model.check_exit(exit_layer, f"{prefix}exit_layer")
        size = model.tok_embeddings.num_embeddings
        for key, value in (("tree_width", self.tree_width), ("tree_children", self.tree_children)):
            check_number(f"{prefix}{key}", value, minimum=1, maximum=size, example=2)
        if self.draft_vocabulary is not None:
            check_draft_vocabulary(self.draft_vocabulary, size, self, prefix)
        if self.drafter is not None:
            check_drafter(self.drafter, model, max(self.exits), prefix)


def check_drafter(drafter: TransformerDecoder, model: LayerSkipDecoder, exit_layer: int, prefix: str = "") -> None:
    """Raises a ValueError unless a drafter has the layers to draft, and caches and tokens like the model's."""
    if len(drafter.layers) < exit_layer:
        raise ConfigError(f"{prefix}exit_layer: {exit_layer} is more than the drafter's layers")
    if len(drafter.layers) > model.num_layers:
        layers = f"{len(drafter.layers)} layers, and the model {model.num_layers}"
        raise ConfigError(
            f"{prefix}drafter: it has {layers}. Allowed: no more than the model, such as a quantised copy"
        )
    for what, of in {
        "num_kv_heads": lambda decoder: decoder.layers[0].attn.num_kv_heads,
        "head_dim": lambda decoder: decoder.layers[0].attn.head_dim,
        "vocabulary": lambda decoder: decoder.tok_embeddings.num_embeddings,
        "dtype": lambda decoder: decoder.tok_embeddings.weight.dtype,
    }.items():
        if of(drafter) != of(model):
            raise ConfigError(
                f"{prefix}drafter: its {what} is {of(drafter)}, and the model's {of(model)}. Allowed: a decoder that "
                "shares cache and vocabulary with the model, such as a quantised copy"
            )


def check_num_speculations(
    num_speculations: int | None, exit_layer: int | None, key: str = "num_speculations"
) -> int | None:
    """Raises a ValueError unless it is None, or 1 or more with an exit layer to draft from."""
    if num_speculations is None:
        return None
    check_number(key, num_speculations, minimum=1, example=6)
    if exit_layer is None:
        raise ConfigError(f"{key}: {num_speculations} needs exit_layer too, the exit that drafts, e.g. exit_layer=8")
    return num_speculations


def check_draft_vocabulary(
    vocabulary: torch.Tensor | Sequence[int], size: int, speculation: Speculation | None = None, prefix: str = ""
) -> None:
    """Raises a ValueError unless it holds ids of a vocabulary of that size, enough for each node of a draft tree."""
    try:
        ids = torch.as_tensor(vocabulary)
    except (TypeError, ValueError, RuntimeError):
        ids = torch.empty(0)
    needed = max(speculation.tree_width, speculation.tree_children) if speculation else 1
    allowed = (
        f"Allowed: at least {needed} different ids of 0..{size - 1}; {prefix}draft_vocabulary=null drafts any token"
    )
    if ids.dim() != 1 or ids.is_floating_point() or ids.dtype == torch.bool or len(ids.unique()) < needed:
        raise ConfigError(f"{prefix}draft_vocabulary: {ids.numel()} ids are too few, or no ids. {allowed}")
    if int(ids.min()) < 0 or int(ids.max()) >= size:
        bad = int(ids.min()) if int(ids.min()) < 0 else int(ids.max())
        raise ConfigError(f"{prefix}draft_vocabulary: {bad} is no token of the model. {allowed}")


def most_positions(model: TransformerDecoder, spare: int = 0) -> tuple[int, str]:
    """How many positions of text and new tokens a model decodes with a cache, and what limits them.

    Args:
        model: the decoder.
        spare: slots of a draft tree, which count where attention has a sliding window.
    """
    # torchtune's gemma2 attention places its sliding window by the query's row, which is wrong with a cache: up to
    # the window's size nothing is cut, so there it does no harm.
    windows = [getattr(layer.attn, "sliding_window_size", None) for layer in model.layers]
    limits = [(w - spare, "the attention's sliding window") for w in windows if w]
    return min([*limits, (model.max_seq_len, "max_seq_len")])


def check_lengths(
    model: TransformerDecoder,
    prompt_lengths: Sequence[int],
    max_generated_tokens: int,
    key: str = "max_generated_tokens",
    spare: int = 0,
) -> None:
    """Raises a ValueError unless each prompt has a token and fits the model together with the new tokens.

    Args:
        model: the decoder.
        prompt_lengths: tokens of each prompt.
        max_generated_tokens: new tokens, at most.
        key: what an error message calls them.
        spare: see `most_positions`.
    """
    check_number(key, max_generated_tokens, minimum=1, example=128)
    if not prompt_lengths or min(prompt_lengths) == 0:
        raise ConfigError("prompt: it has no token. Allowed: at least one token in each prompt")
    if any(isinstance(module, FusionLayer | TransformerCrossAttentionLayer) for module in model.modules()):
        raise ConfigError("model: generation supports decoders of self-attention layers only, no fusion layers")
    limit, what = most_positions(model, spare)
    longest = max(prompt_lengths)
    if longest + 1 > limit:
        raise ConfigError(f"prompt: its {longest} tokens leave no room in the model's {limit} ({what})")
    if longest + max_generated_tokens > limit:
        raise ConfigError(
            f"{key}: a prompt of {longest} tokens and {max_generated_tokens} new ones make "
            f"{longest + max_generated_tokens}, more than the model's {limit} ({what}). Allowed here: up to "
            f"{limit - longest}, for example {key}={limit - longest}"
        )


def check_tokens(model: TransformerDecoder, prompts: Sequence[Sequence[int]]) -> None:
    """Raises a ValueError for a token that the model does not know: on a GPU it would end the process."""
    known = model.tok_embeddings.num_embeddings
    for token in (token for prompt in prompts for token in prompt):
        if not isinstance(token, Integral) or not 0 <= token < known:
            raise ConfigError(f"prompt: {token} is no token of this model. Allowed: 0..{known - 1}")
