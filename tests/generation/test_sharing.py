"""What generations leave with a model and take from each other: caches, draft heads, settings; what is freed when."""

import gc
import weakref

import pytest
import torch
from helpers.decoding import PROMPT, greedy, make_model, model_of
from helpers.speculation import plain
from helpers.tiny import make_tiny

from layerskip_recipes import layerskip_decoder
from layerskip_recipes.checkpoint.weights import quantise
from layerskip_recipes.config.components import Component
from layerskip_recipes.generation.api import generate
from layerskip_recipes.generation.drafting.speculation import Speculation
from layerskip_recipes.generation.engine import Generation
from layerskip_recipes.generation.kernels.compiling import compiled_steps
from layerskip_recipes.generation.stats import memory_bandwidth

CPU = torch.device("cpu")
TOKENS = greedy("llama3_2", PROMPT, 12)


def two_layers(family="llama3_2"):
    """A plain decoder whose steps become graphs soon; Qwen 3's, whose heads have 16 numbers, run in C++."""
    base = make_tiny(family)
    base.layers = base.layers[:2]
    return base


def run(model, prompt=PROMPT, count=12, **kwargs):
    generation = Generation(model, [prompt], count, **kwargs)
    for _ in generation:
        pass
    return generation


@pytest.mark.parametrize("speculation", [None, Speculation(2, 3), Speculation(2, 2, draft_vocabulary=[5, 8, 17])])
def test_a_finished_generation_is_freed_at_once(speculation):
    """Without Python's search for cycles, which counts objects and not what they hold of a GPU's memory."""
    gc.disable()
    try:
        generation = run(make_model(), speculation=speculation)
        cache, buffer = weakref.ref(generation.cache), weakref.ref(generation.cache.layers[0].k)
        del generation
        assert cache() is None and buffer() is None
    finally:
        gc.enable()


@pytest.mark.slow
def test_a_model_with_compiled_steps_is_freed_at_once(traced):
    model = layerskip_decoder(two_layers())
    run(model, compile=True, count=2)
    weight, _ = weakref.ref(model.layers[0].attn.q_proj.weight), gc.collect()
    gc.disable()
    try:
        del model
        assert weight() is None
    finally:
        gc.enable()


def test_caches_of_compiled_steps_by_rows():
    """CUDA graphs know where they are: batches of several sizes in turns have each their own."""
    model = make_model()
    steps = compiled_steps(model)
    caches = {rows: steps.cache(model, rows, 300) for rows in (1, 8)}
    for rows in (1, 8, 1):
        assert steps.cache(model, rows, 200) is caches[rows]
    assert steps.cache(model, 1, 301) is not caches[1] and steps.cache(model, 8, 300) is caches[8]
    steps.cache(model, 3, 300)  # of three sizes the one that was used last is kept
    assert steps.cache(model, 8, 300) is caches[8]


@pytest.mark.parametrize("training", [True, False])
def test_modules_keep_their_modes(training):
    """Such as a frozen layer's, in a model that is being trained; and a drafter's."""
    model, drafter = make_model().train(training), make_tiny("llama3_2").train(training)
    model.layers[1].eval()
    drafter.layers[1].eval()
    before = [module.training for decoder in (model, drafter) for module in decoder.modules()]
    assert run(model, speculation=Speculation(2, 3, drafter=drafter)).generated == [TOKENS]
    assert [module.training for decoder in (model, drafter) for module in decoder.modules()] == before


def test_a_plain_decoder_drafts():
    model, plain = make_model(), make_tiny("llama3_2")
    plain.load_state_dict(model.state_dict())
    out = generate(model, torch.tensor(PROMPT), 12, exit_layer=2, num_speculations=3, drafter=plain)
    own = generate(model, torch.tensor(PROMPT), 12, exit_layer=2, num_speculations=3)
    assert out.tokens[0, len(PROMPT) :].tolist() == TOKENS and out.stats.accepted == own.stats.accepted
    assert plain.layers[0].attn.kv_cache is None


@pytest.mark.slow
def test_a_draft_vocabulary_of_all_tokens_and_none():
    model = layerskip_decoder(two_layers("qwen3"))
    for vocabulary in (range(97), None, range(97)):
        drafts = Speculation(1, 2, draft_vocabulary=vocabulary)
        assert run(model, speculation=drafts, compile=True).generated == [plain(model, PROMPT, 12)]


