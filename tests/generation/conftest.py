"""A checkpoint and a generation config for the tests of the generate recipe."""

from pathlib import Path

import pytest
from helpers.configs import generate_config, make_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tokenizer_folder) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model") / "folder", tokenizer_folder)


@pytest.fixture
def path(tmp_path, checkpoint) -> Path:
    return generate_config(tmp_path, checkpoint, max_new_tokens=24)
