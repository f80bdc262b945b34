"""LayerSkipDecoder against the base decoder and against a plain walk through its modules."""

import pytest
import torch
import torchtune.generation
from helpers.tiny import VOCAB, logits_of, make_tiny, walk
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchtune.modules.attention_utils import create_block_causal_mask
from torchtune.modules.model_fusion import DeepFusionModel, EarlyFusionModel

from layerskip_recipes import layerskip_decoder
from layerskip_recipes.model.draft import Draft

L = 6


@pytest.fixture
def tokens():
    return torch.randint(1, VOCAB, (2, 9), generator=torch.Generator().manual_seed(5))


def test_checkpoints_are_the_base_decoders(any_family, tokens):
    """Same keys in both directions, so a file of either loads into the other."""
    expected, state = logits_of(any_family, tokens), any_family.state_dict()
    model = layerskip_decoder(any_family)
    assert {id(p) for p in model.parameters()} == {id(p) for p in any_family.parameters()}
    assert list(model.state_dict()) == list(state)
    assert {name for name, _ in model.named_parameters()} == {name for name, _ in any_family.named_parameters()}
    state = {name: tensor.clone() for name, tensor in state.items()}
    nn.init.zeros_(next(model.parameters()))
    model.load_state_dict(state)
    assert torch.equal(model(tokens), expected)


@pytest.mark.parametrize("training", [True, False])
def test_wrapping_keeps_the_mode(tiny, training):
    """A model set to eval() stays there: otherwise layer dropout would act on it."""
    assert layerskip_decoder(tiny.train(training)).training == training


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("exit_layer", [1, 4, L])
def test_an_exit_runs_that_many_layers_and_the_rest_goes_on_from_there(any_family, tokens, exit_layer):
    """Draft and verification: x_E of the first part is all that the second needs."""
    expected = walk(any_family, tokens, range(exit_layer))
    run, model = [], layerskip_decoder(any_family)
    whole = model(tokens)
    for number, layer in enumerate(any_family.layers):
        layer.register_forward_pre_hook(lambda *_, number=number: run.append(number))
    torch.testing.assert_close(model(tokens, exit_layer=exit_layer), expected, rtol=1e-9, atol=1e-9)
    hidden = model(tokens, exit_layer=exit_layer, unembed=False)
    assert torch.equal(model(hidden=hidden, start_layer=exit_layer), whole)
    assert run == [*range(exit_layer), *range(L)]


def test_wrapping_twice_is_wrapping_once(tiny):
    model = layerskip_decoder(tiny)
    assert layerskip_decoder(model, layer_dropout={"prob": 0.1}) is model
    assert model.layer_dropout.rates[-1] == pytest.approx(0.1)


@pytest.mark.parametrize("exit_layer", [0, L + 1, -1, True, 1.5, "2"])
def test_an_exit_that_the_model_does_not_have_is_refused(tiny, tokens, exit_layer):
    model = layerskip_decoder(tiny)
    with pytest.raises(ValueError, match=r"exit_layer: .*Allowed: 1\.\.6"):
        model(tokens, exit_layer=exit_layer)
    with pytest.raises(ValueError, match=r"exits: .*Allowed: 1\.\.6"):
        model.hidden_states(tokens, exits=[1, exit_layer])


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Linear(2, 2),
        lambda: DeepFusionModel(make_tiny(), nn.Identity()),
        lambda: EarlyFusionModel(make_tiny(), {"image": nn.Identity()}, {"image": 5}),
    ],
    ids=["no decoder", "deep fusion", "early fusion"],
)
def test_only_plain_decoders_are_wrapped(build):
    with pytest.raises(ValueError, match=r"model: .* is not supported"):
        layerskip_decoder(build())


@pytest.mark.slow
@pytest.mark.parametrize("caches", [False, True])
def test_torchtunes_generate_runs_on_it(any_family, tokens, caches):
    """The host's own generation gives the same tokens with the wrapped model, with and without its KV caches."""
    model = layerskip_decoder(any_family).eval()
    outputs = []
    for decoder in (any_family, model):
        if caches:
            decoder.setup_caches(2, torch.float32, decoder_max_seq_len=24)
            decoder.reset_caches()
        outputs.append(torchtune.generation.generate(decoder, tokens, max_generated_tokens=12, top_k=1)[0])
    assert torch.equal(*outputs)


class CountedOperations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("packed", "operation"), [(True, "cumsum.default"), (False, "triu.default")])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_window_is_computed_once_for_all_layers(packed, operation, dropout):
    """In training too, where a layer may run for some samples only, and in the layers of a draft."""
    model = layerskip_decoder(make_tiny("gemma3"), {"prob": dropout, "layers_scale": "uniform"}).train()
    draft = Draft(model, "copy", 2)
    tokens = torch.arange(4 * 20).view(4, 20) % VOCAB
    mask = create_block_causal_mask([torch.tensor([14, 6])] * 4) if packed else None
    assert sum(layer.attn.window is not None for layer in model.layers) == 4
    with CountedOperations() as counted:
        x, _ = draft.teacher_states(model, tokens, mask=mask)
        assert counted.names.count(operation) == 1
        draft(x, mask=mask)
        assert counted.names.count(operation) == 2
