"""Compiled steps whose weights and caches stay in place from call to call: same results, and nothing kept too long."""

import gc
import shutil
import weakref
from typing import NamedTuple

import pytest
import torch
from helpers.compiled import make_small

from layerskip_recipes.generation.drafting.speculation import Speculation
from layerskip_recipes.generation.engine import Generation
from layerskip_recipes.generation.kernels.bound_graph import BoundGraph, LastCall, RecordingBackend
from layerskip_recipes.generation.kernels.compiling import compiled_steps

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")


class Pair(NamedTuple):
    sums: torch.Tensor
    nothing: None


class Owner:
    """Has what a step finds by name."""

    def __init__(self):
        self.weight, self.counts = torch.arange(6.0).reshape(2, 3), torch.zeros(3)

    def step(self, x, slots):
        self.counts += 1
        return Pair(self.weight @ x + slots.sum(), None)

    def same(self, x, slots):
        return x, x + 1


def compiled(function, owner, *args):
    last = LastCall()
    torch._dynamo.mark_dynamic(args[1], 0)
    call = torch.compile(function, fullgraph=True, backend=RecordingBackend({}, last))
    return last, call(owner, *args)


def test_other_arguments_and_lengths_of_the_same_step():
    """The result's form, with its None; the step still changes what it changed; the function is not looked at again."""
    owner = Owner()
    x, slots = torch.tensor([1.0, 0.0, 2.0]), torch.arange(5)
    last, result = compiled(Owner.step, owner, x, slots)
    bound = last.bind((x, slots), 5, result)
    assert (last.function, last.inputs, last.outputs) == (None, (), ())
    for length in (5, 7, 4):
        x, slots = torch.randn(3), torch.arange(length)
        result = bound((x, slots), length)
        assert type(result) is Pair and result.nothing is None
        torch.testing.assert_close(result.sums, owner.weight @ x + slots.sum())
    assert owner.counts.tolist() == [4.0] * 3


def test_a_result_or_a_length_from_elsewhere_is_not_bound():
    owner, x, slots = Owner(), torch.ones(3), torch.arange(5)
    last, result = compiled(Owner.same, owner, x, slots)
    assert result[0] is x and last.bind((x, slots), 5, result) is None
    last, result = compiled(Owner.step, owner, x, slots)
    assert last.bind((x, slots), 6, result) is None


@pytest.mark.slow
@pytest.mark.parametrize("drafts", [None, 2])
def test_within_a_generation_only(drafts, monkeypatch):
    """From its second call on a step is bound.

    Afterwards nothing is bound, and a cache without users is freed at once.
    """
    model, calls = make_small(), []
    monkeypatch.setattr(BoundGraph, "__call__", counted(BoundGraph.__call__, calls))

    def run():
        speculation = None if drafts is None else Speculation(1, drafts)
        generation = Generation(model, [[5, 6, 7]], 12, speculation=speculation, compile=True)
        for _ in generation:
            pass
        return generation

    expected = Generation(model, [[5, 6, 7]], 12)
    for _ in expected:
        pass
    for _ in range(2):
        calls.clear()
        generation = run()
        rounds = generation.stats.rounds
        assert generation.generated == expected.generated
        # A step; a draft and its verification. The first call of each is not bound.
        steps = 1 if drafts is None else 2
        assert len(calls) == steps * (rounds - 1) > 0
        assert compiled_steps(generation.model).bound == {}
    with torch.no_grad():  # another tensor in a weight's place
        model.tok_embeddings.weight = torch.nn.Parameter(model.tok_embeddings.weight.flip(0))
    other = Generation(model, [[5, 6, 7]], 12)
    for _ in other:
        pass
    assert run().generated == other.generated != expected.generated
    gc.disable()
    try:
        steps = compiled_steps(generation.model)
        cache = weakref.ref(steps._caches.popitem()[1].layers[0].k)
        del generation
        assert cache() is None
    finally:
        gc.enable()


def counted(function, calls):
    def call(*args):
        calls.append(1)
        return function(*args)

    return call
