"""Layer dropout (paper, eq. 1-4): the rates, the draw, and what the decoder does with it."""

import math

import pytest
import torch
from helpers.tiny import VOCAB, logits_of, make_tiny, walk
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torchtune.modules import TransformerSelfAttentionLayer
from torchtune.training import set_activation_checkpointing

from layerskip_recipes import layerskip_decoder
from layerskip_recipes.config.layer_strings import select_exits, select_layers
from layerskip_recipes.model.decoder import take_rows
from layerskip_recipes.model.layer_dropout import LayerDropout, dropout_rates, schedule_scale

L = 6
# Half of the samples leave each layer: most draws mix kept and dropped samples.
HALF = {"prob": 0.5, "layers_scale": "uniform", "inverted": False}
# (settings, p_l at step 3 of 11, factors of what kept layers add)
INVERTED = {"prob": 0.9, "layers_scale": "linear", "schedule": "linear_decay"}
FALLEN = [0.9 * layer / (L - 1) * 0.7 for layer in range(L)]
DROPOUTS = {"plain": (HALF, None), "inverted": (INVERTED, [1 / (1 - p) for p in FALLEN])}
each_dropout = pytest.mark.parametrize(("settings", "factors"), DROPOUTS.values(), ids=DROPOUTS)


def dropping(base, settings):
    """A decoder in training, at step 3 of 11."""
    model = layerskip_decoder(base, layer_dropout=settings).train()
    model.layer_dropout.set_step(3, 11)
    return model


def random_tokens(batch, length, seed=3):
    return torch.randint(1, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def next_draw(dropout, batch):
    """What the next forward pass will draw, as layers that each sample runs; the generator stays where it is."""
    state = dropout.state_dict()
    keep = dropout.draw(batch)
    dropout.load_state_dict(state)
    return [[layer for layer in range(L) if keep[layer] is None or row in keep[layer]] for row in range(batch)]


def rows_seen(model):
    """A list that collects, per layer, the batch sizes that arrive at it."""
    seen = [[] for _ in model.layers]
    for sizes, layer in zip(seen, model.layers, strict=True):
        layer.register_forward_pre_hook(lambda _, args, sizes=sizes: sizes.append(args[0].shape[0]))
    return seen


# ---- which layers ----


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (":", range(20)),
        ("0::4", [0, 4, 8, 12, 16]),
        (" 8, 12 ", [8, 12]),
        ("-3:", [17, 18, 19]),
        ("2:6,15", [2, 3, 4, 5, 15]),
        ("4:2:-1", [4, 3]),
        ("3,3,1:4", [1, 2, 3]),
        (7, [7]),
        (-20, [0]),
        ([1, 5, -1], [1, 5, 19]),
    ],
)
def test_layers_are_selected_by_numbers_slices_and_lists(layers, expected):
    assert select_layers(layers, 20) == [layer in expected for layer in range(20)]


@pytest.mark.parametrize(
    "layers",
    [
        *("", "1,,2", "3:3", "6", "-7", "0:7", "-7:", "::0", "1:2:1:1", "a", "1-3", "1.5"),
        *(6, [], [6], [1.5], None, 2.0, True),
    ],
)
def test_select_layers_names_the_key_of_what_it_refuses(layers):
    with pytest.raises(ValueError, match=r"^layer_dropout\.layers: .*0\.\.5"):
        select_layers(layers, L, key="layer_dropout.layers")


@pytest.mark.parametrize(
    ("exits", "expected"),
    [
        *((":", range(1, 21)), ("4::4", [4, 8, 12, 16, 20]), (" 8, 12 ", [8, 12]), ("-3:", [18, 19, 20])),
        *(("17:21,2", [2, 17, 18, 19, 20]), ("::9", [1, 10, 19]), (20, [20]), (-1, [20]), ([1, 5, -1], [1, 5, 20])),
    ],
)
def test_exits_count_from_one(exits, expected):
    assert select_exits(exits, 20) == [*expected]


