"""OwnText: continuations by the model itself, in place of a part of a draft's training batches.

Acceptance is measured on the model's own text, which differs from its data.
"""

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX

from layerskip_recipes.generation.engine import Generation
from layerskip_recipes.generation.sampling import Sampler
from layerskip_recipes.model.decoder import LayerSkipDecoder
from layerskip_recipes.model.limits import most_positions
from layerskip_recipes.model.memory import free_memory, row_bytes
from layerskip_recipes.processes import from_rank_zero, is_rank_zero
from layerskip_recipes.training.batches import TrainingData
from layerskip_recipes.training.parallel import reshard

ROWS = 64  # texts that are written together


class OwnText:
    """Batches of the model's own text, written when they are needed and kept in a file, a JSON line for each text.

    The texts follow from the seed, their number, and how many are decoded at a time, which memory limits. They begin
    like samples of `data`: with the part without labels, or else with the first quarter. All ranks write them together,
    since each has a part of the model, and take their parts of each batch. A run that `resumes` reads the file.
    """

    def __init__(
        self, share: float, temperature: float, data: TrainingData, stop_tokens: list[int], file: Path, resumes: bool
    ) -> None:
        self.share, self.temperature, self.data, self.stop_tokens = share, temperature, data, stop_tokens
        self.file = file
        # A killed run may have left a part of its last group, and of a line.
        lines = file.read_text().split("\n")[:-1] if resumes and is_rank_zero() and file.exists() else []
        lines = lines[: len(lines) // ROWS * ROWS]
        self.texts: list[dict[str, Any]] = from_rank_zero([json.loads(line) for line in lines])
        self._keep(self.texts, "w")
        self.order = torch.randperm(data.num_samples, generator=torch.Generator().manual_seed(data.seed)).tolist()

    def batch(self, number: int, model: LayerSkipDecoder) -> dict[str, torch.Tensor] | None:
        """The own text in place of micro-batch `number` of an epoch; None where the data stays."""
        before, after = int(number * self.share), int((number + 1) * self.share)
        if before == after:
            return None
        mesh = self.data.mesh
        size = self.data.batch_size * mesh.data_size
        while len(self.texts) < (before + 1) * size:
            self._write(model)
        texts = self.texts[before * size : (before + 1) * size][mesh.data_rank :: mesh.data_size]
        width = max(len(text["tokens"]) for text in texts)
        tokens = torch.zeros(len(texts), width, dtype=torch.long)
        labels = torch.full_like(tokens, CROSS_ENTROPY_IGNORE_IDX)
        for row, text in enumerate(texts):
            written = torch.tensor(text["tokens"])
            tokens[row, : len(written)] = written
            labels[row, text["prompt"] : len(written)] = written[text["prompt"] :]
        return {"tokens": tokens, "labels": labels}

    def _write(self, model: LayerSkipDecoder) -> None:
        """Let the model write the next texts, and append them to the file."""
        first = len(self.texts)
        samples = [self.data.dataset[self.order[i % len(self.order)]] for i in range(first, first + ROWS)]
        # Each text has room for as much again as its beginning, also in the model with the shortest context.
        longest = min(max(len(sample["tokens"]) for sample in samples), most_positions(model)[0])
        prompts = [_beginning(sample)[: longest // 2] for sample in samples]
        limit = longest - max(map(len, prompts))
        embeddings = model.tok_embeddings.weight
        rng = torch.Generator(embeddings.device).manual_seed(self.data.seed + first)
        row = row_bytes(model, longest, embeddings.dtype, max(map(len, prompts)))
        rows = min(max(free_memory(embeddings.device) // 2 // row, 1), ROWS)
        if dist.is_initialized():
            # FSDP makes its buffers in the first forward, and training cannot use those of a generation.
            with torch.no_grad():
                model(torch.zeros(1, 1, dtype=torch.long, device=embeddings.device))
        # Without drafts, which save reading weights: a batch of so many rows reads them once for all of its tokens.
        generation = Generation(
            model,
            prompts,
            limit,
            sampler=Sampler(self.temperature, rng=rng),
            stop_tokens=self.stop_tokens,
            rows=from_rank_zero(rows),
            shared=dist.is_initialized(),
        )
        for _ in generation:
            pass
        reshard(model)
        new = [
            {"prompt": len(prompt), "tokens": prompt + written}
            for prompt, written in zip(prompts, generation.generated, strict=True)
        ]
        self._keep(new, "a")
        self.texts += new

    def _keep(self, texts: list[dict[str, Any]], mode: str) -> None:
        """Write texts to the file: "w" in place of what it holds, "a" behind it."""
        if is_rank_zero():
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open(mode) as file:
                file.write("".join(json.dumps(text) + "\n" for text in texts))


def _beginning(sample: dict[str, Any]) -> list[int]:
    """What a text begins with: the sample's tokens without a label at its start, or else its first quarter."""
    tokens, labels = (torch.as_tensor(sample[name]).tolist() for name in ("tokens", "labels"))
    unlabelled = next((i for i, label in enumerate(labels) if label != CROSS_ENTROPY_IGNORE_IDX), 0)
    return tokens[: unlabelled or max(len(tokens) // 4, 1)]
