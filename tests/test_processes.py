"""The end of several processes."""

import time

import pytest
import torch.distributed as dist
from helpers.ranks import on_ranks

from layerskip_recipes.processes import end_processes


@pytest.mark.distributed
@on_ranks(3)
def test_no_process_leaves_before_all_have_come(tmp_path):
    """Of three ranks, the last comes 0.4 s after the first."""
    rank = dist.get_rank()
    time.sleep(0.2 * rank)
    (tmp_path / f"rank_{rank}").touch()
    end_processes()
    assert len([*tmp_path.iterdir()]) == 3
