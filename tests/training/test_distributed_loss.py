"""The early-exit loss on two ranks: gradients by plain PyTorch, where ranks drop other samples; what is gathered."""

import json

import pytest
import torch
import torch.nn.functional as F
from helpers import training_ranks
from helpers.ranks import check_success, run_on_ranks
from helpers.tiny import unembedded
from helpers.training import paper_weights
from helpers.training_ranks import COUNTED, DRAWS, DROPPED, PROB, some_tokens, tiny_model

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def dropped(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dropped")
    check_success(run_on_ranks(training_ranks.__file__, "dropped", folder, cwd=folder))
    return torch.load(folder / "dropped.pt")


@pytest.fixture(scope="module")
def counts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("counts")
    check_success(run_on_ranks(training_ranks.__file__, "counts", folder, cwd=folder))
    return folder


def exit_sums(model, tokens, keep):
    """Of one sample: the summed cross-entropy of each exit, x_{l+1} = x_l + r M_l f_l(x_l) with keep[l] = r M_l."""
    h, sums = model.tok_embeddings(tokens[None]), []
    for layer, stays in zip(model.layers, keep, strict=True):
        h = h + float(stays) * (layer(h) - h)
        sums.append(F.cross_entropy(unembedded(model, h)[0][:-1], tokens[1:], reduction="sum"))
    return torch.stack(sums)


def same_gradients(model, found):
    """model has gradients where a layer ran on any rank."""
    for name, p in model.named_parameters():
        expected = torch.zeros_like(p) if p.grad is None else p.grad
        actual = torch.zeros_like(p) if found[name] is None else found[name]
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("name", DROPPED)
def test_layers_that_some_samples_skip_or_all(dropped, name):
    lora, _ = DROPPED[name]
    # e~ of eq. 6 for all exits, rounded to fp32 as in the loss.
    weights, seen = torch.tensor(paper_weights([True] * 6, scale=0.5)).double(), set()
    for seed in range(DRAWS):
        model = tiny_model("llama3", lora).double()
        keep = torch.rand(6, 3, generator=torch.Generator().manual_seed(seed)) >= PROB
        factor = 1 / (1 - PROB) if seed % 2 == 1 else 1.0  # every second draw is inverted
        loss = 0
        for tokens in some_tokens():
            sums = sum(exit_sums(model, tokens[row], factor * keep[:, row]) for row in range(3))
            loss = loss + (weights * sums).sum() / (3 * (tokens.shape[1] - 1)) / 2
        loss.backward()
        seen |= set(keep.sum(1).tolist())
        mean, found = dropped[name, seed]
        torch.testing.assert_close(mean, loss.detach(), atol=1e-5, rtol=1e-5)
        same_gradients(model, found)
    assert seen >= {0, 1, 2}  # samples that stay in a layer


def test_the_head_is_gathered_once_for_all_exits_and_chunks(counts):
    counts = json.loads((counts / "counts.json").read_text())
    assert set(counts) == {
        f"{name}: {how}"
        for name in COUNTED
        for how in ("2 exits, chunks of 512", "6 exits, chunks of 512", "6 exits, chunks of 3")
    }
    for key, (forward, _) in counts.items():
        assert forward == COUNTED[key.split(":")[0]][2]
    for name in COUNTED:
        backward = {counted[1] for key, counted in counts.items() if key.startswith(f"{name}:")}
        assert len(backward) == 1 and (backward == {0}) == (name == "untied, kept")


def test_a_checkpoint_of_adapters_alone_gathers_nothing_else(counts):
    """A and B of q, v and three matrices of the MLP in each of 6 layers, as rank 0 alone had them."""
    gathered, written = torch.load(counts / "adapters.pt")
    start = tiny_model("llama3", lora=True).state_dict()
    expected = {name: value for name, value in start.items() if "lora" in name}
    assert gathered == len(expected) == 2 * 5 * 6
    assert set(written) == {"adapter", "adapter_config", "scaled biases"} and set(written["adapter"]) == set(expected)
    assert all(torch.equal(written["adapter"][name], value) for name, value in expected.items())
