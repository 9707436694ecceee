"""Losses measured by forward passes, against the same model with its weights changed by hand and torch's own loss."""

import copy
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import xarray as xr
from safetensors.torch import save_file
from scipy.integrate import quad_vec
from torch import nn

import hoanalysis as ho
from hoanalysis import schema, summaries
from hoanalysis.analysis.errorbars import error_over_blocks
from hoanalysis.derivatives import engines
from hoanalysis.derivatives.accumulate import settled
from hoanalysis.derivatives.measured import MEASURES, Measure, forward_passes, measured
from hoanalysis.directions import MULTIPLES, RATES
from hoanalysis.errors import ArgumentError, HoError
from hoanalysis.study import StudySpec
from hoanalysis.units import Accumulator, add_shards
from tests import oracles

SIZES = (5, 3, 7, 4, 6)
ALL = ("along", "removed", "pairs")
NAMES = [name for names in MEASURES.values() for name in names]
EXACT = {"rtol": 1e-11, "atol": 1e-14}


def make_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def make_batches(seed: int = 1, sizes=SIZES) -> list:
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(n, 4, generator=g).double(), torch.randint(0, 3, (n,), generator=g)) for n in sizes]


def losses(model: nn.Module, batches: list, move: dict[str, torch.Tensor]) -> np.ndarray:
    """The loss of every batch, of a copy of the model whose parameters were moved in place."""
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for n, p in moved.named_parameters():
            if n in move:
                p += move[n]
        return np.array([F.cross_entropy(moved(x), y).item() for x, y in batches])


def summarize(model: nn.Module, batches: list, **options) -> xr.Dataset:
    problem = ho.Problem(model, batches, F.cross_entropy)
    return ho.summarize(problem, 1, **{"progress": False, "self_check": False, "measure": ALL, **options})


@pytest.mark.parametrize("what", [(), ("along",), ("removed",), ("pairs",), ALL, (*ALL, "path")])
def test_the_forward_passes_are_counted(what, monkeypatch):
    problem = ho.Problem(make_model(), make_batches()[:1], F.cross_entropy)
    work = summaries.Work(problem, summaries.Settings(1, direction="weights"))
    state = work.state(None)
    task = engines.Task(problem, state, dict(state.parameters), work.partition, work.settings.request, 2**30)
    calls, value, gradient = [0.0], problem.batch_value, torch.autograd.grad

    def counted(f, cost):
        return lambda *args, **kwargs: [calls.append(calls.pop() + cost), f(*args, **kwargs)][1]

    monkeypatch.setattr(problem, "batch_value", counted(value, 1))
    monkeypatch.setattr(torch.autograd, "grad", counted(gradient, 2))
    wanted = Measure(what, (0.5, 1.0, 2.0), (0.1, 0.9))
    measured(engines.Nested(task), wanted, problem.first_batch())
    assert calls[0] == (forward_passes(wanted, len(work.partition)) if what else 0)


def check(ds: xr.Dataset, change: str, index: tuple, model: nn.Module, batches: list, move: dict) -> None:
    """The change and its paired error, and the loss itself, by hand."""
    weights = np.array([len(y) for _, y in batches], dtype=float)
    mean, se = oracles.weighted(losses(model, batches, move) - losses(model, batches, {}), weights)
    np.testing.assert_allclose(ds[change].values[index], mean, **EXACT)
    np.testing.assert_allclose(ds[f"{change}_se"].values[index], se, rtol=1e-9, atol=1e-14)
    loss = (losses(model, batches, move) * weights).sum() / weights.sum()
    np.testing.assert_allclose(ds[change.replace("change", "loss")].values[index], loss, **EXACT)


@pytest.mark.parametrize("engine", ["nested", "auto"])
def test_what_is_measured_is_the_loss_of_the_changed_model(engine: str) -> None:
    model, batches = make_model(), make_batches()
    u = oracles.random_like(dict(model.named_parameters()), 5)
    taus = (-0.5, 0.0, 0.25, 1.0)
    ds = summarize(model, batches, direction=u, taus=taus, engine=engine)
    schema.validate(ds)
    assert ds["change_along"].dims == ("tau",)
    assert ds["change_removed"].dims == ("group",)
    assert ds["change_removed_pair"].dims == ("group", "group2")
    np.testing.assert_array_equal(ds.tau, taus)
    for i, tau in enumerate(taus):
        check(ds, "change_along", (i,), model, batches, {n: tau * t for n, t in u.items()})
    assert ds["change_along"].values[1] == 0
    assert ds["change_along_se"].values[1] == 0
    names = list(u)
    for s, n in enumerate(names):
        check(ds, "change_removed", (s,), model, batches, {n: u[n]})
        check(ds, "change_removed_pair", (s, s), model, batches, {n: u[n]})
    for s, t in itertools.permutations(range(len(names)), 2):
        check(ds, "change_removed_pair", (s, t), model, batches, {names[s]: u[names[s]], names[t]: u[names[t]]})
    for name in ds.variables:
        assert ds[name].attrs["long_name"], name
        assert ds[name].attrs["units"] == ("loss" if name in ds.data_vars else "1"), name


