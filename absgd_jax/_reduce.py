"""The sum over devices."""

from collections.abc import Hashable
from typing import TypeVar

from jax import lax

_Tree = TypeVar("_Tree")


def psum(tree: _Tree, axis_name: Hashable | None) -> _Tree:
    """Over the mapped axes of that name, or as it is where there is none."""
    if axis_name is None:
        return tree
    total: _Tree = lax.psum(tree, axis_name)
    return total
