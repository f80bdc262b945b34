"""What a round drafts: a chain or a tree from an exit, a chain that stops by its confidence, or tokens of the text."""

from collections.abc import Callable, Sequence

import torch

from layerskip_recipes.generation.drafting.choice import Arm
from layerskip_recipes.generation.drafting.lookup import LookUp
from layerskip_recipes.generation.drafting.speculation import Speculation
from layerskip_recipes.generation.runner import Runner
from layerskip_recipes.generation.steps import Draft, Steps
from layerskip_recipes.generation.timing import Stopwatch
from layerskip_recipes.model.decoder import on_device


class Drafting:
    """The drafts of one generation.

    Args:
        runner: of its steps.
        speculation: how to draft.
        prompts: of each row, in which drafts are looked up.
        agree: makes what a round chose the same on all processes.
        watch: times draft steps.
    """

    def __init__(
        self,
        runner: Runner,
        speculation: Speculation,
        prompts: Sequence[Sequence[int]],
        agree: Callable[[torch.Tensor], torch.Tensor],
        watch: Stopwatch,
    ) -> None:
        self.runner, self.speculation, self.policy = runner, speculation, speculation.policy
        self.agree, self.watch = agree, watch
        self.texts: list[LookUp] = []
        if speculation.prompt_lookup is not None:
            self.texts = [LookUp(speculation.prompt_lookup) for _ in prompts]
            self.extend(prompts)

    def extend(self, tokens: Sequence[Sequence[int]]) -> None:
        """More text of each row."""
        if self.texts:
            for text, new in zip(self.texts, tokens, strict=True):
                text.extend(new)

    def look_up(self, finished: Sequence[bool]) -> tuple[torch.Tensor | None, int | None]:
        """[b, n] drafts from the text and the worst match of a row; None unless every row that still runs has one."""
        if not self.texts:
            return None, None
        n = self.speculation.num_speculations
        found = [None if done else text.find(n) for text, done in zip(self.texts, finished, strict=True)]
        if not all(row is None or row[0] for row in found):
            return None, None
        drafts = [[0] * n if row is None else row[0] for row in found]
        return on_device(drafts, self.runner.device), min(row[1] for row in found if row is not None)

    def whole(
        self, steps: Steps, last: torch.Tensor, start: torch.Tensor, slots: torch.Tensor, seen: torch.Tensor | None
    ) -> Draft:
        """As many tokens as the steps have."""
        name = "draft_chain" if steps.tree.is_chain else "draft_tree"
        noise = self.runner.noise(len(steps.tree.expanded), draft=True)
        return self.runner.run(steps, name, slots, last, start, slots, noise, seen)

    def stopping(
        self,
        steps: Steps,
        arm: Arm,
        last: torch.Tensor,
        start: torch.Tensor,
        slots: torch.Tensor,
        seen: torch.Tensor | None,
        finished: Sequence[bool],
    ) -> tuple[Draft, list[list[float]]]:
        """A chain that stops by its confidences, and these, [b][n]; where it may stop, the host waits for them."""
        runner, length = self.runner, self.policy.lengths[arm.exit_layer]
        tokens, hidden, q, confidences = [last], [], [], [[] for _ in finished]
        unread, started = [], self.watch.start()
        for i in range(steps.tree.depth):
            noise = runner.noise(draft=True)
            token, x, probs, sure, seen = runner.run(
                steps, "draft_one", slots, tokens[-1], start + i, slots, noise, seen, True
            )
            if runner.device.type == "cuda" and runner.compiled:
                token, x, sure = token.clone(), x.clone(), sure.clone()
                probs, seen = (None if t is None else t.clone() for t in (probs, seen))
            tokens.append(token)
            hidden.append(x)
            q.append(probs)
            unread.append(sure)
            # Each number of drafts that is verified needs a compiled graph: some are enough.
            may_stop = runner.compiled is None or (i + 1) & i == 0
            if not may_stop and i + 1 < steps.tree.depth:
                continue
            for row, values in zip(confidences, self.agree(torch.stack(unread, 1)).tolist(), strict=True):
                row += values
            if seconds := self.watch.since(started):
                length.timed(seconds / len(unread))
            of_running = [row for row, done in zip(confidences, finished, strict=True) if not done]
            if may_stop and not length.go_on(of_running, self.policy.rate(arm)):
                break
            unread, started = [], self.watch.start()
        q = None if q[0] is None else torch.stack(q, 1)
        return Draft(torch.stack(tokens, 1), torch.cat(hidden, 1), q), confidences
