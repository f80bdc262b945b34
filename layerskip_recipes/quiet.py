"""Hides a line that torchao logs at every import.

`tune` imports torchao before it starts a recipe. torch calls this function earlier, at the end of its own import,
through the entry point group `torch.backends`.
"""

import logging


def hide_torchao_notice() -> None:
    """Drop "Skipping import of cpp extensions": torchao's C++ code does not fit this torch, and we do not use it."""
    logging.getLogger("torchao").addFilter(lambda record: "Skipping import of cpp extensions" not in str(record.msg))
