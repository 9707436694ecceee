"""A forward pass, op by op as the user wrote it: where values stop being finite, and where the loss has a kink.

A `TorchFunctionMode` sees each call of a torch function or tensor method, with the frames of Python that led to it: the
innermost module that is running and the innermost line that is the user's own.
"""

from __future__ import annotations

import os
import sys
import sysconfig
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from hoanalysis.problem import Batch, Problem, State

#: Ops that write infinite values on purpose: masks before a softmax.
_MASKS = {
    "masked_fill", "masked_fill_", "where", "full", "full_like", "new_full", "fill_", "tensor", "as_tensor",
    "scalar_tensor", "__setitem__", "triu", "tril", "empty", "empty_like", "new_empty",
}  # fmt: skip

#: Where the first derivative of an elementwise function jumps.
_KINKS: dict[str, tuple[float, ...]] = {
    "relu": (0.0,), "relu_": (0.0,), "leaky_relu": (0.0,), "leaky_relu_": (0.0,), "prelu": (0.0,), "abs": (0.0,),
    "relu6": (0.0, 6.0), "hardtanh": (-1.0, 1.0), "hardswish": (-3.0, 3.0), "hardsigmoid": (-3.0, 3.0),
}  # fmt: skip

#: Functions whose derivative is infinite where their value is 0.
_SINGULAR = {"sqrt", "norm", "vector_norm", "std"}


#: Folders of torch, of Python itself, and of what runs here beside the models: a line in them is not the user's.
_HERE = Path(__file__).parent
_NOT_THE_USERS = (
    str(Path(torch.__file__).parent), sysconfig.get_paths()["stdlib"] + os.sep + "contextlib", "<", str(_HERE),
    str(_HERE.parent / "problem.py"), str(_HERE.parent / "derivatives"),
)  # fmt: skip


@dataclass(frozen=True)
class Site:
    """One place in the model: the module by name and class ("" for the loss), the op, and the user's line."""

    module: str
    op: str
    line: str

    def __str__(self) -> str:
        return f"{self.op} in {self.module or 'the loss'}"


@dataclass
class Touched:
    """Which values at one site sit on a kink: a mask of each call."""

    kind: str
    masks: list[Tensor] = field(default_factory=list)


