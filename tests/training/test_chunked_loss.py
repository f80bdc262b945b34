"""Pieces of the loss of a chunk: how the head's gradient adds up, and a loss that cannot be compiled."""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.exc import TorchDynamoException

from layerskip_recipes.training import compiled as compiling
from layerskip_recipes.training.chunked_loss import add_product_, cross_entropy_, token_loss_
from layerskip_recipes.training.compiled import compiled

GPU = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
)


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_product_is_added_to_a_sum_in_fp32(dtype, device):
    total, a, b = 1000 + torch.randn(6, 4), torch.randn(6, 9).to(dtype), torch.randn(9, 4).to(dtype)
    expected, on_device = total + a.float() @ b.float(), total.to(device)
    add_product_(on_device, a.to(device), b.to(device))
    rounded = dtype == torch.bfloat16 and (device == "cpu" or torch.__version__ < "2.10")
    torch.testing.assert_close(on_device.cpu(), expected, **{"rtol": 0, "atol": 0.05} if rounded else {})


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("size", [1.0, 300.0], ids=["usual", "large"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
def test_a_loss_of_labels_puts_its_gradient_into_the_logits(size, label_smoothing, dtype, tolerance, compiled):
    """Against autograd; logits whose exponential is no fp32 number."""
    loss = torch.compile(cross_entropy_, backend="eager") if compiled else cross_entropy_
    generator = torch.Generator().manual_seed(0)
    logits = (size * torch.randn(20, 97, generator=generator, dtype=dtype)).requires_grad_()
    labels = torch.randint(97, (20,), generator=generator)
    expected = F.cross_entropy(logits, labels, label_smoothing=label_smoothing, reduction="sum")
    (gradient,) = torch.autograd.grad(0.25 * expected, logits)
    ours = logits.detach().clone()
    total = loss(ours, labels, 0.25, label_smoothing=label_smoothing)
    torch.testing.assert_close(total, expected.detach(), rtol=tolerance, atol=tolerance)
    # Entries of a gradient are 0.25 at most; those of the large logits are sums of exponentials near 0.
    torch.testing.assert_close(ours, gradient, rtol=0, atol=tolerance)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_loss_of_a_teacher_puts_its_gradient_into_the_logits(compiled):
    torch.manual_seed(4)
    logits, teacher = torch.randn(2, 6, 50, dtype=torch.float64)
    exact = logits.clone().requires_grad_()
    expected = F.kl_div(exact.log_softmax(-1), teacher.log_softmax(-1), reduction="sum", log_target=True)
    (gradient,) = torch.autograd.grad(0.25 * expected, exact)
    loss = torch.compile(token_loss_, backend="aot_eager") if compiled else token_loss_
    torch.testing.assert_close(loss(logits, teacher, torch.tensor(0.25)), expected.detach())
    torch.testing.assert_close(logits, gradient)


def test_only_the_number_of_tokens_is_unknown_to_a_compiled_loss(monkeypatch):
    """With an unknown vocabulary size a GPU would read logits one by one. All numbers of tokens share a graph."""
    torch._dynamo.reset()  # it remembers the vocabulary sizes of other tests
    compile, shapes = torch.compile, []

    def backend(graph, _):
        values = [node.meta["example_value"] for node in graph.graph.nodes if node.op == "placeholder"]
        shapes.append([tuple(value.shape) for value in values if isinstance(value, torch.Tensor)])
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda function: compile(function, backend=backend))
    loss, buffer = compiled(token_loss_, "the loss", num_dynamic=2), torch.randn(8, 5)
    for count in (8, 6, 3):
        expected = token_loss_(buffer[:count].clone(), torch.arange(count) % 5, torch.tensor(0.5))
        found = loss(buffer.clone()[:count], torch.arange(count) % 5, torch.tensor(0.5))
        torch.testing.assert_close(found, expected)
    (graph,) = shapes
    logits, labels = (next(shape for shape in graph if len(shape) == dim) for dim in (2, 1))
    assert isinstance(logits[0], torch.SymInt) and isinstance(labels[0], torch.SymInt) and type(logits[1]) is int


def test_a_loss_that_cannot_be_compiled_is_taken_as_it_is(monkeypatch):
    warnings = []

    def fails(*_):
        raise TorchDynamoException("no C compiler\nand more")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: fails)
    monkeypatch.setattr(compiling.log, "warning", lambda message, *args: warnings.append(message % args))
    loss, labels = compiled(token_loss_, "the loss", num_dynamic=2), torch.tensor([1, 2])
    for _ in range(2):
        logits, exact = torch.eye(2, 5), torch.eye(2, 5, requires_grad=True)
        expected = F.cross_entropy(exact, labels, reduction="sum")
        torch.testing.assert_close(loss(logits, labels, torch.tensor(1.0)), expected.detach())
        torch.testing.assert_close(logits, *torch.autograd.grad(expected, exact))
    (warning,) = warnings
    assert "could not be compiled" in warning and "\n" not in warning
