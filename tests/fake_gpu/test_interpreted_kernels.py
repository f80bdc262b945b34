"""The numbers of the GPU's kernels, which Triton's interpreter runs without a GPU, beside torch's on the CPU."""

import importlib.metadata
import importlib.util
from pathlib import Path

import pytest
from stand_in_gpu import needs_fake_gpu, run

HAS_TRITON = importlib.util.find_spec("triton") and importlib.metadata.version("triton").startswith("3.7.")
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs torch 2.13's Triton, triton==3.7.1")
pytestmark = [pytest.mark.slow, needs_fake_gpu, needs_triton]
# Largest errors as a share of the largest number.
BF16, FP32 = 2**-8, 1e-6


def test_kernels_compute_what_torch_computes(tmp_path):
    """Sampling and StochasticAdamW draw the same noise, so their results are the same numbers."""
    results = run(Path(__file__).with_name("interpreted_kernels.py"), str(tmp_path))
    found = {result["function"]: result for result in results}
    assert all(result["kernels"] for result in found.values())
    errors = {function: result["error"] for function, result in found.items()}
    assert errors.pop("sampling") == errors.pop("StochasticAdamW") == 0
    assert errors.pop("noise") < FP32 and errors.pop("FlexAttention") < FP32
    # The gradient replaces logits in bf16.
    assert len(errors) == 3 and all(error < 1.5 * BF16 for error in errors.values())
