"""Pieces of the loss of a chunk: how the head's gradient adds up, and a loss that cannot be compiled."""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.exc import BackendCompilerFailed
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
    total, a, b = torch.randn(6, 4), torch.randn(6, 9).to(dtype), torch.randn(9, 4).to(dtype)
    expected, on_device = total + a.float() @ b.float(), total.to(device)
    add_product_(on_device, a.to(device), b.to(device))
    rounded = dtype == torch.bfloat16 and (device == "cpu" or not hasattr(torch.ops.aten.addmm, "dtype_out"))
    torch.testing.assert_close(on_device.cpu(), expected, **{"rtol": 2e-2, "atol": 1e-2} if rounded else {})


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


def test_a_loss_that_cannot_be_compiled_is_taken_as_it_is(monkeypatch):
    """One line says so, once."""
    warnings = []

    def fails(*_):
        raise BackendCompilerFailed(fails, RuntimeError("no C compiler\nand more"), None)

    monkeypatch.setattr(torch, "compile", lambda *_, **__: fails)
    monkeypatch.setattr(chunked_loss.log, "warning", lambda message, *args: warnings.append(message % args))
    loss, labels = compiled(token_loss_), torch.tensor([1, 2])
    for _ in range(2):
        logits = torch.eye(2, 5)
        expected = F.cross_entropy(logits, labels, reduction="sum")
        torch.testing.assert_close(loss(logits, labels, torch.tensor(1.0)), expected)
    (warning,) = warnings
    assert "not compiled" in warning and "\n" not in warning
