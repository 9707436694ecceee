"""What the user's own code raised, as a sentence that names the module, the line and the batch.

An exception of a model, a loss or a loader passes through many frames of torch and of this package. What helps is the
innermost of the user's frames and the innermost module that was called.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from hoanalysis.errors import DataError, HoError, LossError, ModelError, listed

_OURS = (str(Path(__file__).parent), str(Path(torch.__file__).parent), "<")

#: What torch says -> what to do about it.
_ADVICE = (
    (r"does not require grad|second time", "return the loss and leave .backward() out: the derivatives are taken here"),
    (r"register a hook", "remove the hook: it would change gradients, which are then not derivatives of the loss"),
    (r"inplace operation", "write it without changing tensors in place: h = h + 1 for h += 1"),
    (r"dtype|expected scalar type", "give parameters and inputs one dtype; dtype='float64' casts all floating ones"),
    (r"same device|on device", "put the model on one device"),
    (r"[Ss]hape|size|cannot be multiplied", "check that the batches are those that the model was trained on"),
)


def foreign(error: BaseException) -> bool:
    """Whether an exception is none that this package raises or handles itself."""
    ours = isinstance(error, HoError) or type(error).__module__.startswith("hoanalysis.")
    return isinstance(error, Exception) and not ours and not isinstance(error, MemoryError) and not _memory(error)


def _memory(error: BaseException) -> bool:
    """torch says in words that memory is short; the engines then take smaller chunks."""
    words = r"out of memory|not enough memory|cannot allocate|can't allocate|failed to allocate|alloc_cpu|bad_alloc"
    return bool(re.search(words, str(error), re.IGNORECASE))


def of_call(error: Exception, where: str, root: nn.Module | None = None) -> HoError:
    """A `ModelError` where a module raised, else a `LossError`."""
    module, line, outer = _place(error.__traceback__)
    root = root or outer
    name = _name(root, module)
    kind, who = (ModelError, f"the model{name}") if module is not None else (LossError, "the loss")
    text = _first_line(error)
    advice = next((do for pattern, do in _ADVICE if re.search(pattern, str(error))), "")
    mixed = _kinds(root) if re.search(r"dtype|device|scalar type", str(error)) else ""
    return kind(
        f"{who} raised {type(error).__name__}: {text}",
        where=", ".join(filter(None, (where, line))),
        why=mixed,
        do=advice or "call it on this batch by itself to see more",
    )


def of_backward(error: RuntimeError, again: Callable[[], Tensor], where: str) -> Exception:
    """An error of the backward pass, with the line of the forward pass that it is about: ``again`` makes the loss."""
    if not foreign(error):
        return error
    told = of_call(error, where)
    with warnings.catch_warnings(record=True) as heard, contextlib.suppress(Exception):
        warnings.simplefilter("always")
        with torch.autograd.detect_anomaly(check_nan=False):
            again().backward()
    places = re.findall(r'File "(.+)", line (\d+), in (\S+)\n\s*(.*)', "".join(str(w.message) for w in heard))
    mine = [p for p in places if not p[0].startswith(_OURS)]
    line = "{}, line {}, in {}: {}".format(*mine[-1]) if mine else ""
    return ModelError(
        f"the model cannot be differentiated: {_first_line(error)}",
        where=", ".join(filter(None, (where, line))),
        do=told.do,
    )


def of_data(error: Exception, where: str) -> DataError:
    """What a loader or a dataset raised while it made a batch."""
    text = _first_line(error)
    _, line, _ = _place(error.__traceback__)
    do = "iterate over the data by itself to see more"
    if re.search(r"worker|pickle|fork|spawn|exited unexpectedly|shared memory", str(error), re.IGNORECASE):
        do = "use num_workers=0: the loader then works in this process, and its errors are seen"
    # a worker tells its own error within a longer text
    inner = re.findall(r"^(\w+(?:Error|Exception|Interrupt)\b.*)$", str(error), re.MULTILINE)
    return DataError(
        f"the data raised {type(error).__name__}: {text}",
        where=", ".join(filter(None, (where, line))),
        why=inner[-1][:300] if inner else "",
        do=do,
    )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else "without a message"


def _frames(tb: TracebackType | None) -> Iterator[tuple[Any, int]]:
    while tb is not None:
        yield tb.tb_frame, tb.tb_lineno
        tb = tb.tb_next


def _place(tb: TracebackType | None) -> tuple[nn.Module | None, str, nn.Module | None]:
    """The innermost module that was running, the innermost line of the user's, and the outermost module."""
    module, root, line = None, None, ""
    for frame, number in _frames(tb):
        owner, file = frame.f_locals.get("self"), frame.f_code.co_filename
        if isinstance(owner, nn.Module):
            if root is None:
                root = getattr(owner, "model", owner)  # the outermost is the call of the loss with the model in it
            module = owner if not hasattr(owner, "fn") else module
        if not file.startswith(_OURS):
            line = f"{file}, line {number}, in {frame.f_code.co_name}"
    return module, line, root if isinstance(root, nn.Module) else None


