"""What generations leave with a model and take from each other: caches, draft heads, settings; what is freed when."""

import copy
import gc
import weakref

import pytest
import torch
from helpers.compiled import SHORT, VOCAB, make_small
from helpers.decoding import PROMPT, greedy, make_model
from helpers.speculation import plain, run
from helpers.tiny import make_tiny
from torch._dynamo.utils import counters

from layerskip_recipes import layerskip_decoder
from layerskip_recipes.checkpoint.weights import quantise
from layerskip_recipes.config.components import Component
from layerskip_recipes.generation.api import generate
from layerskip_recipes.generation.drafting.speculation import Speculation
from layerskip_recipes.generation.engine import Generation
from layerskip_recipes.generation.state import MOST_DRAFTS, ModelState, state_of

TOKENS = greedy("llama3_2", PROMPT, 12)


def two_layers():
    """A plain decoder whose steps become graphs soon."""
    base = make_tiny()
    base.layers = base.layers[:2]
    return base


@pytest.mark.parametrize("speculation", [None, Speculation(2, 3), Speculation(2, 2, draft_vocabulary=[5, 8, 17])])
def test_a_finished_generation_is_freed_at_once(speculation):
    """Without Python's search for cycles, which counts objects and not what they hold of a GPU's memory."""
    gc.disable()
    try:
        generation = run(make_model(), [PROMPT], 12, speculation=speculation)
        cache, buffer = weakref.ref(generation.cache), weakref.ref(generation.cache.layers[0].k)
        del generation
        assert cache() is None and buffer() is None
    finally:
        gc.enable()


def test_one_generation_of_a_model_at_a_time():
    """They have the attention layers' caches to themselves; one that is closed gives them back."""
    model = make_model()
    begun = iter(Generation(model, [PROMPT], 12))
    next(begun)
    with pytest.raises(RuntimeError, match=r"another Generation .*close\(\)"):
        run(model, [PROMPT], 12)
    begun.close()
    assert run(model, [PROMPT], 12).generated == [TOKENS]
    assert not model.decoding and all(layer.attn.kv_cache is None for layer in model.layers)


def test_of_two_threads_one_decodes_and_the_other_is_refused_once():
    """Both pass the check of the flag before either sets it: the lock decides."""
    model, state = make_model(), ModelState()
    refused = pytest.raises(RuntimeError, match="another Generation")
    with state.in_use, refused:  # as another thread between its check and its first step
        run(model, [PROMPT], 12, state=state)
    assert run(model, [PROMPT], 12, state=state).generated == [TOKENS]


def test_int8_drafts_follow_weights_that_change():
    """Also by `.data`, which torch does not count. Graphs hold the copies' addresses, so these stay."""
    model, drafts = make_model(), Speculation(2, 3, draft_int8=True)
    first, same = (run(model, [PROMPT], 12, speculation=drafts).context.draft_decoder for _ in range(2))
    assert same is first
    for parameter in model.layers[0].parameters():
        parameter.data.mul_(-1)
    changed = run(model, [PROMPT], 12, speculation=drafts)
    fresh = run(copy.deepcopy(model), [PROMPT], 12, speculation=drafts)
    assert changed.context.draft_decoder is first
    assert (changed.generated, changed.stats.accepted) == (fresh.generated, fresh.stats.accepted)


@pytest.mark.slow
def test_int8_drafts_are_compiled_once(traced):
    """Without an object that keeps them, and where the weights change between the calls, as in training."""
    model, stats = make_small(), counters["stats"]

    def tokens(weights):
        drafts = {"exit_layer": 1, "num_speculations": 2, "draft_int8": True, "draft_vocabulary": range(0, VOCAB, 2)}
        return generate(weights, torch.tensor(SHORT[1]), 12, compile=True, **drafts).tokens.tolist()

    first, compiled = tokens(model), stats["unique_graphs"]
    assert compiled > 0 and tokens(model) == first and stats["unique_graphs"] == compiled
    with torch.no_grad():
        model.layers[0].mlp.w2.weight.mul_(-0.7)
    assert tokens(model) == tokens(copy.deepcopy(model)) != first
    assert stats["unique_graphs"] <= 2 * compiled  # the copy's alone


