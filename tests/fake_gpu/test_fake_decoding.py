"""Decoding on a fake GPU: the host waits once a round, and each step is one graph that a CUDA graph can hold."""

from pathlib import Path

import pytest
from stand_in_gpu import needs_fake_gpu, run

pytestmark = [pytest.mark.slow, needs_fake_gpu]

DRAFTING = {"draft_token": 1, "draft_logits": 1, "accept_tokens": 1}
# The graphs of the steps by method. A greedy plain step chooses its token without a graph, and a look-up drafts without
# the model; the others in its run are of the chain.
GRAPHS = {"plain": {"next_logits": 1}} | dict.fromkeys(("chain", "copy", "adapter", "draft vocabulary"), DRAFTING)


@pytest.fixture(scope="module")
def cases():
    """By (method, sampler, rows, compiled or eager)."""
    found = run(Path(__file__).with_name("decoding.py"))
    return {tuple(result.pop("case")): result for result in found}


def test_every_method_sampler_and_batch_decodes_on_one_device(cases):
    """A tensor on the wrong device is an error. Each method runs compiled, and each sampler with a chain."""
    assert {case: result["error"] for case, result in cases.items() if "error" in result} == {}
    assert {case[0] for case in cases if case[3] == "compiled"} == {*GRAPHS, "look-ups"}
    assert {case[0] for case in cases if case[3] == "whole rounds"} == {*GRAPHS, "look-ups"} - {"plain"}
    assert len(cases) == 6 + 5 + 5 + 4 and all(result["rounds"] > 1 for result in cases.values())


def test_the_host_waits_once_in_each_round(cases):
    waits = {case: [n for n in map(len, result["waits"]) if n != 1] for case, result in cases.items()}
    assert {case: cases[case]["waits"] for case, others in waits.items() if others} == {}


def test_each_step_is_one_graph_for_all_rounds_and_generations(cases):
    compiled = {case: result for case, result in cases.items() if case[3] == "compiled"}
    for case, result in compiled.items():
        first, second = result["graphs"]
        assert first == second, case
        assert first == GRAPHS.get(case[0], first) and first, case


def test_a_whole_round_is_one_graph_for_all_generations(cases):
    """It is captured once, and a replay finds its tensors where they were; other rounds have a graph for each step."""
    whole = {case: result["graphs"] for case, result in cases.items() if case[3] == "whole rounds"}
    assert whole and all(graphs == [{"round": 1}] * 2 for graphs in whole.values()), whole


def test_no_graph_is_refused_or_falls_back_to_masks(cases):
    assert {case: r for case, r in cases.items() if r.get("refused") or r.get("masked")} == {}


def test_nothing_prevents_cuda_graphs(cases):
    """All tensors in a graph are on the GPU, it writes to static inputs only, and no operation is unsafe. A whole round
    reads its inputs and tensors that a generation keeps, and never waits."""
    assert {case: result["problems"] for case, result in cases.items() if result["problems"]} == {}