def _name(root: nn.Module | None, module: nn.Module | None) -> str:
    """The module's name in the model and its class."""
    if module is None:
        return ""
    name = next((n for n, m in root.named_modules() if m is module), "") if root is not None else ""
    return f", in {name!r} ({type(module).__name__})," if name else f" ({type(module).__name__})"


def _kinds(root: nn.Module | None) -> str:
    """Dtypes and devices of the parameters, where there are several."""
    if root is None:
        return ""
    kinds: dict[str, list[str]] = {}
    for name, p in root.named_parameters():
        kinds.setdefault(f"{p.dtype} on {p.device}", []).append(name)
    if len(kinds) < 2:
        return f"the parameters are {next(iter(kinds), 'none')}"
    return "; ".join(f"{kind}: {listed(names, 4)}" for kind, names in kinds.items())


# ---- what is refused before it is called ------------------------------------------------------------------------


def refuse_hooks(model: nn.Module) -> None:
    """Backward hooks can change gradients, and see passes that are no training."""
    hooked = [n or type(m).__name__ for n, m in model.named_modules() if m._backward_hooks or m._backward_pre_hooks]
    if hooked:
        raise ModelError(
            f"backward hooks are registered on {listed(hooked)}",
            why="a hook may change gradients, which are then not derivatives of the loss",
            do="remove them: handle.remove(), with the handle that register_full_backward_hook returned",
        )


def refuse_unready(model: nn.Module) -> None:
    """Parameters without data, or on several devices."""
    lazy = [n for n, p in model.named_parameters() if nn.parameter.is_lazy(p)]
    if lazy:
        raise ModelError(
            f"parameters have no shape yet: {listed(lazy)}",
            do="call the model once on a batch before: it has lazy layers",
        )
    held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    if meta := [n for n, p in held.items() if p.is_meta]:
        raise ModelError(
            f"parameters are on the meta device, which holds no numbers: {listed(meta)}",
            do="build the model on a real device, or call model.to_empty(device='cpu') and load its weights",
        )
    devices: dict[str, list[str]] = {}
    for n, p in model.named_parameters():
        devices.setdefault(str(p.device), []).append(n)
    if len(devices) > 1:
        raise ModelError(
            f"the parameters are on {len(devices)} devices",
            where="; ".join(f"{d}: {listed(names, 4)}" for d, names in devices.items()),
            do="put the model on one device",
        )


def refuse_nonfinite(tensors: list[Tensor], index: int) -> None:
    """Inputs that are not finite, where the loss of a batch is not."""
    for t in tensors:
        if t.is_floating_point() and t.dim() and not bool(t.isfinite().all()):
            rows = (~t.isfinite()).reshape(len(t), -1).any(1).nonzero().flatten().tolist()
            raise DataError(
                f"batch {index} has inputs that are not finite",
                where=f"samples {rows[:10]} of the batch" + (f" and {len(rows) - 10} more" if len(rows) > 10 else ""),
                do="remove or repair these samples",
            )


def refuse_strange(tensors: list[Tensor], where: str) -> None:
    """Tensors of a batch that cannot be cut into samples and cast."""
    for t in tensors:
        kind = "nested" if t.is_nested else "" if t.layout == torch.strided else str(t.layout).removeprefix("torch.")
        kind = kind or ("meta" if t.is_meta else "quantised" if t.is_quantized else "")
        if kind:
            advice = {
                "nested": "pad it: torch.nested.to_padded_tensor(x, 0.0)",
                "meta": "give tensors that hold numbers",
            }
            raise DataError(
                f"a batch holds a {kind} tensor, and batches are plain dense tensors",
                where=where,
                do=advice.get(kind, "x.dequantize()" if kind == "quantised" else "x.to_dense() in the dataset")
                + ", or build it within batch_loss=",
            )
