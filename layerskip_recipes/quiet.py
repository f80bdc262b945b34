"""Hides one line that torchao logs at every import.

`tune` imports torchao before it starts a recipe, so code of ours would come too late. torch calls this function at the
end of its own import, through the entry point group `torch.backends`, in every process.
"""

import logging


def hide_torchao_notice() -> None:
    """Drop "Skipping import of cpp extensions": torchao's C++ does not match this torch, and nothing here needs it."""
    logging.getLogger("torchao").addFilter(lambda record: "Skipping import of cpp extensions" not in str(record.msg))
