"""Early-exit loss (paper, eq. 5) against one written in plain PyTorch."""

import weakref

import pytest
import torch
import torch.nn.functional as F
from helpers.tiny import VOCAB, exit_logits, make_tiny, slow_except, unembedded
from helpers.training import paper_weights

from layerskip_recipes import EarlyExitLoss, layerskip_decoder
from layerskip_recipes.model.head import Head

L = 6
# Two computations of the same mathematics, in float64 (fixture float64).
EXACT = {"rtol": 1e-9, "atol": 1e-9}


def batch(rows=3, length=11, padding=True):
    """Tokens [b, s] and shifted labels; each row ends in a different number of ignored labels."""
    text = torch.randint(1, VOCAB, (rows, length + 1), generator=torch.Generator().manual_seed(0))
    tokens, labels = text[:, :-1].clone(), text[:, 1:].clone()
    for row in range(rows if padding else 0):
        labels[row, length - 2 * row :] = -100
        labels[row, : row + 1] = -100  # and a prompt that is not trained on
    return tokens, labels


def plain_loss(model, tokens, labels, weights, label_smoothing=0.0):
    """J of eq. 5 and the loss of every exit, with all logits at once and ordinary autograd."""
    logits = [x.flatten(0, 1) for x in exit_logits(model, tokens)]
    losses = [F.cross_entropy(x, labels.flatten(), ignore_index=-100, label_smoothing=label_smoothing) for x in logits]
    return sum(weight * loss for weight, loss in zip(weights, losses, strict=True)), losses


def gradients(loss, model):
    """{name: gradient or None} of the model's parameters, which are left without."""
    loss.backward()
    result = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    return result


def assert_same_gradients(ours, plain):
    """Each parameter's gradient, within 1e-9 of its largest entry."""
    assert ours.keys() == plain.keys()
    for name, gradient in plain.items():
        assert (ours[name] is None) == (gradient is None), name
        if gradient is not None:
            atol = 1e-9 * gradient.abs().max().item()
            torch.testing.assert_close(ours[name], gradient, rtol=0, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


def check_loss(model, tokens, labels, on=(True,) * L, step=0, **settings):
    """Loss, gradients and the reported exits against plain PyTorch, with the exits that are on by their flags."""
    weights = paper_weights(on, settings.get("scale", 0.2))
    total, per_exit = EarlyExitLoss(**{"curriculum": None} | settings)(model, tokens, labels, step=step, total_steps=9)
    expected, losses = plain_loss(model, tokens, labels, weights, settings.get("label_smoothing", 0.0))
    torch.testing.assert_close(total, expected, **EXACT)
    ours = gradients(total, model)
    assert_same_gradients(ours, gradients(expected, model))
    assert list(per_exit) == [layer + 1 for layer in range(L) if on[layer]]
    for exit_layer, value in per_exit.items():
        assert not value.requires_grad
        torch.testing.assert_close(value, losses[exit_layer - 1].detach(), **EXACT)
    return ours


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("chunks", [{}, {"chunk_tokens": 1}, {"chunk_tokens": 7}], ids=str)
@pytest.mark.parametrize("settings", [{}, {"label_smoothing": 0.1}], ids=str)
@pytest.mark.parametrize("family", slow_except(["llama2", "llama3_2", "qwen2", "gemma", "gemma2"], "llama2", "gemma2"))
def test_loss_and_gradients_are_those_of_plain_autograd(family, settings, chunks):
    """Untied (llama2, qwen2) and tied heads, gemma's norms, 33 tokens in chunks that leave a rest, ignored labels."""
    on = [layer in (1, 3, 4, 5) for layer in range(L)]
    check_loss(layerskip_decoder(make_tiny(family)), *batch(), on, exits="2,4,5", **settings, **chunks)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("family", ["llama2", "llama3_2", "gemma2"])
def test_early_exits_change_only_the_given_rows_of_the_head(family):
    """All else gets the gradient of plain autograd, also the input side of a tied embedding."""
    model, (tokens, labels) = layerskip_decoder(make_tiny(family)), batch()
    rows, weights = (torch.arange(VOCAB) % 3 == 0).double(), paper_weights((True,) * L, 0.2)
    total, _ = EarlyExitLoss(curriculum=None)(model, tokens, labels, step=0, total_steps=9, head_rows=rows)
    ours, plain = gradients(total, model), gradients(plain_loss(model, tokens, labels, weights)[0], model)
    # The early exits' gradient by the head's matrix alone, with their hidden states as constants.
    _, hidden = model.hidden_states(tokens, exits=range(1, L))
    logits = [unembedded(model, hidden[e].detach()).flatten(0, 1) for e in range(1, L)]
    losses = [F.cross_entropy(z, labels.flatten(), ignore_index=-100) for z in logits]
    early = sum(w * loss for w, loss in zip(weights, losses, strict=False))
    name = "output.weight" if family == "llama2" else "tok_embeddings.weight"
    (through_head,) = torch.autograd.grad(early, model.get_parameter(name))
    assert through_head[rows == 0].abs().max() > 1e-4
    plain[name] -= (1 - rows)[:, None] * through_head
    assert_same_gradients(ours, plain)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("step", "on"), [(0, (0, 2, 4, 5)), (1, (1, 3, 5))])
