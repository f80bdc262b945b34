"""Validation of every chosen exit while training: loss, perplexity, agreement with the last layer, and a warning."""

from typing import Any

import torch
from omegaconf import DictConfig
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torchtune import utils
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX
from torchtune.modules import TransformerDecoder
from tqdm import tqdm

from layerskip_recipes.config.layer_strings import select_layers
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.model.decoder import LayerSkipDecoder
from layerskip_recipes.model.exit_quality import exit_quality
from layerskip_recipes.model.limits import check_length
from layerskip_recipes.processes import is_rank_zero
from layerskip_recipes.training.batches import load_data
from layerskip_recipes.training.parallel import Mesh, reshard

log = utils.get_logger("INFO")


def chosen_exits(cfg: DictConfig, key: str, num_layers: int) -> list[int]:
    """The exits behind the layers that a key chooses (null: all), and the last one, in order.

    Args:
        cfg: `key` is read.
        key: of a selection as in `select_layers`.
        num_layers: L.

    Raises:
        ValueError: if the selection is wrong.
    """
    layers = ":" if cfg.get(key) is None else cfg[key]
    chosen = select_layers(layers, num_layers, key=key)
    return sorted({layer + 1 for layer, on in enumerate(chosen) if on} | {num_layers})


class Even(Dataset):
    """The samples, and the first ones again without labels until each of `ranks` has as many: all run the same walks.

    Args:
        dataset: of {"tokens", "labels", ...}.
        ranks: how many share it.
    """

    def __init__(self, dataset: Dataset, ranks: int) -> None:
        self.dataset = dataset
        self.length = -(-len(dataset) // ranks) * ranks

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> dict[str, Any]:
        if i < len(self.dataset):
            return self.dataset[i]
        sample = self.dataset[i - len(self.dataset)]
        none = [CROSS_ENTROPY_IGNORE_IDX] * len(sample["labels"])
        return sample | {"labels": torch.tensor(none) if isinstance(sample["labels"], torch.Tensor) else none}


class Validation:
    """Held-out data and what was measured on it at the start.

    Args:
        cfg: `dataset_val` (null: no validation), `run_val_every_n_steps` (null: at the start and the end only),
            `batch_size_val`, `max_batches_val`, `layers_val` and `val_loss_margin` are read.
        tokenizer: for the data.
        model: of the config, on any device; device: where it will be.
        mesh: each data-parallel rank measures a part of the data.

    Raises:
        ValueError: if the data is no batch for each rank.
    """

    def __init__(
        self, cfg: DictConfig, tokenizer: Any, model: TransformerDecoder, device: torch.device, mesh: Mesh
    ) -> None:
        self.on = cfg.get("dataset_val") is not None
        self.every = cfg.get("run_val_every_n_steps")
        self.margin = cfg.get("val_loss_margin", 0.05)
        self.mesh = mesh
        self.first: float | None = None  # the last layer's loss at the start
        if not self.on:
            return
        self.exits = chosen_exits(cfg, "layers_val", len(model.layers))
        dataset, collate = load_data(cfg, tokenizer, model, device, key="dataset_val")
        if len(dataset) < mesh.data_size:
            raise ConfigError(f"dataset_val: {len(dataset)} samples are fewer than the {mesh.data_size} ranks")
        check_length(len(dataset[0]["tokens"]), model, key="dataset_val")
        dataset = Even(dataset, mesh.data_size)
        sampler = DistributedSampler(dataset, num_replicas=mesh.data_size, rank=mesh.data_rank, shuffle=False)
        self.batches = DataLoader(
            dataset,
            batch_size=cfg.get("batch_size_val") or cfg.get("batch_size", 1),
            sampler=sampler,
            collate_fn=collate,
            generator=torch.Generator(),  # the global one belongs to the training
        )
        self.count = min(len(self.batches), cfg.get("max_batches_val") or len(self.batches))

    def due(self, step: int) -> bool:
        """Whether to measure after optimizer step `step` (from 1)."""
        return self.on and self.every is not None and step % self.every == 0

    def measure(self, model: LayerSkipDecoder, device: torch.device, step: int) -> dict[str, float]:
        """Quality of each exit, and a warning if the last layer became worse than at the start by the margin.

        Args:
            model: in training mode, and left so.
            device: of the model.
            step: optimizer steps done.

        Returns:
            val_loss_exit_<E>, val_perplexity_exit_<E>, val_agreement_exit_<E>, and val_loss_final.
        """
        model.eval()
        batches = tqdm(self.batches, total=self.count, desc="validation", leave=False, disable=not is_rank_zero())
        some = (batch for batch, _ in zip(batches, range(self.count), strict=False))
        quality = exit_quality(model, some, self.exits, device, add_up=self.mesh.sum, key="dataset_val")
        batches.close()
        reshard(model)
        model.train()
        final = quality[self.exits[-1]]["loss"]
        if self.first is None:
            self.first = final
        if not final <= self.first * (1 + self.margin) and is_rank_zero():  # NaN too
            log.warning(
                f"val_loss_final: {final:.4f} after step {step} is {final / self.first - 1:.1%} worse than at the "
                f"start ({self.first:.4f}), more than val_loss_margin={self.margin}. Less early_exit_loss.scale, "
                "layer_dropout.prob or lr keeps the last layer"
            )
        named = {
            f"val_{what}_exit_{e}": quality[e][what] for e in self.exits for what in ("loss", "perplexity", "agreement")
        }
        return named | {"val_loss_final": final}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run compares with."""
        return {"first": self.first}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.first = state["first"]
