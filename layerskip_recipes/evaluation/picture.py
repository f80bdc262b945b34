"""The picture of `layerskip_eval`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def plot_exits(quality: Mapping[str, Mapping[int, Mapping[str, Any]]], path: Path, title: str) -> None:
    """Plot loss and agreement with the last layer over the exit layer, with a line for each checkpoint."""
    from matplotlib.figure import Figure  # takes a second to import

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplots(1, 2)
    labels = {"loss": "loss (nats per token)", "agreement": "agreement with the last layer"}
    for panel, (key, label) in zip(panels, labels.items(), strict=True):
        for name, exits in quality.items():
            panel.plot(list(exits), [exit[key] for exit in exits.values()], marker="o", markersize=4, label=name)
        panel.set_xlabel("exit layer (layers run)")
        panel.set_ylabel(label)
        panel.grid(alpha=0.3)
    panels[1].set_ylim(0, 1.02)
    if len(quality) > 1:
        panels[0].legend()
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