def test_of_weights_the_group_is_really_gone() -> None:
    model, batches = make_model(), make_batches()
    ds = summarize(model, batches, direction="weights", partition="layer", taus=[1.0])
    whole = copy.deepcopy(model)
    for p in whole.parameters():
        p.data.zero_()
    np.testing.assert_allclose(ds.loss_along, [np.log(3)], **EXACT)
    np.testing.assert_allclose(ds.loss_removed_pair.values[0, 1], np.log(3), **EXACT)
    for s, layer in enumerate(("0", "2")):
        gone = copy.deepcopy(model)
        for p in gone.get_submodule(layer).parameters():
            p.data.zero_()
        total = sum(len(y) * F.cross_entropy(gone(x), y).item() for x, y in batches) / sum(SIZES)
        np.testing.assert_allclose(ds.loss_removed.values[s], total, **EXACT)


def test_groups_that_are_parts_of_a_tensor() -> None:
    model, batches = make_model(), make_batches()
    u = oracles.random_like(dict(model.named_parameters()), 5)
    split = ho.Partition.split(model, {"0.weight": (0, 5)})
    ds = summarize(model, batches, direction=u, partition=split, measure=["removed", "pairs"])
    labels = schema.labels(ds)
    assert len(labels) == 8
    for row in range(5):
        part = torch.zeros_like(u["0.weight"])
        part[row] = u["0.weight"][row]
        check(ds, "change_removed", (row,), model, batches, {"0.weight": part})
        check(ds, "change_removed_pair", (row, 5), model, batches, {"0.weight": part, labels[5]: u[labels[5]]})


@pytest.mark.parametrize("memory", ["2GiB", 20_000])
def test_chunks_leave_the_loss_alone(memory) -> None:
    model, batches = make_model(), make_batches(sizes=(64, 40))
    u = oracles.random_like(dict(model.named_parameters()), 5)
    ds = summarize(model, batches, direction=u, taus=[1.0], engine="tangents", memory=memory)
    assert ("chunks" in str(ds.engine_detail.item())) == (memory == 20_000)
    check(ds, "change_along", (0,), model, batches, u)
    check(ds, "change_removed", (2,), model, batches, {"2.weight": u["2.weight"]})


def test_of_a_sum_over_the_data() -> None:
    model, batches = make_model(), make_batches()
    problem = ho.Problem(
        model, batches, batch_loss=lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="sum"),
        batch_size=lambda b: len(b[1]), reduction="sum",
    )  # fmt: skip
    options = {"direction": "weights", "measure": tuple(MEASURES), "self_check": False, "keep_batches": 6}
    ds = ho.summarize(problem, 1, **options, progress=False)
    mean = summarize(model, batches, direction="weights", keep_batches=6, measure=tuple(MEASURES))
    for name in (*NAMES, "change_along_se", "change_removed_se", "loss_along", "loss_removed_pair"):
        np.testing.assert_allclose(ds[name], mean[name] * sum(SIZES), rtol=1e-9, atol=1e-12)


def test_kept_blocks_give_the_errors_and_shards_add_up() -> None:
    model, batches = make_model(), make_batches()
    ds = summarize(model, batches, direction="weights", keep_batches=6, measure=tuple(MEASURES))
    for name in NAMES:
        again = error_over_blocks(ds[f"{name}_batch"], ds.weight)
        np.testing.assert_allclose(again, ds[f"{name}_se"], rtol=1e-9, atol=1e-14)

    def unit(part: list) -> xr.Dataset:
        settings = summaries.Settings(1, direction="weights", measure=tuple(MEASURES), keep_batches=6, self_check=False)
        return summaries.Work(ho.Problem(model, part, F.cross_entropy), settings).sums(None, progress=False).dataset()

    whole, added = unit(batches), add_shards([unit(batches[:2]), unit(batches[2:])])
    for name in NAMES:
        for part in ("sum", "dev2"):
            shift = whole[f"{name}_center"] - added[f"{name}_center"]
            np.testing.assert_allclose(shift, 0, atol=0)
            np.testing.assert_allclose(added[f"{name}_{part}"], whole[f"{name}_{part}"], rtol=1e-9, atol=1e-12)


