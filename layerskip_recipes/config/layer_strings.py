"""Layer selections: numpy-style strings such as ":", "0::4" or "8,12,16"."""

from collections.abc import Sequence

from layerskip_recipes.errors import ConfigError


def select_layers(layers: str | int | Sequence[int], num_layers: int, key: str = "layers") -> list[bool]:
    """One flag per layer. `layers`: comma-separated indices and slices ("2:6,-1"), one index, or several indices."""

    def wrong(why: str) -> ValueError:
        return ConfigError(
            f'{key}: {layers!r} {why}. Allowed: indices 0..{num_layers - 1} and slices, for example ":", "0::4", "1,3"'
        )

    parts = str(layers).split(",") if isinstance(layers, str | int) else layers
    every = range(num_layers)
    chosen: set[int] = set()
    try:
        for part in map(str, parts):
            bounds = [int(text) if text.strip() else None for text in part.split(":")]
            # Python clips slice bounds silently.
            if any(bound is not None and not -num_layers <= bound <= num_layers for bound in bounds[:2]):
                raise IndexError
            if len(bounds) > 1:
                chosen.update(every[slice(*bounds)])
            else:
                chosen.add(every[int(part)])
    except IndexError:
        raise wrong(f"goes beyond the model's {num_layers} layers") from None
    except (TypeError, ValueError):
        raise wrong("is not a layer selection") from None
    if not chosen:
        raise wrong("selects no layer")
    return [layer in chosen for layer in range(num_layers)]


def select_exits(layers: str | int | Sequence[int], num_layers: int, key: str = "layers") -> list[int]:
    """The sorted exits of the selected layers, plus the last exit; layer l is exit l + 1."""
    chosen = select_layers(layers, num_layers, key=key)
    return sorted({layer + 1 for layer, on in enumerate(chosen) if on} | {num_layers})
