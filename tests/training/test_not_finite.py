"""A loss or a gradient that is not finite stops the run before the weights change, and names step and samples."""

import math
import re

import pytest
import torch
from helpers.configs import start_section
from helpers.resuming import COSINE, checkpoints, final_weights
from helpers.training import losses, read_log, set_up, train

from layerskip_recipes.errors import ConfigError
from layerskip_recipes.training.early_exit import EarlyExitLoss
from layerskip_recipes.training.recipe import LayerSkipFinetune

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("in_backward", [False, True])
def test_a_passing_fault_is_forgotten_on_resume(in_backward, checkpoint, tmp_path, finetune, monkeypatch):
    """A loss that is infinite once, in the second epoch: resumed, the run is the one that never had it."""
    accumulation = {} if in_backward else {"gradient_accumulation_steps": 2, "batch_size": 1}
    path = finetune(
        checkpointer=start_section(checkpoint), epochs=2, max_steps_per_epoch=3, save_every_n_steps=1,
        optimizer_in_bwd=in_backward, lr_scheduler=COSINE, layer_dropout={"prob": 0.5}, **accumulation,
    )  # fmt: skip
    train(path, f"output_dir={tmp_path}/whole")
    whole, sound = losses(tmp_path / "whole"), EarlyExitLoss.__call__

    def faulty(self, *args, step, **kwargs):
        loss, exits = sound(self, *args, step=step, **kwargs)
        return (loss * math.inf if step == 4 else loss), exits

    monkeypatch.setattr(EarlyExitLoss, "__call__", faulty)
    named = torch.randperm(8, generator=torch.Generator().manual_seed(0 + 1)).tolist()[2:4]  # seed + epoch
    with pytest.raises(ConfigError) as error:
        train(path)
    message, out = str(error.value), tmp_path / "out"
    assert message.startswith(f"loss: not finite at step 5, with samples {named} of the dataset.")
    assert f"The last whole checkpoint is {out / 'step_4'}; go on from it with resume_from_checkpoint=true" in message
    assert checkpoints(out)[-1] == "step_4" and sorted(read_log(out)) == [1, 2, 3, 4]
    monkeypatch.undo()
    train(path, "resume_from_checkpoint=true")
    assert losses(out) == whole


@pytest.mark.parametrize("part", ["norm.scale", "layers.2.mlp.w3.weight", None])
def test_a_loss_that_is_not_finite_names_a_smaller_learning_rate(part, checkpoint, tmp_path, finetune):
    """The next step says it. The rate to try is half of the config's, not of the schedule's, which is 0 at first."""
    settings = {"checkpointer": start_section(checkpoint), "shuffle": False, "layer_dropout": None}
    path = finetune(**settings, lr_scheduler=COSINE if part else None)
    if part:
        recipe = set_up(path, "optimizer.lr=1e-3")
        recipe.model.get_parameter(part).data.flatten()[3] = math.nan
        message = r"^loss: not finite at step 1, with samples \[0, 1\] of the dataset.*optimizer.lr=0.0005"
    else:
        recipe = set_up(path, "optimizer.lr=1e18")
        message = r"^loss: not finite at step 2, with samples \[2, 3\].*lr=5e\+17"
    with pytest.raises(ConfigError, match=message) as error:
        recipe.train()
    assert "There is no checkpoint under" in str(error.value) and "resume_from" not in str(error.value)
    assert not checkpoints(tmp_path / "out")


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ("clip_grad_norm=1.0", "gradient norm: not finite at step 2, with samples [2, 3] of the dataset"),
        ("clip_grad_norm=null", "gradient norm: not finite at step 2, with samples [2, 3] of the dataset"),
        ("optimizer_in_bwd=true", "weights: not finite at step 2. Try a smaller learning rate"),
    ],
)
def test_a_gradient_that_is_not_finite_is_refused(settings, what, checkpoint, tmp_path, finetune, monkeypatch):
    """Named with its own step, before a checkpoint has it; the run goes on from there. With an optimizer in backward,
    the weights may have it."""
    path = finetune(
        checkpointer=start_section(checkpoint), shuffle=False, layer_dropout=None, max_steps_per_epoch=4,
        save_every_n_steps=1,
    )  # fmt: skip
    sound = LayerSkipFinetune._train_step

    def faulty(self, batches):
        """The gradient of one number is infinite in the second step; the loss is not."""
        parameter = self.model.layers[1].mlp.w1.weight
        hook = parameter.register_hook(lambda grad: grad * (math.inf if self.step == 1 else 1))
        try:
            return sound(self, batches)
        finally:
            hook.remove()

    monkeypatch.setattr(LayerSkipFinetune, "_train_step", faulty)
    with pytest.raises(ConfigError, match=f"^{re.escape(what)}"):
        train(path, settings)
    assert checkpoints(tmp_path / "out") == ["step_1"]
    monkeypatch.undo()
    assert train(path, settings, "resume_from_checkpoint=true").step == 4
    assert all(value.isfinite().all() for value in final_weights(tmp_path / "out" / "epoch_0").values())
