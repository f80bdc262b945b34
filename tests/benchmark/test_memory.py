"""A benchmark must fit the memory."""

import pytest
from helpers.configs import LAYER, MODEL, REST, SLOT, benchmark_config

from layerskip_recipes.benchmark.recipe import LayerSkipBenchmark
from layerskip_recipes.config.loading import load_config


def test_a_benchmark_must_fit_the_memory(tmp_path, checkpoint, monkeypatch):
    """The longest draft of its variants counts, and the token before it.

    A layer reads the prompt of one token with three states of the width 48 and six of the width 32; a step has three
    results in fp32.
    """
    variants = {"long": {"exit_layer": 2, "num_speculations": 6}, "short": {"exit_layer": 2, "num_speculations": 2}}
    path = benchmark_config(tmp_path, checkpoint, prompt=["a", "b"], batch_size=2, variants=variants)
    need = 4 * (4 * LAYER + REST) + 2 * ((1 + 16 + 7) * SLOT + 4 * (3 * 48 + 6 * 32) + 7 * 3 * 4 * MODEL["vocab_size"])

    def with_memory(memory):
        monkeypatch.setattr("os.sysconf", {"SC_PHYS_PAGES": memory, "SC_PAGE_SIZE": 1}.get)
        LayerSkipBenchmark(load_config(str(path)))

    with_memory(need)
    with pytest.raises(ValueError, match=r"^batch_size: .* up to 1; for example batch_size=1$"):
        with_memory(need - 1)