def test_a_conversation_keeps_its_cache_while_it_fits():
    """Whatever room a new one would be given."""
    first = run(model_of("llama3_2"), reserve=60)
    longer = [*PROMPT, *first.generated[0], 3]
    second = run(model_of("llama3_2"), longer, cache=first.cache, reserve=120)
    assert second.cache is first.cache and second.stats.reused_tokens == len(longer) - 2
    third = run(model_of("llama3_2"), longer, count=50, cache=first.cache, reserve=120)
    assert third.cache is not first.cache and third.cache.max_len == 120


def test_one_generation_of_a_model_at_a_time():
    """They have the attention layers' caches to themselves; one that is closed gives them back."""
    model = make_model()
    begun = iter(Generation(model, [PROMPT], 12))
    next(begun)
    with pytest.raises(RuntimeError, match=r"another Generation of this model has not ended.*close\(\)"):
        run(model)
    begun.close()
    assert run(model).generated == [TOKENS]
    assert not model.decoding and all(layer.attn.kv_cache is None for layer in model.layers)


def test_a_draft_vocabularys_head_stays_where_it_is_with_the_weights_of_now():
    model, other = make_model("llama3"), make_model("llama3")
    with torch.no_grad():
        other.output.weight.copy_(other.output.weight.flip(0))
    drafts = Speculation(2, 3, draft_vocabulary=range(0, 97, 2))
    first = run(model, speculation=drafts).context.draft_head
    at = first.output.weight.data_ptr()
    with torch.no_grad():
        model.output.weight.copy_(other.output.weight)
    again, fresh = run(model, speculation=drafts), run(other, speculation=drafts)
    rows, expected = again.context.draft_head.output.weight, fresh.context.draft_head.output.weight
    assert again.context.draft_head is first and rows.data_ptr() == at
    assert torch.equal(rows, expected)
    assert again.stats.accepted == fresh.stats.accepted and again.generated == fresh.generated
    less = run(model, speculation=Speculation(2, 3, draft_vocabulary=[1, 2]))
    assert less.context.draft_head is not first and less.context.draft_head.output.weight.shape[0] == 2
    assert not any("draft_head" in name for name in model.state_dict())


def test_a_quantiser_leaves_the_compilers_settings():
    """torchao sets inductor to its liking, for all that is compiled later."""
    before = torch._inductor.config.save_config_portable()
    layers = torch.nn.ModuleList([torch.nn.Linear(32, 32)])
    quantizer = Component({"_component_": "torchao.quantization.Int8WeightOnlyConfig"}, "quantizer")
    with torch._inductor.config.patch(coordinate_descent_tuning=False, epilogue_fusion=True):
        inside = torch._inductor.config.save_config_portable()
        quantise(layers, quantizer)
        assert torch._inductor.config.save_config_portable() == inside
    assert torch._inductor.config.save_config_portable() == before


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
    before = generate(base, torch.tensor(PROMPT), 6)
    base.layers = base.layers[:2]
    assert torch.equal(
        generate(base, torch.tensor(PROMPT), 6, exit_layer=2).tokens[:, : len(PROMPT)], before.tokens[:, :4]
    )
    with pytest.raises(ValueError, match=r"^exit_layer: 3 .*1\.\.2"):
        generate(base, torch.tensor(PROMPT), 6, exit_layer=3)


def test_output_chunks_of_a_training_do_not_matter_and_stay():
    model = make_model()
    model.set_num_output_chunks(4)
    assert run(model).generated == [TOKENS] and model.num_output_chunks == 4


@pytest.mark.parametrize(("tokens", "first"), [((1, -1), "-1"), ((1, 97), "97"), ((1.0, 2.5), r"1\.0")])
def test_a_token_that_the_model_does_not_know(tokens, first):
    with pytest.raises(ValueError, match=rf"^prompt: {first} is no token of this model\. Allowed: 0\.\.96"):
        generate(model_of("llama3_2"), torch.tensor(tokens), 4)


def test_stop_tokens_are_a_list():
    with pytest.raises(ValueError, match=r"^stop_tokens: 2 is not allowed\. Allowed: a list; for example \[2\]"):
        generate(model_of("llama3_2"), torch.tensor(PROMPT), 4, stop_tokens=2)


def test_a_quantiser_leaves_the_precision_of_other_products():
    quantizer = Component({"_component_": "torchao.quantization.Int8WeightOnlyConfig"}, "quantizer")
    before = torch.get_float32_matmul_precision()
    quantise(make_model().layers, quantizer)
    assert torch.get_float32_matmul_precision() == before == "highest"


def test_a_full_device_has_no_known_bandwidth(monkeypatch):
    def ones(*args, **kwargs):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(torch, "ones", ones)
    assert memory_bandwidth(torch.device("cpu")) == 0
