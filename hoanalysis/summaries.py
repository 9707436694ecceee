"""The only place where torch meets xarray: from a problem to the labelled Dataset of its summaries."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import re
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from tqdm.auto import tqdm

from hoanalysis import schema, units
from hoanalysis._version import __version__
from hoanalysis.checkpoints import Checkpoint, Run, load_checkpoint
from hoanalysis.checkpoints.load import content_sha256
from hoanalysis.derivatives import engines, nested
from hoanalysis.derivatives.accumulate import accumulate, stopping
from hoanalysis.derivatives.common import Request
from hoanalysis.derivatives.influence import influence
from hoanalysis.derivatives.measured import MEASURES, Measure
from hoanalysis.derivatives.tangents import TangentsUnsupported
from hoanalysis.directions import (
    LAST,
    OF_GRADIENT,
    Direction,
    Part,
    Recipe,
    default_taus,
    digest,
    file_of,
    group_norms,
    of_parts,
    part_of_gradient,
)
from hoanalysis.directions import resolve as resolve_direction
from hoanalysis.errors import (
    ArgumentError,
    CheckpointError,
    ClusterError,
    HoError,
    NoDirection,
    NumericsError,
    StoreError,
    listed,
)
from hoanalysis.partitions import Partition
from hoanalysis.partitions import resolve as resolve_partition
from hoanalysis.problem import Problem, State, count_rows, full_precision
from hoanalysis.quadrature import NODES
from hoanalysis.shards import Shard, cut
from hoanalysis.store import Store
from hoanalysis.store.container import canonical

if TYPE_CHECKING:
    from hoanalysis.cluster.driver import Workers

MAX_ORDER = 16
MAX_ENTRIES = 2**27  # of one tensor: 1 GiB of float64

CheckpointLike: TypeAlias = Checkpoint | str | Path | Mapping[str, Tensor] | None
Item: TypeAlias = tuple[int, dict[str, Any]]  # a unit to be computed: the checkpoint's position in the run, the key
Made: TypeAlias = Callable[[], xr.Dataset]  # the unit, or raises what went wrong with it


class Directions(Protocol):
    """Where a direction is kept: a `Store`, or on a worker of a cluster what it was given."""

    def read_arrays(self, key: Mapping[str, Any]) -> dict[str, np.ndarray] | None: ...
    def publish_arrays(self, key: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None: ...


@dataclass(frozen=True)
class Settings:
    """What to compute, with the defaults of `summarize`. See there for the meaning of each."""

    order: int = 2
    direction: Recipe = "gradient"
    partition: str | Partition = "canonical"
    diagonal: int | None = None
    engine: str = "auto"
    dtype: str | torch.dtype | None = None
    memory: str | int = "2GiB"
    max_batches: int | None = None
    tolerance: float | None = None
    keep_batches: int = 0
    include_frozen: bool = False
    self_check: bool = True
    seed: int = 0
    measure: Sequence[str] = ()
    taus: Sequence[float] | None = None
    errors: str = "conditional"
    shards: int = 1  # of `summarize_run` alone

    @property
    def request(self) -> Request:
        return Request(self.order, self.diagonal)


def summarize(
    problem: Problem,
    order: int = Settings.order,
    *,
    direction: Recipe = Settings.direction,
    partition: str | Partition = Settings.partition,
    diagonal: int | None = Settings.diagonal,
    engine: str = Settings.engine,
    checkpoint: CheckpointLike = None,
    dtype: str | torch.dtype | None = Settings.dtype,
    memory: str | int = Settings.memory,
    max_batches: int | None = Settings.max_batches,
    tolerance: float | None = Settings.tolerance,
    keep_batches: int = Settings.keep_batches,
    include_frozen: bool = Settings.include_frozen,
    self_check: bool = Settings.self_check,
    seed: int = Settings.seed,
    measure: Sequence[str] = Settings.measure,
    taus: Sequence[float] | None = Settings.taus,
    errors: str = Settings.errors,
    progress: bool = True,
) -> xr.Dataset:
    """The summaries D^(1) .. D^(order) of the loss over the data, with standard errors.

        D^(d)[s1..sd] = d^d L / dT_s1 .. dT_sd (theta) [U^s1, .., U^sd]       shape (S,)*d, unit of the loss

    L is the weighted mean (or sum, see `Problem`) over the batches, U^s the part of the direction u in group s. The
    standard error over n batches of weight w_b is conditional on u (unless ``errors`` says otherwise):

        se^2 = n/(n-1) sum_b w_b^2 (x_b - x)^2 / (sum_b w_b)^2

    Parameters
    ----------
    problem
        Model, data and loss. The model comes back untouched.
    order
        The highest order d of a full tensor.
    direction
        ``"gradient"`` (over the whole data, in a first pass), ``"weights"``, ``"random"``, ``"to:<file>"``,
        ``"momentum"``, ``"adam"``, a mapping parameter name -> tensor, or a callable (checkpoint, run) -> mapping.
    partition
        ``"canonical"`` (one group per tensor), ``"layer"``, ``"kind"``, ``"trivial"``, ``"discrete"`` or a `Partition`.
    diagonal
        ``3`` adds D^(3)[s,s,s], which the regularizer r needs, beside the tensors of order 1 .. ``order``.
    engine
        ``"auto"``, ``"tangents"`` or ``"nested"``; what ran is the coordinate ``engine``, why is ``engine_detail``.
    checkpoint
        Weights to put in the model's place: a `Checkpoint`, a path, or a state_dict. None: the model's own.
    dtype
        ``"float64"`` casts parameters, buffers, direction and floating inputs. None is the model's. Results are
        float64 in any case.
    memory
        Budget for the derivatives of one batch, in bytes or as ``"2GiB"``; batches are chunked to fit where possible.
    max_batches
        Use the first batches only.
    tolerance
        0.05 stops once, for every order, all entries of at least a tenth of the largest have a relative standard error
        of at most 5 %; at least 8 batches are used. The coordinate ``n_batches`` says how many it took, ``stopping``
        whether that was enough. The batches should stand in random order. A pass that stops where an estimated error
        is small stops a little early: see docs/errors.md.
    keep_batches
        K > 0 keeps un-normalised sums over at most K contiguous blocks of batches, from which merging and every
        derived error are computed.
    include_frozen
        Take in parameters with ``requires_grad=False``.
    self_check
        Compare with univariate nested differentiation on a few samples; the error is the coordinate ``self_check``.
    seed
        For the direction ``"random"``.
    measure
        What the summaries predict, measured by forward passes in the same pass over the data. ``"along"``:
        ``change_along`` = L(theta + tau u) - L(theta) for each of ``taus``. ``"removed"``: ``change_removed`` =
        L(theta + U^s) - L(theta), S passes. ``"pairs"``: ``change_removed_pair`` = L(theta + U^s + U^t) - L(theta),
        S(S+1)/2 passes. Their errors are those of the change; ``loss_along``, ``loss_removed`` and
        ``loss_removed_pair`` are the losses. ``"path"``: ``slope_path`` = U^s . gradient L(theta + t u) at the 7 nodes
        t of a quadrature over 0..1, and ``change_path``, 7 gradients: what each group did to the loss along a step, see
        `ds.ho.path`. Buffers stay those of the checkpoint. An overflow is inf or NaN.
    taus
        Multiples of u for ``"along"``. None: from 0.125 to 4, and -0.25 to -1; for gradient, momentum and adam, of
        which a training step is -eta u, minus the learning rates from 1e-4 to 3.
    errors
        ``"unconditional"``: where u is the gradient of the same data, the errors of the derivatives, and through the
        kept blocks those of whatever is derived, include how the data act through u. They are then errors over the
        kept blocks, and cost C(S+d-2, d-1) more backward passes a batch (S for D2). See docs/errors.md.
    progress
        Show a progress bar.

    Returns
    -------
    xarray.Dataset
        The schema of `hoanalysis.schema`.

    Raises
    ------
    HoError
        Of the subclass that names the culprit: model, loss, data, partition, direction, checkpoint or numerics.
    """
    settings = Settings(
        order, direction, partition, diagonal, engine, dtype, memory, max_batches, tolerance, keep_batches,
        include_frozen, self_check, seed, measure, taus, errors,
    )  # fmt: skip
    work = Work(problem, settings)
    loaded = load_checkpoint(checkpoint) if isinstance(checkpoint, (str, Path)) else checkpoint
    unit = work.sums(loaded, progress=progress)
    sha = loaded.sha256 if isinstance(loaded, Checkpoint) else ""
    plan = work.plan([{"step": 0, "sha256": sha, "units": [{}]}], series=False)
    return units.assemble(plan, lambda _: unit)


def summarize_run(
    run: Run,
    problem: Problem,
    order: int = Settings.order,
    *,
    store: str | Path | None = None,
    client: Any = None,
    progress: bool = True,
    **options: Any,
) -> xr.Dataset:
    """`summarize` for every checkpoint of a run: a Dataset with the leading dim ``step``.

    A checkpoint that has no such direction (the last one has no next, the first no optimizer state) is a gap: NaN,
    coverage 0, and the reason in the coordinate ``gap``; where that is all of them, it is an error. One that cannot be
    computed (its file is damaged, say) stops no other. With a store it is raised when the others are published;
    without one it is a warning and NaN, so that nothing is lost, and an error where it is all of them.

    Parameters
    ----------
    store
        A folder for the unit files. What is there already is not computed again; kill the process at any instant and
        call again.
    client
        A `distributed.Client`: its workers compute the units, each with one Dask thread and as many torch threads as
        this process has (``torch.set_num_threads``), which gives the bits that this process would give. This process
        alone writes. Workers load checkpoints by path, and compare digests. What a lost worker had in hand is given
        to others; a unit that kills whoever computes it is named at the end, when the others are done.
    options
        As for `summarize`, except ``checkpoint``; and ``shards``, a whole number: the data of a checkpoint are cut into
        at most so many units, so that a run of fewer checkpoints than workers keeps them busy. A shard holds whole
        blocks of ``keep_batches``, which stay what they are without shards. The sums of the shards are added in their
        order: with the same ``shards`` the bits are the same however many workers there are, with others the last bits
        differ. A tolerance, and unconditional errors, look at all the data at once and exclude shards.
    """
    if unknown := [k for k in options if k not in Settings.__dataclass_fields__]:
        raise ArgumentError(f"unknown options: {listed(unknown)}", do=f"use {listed(Settings.__dataclass_fields__)}")
    if not len(run):
        raise ArgumentError("the run has no checkpoints")
    work = Work(problem, Settings(order, **options))
    plan = work.plan(work.steps(run), series=True)
    workers = None if client is None else _workers_of(client, problem, progress)
    if store is None:
        made = work.in_memory(run, plan, progress, workers)
        return units.assemble(plan, lambda key: made.get(canonical(key)))
    with Store.open(store, mode="w") as opened:
        opened.register(work.name, plan)
        work.fill(opened, run, plan, progress, workers)
        return units.assemble(plan, opened.read)


def _workers_of(client: Any, problem: Problem, progress: bool) -> Workers:
    """The workers of a Dask client, to compute units of a live problem."""
    from hoanalysis.cluster.clients import checked, show_dashboard
    from hoanalysis.cluster.driver import Workers
    from hoanalysis.cluster.parcels import Source

    client = checked(client)
    if progress:
        show_dashboard(client)
    return Workers(client, Source.of_problem(problem))


@full_precision()
def taylor_terms(
    problem: Problem,
    order: int,
    *,
    direction: Recipe = Settings.direction,
    checkpoint: CheckpointLike = None,
    dtype: str | torch.dtype | None = Settings.dtype,
    max_batches: int | None = Settings.max_batches,
    include_frozen: bool = Settings.include_frozen,
    seed: int = Settings.seed,
    progress: bool = True,
) -> xr.DataArray:
    """The Taylor terms d^k/dt^k L(theta + t u) at t = 0 for k = 1..order, with the coordinate ``se``.

    Each equals D^(k) summed over all its entries, whatever the partition, at the cost of k nested backward passes.
    Source: Appendix A of the paper.
    """
    settings = Settings(order=order, direction=direction, partition="trivial", dtype=dtype, max_batches=max_batches,
                        include_frozen=include_frozen, seed=seed)  # fmt: skip
    work = Work(problem, settings)
    loaded = load_checkpoint(checkpoint) if isinstance(checkpoint, (str, Path)) else checkpoint
    state = work.state(loaded)
    u = work.direction(state, loaded, None, progress).tensors
    sums = units.Accumulator()
    for raw in _bar(problem.batches(max_batches), progress, "batches"):
        _, terms = nested.taylor(problem, state, u, problem.cast(raw, state.dtype), order)
        weight = problem.size(raw)
        values = np.array(terms) / (weight if problem.reduction == "sum" else 1.0)
        sums.add({"terms": values}, weight, count_rows(raw))
    mean, se = sums.mean_and_error("terms", problem.reduction)
    return xr.DataArray(
        mean,
        {"order": np.arange(1, order + 1), "se": ("order", se)},
        ("order",),
        name="taylor_terms",
        attrs={"long_name": "derivative of the loss along the direction", "units": "loss"},
    )


class Identity(NamedTuple):
    """Equal for two calls that are about the same weights, model, loss, data and setting."""

    weights: str
    settings: tuple  # of the model and the loss, see `Problem.settings`
    others: tuple


class Work:
    """One problem and one setting: its keys, its units, its plan. The store and the report drive it."""

    def __init__(self, problem: Problem, settings: Settings) -> None:
        self.problem, self.settings = problem, _checked(settings)
        self.dtype = _dtype(settings.dtype) or problem.upcast(settings.include_frozen)
        self.memory = _bytes(settings.memory)
        self.partition = resolve_partition(settings.partition, problem.model, settings.include_frozen)
        _refuse_huge(self.partition, settings)
        recipe = settings.direction
        self.direction_name = recipe if isinstance(recipe, str) else getattr(recipe, "__name__", "custom")
        self.measure = _measure(self.settings, self.direction_name)

    @property
    def name(self) -> str:
        """A file-name-safe name for direction and partition."""
        name = re.sub(r"[^A-Za-z0-9_.]+", "-", f"{self.direction_name}-{self.partition.name}").strip("-")
        named = isinstance(self.settings.partition, str)
        return name if named else f"{name}-{self.partition.fingerprint()[:8]}"

    # ---- the point and the direction ----------------------------------------------------------------------------

    def shards(self) -> list[Shard]:
        """What the data of each checkpoint are cut into, a unit each."""
        s = self.settings
        if s.shards == 1:
            return [Shard(0, s.max_batches)]
        return cut(self.problem.count(s.max_batches), s.shards, s.keep_batches)

    def gradient_shards(self) -> list[Shard]:
        """What the data of the direction ``"gradient"`` are cut into."""
        s, of = self.settings, self.problem.of_direction()
        limit = s.max_batches if of is self.problem else None
        return [Shard(0, limit)] if s.shards == 1 else cut(of.count(limit), s.shards)

    def state(self, checkpoint: Checkpoint | Mapping[str, Tensor] | None) -> State:
        weights = None if checkpoint is None else self.problem.fitted(checkpoint)
        state = self.problem.state(weights, dtype=self.dtype, include_frozen=self.settings.include_frozen)
        if checkpoint is None:
            _refuse_nonfinite(state)
        return state

    def direction(
        self,
        state: State,
        checkpoint: Any,
        run: Run | None,
        progress: bool,
        store: Directions | None = None,
        identity: Identity | None = None,
    ) -> Direction:
        """The direction at a checkpoint: from the store, from the last call on the same weights, or computed."""
        loaded = checkpoint if isinstance(checkpoint, Checkpoint) else None
        key = self.direction_key(loaded.sha256) if loaded is not None and store is not None else None
        stored = store.read_arrays(key) if store is not None and key is not None else None
        if stored is not None:
            tensors = {n: torch.from_numpy(stored[n]) for n in state.parameters}
            return Direction(tensors, self.direction_name, dict(OF_GRADIENT))  # no other is stored
        identity = identity or self._identity(state, checkpoint)
        cached = self.problem.cache.get("direction")
        s = self.settings
        kept = isinstance(s.direction, str) and not s.direction.startswith("to:")  # of which another file is a part
        if kept and cached is not None and cached[0] == identity:
            u = cached[1]
        else:
            u = resolve_direction(
                s.direction, self.problem, state, checkpoint=loaded, run=run, seed=s.seed,
                shards=self.gradient_shards() if s.direction == "gradient" else (),
                progress=lambda it: _bar(it, progress, "gradient"),
            )  # fmt: skip
        if kept:
            self.problem.cache["direction"] = (identity, u)
        if store is not None and key is not None and s.direction == "gradient":
            store.publish_arrays(key, {n: t.cpu().numpy() for n, t in u.tensors.items()})
        return u

    def _identity(self, state: State, checkpoint: Any) -> Identity:
        s = self.settings
        # momentum depends on the file, "to:next" on the one that follows it
        where = (checkpoint.sha256, str(checkpoint.path)) if isinstance(checkpoint, Checkpoint) else ""
        weights = digest({**state.parameters, **state.fixed})
        recipe = s.direction if isinstance(s.direction, str) else ""  # tensors and functions are never cached
        others = where, recipe, s.seed, s.max_batches, s.shards, str(self.dtype), s.include_frozen
        return Identity(weights, self.problem.settings(), others)

    # ---- keys ---------------------------------------------------------------------------------------------------

    def _common_key(self, checkpoint_sha: str) -> dict[str, Any]:
        s = self.settings
        return {
            "schema": schema.SCHEMA_VERSION,
            "checkpoint": checkpoint_sha,
            "data": self.problem.fingerprint(s.max_batches),
            "max_batches": s.max_batches,
            "direction": self.direction_name,
            "seed": s.seed if self.direction_name == "random" else None,
            "dtype": str(self.dtype),
            "include_frozen": s.include_frozen,
            **self.problem.description(),
        }

    def direction_key(self, checkpoint_sha: str) -> dict[str, Any]:
        return {"kind": "direction", **self._common_key(checkpoint_sha), **self._cut_of_gradient("shards")}

    def _cut_of_gradient(self, name: str) -> dict[str, int]:
        """The number of shards of the gradient, where they are several: added in another order, other last bits."""
        n = len(self.gradient_shards()) if self.direction_name == "gradient" else 1
        return {name: n} if n > 1 else {}

    def key(self, checkpoint_sha: str, relatives: list[str], shard: int = 0) -> dict[str, Any]:
        """What a unit depends on. ``relatives`` are the other checkpoints of the run that the direction looks at."""
        s = self.settings
        return {
            "kind": "summary",
            **self._common_key(checkpoint_sha),
            "relatives": relatives,
            "shard": [shard, len(self.shards())],
            "partition": self.partition.fingerprint(),
            "order": s.order,
            "diagonal": s.diagonal,
            "engine": s.engine,
            "tolerance": s.tolerance,
            "keep_batches": s.keep_batches,
            "self_check": s.self_check,
            **self._cut_of_gradient("direction_shards"),
            **self._optional_key(),
        }

    def _optional_key(self) -> dict[str, Any]:
        """Nothing where nothing is asked for, so that units of older versions keep their keys."""
        m = self.measure
        measured = ({"measure": list(m.what)} if m.what else {}) | self._points()
        return measured | ({"errors": "unconditional"} if self.unconditional else {})

    def _points(self) -> dict[str, list[float]]:
        """The multiples of u at which losses and slopes are measured."""
        points = {"taus": self.measure.taus, "nodes": self.measure.nodes}
        return {name: list(values) for name, values in points.items() if values}

    @property
    def unconditional(self) -> bool:
        """Whether the data's influence on the direction is to be computed: only the gradient depends on them."""
        return self.settings.errors == "unconditional" and self.direction_name == "gradient"

    def steps(self, run: Run) -> list[dict[str, Any]]:
        """Label, digest and unit keys of each checkpoint of a run."""
        if not isinstance(self.settings.direction, str):
            raise ArgumentError(
                "a direction given as tensors or a function has no key that a run's units could be found by",
                do="use a named direction, or call ho.summarize for each checkpoint",
            )
        shas = [_sha256(run, i) for i in range(len(run))]
        name, out = self.direction_name, []
        elsewhere = name.startswith("to:") and name not in ("to:init", "to:next")
        to_file = [content_sha256(file_of(name[3:], run))] if elsewhere else []
        for i, (label, sha) in enumerate(zip(run.steps, shas, strict=True)):
            if self.direction_name == "to:next" and i + 1 == len(run):
                out.append({"step": label, "sha256": sha, "units": [], "gap": LAST})
                continue
            relatives = {"to:init": shas[:1], "to:next": shas[i + 1 : i + 2]}.get(name, to_file)
            keys = [self.key(sha, relatives, k) for k in range(len(self.shards()))]
            out.append({"step": label, "sha256": sha, "units": keys})
        return out

    # ---- units --------------------------------------------------------------------------------------------------

    def unit(
        self,
        checkpoint: Any,
        run: Run | None = None,
        *,
        store: Directions | None = None,
        progress: bool = True,
        shard: int = 0,
    ) -> xr.Dataset:
        """The un-normalised sums of one checkpoint over a shard of the data."""
        return self.sums(checkpoint, run, store=store, progress=progress, shard=shard).dataset()

    @full_precision()
    def part_of_gradient(self, checkpoint: Checkpoint, shard: int) -> Part:
        """What a shard of the data adds to the direction ``"gradient"``."""
        state, _ = self._point(checkpoint)
        return part_of_gradient(self.problem.of_direction(), state, self.gradient_shards()[shard])

    def direction_of_parts(self, checkpoint: Checkpoint, parts: Sequence[Part]) -> Direction:
        """The direction ``"gradient"`` from the parts of all shards."""
        return of_parts(parts, self.problem, self.state(checkpoint))

    def _point(self, checkpoint: Any) -> tuple[State, Identity]:
        """Weights at which the loss was found to be deterministic, and their identity."""
        state = self.state(checkpoint)
        identity = self._identity(state, checkpoint)
        if self.problem.cache.get("deterministic") != identity:
            self.problem.check_deterministic(state)
            self.problem.cache["deterministic"] = identity
        return state, identity

    @full_precision()
    def sums(
        self,
        checkpoint: Any,
        run: Run | None = None,
        *,
        store: Directions | None = None,
        progress: bool = True,
        shard: int = 0,
    ) -> units.Parts:
        """What a unit is made of: the un-normalised sums of one checkpoint over a shard of the data."""
        s = self.settings
        state, identity = self._point(checkpoint)
        u = self.direction(state, checkpoint, run, progress, store, identity)
        task = engines.Task(
            self.problem, state, u.tensors, self.partition, s.request, self.memory, identity, identity.settings
        )
        try:
            engine = engines.choose(task, s.engine, check_all=s.self_check)
            error, sums = self._run(engine, identity, progress, shard)
        except TangentsUnsupported as reason:
            engine = engines.fall_back(task, s.engine, reason)
            error, sums = self._run(engine, identity, progress, shard)
        norms = {
            "direction_norm": group_norms(u.tensors, self.partition),
            "parameter_norm": group_norms(state.parameters, self.partition),
        }
        facts = {
            "engine": engine.name,
            "engine_detail": "; ".join(dict.fromkeys(task.notes)),
            "self_check": error,
            "suspect": s.self_check and engines.suspect(error, state),
            "torch_threads": torch.get_num_threads(),
            "direction": u.provenance,
        }
        if self.unconditional:
            sums.influence = influence(engine, sums, s.max_batches, lambda it: _bar(it, progress, "influence"))
        if s.tolerance is not None:
            facts["stopping"] = stopping(sums, s.tolerance)
        return sums.parts(norms, facts)

    def unit_or_gap(
        self, checkpoint: Checkpoint, run: Run, store: Directions | None = None, shard: int = 0
    ) -> xr.Dataset:
        """The unit of a checkpoint of a run, or the reason why it has no such direction."""
        try:
            return self.unit(checkpoint, run, store=store, progress=False, shard=shard)
        except NoDirection as error:
            return units.gap_of_error(error)

    def in_memory(
        self, run: Run, plan: Mapping[str, Any], progress: bool, workers: Workers | None = None
    ) -> dict[str, xr.Dataset]:
        """The units of a plan by their canonical keys, without those that failed; each such step is a warning."""
        wanted: dict[str, Item] = {}
        alike: dict[str, list[int]] = {}  # checkpoints of the same content share a unit
        for i, step in enumerate(plan["steps"]):
            for key in step["units"]:
                wanted.setdefault(canonical(key), (i, key))
                alike.setdefault(canonical(key), []).append(i)
        made: dict[str, xr.Dataset] = {}
        failed: dict[int, HoError] = {}
        with closing(self._made(list(wanted.values()), run, None, workers)) as computed:
            for (i, key), unit in _bar(computed, progress, self._things, len(wanted)):
                try:
                    made[canonical(key)] = unit()
                    refuse_replaced(run, i, key)
                except (CheckpointError, ClusterError) as error:
                    made.pop(canonical(key), None)
                    for j in alike[canonical(key)]:
                        failed.setdefault(j, error)
        if failed and not made:
            raise _summed_up({str(run.steps[i]): e for i, e in failed.items()}, len(plan["steps"]))
        for i, failure in sorted(failed.items()):
            keys = plan["steps"][i]["units"]
            there = sum(canonical(key) in made for key in keys)
            what = f", with {there} of {len(keys)} shards of its data" if there else ""
            warnings.warn(f"step {run.steps[i]} is NaN{what}: {failure}", stacklevel=4)
        if not failed:
            self.refuse_gaps_alone(made.values())
        return made

    def _made(
        self, items: Iterable[Item], run: Run, store: Store | None, workers: Workers | None
    ) -> Generator[tuple[Item, Made]]:
        """The units of the items: computed here, one by one when they are called for, or by workers as these finish."""
        if workers is not None:
            yield from workers.units(self, items, run, store)
            return
        for item in items:
            yield item, functools.partial(self.of_key, run, *item, store)

    def of_key(self, run: Run, position: int, key: Mapping[str, Any], store: Store | None = None) -> xr.Dataset:
        """The unit of a key: of the very bytes that the key names, whatever became of the file since."""
        checkpoint = run[position]
        if checkpoint.sha256 != key["checkpoint"]:
            raise _replaced(run.paths[position])
        return self.of_checkpoint(checkpoint, run, position, key, store)

    def of_checkpoint(
        self, checkpoint: Checkpoint, run: Run, position: int, key: Mapping[str, Any], store: Directions | None
    ) -> xr.Dataset:
        """The unit of a key of which the checkpoint is read."""
        unit = self.unit_or_gap(checkpoint, run, store, key["shard"][0])
        read = json.loads(unit.attrs["unit"]).get("direction", {}).get("to_sha256")
        if read is not None and read not in key["relatives"]:
            raise _replaced(_relatives(run, position, self.direction_name)[0])
        return unit

    @property
    def _things(self) -> str:
        """What progress is counted in."""
        return "checkpoints" if self.settings.shards == 1 else "units"

    def refuse_gaps_alone(self, made: Iterable[xr.Dataset | None]) -> None:
        """Raise `NoDirection` where no checkpoint of a run has such a direction."""
        reasons = [units.gap_of(unit) for unit in made]
        if reasons and all(r is not None for r in reasons):
            raise NoDirection(**{**(reasons[0] or {}), "where": "every checkpoint of the run"})

    def _run(
        self, engine: engines.Engine, identity: Identity, progress: bool, shard: int
    ) -> tuple[float, units.Accumulator]:
        """The self-check and one pass over a shard of the data."""
        s = self.settings
        error = self._self_check(engine.task, engine, identity) if s.self_check else float("nan")
        return error, accumulate(
            engine, self.shards()[shard], tolerance=s.tolerance, keep_batches=s.keep_batches,
            measure=self.measure, progress=lambda it: _bar(it, progress, "batches"),
        )  # fmt: skip

    def _self_check(self, task: engines.Task, engine: engines.Engine, identity: Identity) -> float:
        """The self-check, once for the same weights, partition, orders and engine."""
        u = "" if isinstance(self.settings.direction, str) else digest(task.direction)
        key = (identity, u, self.partition.fingerprint(), task.request, engine.name)
        cached = self.problem.cache.get("self check")
        if cached is None or cached[0] != key:
            cached = self.problem.cache["self check"] = (key, engines.self_check(task, engine))
        return cached[1]

    def fill(
        self, store: Store, run: Run, plan: Mapping[str, Any], progress: bool, workers: Workers | None = None
    ) -> int:
        """Compute and publish what the plan asks for and the store lacks; how many units that were.

        This process computes them one by one, or ``workers`` do; it alone writes. A checkpoint that fails does not
        stop the others; what went wrong is raised when they are done. Checkpoints of the same content share a unit.
        """
        wanted = {canonical(key): (i, key) for i, step in enumerate(plan["steps"]) for key in step["units"]}
        missing, gaps = [], {}
        for k, (i, key) in wanted.items():
            unit = store.read(key)
            if unit is None:
                missing.append((i, key))
            elif units.gap_of(unit) is not None:
                gaps[k] = unit
        failed: dict[int, Exception] = {}
        with closing(self._made(missing, run, store, workers)) as computed:
            title = f"{self._things}, {self.name}"
            for (i, key), made in _bar(computed, progress and bool(missing), title, len(missing)):
                try:
                    unit = made()
                    store.publish(key, unit, check=functools.partial(refuse_replaced, run, i, key))
                except StoreError:
                    raise
                except Exception as error:
                    failed.setdefault(i, error)
                else:
                    if units.gap_of(unit) is not None:
                        gaps[canonical(key)] = unit
        if failed:
            tried = len({i for i, _ in missing})
            raise _summed_up({str(run.steps[i]): error for i, error in sorted(failed.items())}, tried)
        self.refuse_gaps_alone(gaps.get(k) for k in wanted)
        return sum(canonical(key) not in gaps for _, key in missing)

    # ---- the plan -----------------------------------------------------------------------------------------------

    def plan(self, steps: list[dict[str, Any]], series: bool) -> dict[str, Any]:
        """A JSON document that says which units make up the Dataset, and how. See `hoanalysis.units.assemble`."""
        s, p = self.settings, self.partition
        wanted = {schema.LOSS: 0} | {schema.derivative(d): d for d in range(1, s.order + 1)}
        if s.diagonal is not None and s.diagonal > s.order:
            wanted[schema.diagonal(s.diagonal)] = 1
        for name in [name for what in self.measure.what for name in MEASURES[what]]:
            wanted[name] = len(schema.MEASURED_DIMS[name])
        data = "" if s.max_batches == 0 else self.problem.fingerprint(s.max_batches)
        return {
            "study": {**self.study(), "data": data, "checkpoints": {str(x["step"]): x["sha256"] for x in steps}},
            "groups": {"label": list(p.labels), **p.coords()},
            "quantities": wanted,
            **self._points(),
            "steps": steps,
            "series": series,
            "reduction": self.problem.reduction,
            "attrs": self._attrs(),
        }

    def study(self) -> dict[str, Any]:
        """The settings that tell this study from another one, in plain words."""
        s = self.settings
        return {
            "order": s.order,
            "diagonal": s.diagonal,
            "direction": self.direction_name,
            "partition": self.partition.name,
            "groups": len(self.partition),
            "dtype": str(self.dtype or "the model's"),
            "max_batches": s.max_batches,
            "keep_batches": s.keep_batches,
            "engine": s.engine,
            "seed": s.seed,
            **self._optional_key(),
            **({"shards": n} if (n := len(self.shards())) > 1 else {}),
            **{k: v for k, v in self.problem.description().items() if k != "model_repr"},
        }

    def _attrs(self) -> dict[str, Any]:
        s, p = self.settings, self.partition
        provenance = {
            **self.study(),
            "data": self.problem.fingerprint(s.max_batches) if s.max_batches is None or s.max_batches > 0 else "",
            "partition_fingerprint": p.fingerprint(),
            "frozen": list(p.frozen),
            "standard_errors": self._standard_errors(),
            "problem_notes": [n for n in self.problem.notes if n],
        }
        return {
            "schema_version": schema.SCHEMA_VERSION,
            "order": s.order,
            "direction": self.direction_name,
            "partition": p.name,
            "dtype": str(self.dtype or next(self.problem.model.parameters()).dtype).removeprefix("torch."),
            "standard_errors": self._standard_errors(),
            "creation_library": "hoanalysis",
            "creation_library_version": __version__,
            "torch_version": str(torch.__version__),
            "torch_threads": torch.get_num_threads(),
            "provenance": json.dumps(provenance, sort_keys=True),
        }

    def _standard_errors(self) -> str:
        if self.unconditional:
            return "unconditional: with what the data do through the direction, over the kept blocks"
        return "conditional on the direction"