def test_the_curriculum_decides_which_exits_weigh(step, on, tiny):
    """e(0) = 0 in the paper's scale: exit 1 is measured and not trained."""
    on = [layer in on for layer in range(L)]
    check_loss(layerskip_decoder(tiny), *batch(), on, step, scale=0.5, curriculum="rotational", interval=2)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("family", "trained"),
    [("llama2", "q_proj"), ("llama3_2", "q_proj"), ("gemma2", "q_proj"), ("llama2", "output.weight")],
)
def test_frozen_weights_get_no_gradient(family, trained):
    model = layerskip_decoder(make_tiny(family))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained in name)
    outputs = []
    model.register_forward_hook(lambda _, args, out: outputs.append(out))
    ours = check_loss(model, *batch())
    assert {name for name, gradient in ours.items() if gradient is not None} == {n for n in ours if trained in n}
    # FSDP waits for the gradient of the decoder's output before it reduces those of the head.
    assert outputs[0].requires_grad


@pytest.mark.usefixtures("float64")
def test_masks_and_positions_reach_the_model(tiny):
    model = layerskip_decoder(tiny)
    tokens, labels = batch(padding=False)
    documents = torch.block_diag(torch.ones(4, 4), torch.ones(7, 7)).tril().bool().expand(3, -1, -1)
    positions = torch.cat([torch.arange(4), torch.arange(7)]).expand(3, -1)
    inputs = {"mask": documents, "input_pos": positions}
    total, _ = EarlyExitLoss(curriculum=None)(model, tokens, labels, step=0, total_steps=1, **inputs)
    weights = paper_weights([True] * L, 0.2)
    parts = [plain_loss(model, tokens[:, part], labels[:, part], weights)[0] for part in (slice(4), slice(4, 11))]
    torch.testing.assert_close(total, (4 * parts[0] + 7 * parts[1]) / 11, **EXACT)