@pytest.mark.parametrize("exits", ["", "3:3", "0", "0::4", "7", "-7", "1:8", "a", 0, [], [7], None])
def test_select_exits_names_the_key_of_what_it_refuses(exits):
    with pytest.raises(ValueError, match=r"^exits_val: .*1\.\.6"):
        select_exits(exits, L, key="exits_val")


# ---- rates and schedule ----


@pytest.mark.parametrize("num_layers", [2, 6, 32])
def test_exp_rates_are_the_papers(num_layers):
    """p_l = p_max (exp(l ln2 / (L-1)) - 1): nothing in the first layer, p_max in the last."""
    expected = [0.2 * (2 ** (layer / (num_layers - 1)) - 1) for layer in range(num_layers)]
    assert dropout_rates(num_layers, 0.2) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("scale", "d"),
    [
        ("uniform", [1, 1, 1, 1, 1]),
        ("linear", [0, 0.25, 0.5, 0.75, 1]),
        ("log", [math.log(layer + 1) / math.log(5) for layer in range(5)]),
        ("sin", [0, math.sin(math.pi / 8), math.sin(math.pi / 4), math.sin(3 * math.pi / 8), 1]),
        ("sigmoid", [0.5 + 0.5 * math.tanh(5 * (u - 0.5)) for u in (0, 0.25, 0.5, 0.75, 1)]),
        ("step", [0, 0, 0, 0, 1]),
    ],
)
def test_rates_of_other_scales_follow_their_formula(scale, d):
    assert dropout_rates(5, 0.3, scale) == pytest.approx([0.3 * x for x in d], rel=1e-12)
    if scale != "sigmoid":  # the only layer of a model is its last
        assert dropout_rates(1, 0.3, scale) == pytest.approx([0.3])


def test_chosen_layers_keep_the_rates_they_have_in_the_whole_model():
    whole = dropout_rates(8, 0.4)
    assert dropout_rates(8, 0.4, layers="2:5,-1") == [
        rate if layer in (2, 3, 4, 7) else 0 for layer, rate in enumerate(whole)
    ]


def test_schedules_follow_their_formulas():
    assert [schedule_scale(t, 11, "constant") for t in (0, 5, 10)] == [1, 1, 1]
    assert schedule_scale(0, 11, "exp") == 0
    assert schedule_scale(10, 11, "exp") == pytest.approx(1)
    assert schedule_scale(3, 11, "exp") == pytest.approx(math.exp(0.3 * math.log(2)) - 1)
    # Progressive Layer Dropping: theta(t) = (1 - theta) exp(-gamma t) + theta with gamma = 100 / T keeps, so
    # 1 - exp(-gamma t) of the largest rate drops.
    for t in (0, 7, 100, 999):
        keeps = (1 - 0.5) * math.exp(-100 / 1000 * t) + 0.5
        assert (1 - 0.5) * schedule_scale(t, 1000, "progressive") == pytest.approx(1 - keeps)
    # Don't Drop Dropout: 1 - t / (T - 1), all of it in the first step and nothing in the last, or after it.
    falling = [schedule_scale(t, 11, "linear_decay") for t in (0, 3, 10, 11)]
    assert falling == pytest.approx([1, 0.7, 0, 0]) and falling[2] == 0
    assert schedule_scale(0, 1, "linear_decay") == 1
    dropout = LayerDropout(L, prob=0.4, schedule="exp")
    dropout.set_step(5, 11)
    assert dropout.max_rate == pytest.approx(0.4 * (math.sqrt(2) - 1))


# ---- the draw ----


