"""The end of several processes. This file is also what each of them runs."""

import time

import pytest
from helpers.ranks import check_success, run_on_ranks

from layerskip_recipes import processes


@pytest.mark.distributed
def test_no_process_leaves_before_all_have_come(tmp_path):
    """Of three ranks, the last comes about 0.4 s after the first."""
    ranks = run_on_ranks(__file__, cwd=tmp_path, processes=3)
    check_success(ranks)
    come, left = zip(*(map(float, rank.stdout.split()) for rank in ranks), strict=True)
    assert max(come) < min(left)


if __name__ == "__main__":
    rank = processes.init_processes("cpu")
    processes.wait_for_all()
    time.sleep(0.2 * rank)
    come = time.time()
    processes.end_processes()
    print(come, time.time())
    processes.exit_at_once(0)