# ---- checks of the settings -------------------------------------------------------------------------------------


def _checked(s: Settings) -> Settings:
    for name, kinds in (("max_batches", int), ("keep_batches", int), ("seed", int), ("tolerance", (int, float))):
        value = getattr(s, name)
        if (value is not None or name in ("keep_batches", "seed")) and (
            not isinstance(value, (kinds, np.integer)) or isinstance(value, bool)
        ):
            raise ArgumentError(f"{name} is a number, not {value!r}")
    if not -(2**63) <= s.seed < 2**63:
        raise ArgumentError(f"seed is a number of 64 bits, not {s.seed}")
    s = replace(s, measure=(s.measure,) if isinstance(s.measure, str) else tuple(s.measure))
    for name, value in (("order", s.order), ("diagonal", s.diagonal)):
        if name == "diagonal" and value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ArgumentError(f"{name} must be a whole number of at least 1, not {value!r}")
        if value > MAX_ORDER:
            raise ArgumentError(
                f"{name} is at most {MAX_ORDER}, not {value}",
                why=f"each order at least doubles the cost: more than 2^{value - 1} gradients a batch",
                do="use a lower order",
            )
    if s.max_batches is not None and s.max_batches < 1:
        raise ArgumentError(f"max_batches must be at least 1, not {s.max_batches}")
    if s.keep_batches < 0 or s.keep_batches == 1:
        raise ArgumentError(f"keep_batches must be 0, or at least 2 blocks, not {s.keep_batches}")
    if s.errors not in ("conditional", "unconditional"):
        raise ArgumentError(f"errors are 'conditional' or 'unconditional', not {s.errors!r}")
    if s.errors == "unconditional" and s.direction == "gradient":
        if s.keep_batches == 0:
            raise ArgumentError("unconditional errors are errors over kept blocks", do="add keep_batches=20")
        if s.tolerance is not None:
            raise ArgumentError(
                "a tolerance stops by errors that are conditional on u",
                why="u is the gradient over all batches, and the pass would end before",
                do="leave out tolerance or errors='unconditional'",
            )
    _refuse_shards(s)
    if s.tolerance is not None and not s.tolerance > 0:
        raise ArgumentError(f"tolerance is a relative standard error above 0, not {s.tolerance}")
    return s


