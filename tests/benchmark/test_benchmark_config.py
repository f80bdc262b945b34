"""A benchmark's config beside generation's, and its memory; tests/cli/test_errors.py has its mistakes."""

import pytest
from helpers.configs import LAYER, MODEL, REST, SLOT, benchmark_config

from layerskip_recipes.benchmark.config import BenchmarkConfig
from layerskip_recipes.benchmark.recipe import LayerSkipBenchmark
from layerskip_recipes.config.loading import load_config
from layerskip_recipes.generation.config import GenerateConfig


def test_every_key_of_generation_is_known():
    """Honoured or refused by name: a benchmark config extends a generation config."""
    known = {*BenchmarkConfig.model_fields, *BenchmarkConfig.REFUSED, *BenchmarkConfig.IGNORED}
    assert {*GenerateConfig.model_fields} <= known


def test_a_benchmark_must_fit_the_memory(tmp_path, checkpoint, monkeypatch):
    """The longest draft of its variants counts, and the token before it; see generation/test_fitting_memory.py."""
    variants = {"long": {"exit_layer": 2, "num_speculations": 6}, "short": {"exit_layer": 2, "num_speculations": 2}}
    path = benchmark_config(tmp_path, checkpoint, prompt=["a", "b"], batch_size=2, variants=variants)
    need = 4 * (4 * LAYER + REST) + 2 * ((1 + 16 + 7) * SLOT + 4 * (3 * 48 + 6 * 32) + 7 * 3 * 4 * MODEL["vocab_size"])
    monkeypatch.setattr("os.sysconf", {"SC_PHYS_PAGES": need, "SC_PAGE_SIZE": 1}.get)
    LayerSkipBenchmark(load_config(str(path)))
    monkeypatch.setattr("os.sysconf", {"SC_PHYS_PAGES": need - 1, "SC_PAGE_SIZE": 1}.get)
    with pytest.raises(ValueError, match=r"^batch_size: .* up to 1; for example batch_size=1$"):
        LayerSkipBenchmark(load_config(str(path)))