def test_the_paired_error_is_far_below_that_of_a_loss() -> None:
    model, batches = make_model(), make_batches()
    u = {n: 1e-3 * t for n, t in oracles.random_like(dict(model.named_parameters()), 5).items()}
    ds = summarize(model, batches, direction=u, taus=[1.0])
    assert float(ds.change_along_se[0]) < 1e-2 * float(ds.loss_se)


def test_a_small_move_is_what_the_summaries_predict() -> None:
    model, batches = make_model(), make_batches()
    u = {n: 0.1 * t for n, t in oracles.random_like(dict(model.named_parameters()), 5).items()}
    problem = ho.Problem(model, batches, F.cross_entropy)
    ds = ho.summarize(problem, 4, direction=u, measure=ALL, taus=[0.5, 1.0], progress=False, engine="nested")
    for i, tau in enumerate((0.5, 1.0)):
        np.testing.assert_allclose(ds.ho.taylor(tau), ds.change_along[i], rtol=2e-5)
    for s, label in enumerate(schema.labels(ds)):
        np.testing.assert_allclose(ds.ho.taylor({label: 1.0}), ds.change_removed[s], rtol=2e-5)


def slopes_at(model: nn.Module, batches: list, u: dict, t: float) -> np.ndarray:
    """U^s . gradient of each batch at theta + t u, (batches, S), by torch's backward on a moved copy."""
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for n, p in moved.named_parameters():
            p += t * u[n]
    out = []
    for x, y in batches:
        moved.zero_grad()
        F.cross_entropy(moved(x), y).backward()
        out.append([(p.grad * u[n]).sum().item() for n, p in moved.named_parameters()])
    return np.array(out)


@pytest.mark.parametrize("engine", ["nested", "auto"])
def test_slopes_along_the_step_integrate_to_what_each_group_did(engine: str) -> None:
    """The nodes against torch's gradients, the integrals against scipy's adaptive quadrature of them."""
    model, batches = make_model(), make_batches()
    u = {n: 2 * t for n, t in oracles.random_like(dict(model.named_parameters()), 5).items()}
    weights = np.array(SIZES, dtype=float)
    ds = summarize(model, batches, direction=u, measure="path", engine=engine, keep_batches=6)
    schema.validate(ds)
    assert ds.slope_path.dims == ("node", "group")
    assert (ds.node.values[0], ds.node.values[-1], ds.sizes["node"]) == (0, 1, 7)
    for q, t in enumerate(ds.node.values):
        mean, se = oracles.weighted(slopes_at(model, batches, u, t), weights)
        np.testing.assert_allclose(ds.slope_path[q], mean, **EXACT)
        np.testing.assert_allclose(ds.slope_path_se[q], se, rtol=1e-9, atol=1e-14)
        check(ds, "change_path", (q,), model, batches, {n: t * v for n, v in u.items()})
    np.testing.assert_allclose(ds.slope_path[0], ds.D1, **EXACT)
    truth, _ = quad_vec(lambda t: slopes_at(model, batches, u, t), 0, 1, epsrel=1e-11)
    mean, se = oracles.weighted(truth, weights)
    found = ds.ho.path()
    off = np.abs(found.contribution.values - mean)
    assert (off <= found.quadrature_error).all()
    assert (off < 1e-3 * np.abs(mean).max()).all()
    np.testing.assert_allclose(found.contribution_se, se, rtol=1e-2)
    change, change_se = oracles.weighted(losses(model, batches, u) - losses(model, batches, {}), weights)
    np.testing.assert_allclose([found.measured, found.measured_se], [change, change_se], rtol=1e-9)
    np.testing.assert_allclose(mean.sum(), change, rtol=1e-9)  # the identity itself
    assert abs(found.residual) <= found.quadrature_error.sum()
    np.testing.assert_allclose(found.total, found.contribution.sum(), rtol=1e-12)
    merged = ds.ho.merge("layer").ho.path()
    np.testing.assert_allclose(merged.contribution, found.contribution.groupby("layer").sum(), rtol=1e-12)
    np.testing.assert_allclose(
        merged.contribution_se, oracles.weighted(truth.reshape(5, 2, 2).sum(2), weights)[1], rtol=1e-2
    )


