"""OwnText: text by the model itself, in place of a part of a draft's training batches.

Acceptance is measured on the model's own text, which differs from its training data.
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
from layerskip_recipes.training.draft.loss import DraftSection
from layerskip_recipes.training.parallel import reshard

GROUP = 64  # texts that are generated together


class OwnText:
    """Batches of the model's own text, generated on demand and kept in a file with one JSON line per text.

    A text continues the unlabelled beginning of a sample, or else its first quarter. It depends on the seed, the text's
    number, and how many texts are decoded at a time (as many as memory allows). All ranks generate every text together,
    since each holds a part of the model, and take their share of each batch. A resumed run reads the file.
    """

    def __init__(
        self, section: DraftSection, data: TrainingData, stop_tokens: list[int], output_dir: Path, resumes: bool
    ) -> None:
        self.share, self.temperature = section.own_text, section.own_text_temperature
        self.data, self.stop_tokens, self.file = data, stop_tokens, output_dir / "own_text.jsonl"
        # A killed run may have written only a part of its last group or line.
        lines = self.file.read_text().split("\n")[:-1] if resumes and is_rank_zero() and self.file.exists() else []
        lines = lines[: len(lines) // GROUP * GROUP]
        self.texts: list[dict[str, Any]] = from_rank_zero([json.loads(line) for line in lines])
        self._keep(self.texts, "w")
        self.order = torch.randperm(data.num_samples, generator=torch.Generator().manual_seed(data.seed)).tolist()

    def batch(self, number: int, model: LayerSkipDecoder) -> dict[str, torch.Tensor] | None:
        """The own text that replaces micro-batch `number` of an epoch, or None to keep the data."""
        index = int(number * self.share)
        if index == int((number + 1) * self.share):
            return None
        mesh = self.data.mesh
        size = self.data.batch_size * mesh.data_size
        while len(self.texts) < (index + 1) * size:
            self._generate_group(model)
        texts = self.texts[index * size : (index + 1) * size][mesh.data_rank :: mesh.data_size]
        width = max(len(text["tokens"]) for text in texts)
        tokens = torch.zeros(len(texts), width, dtype=torch.long)
        labels = torch.full_like(tokens, CROSS_ENTROPY_IGNORE_IDX)
        for row, text in enumerate(texts):
            written = torch.tensor(text["tokens"])
            tokens[row, : len(written)] = written
            labels[row, text["prompt"] : len(written)] = written[text["prompt"] :]
        return {"tokens": tokens, "labels": labels}

    def _generate_group(self, model: LayerSkipDecoder) -> None:
        """Generate the next texts, and append them to the file."""
        # Each text has as much room for new tokens as for its beginning, within the model's context length.
        first = len(self.texts)
        samples = [self.data.dataset[self.order[i % len(self.order)]] for i in range(first, first + GROUP)]
        longest = min(max(len(sample["tokens"]) for sample in samples), most_positions(model)[0])
        prompts = [_beginning(sample)[: longest // 2] for sample in samples]
        limit = longest - max(map(len, prompts))
        # As many rows at a time as fit into half of the free memory.
        embeddings = model.tok_embeddings.weight
        rng = torch.Generator(embeddings.device).manual_seed(self.data.seed + first)
        row = row_bytes(model, longest, embeddings.dtype, max(map(len, prompts)))
        num_rows = min(max(free_memory(embeddings.device) // 2 // row, 1), GROUP)
        if dist.is_initialized():
            # FSDP creates its buffers in the first forward pass. Training cannot use buffers made in inference mode.
            with torch.no_grad():
                model(torch.zeros(1, 1, dtype=torch.long, device=embeddings.device))
        # Autoregressive: a large batch already reads the weights once for many tokens, which is what drafting saves.
        generation = Generation(
            model,
            prompts,
            limit,
            sampler=Sampler(self.temperature, rng=rng),
            stop_tokens=self.stop_tokens,
            rows=from_rank_zero(num_rows),
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
        """Write texts to the file; mode "w" replaces its content, "a" appends."""
        if is_rank_zero():
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open(mode) as file:
                file.write("".join(json.dumps(text) + "\n" for text in texts))


def _beginning(sample: dict[str, Any]) -> list[int]:
    """The sample's unlabelled beginning, or else its first quarter."""
    tokens, labels = (torch.as_tensor(sample[name]).tolist() for name in ("tokens", "labels"))
    unlabelled = next((i for i, label in enumerate(labels) if label != CROSS_ENTROPY_IGNORE_IDX), 0)
    return tokens[: unlabelled or max(len(tokens) // 4, 1)]
