"""Selections of layers (from 0) and of exits (from 1): strings such as ":", "1::4" or "8,12,16"."""

from collections.abc import Collection, Sequence

from layerskip_recipes.errors import ConfigError

Selection = str | int | Sequence[int]


def select_layers(layers: Selection, num_layers: int, key: str = "layers") -> list[bool]:
    """One flag per layer. `layers`: comma-separated indices and slices ("2:6,-1"), one index, or several indices."""
    allowed = f'indices 0..{num_layers - 1} and slices, for example ":", "0::4", "1,3"'
    chosen = _select(layers, 0, num_layers, key, allowed)
    return [layer in chosen for layer in range(num_layers)]


def select_exits(exits: Selection, num_layers: int, key: str = "exits") -> list[int]:
    """The chosen exits, in order. `exits` is like `layers` above, but its numbers are 1..L; exit E runs E layers."""
    allowed = f'exits 1..{num_layers} and slices, for example ":", "4::4", "2,4"'
    return sorted(_select(exits, 1, num_layers, key, allowed))


def default_exit(num_layers: int, exits: Collection[int] = ()) -> int:
    """The exit that training trains and that drafts, unless a config or a measurement says otherwise: the exit nearest
    to a seventh of the depth, among `exits` or else among all early exits.

    A draft step takes time in proportion to its layers, and deeper exits were not accepted often enough to pay for
    theirs: of SmolLM2's 30 layers, exit 4 decoded faster than exits 6 and 8 (docs/lab_notes.md).
    """
    return min(exits or range(1, max(num_layers, 2)), key=lambda e: (abs(e - num_layers / 7), e))


def _select(selection: Selection, first: int, count: int, key: str, allowed: str) -> set[int]:
    """Choose of the numbers first .. first + count - 1, as Python's indices and slices do."""

    def wrong(why: str) -> ValueError:
        return ConfigError(f"{key}: {selection!r} {why}. Allowed: {allowed}")

    parts = str(selection).split(",") if isinstance(selection, str | int) else selection
    numbers = range(first + count)
    chosen: set[int] = set()
    try:
        for part in map(str, parts):
            bounds = [int(text) if text.strip() else None for text in part.split(":")]
            # Python clips slice bounds silently.
            if any(bound is not None and not -count <= bound <= len(numbers) for bound in bounds[:2]):
                raise IndexError
            if len(bounds) == 1:
                chosen.add(numbers[int(part)])
            else:
                chosen.update(numbers[slice(first if bounds[0] is None else bounds[0], *bounds[1:])])
    except IndexError:
        raise wrong(f"goes beyond the model's {count} layers") from None
    except (TypeError, ValueError):
        raise wrong("is no list of numbers and slices") from None
    if min(chosen, default=first) < first:
        raise wrong("has a number below 1")
    if not chosen:
        raise wrong("selects nothing")
    return chosen