def test_slopes_of_groups_that_are_parts_of_a_tensor_or_unused() -> None:
    model, batches = make_model(), make_batches()
    model.unused = nn.Parameter(torch.ones(2).double())
    u = oracles.random_like(dict(model.named_parameters()), 5)
    split = ho.Partition.split(model, {"0.weight": (0, 5)})
    ds = summarize(model, batches, direction=u, partition=split, measure="path")
    whole = summarize(model, batches, direction=u, measure="path")
    parts = [s.startswith("0.weight[") for s in schema.labels(ds)]
    assert sum(parts) == 5
    np.testing.assert_allclose(ds.slope_path[:, parts].sum("group"), whole.slope_path.sel(group="0.weight"), rtol=1e-11)
    assert (whole.slope_path.sel(group="unused") == 0).all()
    assert np.isnan(whole.ho.path().contribution_se).all()  # no blocks
    with pytest.raises(HoError, match=r"measure=\('path',\)"):
        summarize(model, batches, direction=u, measure="along").ho.path()


def test_towards_the_next_checkpoint_one_is_the_loss_there(tmp_path) -> None:
    for step in range(3):
        save_file(dict(make_model(step).state_dict()), tmp_path / f"m_{step}.safetensors")
    run, problem = ho.open_run(tmp_path), ho.Problem(make_model(), make_batches(), F.cross_entropy)
    options = {"direction": "to:next", "measure": ("along", "removed", "path"), "progress": False, "keep_batches": 4}
    ds = ho.summarize_run(run, problem, 1, **options)
    assert ds.change_along.dims == ("step", "tau")
    np.testing.assert_array_equal(ds.tau, MULTIPLES)
    np.testing.assert_allclose(ds.loss_along.sel(tau=1.0)[:2], ds.loss[:2] + ds.change_along.sel(tau=1.0)[:2])
    here = ho.summarize_run(run, problem, 1, direction="weights", progress=False)
    np.testing.assert_allclose(ds.loss_along.sel(tau=1.0)[:2], here.loss[1:], **EXACT)
    assert ds.change_along.isel(step=2).isnull().all()
    assert ds.change_removed.isel(step=2).isnull().all()
    assert ds.slope_path.isel(step=2).isnull().all()
    told = ds.ho.path()
    np.testing.assert_allclose(told.measured[:2], here.loss.diff("step"), **EXACT)
    assert (abs(told.residual[:2]) <= told.quadrature_error[:2].sum("group")).all()
    stored = ho.summarize_run(run, problem, 1, store=tmp_path / "store", **options)
    xr.testing.assert_identical(stored.drop_attrs(), ds.drop_attrs())
    xr.testing.assert_identical(ho.open_store(tmp_path / "store").drop_attrs(), ds.drop_attrs())
    ds.to_netcdf(tmp_path / "ds.nc", engine="h5netcdf")
    xr.testing.assert_equal(xr.load_dataset(tmp_path / "ds.nc", engine="h5netcdf"), ds)
    merged = ds.ho.merge("layer")
    xr.testing.assert_equal(merged.loss_along.reset_coords(drop=True), ds.loss_along.reset_coords(drop=True))
    assert "loss_removed" not in merged
    assert "change_removed" not in merged


def test_uphill_directions_are_measured_at_minus_learning_rates() -> None:
    ds = summarize(make_model(), make_batches(), direction="gradient", measure="along")
    np.testing.assert_array_equal(ds.tau, sorted(-r for r in RATES))
    assert float(ds.change_along.sel(tau=-0.01)) < 0  # a small step against the gradient


