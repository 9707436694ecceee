"""What modules, losses and other objects keep as attributes: what was found out about them holds while it is the same.

Numbers, words, arrays, containers of them and objects of the user's classes are told by their content, tensors by
their place and version, everything else by being the same one. With a function go its defaults, the variables that it
closes over, and those global names in its code that hold data; what the functions that it calls read is not seen.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import types
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_VALUES = (bool, int, float, complex, str, bytes, types.NoneType, torch.dtype, torch.device, np.generic)
_DATA = (*_VALUES, Tensor, np.ndarray, dict, list, tuple, set, frozenset)
_NAMES = (types.BuiltinFunctionType, type, types.ModuleType)
_INTERNAL = frozenset(vars(nn.Module())) - {"training"}
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")


class Same:
    """Equal to another only if both hold the very same object, which stays alive, so that its place stays its own."""

    __slots__ = ("held",)

    def __init__(self, held: Any) -> None:
        self.held = held

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and other.held is self.held

    def __hash__(self) -> int:
        return id(self.held)


def of_modules(model: nn.Module, seen: set[int] | None = None) -> tuple:
    """The attributes of every module, and its forward hooks; hashable."""
    seen = set() if seen is None else seen
    return tuple(tuple(_of_module(m, seen)) for m in model.modules())


def of_value(value: Any, seen: set[int] | None = None) -> Any:
    """A hashable value that is equal as long as this one is."""
    seen = set() if seen is None else seen
    if isinstance(value, _VALUES):
        return type(value), value
    if isinstance(value, Tensor):
        return _of_tensor(value)
    if isinstance(value, nn.Module):
        return () if _again(value, seen) else (of_modules(value, seen), *map(_of_tensor, _tensors(value)))
    if isinstance(value, _NAMES):
        return Same(value)
    if _again(value, seen):
        return ()
    if isinstance(value, np.ndarray):
        return _of_array(value, seen)
    if isinstance(value, types.FunctionType):
        return Same(value), *(of_value(v, seen) for v in _bound(value))
    if isinstance(value, functools.partial):
        return Same(value.func), of_value(value.args, seen), of_value(value.keywords, seen)
    if isinstance(value, Mapping):
        return type(value), tuple((of_value(k, seen), of_value(v, seen)) for k, v in value.items())
    if isinstance(value, (list, tuple, set, frozenset)):
        return type(value), tuple(of_value(v, seen) for v in value)
    if isinstance(value, types.MethodType):
        return of_value(value.__func__, seen), of_value(value.__self__, seen)
    if hasattr(value, "__dict__"):
        return Same(value), of_value(vars(value), seen)
    return Same(value)


def _of_tensor(t: Tensor) -> tuple[Same, int]:
    return Same(t), t._version


def _of_array(a: np.ndarray, seen: set[int]) -> tuple:
    if a.dtype.hasobject:
        return a.shape, tuple(of_value(v, seen) for v in a.ravel().tolist())
    return a.shape, a.dtype.str, hashlib.blake2b(a.tobytes()).digest()


def _bound(fn: types.FunctionType) -> Iterator[Any]:
    """What a function brings along: defaults, the variables that it closes over, and the global data that it names."""
    yield fn.__defaults__
    yield fn.__kwdefaults__
    for cell in fn.__closure__ or ():
        with contextlib.suppress(ValueError):  # an empty cell
            yield cell.cell_contents
    for name in dict.fromkeys(_names(fn.__code__)):
        if isinstance(value := fn.__globals__.get(name, fn), _DATA):
            yield value


def _names(code: types.CodeType) -> Iterator[str]:
    """Also those in comprehensions and functions within."""
    yield from code.co_names
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            yield from _names(const)


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    """Those of a loss; the model's own are a part of the point at which it is differentiated."""
    yield from module.parameters()
    yield from module.buffers()


def _again(value: Any, seen: set[int]) -> bool:
    """Whether this object was met before: a configuration that all layers share is read once."""
    if id(value) in seen:
        return True
    seen.add(id(value))
    return False


def _of_module(module: nn.Module, seen: set[int]) -> Iterator[Any]:
    own = vars(module)
    for name, value in own.items():
        if name not in _INTERNAL:
            yield name, of_value(value, seen)
    for name in _HOOKS:
        if own[name]:
            yield name, tuple(Same(hook) for hook in own[name].values())