def _refuse_shards(s: Settings) -> None:
    if not isinstance(s.shards, int) or isinstance(s.shards, bool) or s.shards < 1:
        raise ArgumentError(f"shards must be a whole number of at least 1, not {s.shards!r}")
    if s.shards > 1 and s.tolerance is not None:
        raise ArgumentError(
            "a tolerance stops one pass over the data, and shards are passes of their own",
            do="leave out tolerance or shards; max_batches takes the first batches only",
        )
    if s.shards > 1 and s.errors == "unconditional" and s.direction == "gradient":
        raise ArgumentError(
            "unconditional errors look at all blocks of the data at once, and a shard holds some of them",
            do="leave out shards, or errors='unconditional'",
        )


def _measure(s: Settings, direction: str) -> Measure:
    """What is to be measured, in the order of `MEASURES`, and where."""
    if unknown := [w for w in s.measure if w not in MEASURES]:
        raise ArgumentError(f"measure does not know {listed(unknown)}", do=f"use {listed(MEASURES)}")
    what = tuple(w for w in MEASURES if w in s.measure)
    nodes = NODES if "path" in what else ()
    if "along" not in what:
        if s.taus is not None:
            raise ArgumentError("taus say where the loss is measured along u", do="add measure=('along',)")
        return Measure(what, nodes=nodes)
    given = default_taus(direction) if s.taus is None else s.taus
    try:
        taus = tuple(sorted({float(t) for t in given}))
    except (TypeError, ValueError):
        raise ArgumentError(f"taus are numbers, the multiples of u, not {given!r}") from None
    if not taus or not np.isfinite(taus).all():
        raise ArgumentError(f"taus are finite numbers, and at least one, not {given!r}")
    return Measure(what, taus, nodes)


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None or isinstance(dtype, torch.dtype):
        found = dtype
    else:
        found = {"float32": torch.float32, "float64": torch.float64}.get(str(dtype).removeprefix("torch."))
        if found is None:
            raise ArgumentError(f"dtype must be 'float32' or 'float64', not {dtype!r}")
    if found not in (None, torch.float32, torch.float64):
        raise ArgumentError(f"dtype must be float32 or float64, not {found}", why="lower ones give noise at order 2")
    return found


