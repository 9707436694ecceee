"""Views, and what becomes of them when one of them is written to.

The graph holds values that never change, and a traced call may write into tensors and see it through others that share
their memory. A write to a view is therefore put back, through the views that it was made by, into the tensor that owns
the memory (``y[:, 0] = x`` becomes a `select_scatter`); then every other view that is still to be read is made anew.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from hoanalysis.derivatives.tangents.graph import Ref, TangentsUnsupported

if TYPE_CHECKING:
    from hoanalysis.derivatives.tangents.capture import Builder

aten = torch.ops.aten
T = TypeVar("T")

RESHAPES = {
    "view", "_unsafe_view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "contiguous", "alias",
    "lift_fresh", "to", "clone", "view_as", "reshape_as", "resolve_conj", "resolve_neg", "ravel", "atleast_1d",
    "atleast_2d",
}  # fmt: skip
PERMUTES = {"permute", "transpose", "t", "numpy_T", "movedim", "mT", "swapaxes", "swapdims"}


@dataclass(frozen=True)
class View:
    """How a view was made of its parent."""

    parent: Ref
    op: Callable
    args: tuple  # after the parent
    kwargs: dict[str, Any]

    @property
    def name(self) -> str:
        return self.op._schema.name.removeprefix("aten::") if hasattr(self.op, "_schema") else str(self.op)


class Aliases:
    """Which references share memory, as the trees of views below the tensors that own it."""

    def __init__(self, builder: Builder) -> None:
        self._b = builder
        self._views: dict[Ref, View] = {}
        self._renamed: dict[Ref, Ref] = {}
        self._now: dict[Ref, Ref] = {}  # what a reference stands for after the writes since

    def note(self, ref: Ref, op: Callable, args: tuple, kwargs: dict[str, Any]) -> None:
        """Remember a node whose value shares memory with its first argument."""
        parent = args[0] if args else None
        always = op is aten.view.default  # evaluated as a reshape, which may copy
        if isinstance(parent, Ref) and (always or _shares(self._b.value(ref), self._b.value(parent))):
            self._views[ref] = View(parent, op, args[1:], kwargs)

    def rename(self, target: Ref, view: Ref) -> Ref:
        """``target`` stands for a view of itself from now on."""
        self._renamed[target] = view
        return view

    def write(self, target: Ref, value: Ref) -> Ref:
        """``value`` written over ``target``. What stands for an alias from now on is in `updated`."""
        ref, new = target, value
        while ref in self._views:
            view = self._views[ref]
            new = self._put_back(view, new)
            ref = view.parent
        self._refuse_strangers(ref)
        self._now[ref] = new
        return self.current(target)

    def _refuse_strangers(self, root: Ref) -> None:
        """What shares memory with a tensor in a way that is not known here would not see the write."""
        for i, value in enumerate(self._b.values):
            if _shares(value, self._b.value(root)) and self._root(Ref(i)) != root:
                raise TangentsUnsupported(f"the call writes to what {self._b.nodes[i].name} gives, a view")

    def _root(self, ref: Ref) -> Ref:
        while ref in self._views:
            ref = self._views[ref].parent
        return ref

    def current(self, ref: Ref) -> Ref:
        """What ``ref`` stands for: a view of a tensor that was written to is made anew."""
        if ref in self._now:
            return self.current(self._now[ref])
        view = self._views.get(ref)
        if view is None or (parent := self.current(view.parent)) == view.parent:
            return ref
        new = self._b(view.op, parent, *view.args, **view.kwargs)
        self._now[ref] = new
        return new

    def updated(self, references: Mapping[T, Any]) -> dict[T, Any]:
        """Those of some references, or tuples of them, that stand for something else by now."""
        found = {}
        for name, x in references.items():
            now = tuple(map(self._one, x)) if isinstance(x, (tuple, list)) else self._one(x)
            if now != x:
                found[name] = now
        return found

    def _one(self, x: Any) -> Any:
        return self.current(self._renamed.get(x, x)) if isinstance(x, Ref) else x

    def _put_back(self, view: View, new: Ref) -> Ref:
        """The parent with ``new`` in the place of the view."""
        b, parent, name = self._b, view.parent, view.name
        shape = list(b.value(parent).shape)
        if name in RESHAPES:
            return b(aten.reshape.default, new, shape)
        if name in PERMUTES:
            axes = torch.empty(tuple(range(1, len(shape) + 1)), device="meta")
            moved = [n - 1 for n in view.op(axes, *view.args, **view.kwargs).shape]
            return b(aten.permute.default, new, [moved.index(i) for i in range(len(shape))])
        if name == "select":
            return b(aten.select_scatter.default, parent, new, *view.args, **view.kwargs)
        if name == "slice":
            cut: list[Any] = [*view.args, *[0, None, None, 1][len(view.args) :]]
            return b(aten.slice_scatter.default, parent, new, cut[0], *slice(*cut[1:]).indices(shape[cut[0]]))
        if name == "narrow":
            axis, start, length = view.args
            return b(aten.slice_scatter.default, parent, new, axis, start, start + length)
        if name == "diagonal":
            return b(aten.diagonal_scatter.default, parent, new, *view.args, **view.kwargs)
        raise TangentsUnsupported(f"the call writes to what {view.op} gives, a view")


def _shares(x: Any, y: Any) -> bool:
    return (
        isinstance(x, Tensor)
        and isinstance(y, Tensor)
        and x.numel() > 0
        and x.untyped_storage().data_ptr() == y.untyped_storage().data_ptr()
    )