class Exploding(nn.Module):
    """Its output overflows where the scale is moved."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.scale = nn.Linear(4, 3), nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return self.linear(x) * torch.exp(self.scale)


@pytest.mark.parametrize("keep", [0, 2])
def test_an_overflow_is_kept_and_fails_nothing(tmp_path, keep: int) -> None:
    model = Exploding().double()
    u = {n: torch.full_like(p, 1.0) for n, p in model.named_parameters()} | {"scale": torch.tensor(1e3).double()}
    ds = summarize(model, make_batches(), direction=u, taus=[0.0, 0.5, 1.0], keep_batches=keep)
    assert np.isfinite(ds.change_along.values).tolist() == [True, True, False]
    gone = ~np.isfinite(ds.change_removed)
    assert schema.labels(ds.isel(group=gone.values)) == ["scale"]
    np.testing.assert_array_equal(np.isfinite(ds.change_removed_pair), ~(gone.values[:, None] | gone.values[None, :]))
    assert np.isfinite(ds.change_removed_se.values[~gone]).all()
    assert np.isnan(ds.change_removed_se.values[gone]).all()
    assert np.isfinite(ds.D1_se).all()
    ds.to_netcdf(tmp_path / "ds.nc", engine="h5netcdf")
    xr.testing.assert_equal(xr.load_dataset(tmp_path / "ds.nc", engine="h5netcdf"), ds)


def test_units_of_nothing_measured_keep_their_keys() -> None:
    """These names stand in the keys of stores that exist: one more, and no unit would be found again."""
    problem = ho.Problem(make_model(), make_batches(), F.cross_entropy)
    plain = summaries.Work(problem, summaries.Settings()).key("sha", [])
    assert sorted(plain) == [
        "checkpoint", "data", "diagonal", "direction", "dtype", "engine", "include_frozen", "keep_batches", "kind",
        "loss", "max_batches", "model", "model_repr", "order", "partition", "reduction", "relatives", "schema", "seed",
        "self_check", "shard", "tolerance", "train_mode",
    ]  # fmt: skip
    keys = [
        summaries.Work(problem, summaries.Settings(measure=m, taus=t)).key("sha", [])
        for m, t in (
            ((), None),
            (("along",), None),
            (("along",), (1.0,)),
            (("removed",), None),
            (("pairs",), None),
            (("path",), None),
        )
    ]
    assert keys[0] == plain
    assert all(a != b for a, b in itertools.combinations(keys, 2))
    either_way = [summaries.Settings(measure=m, taus=[2, 1]) for m in (("along", "removed"), ["removed", "along"])]
    a, b = (summaries.Work(problem, s).key("sha", []) for s in either_way)
    assert a == b


def test_what_is_measured_does_not_decide_when_to_stop() -> None:
    rng, sums = np.random.default_rng(0), Accumulator()
    for _ in range(10):
        noise = {name: rng.normal(size=3) for name in NAMES}
        sums.add({"loss": np.array(1.0), "D1": 1 + 0.01 * rng.normal(size=3), **noise}, 1.0, 1)
    assert settled(sums, 0.05)
    assert not settled(sums, 1e-5)


def test_passes_are_counted() -> None:
    count = 0

    class Counted(nn.Sequential):
        def forward(self, x):
            nonlocal count
            count += 1
            return super().forward(x)

    model = Counted(*make_model())
    problem = ho.Problem(model, make_batches(), F.cross_entropy)

    def passes(**options) -> int:
        nonlocal count
        count = 0
        ho.summarize(problem, 1, direction="weights", engine="nested", self_check=False, progress=False, **options)
        return count

    passes()  # what is checked once
    base = passes()
    for what, each in ((("along",), 3), (("removed",), 5), (("pairs",), 11), (("removed", "pairs"), 11), (ALL, 13)):
        taus = (1.0, 2.0) if "along" in what else None
        assert passes(measure=what, taus=taus) - base == len(SIZES) * each


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"measure": ["removd"]}, "measure does not know 'removd'"),
        ({"measure": "along", "taus": []}, "at least one"),
        ({"measure": "along", "taus": [np.nan]}, "finite numbers"),
        ({"measure": "along", "taus": ["a"]}, "taus are numbers"),
        ({"measure": "along", "taus": 0.5}, "taus are numbers"),
        ({"measure": "removed", "taus": [0.5]}, r"(?s)taus say where.*measure=\('along',\)"),
    ],
)
def test_wrong_arguments_are_named(options: dict, words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        summarize(make_model(), make_batches(), direction="weights", **options)


def test_pairs_of_very_many_groups_are_refused() -> None:
    model = nn.Linear(4, 4000).double()
    problem = ho.Problem(model, [(torch.zeros(2, 4).double(), torch.zeros(2).long())], F.cross_entropy)
    with pytest.raises(ArgumentError, match="pairs of groups"):
        ho.summarize(problem, 1, partition="discrete", direction="weights", measure=("pairs",), progress=False)


def test_in_a_study(study) -> None:
    study.write_text(study.read_text() + 'measure = ["along", "removed"]\ntaus = [1, 0.5]\n')
    spec = StudySpec.read(study)
    (options,) = spec.settings()
    ds = ho.summarize_run(spec.run()[:1], spec.problem(), **options, progress=False)
    np.testing.assert_array_equal(ds.tau, [0.5, 1.0])
    assert ds.change_removed.dims == ("step", "group")
    study.write_text(study.read_text().replace('"removed"', '"removd"'))
    with pytest.raises(HoError, match="'removd'"):
        StudySpec.read(study)