class Watch(TorchFunctionMode):
    """Records the first value that is not finite, and kinks.

    Attributes
    ----------
    first
        The site of the first op that gives NaN from operands without NaN, or infinities from finite operands; masks do
        not count. With ``operand`` the name of a parameter whose own values are not finite.
    kinks
        By site: the masks of values that sit exactly on a kink.
    """

    def __init__(self, root: nn.Module, named: Mapping[int, str] | None = None, *, kinks: bool = False) -> None:
        super().__init__()
        self._names = {id(m): n for n, m in root.named_modules()}
        self._named, self._kinks = named or {}, kinks
        self.first: Site | None = None
        self.first_value, self.operand = "", ""
        self.kinks: dict[Site, Touched] = {}
        self.smooth = True  # no op was met that has kinks anywhere

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        # before the call: it may write into its operands
        given = _broken((args, kwargs)) if self.first is None else None
        touched = self._touched(name, args, kwargs) if self._kinks else None
        value = func(*args, **kwargs)
        if given is not None:
            self._look(name, given, value, (args, kwargs))
        if self._kinks:
            self._keep(name, touched, args, kwargs, value)
        return value

    # ---- not finite ---------------------------------------------------------------------------------------------

    def _look(self, name: str, given: tuple[bool, bool], value: Any, operands: Any) -> None:
        nan, inf = _broken(value)
        if not nan and not inf:
            return
        culprit = [self._named[id(t)] for t in pytree.tree_leaves(operands) if id(t) in self._named]
        if any(given) and culprit and (bad := [n for n in culprit if n]):
            self.operand = bad[0]
        elif (given[0] or not nan) and (any(given) or not inf):
            return  # handed on from an operand
        if not self.operand and not nan and name in _MASKS:
            return
        self.first, self.first_value = self._site(name), "NaN" if nan else "infinite"

    # ---- kinks --------------------------------------------------------------------------------------------------

    def _touched(self, name: str, args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
        x = args[0] if args else kwargs.get("input")
        if name not in _KINKS or not isinstance(x, Tensor) or not x.is_floating_point():
            return None
        return torch.stack([x.detach() == at for at in _KINKS[name]]).any(0)

    def _keep(self, name: str, touched: Tensor | None, args: tuple, kwargs: dict[str, Any], value: Any) -> None:
        kind = "exactly at its kink"
        x = args[0] if args else kwargs.get("input")
        if touched is None and isinstance(x, Tensor) and x.is_floating_point():
            if name in ("max_pool2d", "max_pool1d") or name in ("amax", "amin", "max", "min", "maximum", "minimum"):
                touched, kind = _ties(name, x, args, kwargs, value), "a tie"
            elif name in _SINGULAR and _floating(value):
                touched, kind = value.detach() == 0, "at 0, where the derivative is infinite"
                self.smooth = self.smooth and not bool(touched.any())
                self._add(name, touched, kind)
                return
            elif name in ("clamp", "clip", "clamp_", "clamp_min", "clamp_max", "sign", "round", "floor", "ceil"):
                self.smooth = False
        if touched is not None:
            self.smooth = False
            self._add(name, touched, kind)

    def _add(self, name: str, touched: Tensor, kind: str) -> None:
        self.kinks.setdefault(self._site(name), Touched(kind)).masks.append(touched)

    # ---- places -------------------------------------------------------------------------------------------------

    def _site(self, op: str) -> Site:
        module, line = "", ""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and not (module and line):
            code, owner = frame.f_code, frame.f_locals.get("self")
            if code is Problem.batch_value.__code__:
                break
            if not module and isinstance(owner, nn.Module) and id(owner) in self._names:
                name = self._names[id(owner)]
                module = f"{name!r} ({type(owner).__name__})" if name else f"the model ({type(owner).__name__})"
            if not line and not code.co_filename.startswith(_NOT_THE_USERS):
                line = f"{code.co_filename}, line {frame.f_lineno}, in {code.co_name}"
            frame = frame.f_back
        return Site(module, op.strip("_"), line)


def _floating(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def _broken(values: Any) -> tuple[bool, bool]:
    """Whether any tensor, or number, holds NaN, and whether any holds infinities."""
    nan = inf = False
    for v in pytree.tree_leaves(values):
        if isinstance(v, Tensor) and (v.is_floating_point() or v.is_complex()) and v.numel() and not v.is_meta:
            v = v.detach()
            nan, inf = nan or bool(v.isnan().any()), inf or bool(v.isinf().any())
        elif isinstance(v, float):
            nan, inf = nan or v != v, inf or v in (float("inf"), float("-inf"))
    return nan, inf


def _ties(name: str, x: Tensor, args: tuple, kwargs: dict[str, Any], value: Any) -> Tensor | None:
    """Where a maximum or minimum is attained more than once. None for forms that are not looked at."""
    x = x.detach()
    other = args[1] if len(args) > 1 else kwargs.get("other")
    if isinstance(other, Tensor) and name in ("maximum", "minimum", "max", "min"):
        return x.eq(other)
    if name == "max_pool2d":
        return _pooling_ties(x, args, kwargs)
    if name == "max_pool1d" and x.dim() == 3:
        return None
    best = value[0] if isinstance(value, tuple) else value
    dim = args[1] if len(args) > 1 else kwargs.get("dim")
    if not isinstance(best, Tensor) or dim is None or isinstance(dim, (tuple, list)):
        whole = isinstance(best, Tensor) and best.dim() == 0
        return torch.as_tensor((x == best).sum() > 1) if whole else None
    keep = args[2] if len(args) > 2 else kwargs.get("keepdim", False)
    return (x == (best if keep else best.unsqueeze(dim)).detach()).sum(dim) > 1


def _pooling_ties(x: Tensor, args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
    names = ("input", "kernel_size", "stride", "padding", "dilation")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    if x.dim() != 4:
        return None
    size = given["kernel_size"]
    stride, padding, dilation = given.get("stride") or size, given.get("padding", 0), given.get("dilation", 1)
    pad = (padding, padding) if isinstance(padding, int) else tuple(padding)
    padded = F.pad(x, (pad[1], pad[1], pad[0], pad[0]), value=-torch.inf)
    windows = F.unfold(padded.flatten(0, 1).unsqueeze(1), size, dilation=dilation, stride=stride)
    return (windows == windows.amax(1, keepdim=True)).sum(1) > 1


# ---- what is asked of a pass ------------------------------------------------------------------------------------


@contextmanager
def _on(watch: Watch) -> Iterator[None]:
    with torch.no_grad(), watch:
        yield


def pass_over(
    problem: Problem, state: State, batch: Batch, *, kinks: bool = False, parameters: Mapping[str, Tensor] | None = None
) -> tuple[Watch, float]:
    """The watch of one forward pass on a batch that was cast, and the loss."""
    parameters = dict(parameters or state.parameters)
    watch = Watch(problem.model, {id(t): n for n, t in parameters.items()}, kinks=kinks)
    with _on(watch):
        value = problem.batch_value(parameters, state, batch)
    return watch, float(value.detach())


def kinks(problem: Problem, state: State, batch: Batch, seed: int = 0) -> tuple[dict[Site, tuple[int, int, str]], bool]:
    """By site how many values of how many sit on a kink that a small change of the weights leaves; whether the model
    has no kinks at all.

    Values that stay on it (equal patches of a constant background, outputs of a ReLU that is off) are the same function
    of the weights on both sides: the derivative is what it is.
    """
    here, _ = pass_over(problem, state, batch, kinks=True)
    if not here.kinks:
        return {}, here.smooth
    generator = torch.Generator().manual_seed(seed)
    moved = {}
    for n, p in state.parameters.items():
        noise = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p)
        moved[n] = p + 1e-4 * (p.square().mean().sqrt() + 1e-4) * noise
    there, _ = pass_over(problem, state, batch, kinks=True, parameters=moved)
    found: dict[Site, tuple[int, int, str]] = {}
    totals: dict[Site, list[int]] = defaultdict(lambda: [0, 0])
    for site, touched in here.kinks.items():
        other = there.kinks.get(site)
        for i, mask in enumerate(touched.masks):
            still = other.masks[i] if other is not None and i < len(other.masks) else None
            left = mask & ~still if still is not None and still.shape == mask.shape else mask
            totals[site][0] += int(left.sum())
            totals[site][1] += mask.numel()
        if totals[site][0]:
            found[site] = (totals[site][0], totals[site][1], touched.kind)
    return found, here.smooth