@pytest.mark.slow
def test_graphs_go_with_the_draft_that_they_are_of(traced):
    """A model keeps two drafts; each further one takes the place of the oldest."""
    model, counts = make_small(), []
    for number in range(4):
        drafts = Speculation(1, 2, draft_int8=True, draft_vocabulary=range(number, VOCAB))
        run(model, SHORT, 9, speculation=drafts, compile=True)
        counts.append(sum("draft_token" in str(key) for key in state_of(model).compiled.graphs))
    assert counts[0] == 1 and max(counts[2:]) <= MOST_DRAFTS + 1


def test_a_draft_vocabularys_head_stays_where_it_is_with_the_weights_of_now():
    model, other = make_model("llama3"), make_model("llama3")
    with torch.no_grad():
        other.output.weight.copy_(other.output.weight.flip(0))
    drafts = Speculation(2, 3, draft_vocabulary=range(0, 97, 2))
    first = run(model, [PROMPT], 12, speculation=drafts).context.draft_head
    at = first.output.weight.data_ptr()
    with torch.no_grad():
        model.output.weight.copy_(other.output.weight)
    again, fresh = (run(of, [PROMPT], 12, speculation=drafts) for of in (model, other))
    rows, expected = again.context.draft_head.output.weight, fresh.context.draft_head.output.weight
    assert again.context.draft_head is first and rows.data_ptr() == at
    assert torch.equal(rows, expected)
    assert again.stats.accepted == fresh.stats.accepted and again.generated == fresh.generated
    less = run(model, [PROMPT], 12, speculation=Speculation(2, 3, draft_vocabulary=[1, 2]))
    assert less.context.draft_head is not first and less.context.draft_head.output.weight.shape[0] == 2
    assert not any("draft_head" in name for name in model.state_dict())


def test_a_quantiser_leaves_the_compilers_settings_and_the_precision_of_products():
    """torchao sets both to its liking, for all that is computed later."""
    layers = torch.nn.ModuleList([torch.nn.Linear(32, 32)])
    quantizer = Component({"_component_": "torchao.quantization.Int8WeightOnlyConfig"}, "quantizer")
    with torch._inductor.config.patch(coordinate_descent_tuning=False, epilogue_fusion=True):
        before = torch._inductor.config.save_config_portable(), torch.get_float32_matmul_precision()
        quantise(layers, quantizer)
        assert (torch._inductor.config.save_config_portable(), torch.get_float32_matmul_precision()) == before
    assert before[1] == "highest"


@pytest.mark.slow
def test_a_plain_decoder_keeps_its_graphs(traced):
    base = two_layers()
    first, second = (generate(base, torch.tensor(PROMPT), 6, compile=True) for _ in range(2))
    assert first.stats.compile_s > 0 == second.stats.compile_s and torch.equal(first.tokens, second.tokens)
    walker = weakref.ref(Generation(base, [PROMPT], 6).model)
    base.train()
    generate(base, torch.tensor(PROMPT), 6)
    assert base.training and base.layers[0].training
    del base
    gc.collect()
    assert walker() is None


def test_a_plain_decoder_with_other_modules_is_another_model():
    base = make_tiny("llama3_2")
    generate(base, torch.tensor(PROMPT), 6)
    base.layers = base.layers[:2]
    expected = plain(layerskip_decoder(two_layers()), PROMPT, 6)
    assert generate(base, torch.tensor(PROMPT), 6).tokens[0, len(PROMPT) :].tolist() == expected
    with pytest.raises(ValueError, match=r"^exit_layer: 3 .*1\.\.2"):
        generate(base, torch.tensor(PROMPT), 6, exit_layer=3)
