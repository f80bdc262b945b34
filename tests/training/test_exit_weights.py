"""Which exits the early-exit loss has on, and what they weigh: equation 6 and the curricula of the paper."""

import math

import pytest
import torch
from helpers.training import paper_weights

from layerskip_recipes.training.early_exit import enabled_exits, exit_weights

L = 6


# ---- weights ----


def test_weights_of_32_layers_are_those_that_the_paper_prints():
    """L = 32, e_scale = 0.2: exits 7, 15, 23, 31 weigh .027 .115 .264 .594; of all 32 the last weighs .111."""
    four = exit_weights(32, [layer in (7, 15, 23, 31) for layer in range(32)], 0.2)
    assert [round(w, 3) for w in four[[7, 15, 23, 31]].tolist()] == [0.027, 0.115, 0.264, 0.594]
    assert four.count_nonzero() == 4
    assert round(exit_weights(32, [True] * 32, 0.2)[-1].item(), 3) == 0.111


@pytest.mark.parametrize("scale", [0.0, 0.1, 1.0, 3])
@pytest.mark.parametrize("num_layers", [2, 6, 40])
def test_weights_are_eq_6(num_layers, scale):
    on = [layer % 3 != 1 or layer == num_layers - 1 for layer in range(num_layers)]
    weights = exit_weights(num_layers, on, scale)
    torch.testing.assert_close(weights, torch.tensor(paper_weights(on, scale)))
    assert weights.sum().item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("num_layers", [1, 6])
@pytest.mark.parametrize("scale_fn", ["layerskip", "uniform", "linear", "sqrt", "inverse", "inverse_sqrt"])
def test_alone_or_with_scale_0_the_last_exit_has_all_the_weight(scale_fn, num_layers):
    only_last = [0.0] * (num_layers - 1) + [1.0]
    assert exit_weights(num_layers, [True] * num_layers, 0.0, scale_fn).tolist() == only_last
    assert exit_weights(num_layers, [False] * (num_layers - 1) + [True], 0.5, scale_fn).tolist() == only_last


@pytest.mark.parametrize(
    ("scale_fn", "f"),
    [
        ("uniform", [1, 1, 1, 1]),
        ("linear", [1, 2, 3, 4]),
        ("sqrt", [1, math.sqrt(2), math.sqrt(3), 2]),
        ("inverse", [1, 1 / 2, 1 / 3, 1 / 4]),
        ("inverse_sqrt", [1, 1 / math.sqrt(2), 1 / math.sqrt(3), 1 / 2]),
    ],
)
def test_weights_of_other_scale_functions_follow_their_formula(scale_fn, f):
    """scale * f(l) for the exits before the last, f(L-1) for the last, normalised over those that are on."""
    expected = torch.tensor([0.3 * f[0], 0, 0.3 * f[2], f[3]])
    torch.testing.assert_close(exit_weights(4, [True, False, True, True], 0.3, scale_fn), expected / expected.sum())


def test_without_an_exit_that_weighs_there_is_no_loss():
    with pytest.raises(ValueError, match="no enabled exit has a weight"):
        exit_weights(4, [True, False, False, False], 0.2)  # e(0) = 0


# ---- curricula ----


@pytest.mark.parametrize(("num_layers", "interval"), [(32, 8), (24, 23), (6, 4), (6, 1), (5, 5), (4, 7)])
def test_a_rotational_curriculum_enables_each_layer_once_in_r_steps(num_layers, interval):
    """Each layer once in R steps, ceil(L/R) of them or fewer at once; the set moves by one; the last is always on."""
    steps = [enabled_exits("rotational", t, 1000, num_layers, interval=interval) for t in range(2 * interval)]
    for t, on in enumerate(steps):
        assert on[-1]
        assert sum(on[:-1]) <= math.ceil(num_layers / interval)
        if num_layers % interval == 0:
            assert sum(on) in (num_layers // interval, num_layers // interval + 1)  # the last may be one of them
        following = steps[(t + 1) % interval]
        assert all(following[layer + 1] for layer in range(num_layers - 1) if on[layer])
    for layer in range(num_layers - 1):
        assert sum(on[layer] for on in steps[:interval]) == 1
    assert steps[:interval] == steps[interval:]


@pytest.mark.parametrize(("num_layers", "total_steps"), [(6, 120), (24, 5800), (8, 37), (32, 10)])
def test_a_gradual_curriculum_adds_layers_from_the_last_one_down(num_layers, total_steps):
    """From the last layer down, one more every T/(2L) steps, all at T/2 and after."""
    for t in range(total_steps):
        on = enabled_exits("gradual", t, total_steps, num_layers)
        added = math.floor(t / (total_steps / (2 * num_layers)) + 1e-9)
        count = min(1 + added, num_layers)
        assert on == [False] * (num_layers - count) + [True] * count
        assert all(on) or t < total_steps / 2
    assert enabled_exits("gradual", 0, total_steps, num_layers) == [False] * (num_layers - 1) + [True]


def test_a_curriculum_enables_only_chosen_layers_and_the_last():
    """Every R-th of the chosen layers, so that each of them still gets its turn."""
    for step, chosen in enumerate([(1, 5, 12), (4, 9)]):
        on = enabled_exits("rotational", step, 9, 16, interval=2, exits="2,5,6,10,13")
        assert on == [layer in (*chosen, 15) for layer in range(16)]
    assert enabled_exits("gradual", 0, 10, 8, exits="1,6,7") == [False] * 7 + [True]
    assert enabled_exits("gradual", 9, 10, 8, exits="1,6,7") == [layer in (0, 5, 6, 7) for layer in range(8)]
    for step in (0, 7):
        assert enabled_exits(None, step, 10, 8, exits="2::3") == [layer in (1, 4, 7) for layer in range(8)]
        assert enabled_exits(None, step, 10, 8, exits="3") == [layer in (2, 7) for layer in range(8)]
