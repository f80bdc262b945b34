"""StochasticAdamW: small steps move weights in bf16, and a training in bf16 goes as in fp32."""

import functools

import pytest
import torch
from helpers.configs import start_section
from helpers.ranks import train_on_ranks
from helpers.resuming import keep_only
from helpers.training import losses, set_up, texts, train
from torchtune.utils import get_logger

from layerskip_recipes.training import stochastic_adamw
from layerskip_recipes.training.stochastic_adamw import StochasticAdamW, mixed, rounded, update_

OURS = {"_component_": "layerskip_recipes.training.stochastic_adamw.StochasticAdamW", "lr": 1e-3}


def stepped(optimizer, dtype, steps=20, **settings):
    """10,000 weights near 0.02 after some steps of 2e-5, most of which go down."""
    weight = torch.nn.Parameter(torch.full((100, 100), 0.02, dtype=dtype))
    one = optimizer([weight], lr=2e-5, **settings)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        weight.grad = (0.01 * torch.randn(100, 100, generator=generator) + 0.01).to(dtype)
        one.step()
    return weight.detach().float(), one


def test_a_small_step_moves_a_weight_of_bf16():
    """By as much as in fp32 on average; rounding to the nearest undoes it."""
    start = torch.tensor(0.02).bfloat16().float()
    expected, _ = stepped(torch.optim.AdamW, torch.float32)
    rounded, _ = stepped(torch.optim.AdamW, torch.bfloat16)
    ours, one = stepped(StochasticAdamW, torch.bfloat16)
    assert torch.equal(rounded, torch.full_like(rounded, start))
    moved = (expected - 0.02).mean()
    assert (ours - start).mean() == pytest.approx(moved.item(), rel=0.03) and moved < -2e-4
    (state,) = one.state.values()
    assert state["exp_avg"].dtype is state["exp_avg_sq"].dtype is torch.bfloat16


def test_weights_of_fp32_get_plain_adamw(monkeypatch):
    monkeypatch.setattr(stochastic_adamw, "CPU_SLICE", 3000)
    settings = {"betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.3}
    expected, _ = stepped(torch.optim.AdamW, torch.float32, **settings)
    ours, _ = stepped(StochasticAdamW, torch.float32, **settings)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-8)


def test_a_transposed_weight_is_refused_and_not_left_as_it_is():
    weight = torch.nn.Parameter(torch.zeros(3, 4).t())
    weight.grad = torch.ones(4, 3)
    with pytest.raises(RuntimeError, match="view"):
        StochasticAdamW([weight]).step()


def test_rounding_has_no_bias():
    """Of values of both signs; numbers of bf16 stay as they are."""
    values = torch.tensor([0.02001, -0.02003, 1.001, -3e-5, 0.0, 1.5]).repeat(40_000, 1)
    target = rounded(values, mixed(torch.arange(values.numel())).view_as(values) & 0xFFFF)
    torch.testing.assert_close(target.float().mean(0), values[0], rtol=1e-4, atol=0)
    assert (target[:, 4] == 0).all() and (target[:, 5] == 1.5).all()
    assert len(target[:, 0].unique()) == 2