def _bytes(memory: str | int) -> int:
    """``"2GiB"`` -> 2 * 2**30."""
    match = re.fullmatch(r"\s*([0-9]+\.?[0-9]*)\s*(B|[KMGT]i?B)?\s*", str(memory))
    number, unit = (float(match[1]), match[2] or "B") if match else (0.0, "B")
    power = "BKMGT".index(unit[0])
    size = number * (1024 if "i" in unit or unit == "B" else 1000) ** power
    if not 1 <= size < 2**63 or isinstance(memory, bool):
        raise ArgumentError(f"memory {str(memory)[:40]!r} is not a size", do="write bytes, or '2GiB', '500MB'")
    return int(size)


def _refuse_huge(p: Partition, s: Settings) -> None:
    entries = len(p) ** s.order
    if "pairs" in s.measure and len(p) ** 2 > MAX_ENTRIES:
        raise ArgumentError(f"there are {len(p) ** 2:.3g} pairs of groups", do="use a coarser partition")
    if entries > MAX_ENTRIES:
        raise ArgumentError(
            f"D{s.order} of {len(p)} groups has {entries:.3g} entries, {entries * 8 / 2**30:.3g} GiB",
            do=f"use a coarser partition, order {s.order - 1}, or diagonal={s.order}",
        )


