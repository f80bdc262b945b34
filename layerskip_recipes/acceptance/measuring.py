"""Measures the acceptance of a checkpoint's exits or draft, for the section "measured" of layerskip.json."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

from layerskip_recipes.acceptance.exit_quality import ExitQuality
from layerskip_recipes.acceptance.tokens_per_round import ALL_TOKENS
from layerskip_recipes.acceptance.trained_exits import DRAFT_VOCABULARIES, LONGEST_DRAFT
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.model.decoder import LayerSkipDecoder
from layerskip_recipes.model.draft import Draft
from layerskip_recipes.processes import from_every_rank

# Each process stops measuring after this many samples or tokens.
ENOUGH_SAMPLES, ENOUGH_TOKENS = 64, 8192
MOST_EXITS = 4  # early ones that are measured


def exits_to_measure(trained: Sequence[int], num_layers: int) -> list[int]:
    """The trained early exits; if more than four, the exits nearest to 1/8, 2/8, 3/8 and 4/8 of the depth."""
    early = sorted(e for e in trained if e < num_layers)
    if len(early) <= MOST_EXITS:
        return early
    return sorted({min(early, key=lambda e: abs(e - part * num_layers / 8)) for part in (1, 2, 3, 4)})


def measured_acceptance(
    quality: Callable[..., dict[int, ExitQuality]],
    source: Literal["dataset_val", "training"],
    batches: Iterable[dict[str, Any]],
    model: LayerSkipDecoder,
    exits: Sequence[int],
    vocabulary: Sequence[int] = (),
    draft: Draft | None = None,
) -> dict[str, Any] | None:
    """The fields of `Measured`, for trained exits or a draft; None if nothing can be measured. Collective.

    Args:
        quality: `exit_quality` over all processes.
        source: where the batches come from. Only the first ones are measured.
        exits: the trained exits; none for a draft.
        vocabulary: the data's most frequent tokens, of which exits draft with the first 512, 1024, ..
    """
    measured_exits = [0] if draft is not None else exits_to_measure(exits, model.num_layers)
    if not measured_exits:  # on all ranks
        return None
    first_batches = _enough(batches)
    count = min(from_every_rank(len(first_batches)))  # all ranks take part in each forward pass
    if not count:
        return None
    num_tokens = model.tok_embeddings.num_embeddings
    sizes = [n for n in DRAFT_VOCABULARIES if n < num_tokens and n < 2 * len(vocabulary)]
    try:
        by_exit = quality(
            model,
            first_batches[:count],
            [*measured_exits, model.num_layers],
            draft,
            num_speculations=LONGEST_DRAFT,
            vocabulary=vocabulary,
            sizes=sizes if draft is None else (),
        )
    except ConfigError:  # no label counts
        return None
    if not all(by_exit[e].overlap >= 0 and by_exit[e].tokens_per_round for e in measured_exits):
        return None  # the last step ruined the weights, or there is no text of two tokens
    measured = {"on": source, "labels": by_exit[measured_exits[0]].generated}
    rates = {e: _rounded(by_exit[e].tokens_per_round) for e in measured_exits}
    return measured | ({"exits": rates} if draft is None else {"draft": rates[0][ALL_TOKENS]})


def _rounded(rates: Any) -> Any:
    if isinstance(rates, dict):
        return {key: _rounded(value) for key, value in rates.items()}
    return [_rounded(value) for value in rates] if isinstance(rates, list) else round(rates, 4)


def _enough(batches: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first batches that are enough to measure."""
    first_batches: list[dict[str, Any]] = []
    samples = tokens = 0
    for batch in batches:
        first_batches.append(batch)
        samples, tokens = samples + len(batch["tokens"]), tokens + batch["tokens"].numel()
        if samples >= ENOUGH_SAMPLES or tokens >= ENOUGH_TOKENS:
            break
    return first_batches
