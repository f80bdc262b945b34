"""Pieces of the loss of a chunk: how the head's gradient adds up, and a loss that cannot be compiled."""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.exc import TorchDynamoException
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from layerskip_recipes.training import chunked_loss
from layerskip_recipes.training.chunked_loss import add_product_, compiled, token_loss_

GPU = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
)


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_product_is_added_to_a_sum_in_fp32(dtype, device):
    total, a, b = 1000 + torch.randn(6, 4), torch.randn(6, 9).to(dtype), torch.randn(9, 4).to(dtype)
    expected, on_device = total + a.float() @ b.float(), total.to(device)
    add_product_(on_device, a.to(device), b.to(device))
    rounded = dtype == torch.bfloat16 and (device == "cpu" or not hasattr(torch.ops.aten.addmm, "dtype_out"))
    torch.testing.assert_close(on_device.cpu(), expected, **{"rtol": 0, "atol": 0.05} if rounded else {})


@pytest.mark.skipif(not hasattr(torch.ops.aten.addmm, "dtype_out"), reason="torch before 2.8")
def test_a_gpu_adds_a_product_in_one_pass():
    """Of tensors without memory: one operation, which writes where the sum is."""

    class Operations(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            if operation is torch.ops.prim.device.default:
                return operation(*args)
            called.append((operation, args[3], kwargs["out"] is args[0]))
            return args[0]

    called = []
    with FakeTensorMode():
        a, b = (torch.empty(shape, device="cuda", dtype=torch.bfloat16) for shape in ((6, 9), (9, 4)))
        total = torch.empty(6, 4, device="cuda")
        with Operations():
            add_product_(total, a, b)
    assert called == [(torch.ops.aten.addmm.dtype_out, torch.float32, True)]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    ("kind", "mixed"),
    [("divergence", None), ("overlap", None), ("overlap", "teacher"), ("overlap", "labels")],
)
def test_the_gradient_of_a_teachers_loss_takes_the_place_of_the_logits(kind, mixed, compiled):
    """Against autograd, with the teacher's loss alone and added to another."""
    torch.manual_seed(4)
    logits, teacher = torch.randn(2, 6, 50, dtype=torch.float64)
    labels = torch.randint(50, (6,))
    exact = logits.clone().requires_grad_()
    divergence = F.kl_div(exact.log_softmax(-1), teacher.log_softmax(-1), reduction="sum", log_target=True)
    expected, target = divergence, teacher
    if kind == "overlap":
        target = (teacher, {"teacher": teacher, "labels": labels, None: None}[mixed])
        beside = {"teacher": divergence, "labels": F.cross_entropy(exact, labels, reduction="sum"), None: 0}[mixed]
        expected = (1 - torch.minimum(teacher.softmax(-1), exact.softmax(-1)).sum(-1)).sum() + beside
    (gradient,) = torch.autograd.grad(0.25 * expected, exact)
    loss = torch.compile(token_loss_, backend="aot_eager") if compiled else token_loss_
    torch.testing.assert_close(loss(logits, target, torch.tensor(0.25)), expected.detach())
    torch.testing.assert_close(logits, gradient)


def test_a_loss_that_cannot_be_compiled_is_taken_as_it_is(monkeypatch):
    """One line says so, once."""
    warnings = []

    def fails(*_):
        raise TorchDynamoException("no C compiler\nand more")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: fails)
    monkeypatch.setattr(chunked_loss.log, "warning", lambda message, *args: warnings.append(message % args))
    loss, labels = compiled(token_loss_), torch.tensor([1, 2])
    for _ in range(2):
        logits, exact = torch.eye(2, 5), torch.eye(2, 5, requires_grad=True)
        expected = F.cross_entropy(exact, labels, reduction="sum")
        torch.testing.assert_close(loss(logits, labels, torch.tensor(1.0)), expected.detach())
        torch.testing.assert_close(logits, *torch.autograd.grad(expected, exact))
    (warning,) = warnings
    assert "could not be compiled" in warning and "\n" not in warning