def _refuse_nonfinite(state: State) -> None:
    unclear = {n: p for n, p in state.parameters.items() if not math.isfinite(p.sum())}  # NaN, inf, or an overflow
    bad = {n: count for n, p in unclear.items() if (count := int((~torch.isfinite(p)).sum()))}
    if bad:
        raise NumericsError(
            f"parameters that are not finite: {listed(bad)}", why=f"{sum(bad.values())} entries are NaN or infinite"
        )


def _summed_up(failed: Mapping[str, Exception], tried: int) -> Exception:
    """The error of one checkpoint, or the first of several with the others' steps."""
    step, first = next(iter(failed.items()))
    several = f"{len(failed)} of {tried} checkpoints failed, at steps {listed(failed)}; the first: "
    if isinstance(first, HoError):
        return type(first)(
            (several if len(failed) > 1 else "") + first.what,
            where=f"step {step}" + (f", {first.where}" if first.where else ""),
            why=first.why, do=first.do, kept=first.kept or "the units of the other checkpoints",
        )  # fmt: skip
    first.add_note(f"{several if len(failed) > 1 else ''}step {step}")
    return first


def _sha256(run: Run, position: int) -> str:
    """The digest of a checkpoint. One that cannot be read at all is named when its turn comes, and stops no other."""
    try:
        return run.sha256(position)
    except (CheckpointError, OSError) as error:
        return hashlib.sha256(f"{run.paths[position].name}: {error}".encode(errors="replace")).hexdigest()


