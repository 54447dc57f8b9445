"""The array type, and numpy views on Paddle's memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from paddle import Tensor

Array = npt.NDArray[Any]


def view(tensor: Tensor) -> Array:
    """Return the memory of a contiguous CPU tensor as an array, without copying it."""
    array: Array = np.from_dlpack(tensor.detach())
    return array
