"""What stays outside of a compiled graph; imported where one is made, as it loads the compiler."""

from collections.abc import Callable
from typing import Any

import torch


@torch.compiler.disable(
    reason="an objective sees its model's states by hooks that are new in every step; to have the "
    "blocks compiled: block.forward = torch.compile(block.forward)"
)
def uncompiled(function: Callable[..., Any], *args: Any) -> Any:
    """Calls a function as it is."""
    return function(*args)
