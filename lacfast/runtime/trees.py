"""Values in nested tuples, lists and dicts, faster than torch's pytree, for what runs at every operator.

Other containers, as named tuples are, go through torch's pytree all the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils._pytree import tree_leaves, tree_map_only


def mapped(kind: type, change: Callable[[Any], Any], tree: Any) -> Any:
    """`tree` with every value of `kind` changed, as torch's tree_map_only."""
    if isinstance(tree, kind):
        return change(tree)
    holder = type(tree)
    if holder is tuple:
        return tuple([mapped(kind, change, each) for each in tree])
    if holder is list:
        return [mapped(kind, change, each) for each in tree]
    if holder is dict:
        return {key: mapped(kind, change, each) for key, each in tree.items()}
    return tree_map_only(kind, change, tree) if isinstance(tree, tuple | list | dict) else tree


def leaves(kind: type, tree: Any) -> list[Any]:
    """The values of `kind`, in order."""
    found: list[Any] = []
    _collect(kind, tree, found)
    return found


def _collect(kind: type, tree: Any, found: list[Any]) -> None:
    if isinstance(tree, kind):
        found.append(tree)
        return
    holder = type(tree)
    if holder is tuple or holder is list:
        for each in tree:
            _collect(kind, each, found)
    elif holder is dict:
        for each in tree.values():
            _collect(kind, each, found)
    elif isinstance(tree, tuple | list | dict):
        found.extend(leaf for leaf in tree_leaves(tree) if isinstance(leaf, kind))