def test_layers_and_samples_are_drawn_independently():
    """Neither one draw for all layers, nor one for all samples: every pair of layers is uncorrelated."""
    n = 4000
    kept = torch.zeros(L, n)
    for layer, rows in enumerate(LayerDropout(L, **HALF).draw(n)):
        kept[layer, rows] = 1
    off_diagonal = torch.corrcoef(kept) - torch.eye(L)
    assert off_diagonal.abs().max() < 4.5 / math.sqrt(n)
    neighbours = torch.corrcoef(torch.stack([kept[:, 1:].flatten(), kept[:, :-1].flatten()]))[0, 1]
    assert neighbours.abs() < 4.5 / math.sqrt(L * n)


@pytest.mark.parametrize(("schedule", "step", "scale"), [("constant", 0, 1.0), ("exp", 50, math.sqrt(2) - 1)])
def test_each_layer_sees_its_share_of_the_samples(tiny, schedule, step, scale):
    """Rows that arrive at layer l: all but a share S(t) D(l) p_max, within 4.5 standard deviations."""
    n = 4000
    model = layerskip_decoder(tiny, layer_dropout={"prob": 0.8, "schedule": schedule}).train()
    model.layer_dropout.set_step(step, 101)
    seen = rows_seen(model)
    with torch.no_grad():
        model(random_tokens(n, 1))
    for layer in range(L):
        rate = scale * 0.8 * (2 ** (layer / (L - 1)) - 1)
        assert len(seen[layer]) == 1
        assert abs(seen[layer][0] - n * (1 - rate)) <= 4.5 * math.sqrt(n * rate * (1 - rate))


# ---- the decoder under dropout ----