@pytest.mark.usefixtures("float64")
def test_with_layer_dropout_an_exit_behind_a_dropped_layer_is_trained_through_the_others(tiny):
    """All samples skip the last layer: exits L-1 and L are one hidden state, whose gradients add up."""
    model = layerskip_decoder(tiny, layer_dropout={"prob": 1, "layers_scale": "step"}).train()
    tokens, labels = batch()
    total, per_exit = EarlyExitLoss(curriculum=None)(model, tokens, labels, step=0, total_steps=1)
    assert per_exit[L] == per_exit[L - 1]
    *weights, last = paper_weights([True] * L, 0.2)
    weights[-1] += last
    expected, _ = plain_loss(model, tokens, labels, [*weights, 0])
    torch.testing.assert_close(total, expected, **EXACT)
    ours, plain = gradients(total, model), gradients(expected, model)
    assert not any(ours.pop(name) is not None for name in list(ours) if name.startswith("layers.5."))
    assert_same_gradients(ours, {name: plain[name] for name in ours})


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@pytest.mark.parametrize("family", ["llama2", "llama3_2"])
def test_the_loss_in_bf16_is_near_the_exact_one(family):
    """Plain autograd in bf16 is off by up to 14%, and our sums over chunks and exits may add a fifth to that."""
    model = layerskip_decoder(make_tiny(family).bfloat16())
    exact = make_tiny(family)
    exact.load_state_dict(model.state_dict())  # the same rounded weights
    tokens, labels = batch(rows=4, length=32)
    weights = paper_weights([True] * L, 0.2)
    total, _ = EarlyExitLoss(curriculum=None, chunk_tokens=16)(model, tokens, labels, step=0, total_steps=1)
    expected, _ = plain_loss(exact, tokens, labels, weights)
    assert total.dtype == torch.float32 and total.item() == pytest.approx(expected.item(), rel=2e-3)
    ours, true = gradients(total, model), gradients(expected, exact)
    plain = gradients(plain_loss(model, tokens, labels, weights)[0], model)
    for name in true:
        error, usual = ((g[name].float() - true[name]).norm() for g in (ours, plain))
        assert ours[name].dtype == torch.bfloat16
        assert error < 1.2 * usual < 0.2 * true[name].norm(), name


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@pytest.mark.parametrize("family", ["llama2", "llama3_2"])
def test_the_heads_gradient_in_bf16_is_that_of_any_chunks(family):
    """Three thousand summands that add up in bf16 lose a tenth: the last ones are smaller than what it can add."""
    model = layerskip_decoder(make_tiny(family).bfloat16())
    tokens, labels = batch(rows=4, length=128)
    head = "tok_embeddings.weight" if family == "llama3_2" else "output.weight"

    def gradient(**chunks):
        total, _ = EarlyExitLoss(curriculum=None, **chunks)(model, tokens, labels, step=0, total_steps=1)
        return gradients(total, model)[head].float()

    once, many = gradient(chunk_tokens=4 * 128), gradient(chunk_tokens=1)
    assert (many - once).norm() < 0.01 * once.norm()


def test_a_batch_without_labels_trains_nothing(tiny):
    model = layerskip_decoder(tiny)
    tokens, labels = batch()
    loss, _ = EarlyExitLoss(curriculum=None)(model, tokens, torch.full_like(labels, -100), step=0, total_steps=1)
    assert loss.item() == 0
    assert not any(gradient.any() for gradient in gradients(loss, model).values())


@pytest.mark.parametrize("family", ["llama2", "llama3_2"])
@pytest.mark.parametrize("exits", ["6", ":"], ids=["one exit", "six exits"])
def test_logits_exist_one_chunk_at_a_time(family, exits, monkeypatch):
    """Whatever the exits, the head sees one chunk at a time, and no logits are kept for the backward pass."""
    model = layerskip_decoder(make_tiny(family))
    tokens, labels = batch(rows=4, length=30)
    rows_at_the_head = []
    unembed = Head.unembed
    monkeypatch.setattr(
        Head, "unembed", lambda self, h, out=None: rows_at_the_head.append(len(h)) or unembed(self, h, out)
    )

    class Saved:
        def __init__(self, tensor):
            self.tensor = tensor

    saved = weakref.WeakSet()

    def pack(tensor):
        saved.add(kept := Saved(tensor))
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        loss_fn = EarlyExitLoss(curriculum=None, exits=exits, chunk_tokens=16)
        loss, per_exit = loss_fn(model, tokens, labels, step=0, total_steps=1)
    assert sum(rows_at_the_head) == int((labels != -100).sum()) * len(per_exit)
    assert max(rows_at_the_head) == 16
    alive = [kept.tensor for kept in saved]
    assert len(alive) > 20  # those of the layers
    # The tied head's weight is [v, d]: only what ends in v can be logits.
    assert not [tensor.shape for tensor in alive if tensor.shape[-1:] == (VOCAB,)]
    loss.backward()