def test_each_average_has_noise_of_its_own():
    """The three numbers of a weight are rounded by different bits, and so are neighbours and other steps."""
    drawn = []

    def keep(value, noise):
        drawn.append(noise)
        return rounded(value, noise)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stochastic_adamw, "rounded", keep)
        for step in (1, 2):
            tensors = [torch.ones(50_000, dtype=torch.bfloat16) for _ in range(4)]
            update_(*tensors, torch.ones(6, dtype=torch.float64), torch.tensor([step, 3]), 7)
    noise = torch.stack(drawn).double()
    assert noise.min() >= 0 and noise.max() < 2**16
    torch.testing.assert_close(noise.mean(1), torch.full((6,), 2**15 - 0.5, dtype=torch.float64), rtol=0.02, atol=0)
    correlation = torch.corrcoef(torch.cat([noise[:, 1:], noise[:1, :-1]])) - torch.eye(7)
    assert correlation.abs().max() < 0.03


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_compiled_step_is_the_step(dtype):
    """One graph for weights of all sizes, and the same for a slice as for the whole."""
    torch.manual_seed(2)
    compiled = torch.compile(update_, backend="aot_eager", dynamic=True)
    keys, factors = torch.tensor([5, 3]), torch.tensor([0.1, 0.05, 0.3, 1e-8, 0.99, 1e-3], dtype=torch.float64)
    for size in (30, 1000):
        tensors = [torch.rand(size).to(dtype) for _ in range(4)]
        whole, sliced, fast = ([tensor.clone() for tensor in tensors] for _ in range(3))
        update_(*whole, factors, keys, 0)
        for part in (slice(0, 17), slice(17, size)):
            update_(*(tensor[part] for tensor in sliced), factors, keys, part.start)
        compiled(*fast, factors, keys, 0)
        for found in (sliced, fast):
            assert all(torch.equal(a, b) for a, b in zip(found, whole, strict=True))
    weight, mean, square, grad = (tensor.double() for tensor in tensors)
    m, v = mean + 0.1 * (grad - mean), square + 0.05 * (grad**2 - square)
    expected = weight * 0.99 - 1e-3 * m / ((v / 0.3).sqrt() + 1e-8)
    tolerance = {"rtol": 2**-7, "atol": 0} if dtype is torch.bfloat16 else {}
    for found, value in zip(whole, (expected, m, v), strict=False):
        torch.testing.assert_close(found.double(), value, **(tolerance or {"rtol": 1e-6, "atol": 1e-7}))


@pytest.fixture
def configured(finetune, checkpoint, tmp_path):
    """A start with weights as a trained model has them; steps move them by less than half of bf16's distance."""
    settings = {"dataset": texts(tmp_path), "epochs": 2, "layer_dropout": None, "clip_grad_norm": 1.0}
    return functools.partial(finetune, checkpointer=start_section(checkpoint), **settings)


def test_optimizers_of_single_weights_draw_other_noise():
    weights = [torch.full((4096,), 0.02, dtype=torch.bfloat16).requires_grad_() for _ in range(2)]
    for number, weight in enumerate(weights):
        weight.grad = torch.ones_like(weight)
        optimizer = StochasticAdamW([weight], lr=2e-5)
        optimizer.first = number
        optimizer.step()
    assert not torch.equal(*weights)


@pytest.mark.slow
def test_steps_that_rounding_would_lose_are_told(configured, caplog):
    with caplog.at_level("WARNING", logger=get_logger().name):
        set_up(configured(optimizer={"_component_": "torch.optim.AdamW", "lr": 2e-5}, dtype="bf16")).cleanup()
        set_up(configured(optimizer=OURS | {"lr": 2e-5}, dtype="bf16")).cleanup()
        eight_bits = {"_component_": "torchao.optim.AdamW8bit", "lr": 2e-5}
        set_up(configured(optimizer=eight_bits, dtype="bf16")).cleanup()
        set_up(configured(optimizer=eight_bits | {"bf16_stochastic_round": True}, dtype="bf16")).cleanup()
    told = [message for message in caplog.messages if "loses most of its steps" in message]
    assert [message.rpartition("optimizer.")[2] for message in told] == [
        f"_component_={OURS['_component_']}",
        "bf16_stochastic_round=true",
    ]


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_train_as_one_and_resume(tmp_path, configured):
    """Sharded, clipped and resumed from shards; the noise is another one, and losses differ by less than a percent."""
    shards = {"save_every_n_steps": 2, "enable_async_checkpointing": True}
    path = configured(optimizer=OURS, dtype="bf16", max_steps_per_epoch=4, **shards)
    train(path, "batch_size=4", f"output_dir={tmp_path}/one")
    train_on_ranks(path, "batch_size=2", f"output_dir={tmp_path}/two")
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert [two[step]["loss"] for step in two] == pytest.approx([one[step]["loss"] for step in one], rel=0.01)
    again = keep_only(tmp_path / "two", "step_6", tmp_path / "again")
    train_on_ranks(path, "batch_size=2", f"output_dir={again}", "resume_from_checkpoint=true")
    assert losses(again) == {step: two[step] for step in (7, 8)}
