"""Hooks, parametrisations and replaced `forward`s act in every call while they are there, compiled or not."""

import pytest
import torch
from helpers.compiled import SHORT, compiled_steps, compiles, make_small, run
from helpers.decoding import PROMPT, make_model
from helpers.speculation import drafting
from helpers.tiny import make_tiny
from torch.nn.utils import parametrizations, parametrize, spectral_norm, weight_norm

from layerskip_recipes.errors import ConfigError
from layerskip_recipes.generation.backends import CppBackend, GraphBackend, TorchBackend
from layerskip_recipes.generation.drafting.speculation import Speculation
from layerskip_recipes.generation.engine import Generation


class Scaled(torch.nn.Module):
    """A parametrisation."""

    def forward(self, weight):
        return -0.5 * weight


def negated(_, args, out):
    return -out


def replaced_forward(model):
    mlp = model.layers[0].mlp
    mlp.forward = lambda x: -type(mlp).forward(mlp, x)


CODE = {
    "forward hook": lambda model: model.layers[1].attn.q_proj.register_forward_hook(negated),
    "pre-hook": lambda model: model.layers[1].register_forward_pre_hook(lambda _, args: (-2 * args[0], *args[1:])),
    "pre-hook with keywords": lambda model: model.layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: ((args[0].flip(-1),), kwargs), with_kwargs=True
    ),
    "hook of the norm": lambda model: model.norm.register_forward_hook(lambda _, args, out: out.roll(3, -1)),
    "hook of the embedding": lambda model: model.tok_embeddings.register_forward_hook(negated),
    "parametrisation": lambda model: parametrize.register_parametrization(model.layers[0].mlp.w1, "weight", Scaled()),
    "weight norm": lambda model: parametrizations.weight_norm(model.layers[0].mlp.w2),
    "spectral norm": lambda model: parametrizations.spectral_norm(model.layers[0].mlp.w2),
    "old weight norm": lambda model: weight_norm(model.layers[0].mlp.w2),
    "old spectral norm": lambda model: spectral_norm(model.layers[0].mlp.w2),
    "replaced forward": replaced_forward,
}


@pytest.mark.parametrize("speculation", [None, Speculation(1, 2)], ids=["plain", "chain"])
@pytest.mark.parametrize("what", CODE)
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm`")
def test_steps_of_a_model_with_user_code_run_uncompiled(what, speculation):
    model = make_small(width=32)
    CODE[what](model)
    generation = run(model, SHORT, 12, speculation=speculation)
    assert generation.generated == run(model, SHORT, 12, compile=False).generated
    assert type(generation.context.backend) is TorchBackend
    assert generation.stats.compile_s == 0 and compiled_steps(model).graphs == {}


def test_global_hooks_act_too():
    model, calls = make_small(width=32), []
    hook = torch.nn.modules.module.register_module_forward_hook(lambda module, *_: calls.append(module))
    try:
        generation = run(model, SHORT, 5)
    finally:
        hook.remove()
    assert type(generation.context.backend) is TorchBackend and model.layers[1] in calls


@compiles
@pytest.mark.parametrize("width", [16, 32], ids=["graphs", "C++"])
def test_a_removed_hook_no_longer_acts_and_a_new_one_does(width, traced):
    model = make_small(width=width)
    without = run(model, SHORT, 12).generated
    outputs = [without]
    for layer in range(2):
        hook = model.layers[layer].register_forward_hook(negated)
        outputs.append(run(model, SHORT, 12).generated)
        assert outputs[-1] == run(model, SHORT, 12, compile=False).generated
        hook.remove()
    assert outputs[0] != outputs[1] != outputs[2] != outputs[0]
    again = run(model, SHORT, 12)
    assert again.generated == without
    assert type(again.context.backend) is (GraphBackend if width == 16 else CppBackend)


@pytest.mark.parametrize("variant", [None, "chain"])
def test_tokens_that_a_hook_helped_to_compute_are_not_reused(variant):
    """Nor those from before the hook, nor from before its own state changed."""
    model, factors = make_model(), [1.0]
    drafts, cache, hook, prompt = drafting(variant, model), None, None, PROMPT
    for factor in (None, 0.2, -1.0, None):
        if factor is None:
            if hook is not None:
                hook.remove()
        else:
            factors[0] = factor
            hook = hook or model.layers[1].register_forward_hook(lambda *args: factors[0] * args[2])
        prompt = (*prompt, 5)
        generation = run(model, [prompt], 9, compile=False, cache=cache, reserve=90, **drafts)
        assert generation.stats.reused_tokens == 0 and generation.cache is (cache or generation.cache)
        assert generation.generated == run(model, [prompt], 9, compile=False).generated
        cache, prompt = generation.cache, (*prompt, *generation.generated[0])
    assert run(model, [prompt], 2, compile=False, cache=cache, **drafts).stats.reused_tokens > 0


@pytest.mark.parametrize("make", [make_model, make_tiny], ids=["LayerSkipDecoder", "plain decoder"])
@pytest.mark.parametrize("pre", [False, True])
def test_hooks_of_the_decoder_itself_are_refused(make, pre):
    """Decoding calls a `LayerSkipDecoder` in parts, and the plain decoder within never."""
    model = make("llama3_2").eval()
    register = model.register_forward_pre_hook if pre else model.register_forward_hook
    hook = register(lambda *_: None)
    with pytest.raises(ConfigError, match=r"^model: .*model\.layers\[0\]\.register_forward_hook"):
        Generation(model, [PROMPT], 5)
    hook.remove()
    Generation(model, [PROMPT], 5)
