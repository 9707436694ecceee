"""A Problem: model + data + loss and its normalization, as one function of the parameters.

    L(theta) = sum_b w_b l_b(theta) / sum_b w_b          l_b = the loss of batch b, a mean over w_b terms

The user's model is never changed: every evaluation runs the real module with its parameters and buffers swapped for
tensors of ours (`torch.func.functional_call`), so parameters, buffers, ``.grad``, train/eval flags and the random state
come back untouched.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import hashlib
import random
import re
import sys
import types
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import checkpoint as checkpointing

from hoanalysis import culprits, losses
from hoanalysis.checkpoints import Checkpoint, fit
from hoanalysis.errors import ArgumentError, DataError, HoError, LossError, ModelError, listed
from hoanalysis.partitions import describe_parameters
from hoanalysis.settings import of_modules, of_value

Batch = Any


@dataclass(frozen=True)
class State:
    """The point theta at which the loss is differentiated: parameters (differentiated), the rest, and a dtype."""

    parameters: dict[str, Tensor]
    fixed: dict[str, Tensor]  # frozen parameters and buffers
    dtype: torch.dtype | None = None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {n: tuple(p.shape) for n, p in self.parameters.items()}


class Problem:
    """Model, data and loss, ready to be differentiated.

    Parameters
    ----------
    model
        A module; its own train/eval mode counts. Active dropout is refused, train-mode BatchNorm differentiated as
        it is.
    data
        A re-iterable of batches in a fixed order: a ``DataLoader`` without shuffling, a list, `hoanalysis.data`.
    loss
        ``loss(model(x), y)`` for batches ``(x, y)``: a mean over the batch.
    batch_loss
        Instead of ``loss``: ``fn(model, batch) -> scalar`` for batches of any structure.
    batch_size
        ``size(batch)``: the denominator of the batch's mean. Inferred for torch's losses, and for any ``loss=`` that
        is found to be a mean over rows; asked for otherwise.
    split
        ``fn(batch, i, j)`` -> the samples i..j of a batch, so that it can be computed in chunks.
    direction_data
        Batches for the direction ``"gradient"`` where they are others than ``data``: u = the gradient over all of a
        large training set, the derivatives over a part of it. Errors are conditional on u then.
    reduction
        ``"mean"``: a batch's loss is a mean over ``size(batch)`` terms, and L the mean over the data. ``"sum"``: it is
        a sum, and L the sum over the data.

    Raises
    ------
    ModelError, LossError, DataError
        Where the model is random, the loss is no differentiable scalar, its normalization is unknown, or the data is
        empty.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Iterable[Batch],
        loss: Callable | None = None,
        *,
        batch_loss: Callable[[nn.Module, Batch], Tensor] | None = None,
        batch_size: Callable[[Batch], float] | None = None,
        split: Callable[[Batch, int, int], Batch] | None = None,
        reduction: str = "mean",
        direction_data: Iterable[Batch] | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ModelError(f"the model is a {type(model).__name__}, not a torch.nn.Module")
        if (loss is None) == (batch_loss is None):
            raise LossError(
                "a problem needs either loss= or batch_loss=", do="pass loss=torch.nn.functional.cross_entropy"
            )
        if reduction not in ("mean", "sum"):
            raise ArgumentError(f"reduction is 'mean' or 'sum', not {reduction!r}")
        for given in (data, *([] if direction_data is None else [direction_data])):
            _refuse_one_pass(given)
        if batch_size is not None and not callable(batch_size):
            raise ArgumentError(
                f"batch_size is a function of a batch, not {batch_size!r}",
                do="leave it out, or pass batch_size=lambda batch: the denominator of the batch's mean",
            )
        self.model = _unwrapped(model)
        self.data, self.direction_data = data, direction_data
        self.reduction = reduction
        self.loss, self._batch_loss, self._split = loss, batch_loss, split
        self.notes: list[str] = []
        #: What is worth computing once: graphs, fingerprints, self-checks. Keyed by whoever fills it.
        self.cache: dict[Any, Any] = {}
        self._splittable: tuple[tuple, bool] | None = None
        self._rows_checked: int | None = None  # batches on which an inferred mean over rows was confirmed
        culprits.refuse_unready(self.model)
        self._refuse_dropout()
        self._size = batch_size or self._inferred_size()

    # ---- to another process -------------------------------------------------------------------------------------

    def packed(self) -> dict[str, Any]:
        """What another process makes the same problem from, by `unpacked`; caches stay here.

        What was found out with the model's own weights goes along: they may be left out.
        """
        return {**vars(self), "cache": {}, "_splittable": self.splittable}

    @classmethod
    def unpacked(cls, parts: Mapping[str, Any]) -> Problem:
        problem = cls.__new__(cls)
        vars(problem).update(parts)
        problem._splittable = problem.settings(), parts["_splittable"]  # settings tell tensors apart by their place
        return problem

    # ---- the point ----------------------------------------------------------------------------------------------

    def state(
        self,
        weights: Mapping[str, Tensor] | None = None,
        *,
        dtype: torch.dtype | None = None,
        include_frozen: bool = False,
    ) -> State:
        """The point theta: the model's own tensors, or ``weights`` (name -> tensor, as `checkpoints.fit` gives them).

        Tensors of ``weights`` that the model does not have are ignored here: fitting a checkpoint is the loader's job.
        """
        self._refuse_dropout()  # the model's mode and hooks may have changed since the last call
        culprits.refuse_hooks(self.model)
        selected, _ = describe_parameters(self.model, include_frozen)
        own = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        weights = weights or {}
        tensors = {n: _cast(weights.get(n, t).detach().to(t.dtype), dtype) for n, t in own.items()}
        half = [n for n in selected if tensors[n].dtype in (torch.float16, torch.bfloat16)]
        if half:
            raise ModelError(
                f"parameters in half precision: {listed(half)}",
                why="derivatives of order two and more are noise there",
                do="pass dtype='float32' (or 'float64'): parameters, buffers, direction and inputs are cast",
            )
        if twofold := [n for n in selected if own[n].requires_grad and own[n].is_complex()]:
            raise ModelError(
                f"complex parameters: {listed(twofold)}",
                why="the summaries are derivatives along real directions",
                do="hold real and imaginary parts as real parameters, joined by torch.complex in the forward pass",
            )
        return State({n: tensors[n] for n in selected}, {n: t for n, t in tensors.items() if n not in selected}, dtype)

    def upcast(self, include_frozen: bool = False) -> torch.dtype | None:
        """The dtype to compute in where the model is in half precision, which is noted; None where it is not."""
        selected, _ = describe_parameters(self.model, include_frozen)
        kinds = {p.dtype for n, p in self.model.named_parameters() if n in selected}
        half = sorted(str(k).removeprefix("torch.") for k in kinds & {torch.float16, torch.bfloat16})
        if not half:
            return None
        note = f"parameters in {' and '.join(half)} were cast to float32: derivatives of order two are noise there"
        if note not in self.notes:
            self.notes.append(note)
        return torch.float32

    def fitted(self, checkpoint: Checkpoint | Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a checkpoint under the model's names, tied ones once.

        Raises
        ------
        CheckpointError
            Where it does not fit the model.
        """
        known, _ = describe_parameters(self.model, include_frozen=True)
        aliases = {n: info.aliases for n, info in known.items() if info.aliases}
        named = {*known, *(a for others in aliases.values() for a in others)}
        buffers = {n: tuple(t.shape) for n, t in self.model.state_dict().items() if n not in named}
        dtypes = {n: t.dtype for n, t in self.model.state_dict().items()}
        return fit(checkpoint, {n: info.shape for n, info in known.items()}, buffers, aliases=aliases, dtypes=dtypes)

    # ---- the loss -----------------------------------------------------------------------------------------------

    def batch_value(self, parameters: Mapping[str, Tensor], state: State, batch: Batch) -> Tensor:
        """l_b: the loss of one batch as the user's function gives it, with ``parameters`` in the model's place.

        Runs on copies of the buffers, outside autocast and with the caller's random state kept; ``batch`` must have
        been through `cast` for ``state.dtype``.
        """
        buffers = {n: t.clone() for n, t in state.fixed.items()}
        swapped = {f"model.{n}": t for n, t in {**buffers, **parameters}.items()}
        device = next(iter(parameters.values())).device.type if parameters else "cpu"
        with (
            torch.enable_grad(),
            torch.autocast(device, enabled=False),
            keep_random_state(),
            without_checkpointing(),
            _without_compiling(),
        ):
            value = functional_call(_Call(self.model, self._user_loss(state.dtype)), swapped, (batch,))
        if not isinstance(value, Tensor) or value.dim() != 0:
            got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise LossError(f"the loss must be a scalar tensor, and is {got}", do="reduce it with .mean() or .sum()")
        if not value.is_floating_point():
            raise LossError(
                f"the loss must be a real number, and is {str(value.dtype).removeprefix('torch.')}",
                do="take .real or .abs() of a complex one; counts and shares of right answers have no derivative",
            )
        return value

    def cast(self, batch: Batch, dtype: torch.dtype | None) -> Batch:
        """The batch with its floating tensors in ``dtype``, on the model's device."""
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        return map_tensors(lambda t: _cast(t.detach(), dtype).to(device), batch)

    def size(self, batch: Batch) -> float:
        """w_b: the denominator of the batch's mean."""
        w = self._size_of(batch)
        if not (np.isfinite(w) and w > 0):
            raise DataError(
                f"a batch has size {w:g}",
                why="nothing in it counts: it is empty, or all its targets are masked",
                do="drop such batches from the data",
            )
        return w

    def shares(self, parts: Sequence[Batch], whole: Batch) -> list[float]:
        """What each part counts in the loss of the whole; 0 for one in which nothing counts."""
        if self.reduction == "sum":
            return [1.0] * len(parts)
        return [self._size_of(part) / self.size(whole) for part in parts]

    def _size_of(self, batch: Batch) -> float:
        try:
            return float(self._size(batch))
        except HoError:
            raise
        except Exception as error:
            raise DataError(
                f"the size of a batch could not be told: {type(error).__name__}: {error}",
                why=f"batch_size= is {describe_callable(self._size)}",
                do="let batch_size(batch) return the denominator of the batch's mean, a number",
            ) from error

    def settings(self) -> tuple:
        """What the model's modules and the loss keep as attributes, see `hoanalysis.settings`.

        What was found out about them holds as long as this is the same.
        """
        seen = {id(self.model)}
        return of_modules(self.model, seen), of_value(self._batch_loss or self.loss, seen)

    @property
    def splittable(self) -> bool:
        """Whether batches may be computed in chunks of samples: the recombined loss equals the whole one.

        Not so for losses that couple the samples of a batch, such as train-mode BatchNorm or a contrastive loss.
        """
        return self.splits(self.settings())

    def splits(self, settings: tuple) -> bool:
        """`splittable`, for a caller who knows the `settings` of this moment."""
        if self._split is None and self.loss is None:
            return False
        if self._splittable is None or self._splittable[0] != settings:
            batch = self.first_batch()
            self._splittable = settings, count_rows(batch) > 1 and self._recombines(batch)
        return self._splittable[1]

    def _recombines(self, batch: Batch) -> bool:
        """Whether the loss of a batch is the weighted mean (or the sum) of the losses of its two parts."""
        batch, rows = self.cast(batch, torch.float64), count_rows(batch)
        state = self.state(dtype=torch.float64, include_frozen=True)
        copies = {n: p.clone() for n, p in state.parameters.items()}
        # uneven, since masks and class weights can be alike in two halves; again where nothing counts in one of them
        cuts = dict.fromkeys(max(1, k) for k in (rows // 3, *(rows * i // 7 for i in (5, 3, 4, 1, 6))))
        try:
            whole = self.batch_value(copies, state, batch).detach()
            if not whole.isfinite():  # told later, with the batch's number
                return True
            for cut in cuts:
                parts = [self.take_rows(batch, 0, cut), self.take_rows(batch, cut, rows)]
                weights = self.shares(parts, batch)
                if all(weights):
                    values = [float(self.batch_value(copies, state, b).detach()) for b in parts]
                    again = sum(w * v for w, v in zip(weights, values, strict=True))
                    exact = 1e-9 if whole.dtype == torch.float64 else 1e-5  # a loss may work in single precision inside
                    return abs(again - float(whole)) <= exact * max(map(abs, (float(whole), *values)))
        except Exception:  # a loss that cannot take a part of a batch is taken whole: nothing is lost but memory
            return False
        return False

    def take_rows(self, batch: Batch, i: int, j: int) -> Batch:
        """Samples i..j of a batch: the user's ``split``, or the rows of its tensors."""
        if self._split is not None:
            return self._split(batch, i, j)
        rows = count_rows(batch)
        return map_tensors(lambda t: t[i:j] if t.dim() and len(t) == rows else t, batch)

    # ---- the data -----------------------------------------------------------------------------------------------

    def batches(self, max_batches: int | None = None, first: int = 0) -> Iterator[Batch]:
        """The batches of one pass, in order, with the caller's random state kept; those before ``first`` are passed by.

        Raises
        ------
        DataError
            Where there is no batch, another number of them than in the pass before, or another batch in a place.
        """
        count = 0
        with keep_random_state():
            for batch in batches_of(self.data):
                if max_batches is not None and count >= max_batches:
                    break
                if count >= first:
                    culprits.refuse_strange(tensors_of(batch), f"batch {count}")
                    if count_rows(batch) == 0:
                        raise DataError(f"batch {count} has no samples", do="drop empty batches from the data")
                    self._check_same(batch, count)
                    self._check_by_rows(batch, count)
                    yield batch
                count += 1
            else:
                before = self.cache.setdefault("batches in a pass", count)
                if count != before:
                    raise DataError(
                        f"one pass over the data gave {before} batches, the next one {count}",
                        why="it is a one-shot iterable, or it samples at random",
                        do="pass a list, a DataLoader or another re-iterable",
                    )
        if count == 0:
            raise DataError("the data has no batches", do="check the path, the subset and drop_last of the loader")

    def count(self, max_batches: int | None = None) -> int:
        """How many batches a pass has."""
        self.fingerprint(max_batches)
        known = len(self.cache["batch digests"])
        return known if max_batches is None else min(known, max_batches)

    def of_direction(self) -> Problem:
        """The problem over the batches of the direction ``"gradient"``: this one, unless it was given others."""
        if self.direction_data is None:
            return self
        if "of direction" not in self.cache:
            other = copy.copy(self)
            other.data, other.direction_data, other.cache, other._rows_checked = self.direction_data, None, {}, None
            self.cache["of direction"] = other
        return self.cache["of direction"]

    def first_batch(self) -> Batch:
        """The first batch, kept: self-checks and captures use it."""
        if "first batch" not in self.cache:
            self.cache["first batch"] = next(iter(self.batches(1)))
        return self.cache["first batch"]

    def fingerprint(self, max_batches: int | None = None) -> str:
        """SHA-256 over every tensor of every batch in order. Two passes that differ are an error.

        Raises
        ------
        DataError
            Where a second pass over the first batch gives other data: a shuffled loader or random augmentation.
        """
        key = ("data fingerprint", max_batches)
        if key not in self.cache:
            count = sum(1 for _ in self.batches(max_batches))
            with keep_random_state():  # another seed, since a pass keeps the random state that it started from
                seed_everything(1)
                next(iter(self.batches(1)))
            self.cache[key] = hashlib.sha256("".join(self.cache["batch digests"][:count]).encode()).hexdigest()
        return self.cache[key]

    def description(self) -> dict[str, Any]:
        """What was differentiated, for provenance: model, loss, reduction, train-mode modules."""
        training = sorted({type(m).__name__ for m in self.model.modules() if m.training and _mode_matters(m)})
        return {
            "model": f"{type(self.model).__module__}.{type(self.model).__qualname__}",
            "model_repr": hashlib.sha256(repr(self.model).encode()).hexdigest(),
            "loss": describe_callable(self.loss if self.loss is not None else self._batch_loss),
            "reduction": self.reduction,
            "train_mode": training,
            **({} if self.direction_data is None else {"direction_data": self.of_direction().fingerprint()}),
        }

    # ---- internals ----------------------------------------------------------------------------------------------

    def _user_loss(self, dtype: torch.dtype | None) -> Callable[[nn.Module, Batch], Tensor]:
        if self._batch_loss is not None:
            return self._batch_loss
        loss = _cast_loss(self.loss, dtype)

        def of_pair(model: nn.Module, batch: Batch) -> Tensor:
            x, y = _pair(batch)
            return loss(model(x), y)

        return of_pair

    def _refuse_dropout(self) -> None:
        active = [name for name, _ in active_dropout(self.model)]
        if active:
            raise ModelError(
                f"dropout is active in {listed(active)}",
                why="the loss is random then and has no derivative tensor",
                do="call model.eval(), or set the dropout probability to 0",
            )

    def check_deterministic(self, state: State) -> float:
        """The loss of the first batch, evaluated twice; `ModelError` where it differs, or changes the parameters."""
        batch = map_tensors(torch.clone, self.cast(self.first_batch(), state.dtype))  # the call may write to it
        versions = [t._version for t in tensors_of(batch)]
        copies = {n: p.clone() for n, p in state.parameters.items()}
        values = []
        with keep_random_state(), naming_batch(0), _refusing_broadcast_targets():
            for seed in (0, 1):
                seed_everything(seed)
                values.append(float(self.batch_value(copies, state, batch).detach()))
        if changed := [
            n for n, p in state.parameters.items() if not torch.equal(p.nan_to_num(), copies[n].nan_to_num())
        ]:
            raise ModelError(
                f"the model changes its own parameters when it is called: {listed(changed)}",
                why="the loss is then not a function of them (Embedding(max_norm=), weight clipping in forward)",
                do="leave such changes to the training loop",
            )
        if values[0] != values[1] and not all(np.isnan(values)):
            if versions != [t._version for t in tensors_of(batch)]:
                raise ModelError(
                    f"the loss of one batch came out as {values[0]!r} and {values[1]!r}",
                    why="the model or the loss changes the tensors of the batch in place",
                    do="let it leave its inputs as they are: x = 2 * x for x *= 2",
                )
            raise ModelError(
                f"the loss of one batch came out as {values[0]!r} and {values[1]!r}",
                why="the model or the loss draws random numbers (dropout, sampling, noise)",
                do="call model.eval() or remove the randomness",
            )
        return values[0]

    def _inferred_size(self) -> Callable[[Batch], float]:
        if self._batch_loss is not None:
            raise LossError(
                "batch_loss= needs batch_size=",
                why="what the batch's mean was divided by cannot be seen from outside; a count of rows may be wrong",
                do="pass batch_size=lambda batch: the number of samples (or unmasked tokens, or summed class weights)",
            )
        assert self.loss is not None
        known = losses.denominator(self.loss)
        if known is not None:
            return lambda batch: known(_pair(map_tensors(lambda t: t, batch)))
        self._size = count_rows
        if self.reduction == "sum" or self.splittable:
            if self.reduction == "mean":
                self.notes.append("the loss was found to be a mean over rows")
                self._rows_checked = 1
            return count_rows
        raise LossError(
            f"what {describe_callable(self.loss)} divides by is unknown",
            why="it is not one of torch's losses, and on the first batch it is not a mean over rows",
            do="pass batch_size=lambda batch: the denominator of the batch's mean",
        )

    def _check_same(self, batch: Batch, index: int) -> None:
        """Every pass must give the batches of the first one: what is cached and what is summed belong together.

        Told by CRC-32, which on LeNet-5 takes a quarter of the time of the SHA-256 that names the data in a store.
        """
        digests: list[str] = self.cache.setdefault("batch digests", [])
        checksums: list[int] = self.cache.setdefault("batch checksums", [])
        checksum = batch_checksum(batch)
        if index == len(digests):
            digests.append(batch_digest(batch))
            checksums.append(checksum)
        elif index < len(digests) and checksums[index] != checksum:
            raise DataError(
                "a second pass over the data gives other batches",
                where=f"batch {index}",
                why="the loader shuffles or augments at random, or the data were changed since they were given",
                do="use shuffle=False and a fixed transform; after a change of the data make a new Problem",
            )

    def _check_by_rows(self, batch: Batch, index: int) -> None:
        """A loss that was taken for a mean over rows on the first batch must be one on every other: checked once."""
        if self._rows_checked is None or index < self._rows_checked:
            return
        if count_rows(batch) > 1 and not self._recombines(batch):
            raise LossError(
                f"what {describe_callable(self.loss)} divides by is unknown",
                where=f"batch {index}",
                why="it is a mean over rows on the batches before, and not on this one: some targets may be masked",
                do="pass batch_size=lambda batch: the denominator of the batch's mean",
            )
        self._rows_checked = index + 1


def batches_of(data: Iterable[Batch]) -> Iterator[Batch]:
    """The batches of one pass; what the user's loader raises names the batch."""
    count, iterator = 0, None
    while True:
        try:
            iterator = iter(data) if iterator is None else iterator
            batch = next(iterator)
        except StopIteration:
            return
        except HoError:
            raise
        except Exception as error:
            raise culprits.of_data(error, f"batch {count}") from error
        yield batch
        count += 1


def _without_compiling() -> contextlib.AbstractContextManager:
    """Compiled submodules run as they were written: what torch.compile makes of them is differentiated once at most."""
    if "torch._dynamo" not in sys.modules:  # nothing was compiled; to look would import it
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")


@contextlib.contextmanager
def without_checkpointing() -> Iterator[None]:
    """Within it, `torch.utils.checkpoint` keeps activations.

    A checkpointed block is computed again in the backward pass, when the parameters that were swapped in are gone: its
    gradients would be those of the model's own weights.
    """

    def once(*_: Any, **__: Any) -> Iterator[None]:
        yield

    class Direct:
        @staticmethod
        def apply(function: Callable, preserve: bool, *args: Any) -> Any:
            return function(*args)

    replaced = {"_checkpoint_without_reentrant_generator": once, "CheckpointFunction": Direct}
    kept = {name: getattr(checkpointing, name) for name in replaced if hasattr(checkpointing, name)}
    try:
        for name in kept:
            setattr(checkpointing, name, replaced[name])
        yield
    finally:
        for name, value in kept.items():
            setattr(checkpointing, name, value)


class _Call(nn.Module):
    """The whole call as a module, so that parameters are swapped for all of it, not for ``forward`` alone."""

    def __init__(self, model: nn.Module, fn: Callable[[nn.Module, Batch], Tensor]) -> None:
        super().__init__()
        self.model = model
        object.__setattr__(self, "fn", fn)
        object.__setattr__(self, "training", model.training)

    def forward(self, batch: Batch) -> Tensor:
        return self.fn(self.model, batch)  # type: ignore[operator]


# ---- batches of any structure -----------------------------------------------------------------------------------


def map_tensors(fn: Callable[[Tensor], Tensor], batch: Batch) -> Batch:
    """``fn`` on every tensor of a nested batch: tuples, lists, mappings (also BatchEncoding), numpy arrays."""
    if isinstance(batch, Tensor):
        return fn(batch)
    if isinstance(batch, np.ndarray):
        return batch if batch.dtype.kind in "OSUMmV" else fn(_from_numpy(batch))
    if isinstance(batch, Mapping):
        items = {k: map_tensors(fn, v) for k, v in batch.items()}
        try:
            return type(batch)(items)  # type: ignore[call-arg]
        except TypeError:
            return items
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(map_tensors(fn, b) for b in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(map_tensors(fn, b) for b in batch)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        changed = {f.name: map_tensors(fn, getattr(batch, f.name)) for f in dataclasses.fields(batch) if f.init}
        return dataclasses.replace(batch, **changed)
    return batch


def _from_numpy(array: np.ndarray) -> Tensor:
    """Shares memory where torch can: not with read-only, reversed or byte-swapped arrays."""
    if not array.flags.writeable or min(array.strides, default=0) < 0 or not array.dtype.isnative:
        array = np.array(array, dtype=array.dtype.newbyteorder("="), order="C")
    return torch.from_numpy(array)


def _pair(batch: Batch) -> tuple[Any, Any]:
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return batch[0], batch[1]
    parts = f" of {len(batch)} parts" if isinstance(batch, (tuple, list)) else ""
    keys = f" with the keys {listed(batch)}" if isinstance(batch, Mapping) else ""
    raise DataError(
        f"loss= takes batches (x, y), and a batch is a {type(batch).__name__}{parts}{keys}",
        do="pass batch_loss=fn(model, batch) and batch_size=size(batch) instead",
    )


def tensors_of(batch: Batch) -> list[Tensor]:
    """The tensors of a nested batch, in order."""
    found: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        found.append(t)
        return t

    map_tensors(keep, batch)
    return found


def count_rows(batch: Batch) -> int:
    """The samples of a batch: the length of its first tensor that has a first axis."""
    lengths = [len(t) for t in tensors_of(batch) if t.dim()]
    return lengths[0] if lengths else 1


def batch_digest(batch: Batch) -> str:
    """SHA-256 over the structure of a batch, the dtype, shape and bytes of its tensors, and its other contents."""
    h = hashlib.sha256()
    _feed(h.update, batch, set())
    return h.hexdigest()


def batch_checksum(batch: Batch) -> int:
    """CRC-32 over the same."""
    value = 0

    def update(part: Any) -> None:
        nonlocal value
        value = zlib.crc32(part, value)

    _feed(update, batch, set())
    return value


def _feed(update: Callable[[Any], None], batch: Batch, seen: set[int]) -> None:
    if isinstance(batch, np.ndarray):
        batch = map_tensors(lambda t: t, batch)
        batch = batch.tolist() if isinstance(batch, np.ndarray) else batch
    update(f"{type(batch).__name__};".encode())
    if isinstance(batch, Tensor):
        update(f"{batch.dtype}{tuple(batch.shape)}".encode())
        update(batch.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    elif isinstance(batch, (str, bytes, int, float, complex, np.generic, types.NoneType)):
        update(f"{batch!r};".encode())
    elif isinstance(batch, Mapping):
        for k, v in batch.items():
            update(f"{k!r}:".encode())
            _feed(update, v, seen)
    elif isinstance(batch, (tuple, list)):
        update(f"{len(batch)};".encode())
        for b in batch:
            _feed(update, b, seen)
    elif hasattr(batch, "__dict__") and id(batch) not in seen:  # a class of the user's
        seen.add(id(batch))
        _feed(update, vars(batch), seen)


# ---- small things -----------------------------------------------------------------------------------------------


def describe_callable(fn: Any, depth: int = 3) -> str:
    """A name for a function, a partial or a module, for provenance and keys.

    Behind it stands a digest of what the name does not tell: code, defaults, closures and settings. ``depth`` bounds
    how far functions within functions are followed.
    """
    if isinstance(fn, functools.partial):
        bound = [_told(v, depth) for v in fn.args] + [f"{k}={_told(v, depth)}" for k, v in fn.keywords.items()]
        return f"partial({', '.join([describe_callable(fn.func, depth), *bound])})"
    if isinstance(fn, nn.Module):
        settings = {f"{n}.{k}": _told(v, depth) for n, m in fn.named_modules() for k, v in _settings(m).items()}
        return f"{fn!r}#{batch_digest([settings, dict(fn.state_dict())])[:8]}"
    name = f"{getattr(fn, '__module__', '?')}.{getattr(fn, '__qualname__', type(fn).__qualname__)}"
    code = getattr(fn, "__code__", None) or getattr(type(fn).__call__, "__code__", None)
    if code is None or name.startswith("torch.") or depth == 0:
        return name
    told = [_code_text(code), [_told(v, depth - 1) for v in _bound(fn)]]
    return f"{name}#{batch_digest(told)[:8]}"


def _bound(fn: Any) -> list[Any]:
    """What is bound to a function beside its code: defaults, closure, the object of a method or its attributes."""
    cells = getattr(fn, "__closure__", None) or ()
    held = [getattr(fn, "__defaults__", None), getattr(fn, "__kwdefaults__", None), getattr(fn, "__self__", None)]
    for cell in cells:
        with contextlib.suppress(ValueError):  # an empty cell
            held.append(cell.cell_contents)
    return held if hasattr(fn, "__code__") else [_settings(fn)]


def _settings(owner: Any) -> dict[str, Any]:
    return {k: v for k, v in sorted(getattr(owner, "__dict__", {}).items()) if k[0] != "_" and k != "training"}


def _told(value: Any, depth: int) -> str:
    """A value that is bound to a loss, in a form that is the same in every process."""
    if isinstance(value, (str, bytes, int, float, complex, np.generic, types.NoneType, torch.dtype)):
        return repr(value)
    if isinstance(value, (Tensor, np.ndarray)):
        return f"tensor#{batch_digest(value)[:8]}"
    if isinstance(value, (set, frozenset)):  # their order differs between processes
        return f"{{{', '.join(sorted(_told(v, depth) for v in value))}}}"
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(_told(v, depth) for v in value)}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{k!r}: {_told(v, depth)}' for k, v in value.items())}}}"
    if isinstance(value, nn.Module):  # often the model itself, whose weights belong to the checkpoint
        return repr(value)
    if callable(value) and not isinstance(value, type):
        return describe_callable(value, depth)
    return type(value).__qualname__


def _code_text(code: types.CodeType) -> str:
    consts = [_code_text(c) if isinstance(c, types.CodeType) else _told(c, 0) for c in code.co_consts]
    return f"{code.co_code.hex()} {code.co_names} {code.co_freevars} {consts}"


def _cast(t: Tensor, dtype: torch.dtype | None) -> Tensor:
    return t.to(dtype) if dtype is not None and t.is_floating_point() else t


def _cast_loss(loss: Any, dtype: torch.dtype | None) -> Any:
    """The loss with the tensors bound to it (class weights) in ``dtype``."""
    if dtype is None:
        return loss
    if isinstance(loss, functools.partial):
        keywords = {k: _cast(v, dtype) if isinstance(v, Tensor) else v for k, v in loss.keywords.items()}
        return functools.partial(_cast_loss(loss.func, dtype), *loss.args, **keywords)
    if isinstance(loss, nn.Module):
        return copy.deepcopy(loss).to(dtype)
    return loss


def _refuse_one_pass(data: Any) -> None:
    if isinstance(data, Iterator):
        raise DataError(
            "the data is a one-shot iterator",
            why="it is empty after the first pass, and several passes are needed",
            do="pass a list, a DataLoader or another re-iterable",
        )
    if not hasattr(type(data), "__iter__") and not hasattr(type(data), "__getitem__"):
        raise DataError(
            f"the data is a {type(data).__name__}, which cannot be iterated", do="pass a list or a DataLoader"
        )


def _unwrapped(model: nn.Module) -> nn.Module:
    """The module inside torch.compile and DataParallel wrappers; scripted and sharded ones are refused by name."""
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError("a TorchScript module cannot be differentiated here", do="pass the original nn.Module")
    wrapper = type(model).__name__
    if wrapper == "OptimizedModule":
        return _unwrapped(model._orig_mod)  # type: ignore[arg-type]
    if wrapper in ("DataParallel", "DistributedDataParallel"):
        return _unwrapped(model.module)  # type: ignore[arg-type]
    if wrapper in ("FullyShardedDataParallel", "FSDPModule"):
        raise ModelError(f"a {wrapper} model holds only a part of its parameters", do="gather them into a plain module")
    return model


def active_dropout(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules that draw random numbers in the mode they are in, with their names."""
    return [
        (name or type(m).__name__, m)
        for name, m in model.named_modules()
        if m.training
        and (
            (isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0)
            or (isinstance(m, (nn.RNNBase, nn.MultiheadAttention)) and m.dropout > 0)
        )
    ]


def _mode_matters(m: nn.Module) -> bool:
    return isinstance(m, nn.modules.batchnorm._NormBase) and m.track_running_stats


@contextlib.contextmanager
def naming_batch(index: int) -> Iterator[None]:
    """Errors of one batch with its number; an index that torch finds out of range (a label) is a `DataError`.

    What else the user's model or loss raises is a `ModelError` or a `LossError` that names module and line.
    """
    try:
        yield
    except DataError as error:
        if error.where:
            raise
        raise DataError(error.what, where=f"batch {index}", why=error.why, do=error.do, kept=error.kept) from error
    except Exception as error:
        if not culprits.foreign(error):
            raise
        if not isinstance(error, (IndexError, RuntimeError)) or not re.search(r"out of (bounds|range)", str(error)):
            raise culprits.of_call(error, f"batch {index}") from error
        raise DataError(
            f"a batch holds an index that is out of range: {error}",
            where=f"batch {index}",
            why="a label or token is not below the number of classes, or is negative",
            do="check the labels, the vocabulary, and ignore_index of the loss",
        ) from error


@contextlib.contextmanager
def _refusing_broadcast_targets() -> Iterator[None]:
    """torch's losses warn where targets of one shape and outputs of another are compared all with all."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Using a target size", category=UserWarning)
        try:
            yield
        except UserWarning as warning:
            raise LossError(
                "the targets do not have the shape of the outputs, so that each is compared with all",
                where="batch 0",
                why=str(warning).partition(". This will")[0],
                do="give the targets the shape of the outputs, y.view_as(output) or y[:, None]",
            ) from None


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Products of float32 in float32: with TF32 or bfloat16 inside, derivatives of order two are noise.

    Whoever called gets the settings back.
    """
    onednn: Any = torch.backends.mkldnn.conv  # type: ignore[attr-defined]
    kept = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32, onednn.fp32_precision
    try:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        onednn.fp32_precision = "ieee"
        yield
    finally:
        torch.set_float32_matmul_precision(kept[0])
        torch.backends.cudnn.allow_tf32 = kept[1]
        onednn.fp32_precision = kept[2]


@contextlib.contextmanager
def keep_random_state() -> Iterator[None]:
    """The random state of torch, numpy and Python as it was before; loaders draw a seed for each pass."""
    state, numpy_state, python_state = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    try:
        yield
    finally:
        torch.set_rng_state(state)
        np.random.set_state(numpy_state)  # noqa: NPY002
        random.setstate(python_state)


def seed_everything(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    random.seed(seed)
