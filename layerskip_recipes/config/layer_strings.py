"""Which layers a config means: numpy-style strings such as ":", "0::4" or "8,12,16" to one flag per layer."""

from collections.abc import Sequence

from layerskip_recipes.errors import ConfigError


def select_layers(layers: str | int | Sequence[int], num_layers: int, key: str = "layers") -> list[bool]:
    """For each of the num_layers layers whether it is selected.

    Args:
        layers: comma-separated indices and slices (":", "0::4", "8,12,16", "2:6,15", negative from the end),
            one index, or a sequence of indices.
    """

    def wrong(why: str) -> ValueError:
        return ConfigError(
            f'{key}: {layers!r} {why}. Allowed: indices 0..{num_layers - 1} and slices, for example ":", "0::4", "1,3"'
        )

    if isinstance(layers, bool) or not isinstance(layers, str | int | Sequence):
        raise wrong("is no selection of layers")
    parts = str(layers).split(",") if isinstance(layers, str | int) else [str(index) for index in layers]
    chosen = set()
    for part in (part.strip() for part in parts):
        try:
            bounds = [int(text) if text.strip() else None for text in part.split(":")]
        except ValueError:
            raise wrong("is no selection of layers") from None
        if part == "" or len(bounds) > 3 or bounds[2:] == [0]:
            raise wrong("is no selection of layers")
        if any(b is not None and not -num_layers <= b <= num_layers for b in bounds[:2]):
            raise wrong(f"reaches outside of the model's {num_layers} layers")
        if len(bounds) == 1 and bounds[0] is not None:
            if bounds[0] == num_layers:
                raise wrong(f"reaches outside of the model's {num_layers} layers")
            chosen.add(bounds[0] % num_layers)
        else:
            chosen.update(range(num_layers)[slice(*bounds)])
    if not chosen:
        raise wrong("selects no layer")
    return [layer in chosen for layer in range(num_layers)]


def select_exits(layers: str | int | Sequence[int], num_layers: int, key: str = "layers") -> list[int]:
    """The exits behind the selected layers (see `select_layers`) and the last one, in order; layer l is exit l + 1."""
    chosen = select_layers(layers, num_layers, key=key)
    return sorted({layer + 1 for layer, on in enumerate(chosen) if on} | {num_layers})