@pytest.mark.usefixtures("float64")
@each_dropout
def test_a_sample_is_what_it_is_alone_without_its_dropped_layers(any_family, settings, factors):
    """Eq. 1 for every sample, with gradients, and the layers see no more rows than they must."""
    batch = 8
    tokens = random_tokens(batch, 7)
    any_family.train()
    model = dropping(any_family, settings)
    seen = rows_seen(model)
    run = next_draw(model.layer_dropout, batch)
    logits = model(tokens)
    assert [sum(sizes) for sizes in seen] == [sum(layer in layers for layers in run) for layer in range(L)]
    assert 0 < sum(map(len, run)) < batch * L

    expected = torch.cat([walk(any_family, tokens[row : row + 1], layers, factors) for row, layers in enumerate(run)])
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
    direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    parameters = list(any_family.parameters())
    gradients = torch.autograd.grad((logits * direction).sum(), parameters)
    for ours, plain in zip(gradients, torch.autograd.grad((expected * direction).sum(), parameters), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-9 * plain.abs().max().item())


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("length", [9, 8], ids=["s != b", "s == b"])
@pytest.mark.parametrize("shared", ["nothing", "mask", "positions", "both"])
@each_dropout
def test_masks_and_positions_follow_their_samples(tiny, length, shared, settings, factors):
    """Packed batches: each sample has its own documents; what is shared by all samples is not cut."""
    tokens, masks, positions = random_tokens(8, length), [], []
    for first in (1 + row % (length - 1) for row in range(8)):  # the length of the first of two documents
        second = length - first
        masks.append(torch.block_diag(torch.ones(first, first), torch.ones(second, second)).tril().bool())
        positions.append(torch.cat([torch.arange(first), torch.arange(second)]))
    masks, positions = torch.stack(masks), torch.stack(positions)
    if shared in ("mask", "both"):
        masks = masks[2:3]
    if shared in ("positions", "both"):
        positions = positions[2]
    model = dropping(tiny, settings)
    run = next_draw(model.layer_dropout, 8)
    logits = model(tokens, mask=masks, input_pos=positions)
    masks, positions = masks.expand(8, -1, -1), positions.expand(8, -1)
    for row, layers in enumerate(run):
        own = {"mask": masks[row : row + 1], "input_pos": positions[row : row + 1]}
        expected = walk(tiny, tokens[row : row + 1], layers, factors, **own)
        torch.testing.assert_close(logits[row : row + 1], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("float64")
def test_exits_under_dropout_see_the_skipped_samples_too(tiny):
    """x_{l+1} of a sample that skips layer l is its x_l, in one and the same draw."""
    tokens = random_tokens(8, 5)
    model = layerskip_decoder(tiny, layer_dropout=HALF).train()
    run = next_draw(model.layer_dropout, 8)
    _, hidden = model.hidden_states(tokens, exits=range(1, L + 1))
    for exit_layer in range(1, L + 1):
        for row, layers in enumerate(run):
            expected = walk(tiny, tokens[row : row + 1], [layer for layer in layers if layer < exit_layer])
            torch.testing.assert_close(model.unembed(hidden[exit_layer][row : row + 1]), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("dropout", "step", "training"),
    [
        (INVERTED, 0, False),
        ({"prob": 0.0, "inverted": True}, 0, True),
        ({"prob": 0.9, "schedule": "exp"}, 0, True),
        (INVERTED, 9, True),
        (None, 0, True),
    ],
    ids=["eval", "prob 0", "S(0) = 0", "S(T - 1) = 0", "none"],
)
def test_without_dropout_it_is_the_base_decoder_bit_for_bit(any_family, dropout, step, training):
    tokens = random_tokens(4, 6)
    expected = logits_of(any_family, tokens)
    model = layerskip_decoder(any_family, layer_dropout=dropout).train(training)
    if dropout:
        model.layer_dropout.set_step(step, 10)
    assert torch.equal(model(tokens), expected)


@pytest.mark.parametrize("inverted", [False, True])
@pytest.mark.parametrize("layers_scale", ["exp", "step", "uniform"])
def test_layers_that_keep_nobody_train_with_and_without_checkpointing(layers_scale, inverted):
    """prob 1: the last layer (or all) is never run, gets no gradient, and checkpointed gradients are the same."""
    gradients, dropout = [], {"prob": 1, "layers_scale": layers_scale, "inverted": inverted}
    for checkpointing in (False, True):
        base = make_tiny()
        model = layerskip_decoder(base, layer_dropout=dropout).train()
        names = [name for name, _ in base.named_parameters()]
        if checkpointing:
            set_activation_checkpointing(model, auto_wrap_policy={TransformerSelfAttentionLayer})
        for _ in range(2):  # accumulated, with two different draws
            model(random_tokens(8, 6)).square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    plain, checkpointed = (dict(zip(names, grads, strict=True)) for grads in gradients)
    for name in names:
        if name.startswith("layers.5.") or (layers_scale == "uniform" and name.startswith("layers.")):
            assert plain[name] is None or not plain[name].any()
        else:
            assert plain[name].isfinite().all() and plain[name].any()
        assert (plain[name] is None) == (checkpointed[name] is None)
        if plain[name] is not None:
            torch.testing.assert_close(checkpointed[name], plain[name])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("per_sample", [True, False])
def test_kept_samples_attend_by_their_rows_of_a_block_mask(per_sample):
    """flex_attention of the kept samples with their rows of the mask is the kept rows of the whole attention."""
    batch, length = 5, 64
    documents = torch.randint(0, 4, (batch, length), generator=torch.Generator().manual_seed(0)).sort(-1).values

    def mask_mod(b, h, q_idx, kv_idx):
        row = b if per_sample else b * 0
        return (q_idx >= kv_idx) & (documents[row, q_idx] == documents[row, kv_idx])

    mask = create_block_mask(mask_mod, batch if per_sample else 1, None, length, length, "cpu", BLOCK_SIZE=16)
    q, k, v = torch.randn(3, batch, 2, length, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    whole = flex_attention(q, k, v, block_mask=mask)
    for rows in ([0], [4], [1, 3], [0, 2, 3, 4]):
        rows = torch.tensor(rows)
        taken = flex_attention(q[rows], k[rows], v[rows], block_mask=take_rows(mask, rows, batch))
        torch.testing.assert_close(taken, whole[rows], rtol=1e-9, atol=1e-9)
