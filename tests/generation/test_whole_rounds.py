"""A round of a chain as one CUDA graph, without a GPU: the round's function runs where the graph would be replayed."""

import pytest
import torch
from helpers.compiled import LONGER, SHORT, make_small
from helpers.decoding import model_of, plain
from helpers.speculation import PROMPTS, PlainBetween, drafting, run

from layerskip_recipes.generation.drafting.speculation import Speculation
from layerskip_recipes.generation.kernels import compiling, round_graph
from layerskip_recipes.generation.kernels.compiling import CompiledSteps
from layerskip_recipes.generation.sampling import Sampler
from layerskip_recipes.generation.state import ModelState

GREEDY, SAMPLED = Sampler(), Sampler(0.8, 20, 0.9, 0.01, 1.2, seed=1)
CHAINS = [("chain", GREEDY), ("chain", SAMPLED)]
# A draft that ends at low confidence is drafted to its end, as in all graphs of a GPU.
OTHERS = ["confident", "vocabulary", "perturbed", "copy, chain", "adapter, chain"]
CHAINS += [pytest.param(variant, SAMPLED, marks=pytest.mark.slow) for variant in OTHERS]


class Captures:
    """Stands in for `capture`: a replay runs the function on the buffers, and overwrites its last outputs."""

    def __init__(self):
        self.captured = self.replayed = 0

    def __call__(self, function, inputs):
        self.captured += 1
        outputs = [None if out is None else torch.zeros_like(out) for out in function(*inputs)]

        def replay():
            self.replayed += 1
            for buffer, value in zip(outputs, function(*inputs), strict=True):
                assert (buffer is None) == (value is None)
                if buffer is not None:
                    buffer.copy_(value)

        return replay, outputs


@pytest.fixture
def captures(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: None)
    monkeypatch.setattr(compiling, "_compiled", lambda function, *_: function)
    monkeypatch.setattr(round_graph, "capture", Captures())
    monkeypatch.setattr(CompiledSteps, "whole_rounds", True)
    steps = CompiledSteps(torch.device("cuda"))
    monkeypatch.setattr(ModelState, "compiled_steps", lambda *_: steps)
    return round_graph.capture


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "sampler"), CHAINS)
def test_whole_rounds_are_the_rounds_of_steps(variant, sampler, captures):
    """Continuous batching, with plain rounds in between: the tokens and counts of steps that nothing compiles."""
    model = model_of("llama3_2")
    arguments = {"rows": 2, "sampler": sampler} | drafting(variant, model)
    first, second, steps = (
        run(model, PROMPTS, 18, rule=PlainBetween((0, 0, 1, 0, 1)), compile=compile, **arguments)
        for compile in (True, True, False)
    )
    assert first.generated == second.generated == steps.generated
    # The second call replays the graph of the first one.
    assert captures.captured == 1 and second.stats.compile_s == 0 < first.stats.compile_s
    assert captures.replayed > second.stats.rounds_by_kind["chain"] > 0 < second.stats.rounds_by_kind["plain"]
    if variant != "confident":
        for name in ("rounds", "drafted", "accepted", "accepted_histogram"):
            assert getattr(second.stats, name) == getattr(steps.stats, name)
    assert second.stats.accepted > 0


@pytest.mark.slow
def test_a_round_is_captured_again_where_its_tensors_have_moved(captures):
    """Not for other settings of a sampler, or a written weight; a replaced weight has another address."""
    model, generated = make_small(), set()

    def tokens(temperature, seed):
        way = {"speculation": Speculation(1, 2), "sampler": Sampler(temperature, seed=seed)}
        compiled, steps = (run(model, SHORT, 12, compile=compile, **way).generated for compile in (True, False))
        assert compiled == steps
        generated.add(str(compiled))
        return captures.captured

    with torch.no_grad():
        before = tokens(0.7, 1)
        assert tokens(1.3, 2) == before == 1
        model.layers[0].mlp.w2.weight.mul_(-0.7)
        assert tokens(1.3, 2) == 1
        model.layers[1].mlp.w1.weight = torch.nn.Parameter(-model.layers[1].mlp.w1.weight)
        assert tokens(1.3, 2) == 2
    assert len(generated) == 4


@pytest.mark.slow
def test_a_text_that_outgrows_a_mask_needs_another_round(captures):
    model = make_small()  # narrow heads, for which there is no FlexAttention
    for _ in range(2):
        generation = run(model, LONGER, 60, speculation=Speculation(1, 2), compile=True)
        assert generation.generated == [plain(model, prompt, 60) for prompt in LONGER]
    lengths = [length for _, length in generation.context.compiled.rounds]
    assert lengths == [256, 512] and captures.captured == 2


@pytest.mark.parametrize("nth", [1, 2])
def test_a_round_that_cannot_be_captured_has_a_graph_for_each_step(nth, captures, monkeypatch, caplog):
    """One line says so; the tokens are right."""

    def failing(function, inputs):
        if captures.captured + 1 == nth:
            function(*inputs)  # half of a round
            raise RuntimeError("operation not permitted when stream is capturing")
        return captures(function, inputs)

    monkeypatch.setattr(round_graph, "capture", failing)
    model = model_of("llama3_2")
    for variant in ("chain", "adapter, chain"):
        generation = run(model, PROMPTS, 18, compile=True, **drafting(variant, model))
        assert generation.generated == [plain(model, prompt, 18) for prompt in PROMPTS]
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warning.startswith("compile: not possible for a whole round") and "capturing" in warning
    assert not generation.context.compiled.whole_rounds and not generation.context.compiled.refused