def refuse_replaced(run: Run, position: int, key: Mapping[str, Any]) -> None:
    """A checkpoint that was replaced while its summaries were computed would be stored under the wrong digest; so
    would one whose direction leads to a checkpoint that was."""
    if run.sha256(position) != key["checkpoint"]:
        raise _replaced(run.paths[position])
    relatives = key.get("relatives", [])
    others = _relatives(run, position, key["direction"]) if relatives else []
    for path, sha256 in zip(others, relatives, strict=True):
        if content_sha256(path) != sha256:
            raise _replaced(path)


def _relatives(run: Run, position: int, direction: str) -> list[Path]:
    """The files that a direction ``to:..`` leads to."""
    if direction == "to:init":
        return list(run.paths[:1])
    return list(run.paths[position + 1 : position + 2]) if direction == "to:next" else [file_of(direction[3:], run)]


def _replaced(path: Path) -> CheckpointError:
    return CheckpointError(
        "the checkpoint was replaced while its summaries were computed",
        where=str(path),
        do="call again when training has finished writing it",
        kept="nothing was written for it; finished units are kept",
    )


# ---- progress ---------------------------------------------------------------------------------------------------


def _bar(iterable: Iterable, show: bool, what: str, total: int | None = None) -> Iterator:
    return iter(tqdm(iterable, desc=what, total=total, disable=not show, leave=False))
