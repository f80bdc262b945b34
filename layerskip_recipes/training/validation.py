"""Validation during training: loss, perplexity and agreement with the last layer of each chosen exit."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset
from torchtune import utils
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX
from tqdm import tqdm

from layerskip_recipes.acceptance.exit_quality import MOST_CHUNK_TOKENS, ExitQuality, exit_quality
from layerskip_recipes.config.schema import AUTO
from layerskip_recipes.data.datasets import Batches, IndexedErrorDataset, load_data
from layerskip_recipes.data.replies import ReplyFormat
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.model.decoder import LayerSkipDecoder
from layerskip_recipes.model.draft import Draft
from layerskip_recipes.model.limits import check_length
from layerskip_recipes.processes import is_rank_zero
from layerskip_recipes.training.config import FinetuneConfig
from layerskip_recipes.training.parallel import Mesh, reshard

log = utils.get_logger("INFO")
MARGIN = 0.05  # a larger relative rise of the last layer's loss gives a warning


class PadToRanks(Dataset):
    """A dataset padded to a multiple of `ranks`, so that all ranks run equally many batches.

    The padding repeats the first samples with masked labels.
    """

    def __init__(self, dataset: IndexedErrorDataset, ranks: int) -> None:
        self.dataset = dataset
        self.length = -(-len(dataset) // ranks) * ranks

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> dict[str, Any]:
        if i < len(self.dataset):
            return self.dataset[i]
        sample = self.dataset[i % len(self.dataset)]
        none = [CROSS_ENTROPY_IGNORE_IDX] * len(sample["labels"])
        return sample | {"labels": torch.tensor(none) if isinstance(sample["labels"], torch.Tensor) else none}


class Validation:
    """Measures the chosen exits on held-out data, and remembers the last layer's first loss."""

    def __init__(self, cfg: FinetuneConfig, tokenizer: Any, device: torch.device, mesh: Mesh) -> None:
        self.on = cfg.dataset_val is not None
        self.every, self.mesh, self.device = cfg.run_val_every_n_steps, mesh, device
        self.replies = ReplyFormat.of(tokenizer)
        section = cfg.early_exit_loss or cfg.draft
        chosen = AUTO if section is None else section.chunk_tokens
        self.chunk_tokens = MOST_CHUNK_TOKENS if chosen == AUTO else chosen
        self.loss_at_start: float | None = None
        if cfg.dataset_val is None:
            return
        self.keys_to_lower = (
            "optimizer.lr" if cfg.draft else "early_exit_loss.scale, layer_dropout.prob or optimizer.lr"
        )
        self.exits = [0, cfg.num_layers] if cfg.draft else cfg.validated_exits
        indexed, collate = load_data(cfg.dataset_val, cfg.collate_fn, tokenizer, cfg.meta_model, device)
        if not len(indexed):
            raise ConfigError("dataset_val: it has no sample. Allowed: at least one, or dataset_val=null")
        check_length(len(indexed[0]["tokens"]), cfg.meta_model, key="dataset_val")
        dataset = PadToRanks(indexed, mesh.data_size)
        samples = range(mesh.data_rank, len(dataset), mesh.data_size)
        self.batches = Batches(dataset, samples, cfg.batch_size, collate, device)

    def due(self, step: int) -> bool:
        """Whether to measure after optimizer step `step` (from 1)."""
        return self.on and self.every is not None and step % self.every == 0

    def quality(
        self,
        model: LayerSkipDecoder,
        batches: Iterable[dict[str, Any]],
        exits: Sequence[int],
        draft: Draft | None = None,
        **options: Any,
    ) -> dict[int, ExitQuality]:
        """`exit_quality` over all processes, in evaluation mode. Leaves the training state as it was."""
        parts: list[torch.nn.Module] = [model] if draft is None else [model, draft]
        trained = [part for part in parts if part.training]
        for part in trained:
            part.eval()
        options |= {"add_up": self.mesh.sum, "generated": self.replies.generated, "chunk_tokens": self.chunk_tokens}
        try:
            return exit_quality(model, batches, exits, self.device, draft=draft, **options)
        finally:
            for part in parts:
                reshard(part)
            for part in trained:
                part.train()

    def measure(self, model: LayerSkipDecoder, step: int, draft: Draft | None = None) -> dict[str, float]:
        """The log metrics of each exit or of the draft. Warns if the last layer got worse."""
        batches = tqdm(self.batches, desc="validation", leave=False, disable=not is_rank_zero())
        quality = self.quality(model, batches, self.exits, draft, key="dataset_val")
        final = quality[self.exits[-1]].loss
        first = self.loss_at_start = final if self.loss_at_start is None else self.loss_at_start
        if not final <= first * (1 + MARGIN):  # also true for NaN
            log.warning(
                f"val_loss_final: {final:.4f} after step {step} is {final / first - 1:.1%} worse than at the "
                f"start ({first:.4f}). Lower {self.keys_to_lower} to keep it"
            )
        if draft is None:
            names = ("loss", "perplexity", "agreement", "overlap")
            named = {f"val_{name}_exit_{e}": getattr(quality[e], name) for e in self.exits for name in names}
            return named | {"val_loss_final": final}
        measured = {name: getattr(quality[0], name) for name in ("agreement", "overlap", "accepted_length")}
        if draft.vocabulary is None:  # otherwise some labels have no probability
            measured["loss"] = quality[0].loss
        named = {f"val_{name}_draft": value for name, value in measured.items() if value is not None}
        return named | {"val_loss_final": final}
