"""`compiled`: a function of training by torch.compile, or as it is where that is not possible."""

from collections.abc import Callable
from typing import Any

import torch
from torch._dynamo.exc import TorchDynamoException
from torchtune.utils import get_logger

from layerskip_recipes.errors import first_line

log = get_logger("INFO")


def compiled(function: Callable[..., Any], name: str, num_dynamic: int) -> Callable[..., Any]:
    """The compiled function. If torch cannot compile it, warns and runs the function itself.

    Only the first dimension of the first `num_dynamic` arguments changes. A size that is known helps a GPU: it then
    reads several numbers at a time.
    """
    fast: Callable[..., Any] | None = None
    failed = False

    def run(*args: Any) -> Any:
        nonlocal fast, failed
        if not failed:
            fast = fast or torch.compile(function)
            for tensor in args[:num_dynamic]:
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
            try:
                return fast(*args)
            except TorchDynamoException as e:  # for example no C compiler; nothing has run yet
                failed = True
                log.warning("%s could not be compiled and will be slower (%s)", name, first_line(e)[:200])
        return function(*args)

    return run
