"""Fixtures of all training tests."""

import pytest
import torch


@pytest.fixture
def eager():
    """torchao compiles a step for each shape of a parameter, which takes longer than all of these steps."""
    with torch.compiler.set_stance("force_eager"):
        yield
