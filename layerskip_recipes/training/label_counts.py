"""LabelCounts: how often each token was a label. Early exits train only these rows of the head, unless
`early_exit_loss.label_rows_only` is false."""

import torch

from layerskip_recipes.training.parallel import Mesh


class LabelCounts:
    """Counts of label tokens since the first step, over all processes."""

    def __init__(self, mesh: Mesh, device: torch.device, num_tokens: int) -> None:
        self.mesh = mesh
        # Counts are exact below 2^53. mps has no float64.
        exact = torch.float64 if device.type != "mps" else torch.float32
        self.local_counts = torch.zeros(num_tokens, dtype=exact, device=device)  # in this process

    def see(self, label_tokens: torch.Tensor) -> None:
        """Count the labels of a micro-batch, [n], on the device."""
        self.local_counts.index_add_(0, label_tokens, self.local_counts.new_ones(1).expand(len(label_tokens)))

    def head_rows(self) -> torch.Tensor:
        """[v], 1 for each token that was a label in an earlier step, else 0. Collective.

        Early exits change only these rows of the head. At first an exit gives some probability to every token, and Adam
        would move the embeddings of tokens that the data does not have as fast as the others.
        """
        return (self._counts() > 0).float()

    def vocabulary(self, most: int) -> list[int]:
        """At most `most` label tokens, the most frequent first. Collective."""
        counts, tokens = self.state_dict()["label_counts"].sort(descending=True, stable=True)
        return tokens[counts > 0][:most].tolist()

    def _counts(self) -> torch.Tensor:
        """[v], on the device. Collective."""
        return self.mesh.sum(self.local_counts.clone())

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The counts. Collective."""
        return {"label_counts": self._counts().cpu().round().long()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Count what all processes had counted before the resume, in one of them."""
        if self.mesh.data_rank == 0:
            self.local_counts.copy_(state["label_counts"])
