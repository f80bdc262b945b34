"""Layers that share one compiled graph: which layers do, and that each group runs with its own weights."""

import pytest
import torch
from helpers.compiled import SIZES, VOCAB, compiles, run
from helpers.speculation import plain
from helpers.tiny import make_tiny
from torchtune.models.llama3_2._component_builders import llama3_2

from layerskip_recipes import layerskip_decoder
from layerskip_recipes.generation.drafting.speculation import Speculation
from layerskip_recipes.generation.kernels import layer_groups as groups_of_layers
from layerskip_recipes.generation.kernels.compiling import compiled_steps
from layerskip_recipes.generation.kernels.layer_groups import MOST_LAYERS, layer_groups, structure_of
from layerskip_recipes.model.decoder import as_layerskip_decoder
from layerskip_recipes.model.kv_cache import DecodingCache


def test_groups_are_of_one_size_or_two():
    for count in range(60):
        groups = layer_groups(5, 5 + count)
        assert [layer for first, last in groups for layer in range(first, last)] == [*range(5, 5 + count)]
        sizes = {last - first for first, last in groups}
        assert max(sizes, default=1) <= MOST_LAYERS and len(sizes) <= 2
    assert {last - first for first, last in layer_groups(0, 24) + layer_groups(0, 32)} == {8}


@pytest.mark.parametrize(("family", "alike"), [("llama3_2", True), ("qwen2", True), ("gemma2", False)])
def test_layers_of_one_structure(family, alike):
    """Gemma 2 alternates layers with a sliding window and without."""
    model = as_layerskip_decoder(make_tiny(family))
    with DecodingCache(model, 1, 16, torch.device("cpu")).used_by(model):
        assert (structure_of(model, 0, 1) == structure_of(model, 1, 2)) == alike
        assert structure_of(model, 0, 2) == structure_of(model, 2, 4)
        model.layers[0].mlp.w1 = model.layers[0].mlp.w1.double()
        assert structure_of(model, 0, 2) != structure_of(model, 2, 4)


@compiles
def test_a_deeper_model_needs_no_more_graphs(monkeypatch):
    """The tokens are those of the whole model: each group has weights and caches of its own."""
    monkeypatch.setattr(groups_of_layers, "MOST_LAYERS", 2)
    graphs = []
    for layers in (4, 8):
        torch.manual_seed(layers)
        model = layerskip_decoder(llama3_2(vocab_size=VOCAB, max_seq_len=128, **SIZES | {"num_layers": layers})).eval()
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.5)
        prompts = [(5, 6, 7), (8, 9, 10, 11)]
        expected = [plain(model, prompt, 8) for prompt in prompts]
        for speculation in (None, Speculation(2, 2), None):
            assert run(model, prompts, 8, speculation=speculation).generated == expected
        assert not compiled_steps(model).failed
        graphs.append(len(compiled_steps(model).graphs))
    # Two layers and the head of one token and of three; the draft.
    assert graphs == [5, 5]
