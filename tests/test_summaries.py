"""summarize, summarize_run and taylor_terms: the exact identities of the summaries, statistics, labels, bookkeeping."""

import functools
import itertools
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

import hoanalysis as ho
from hoanalysis import schema, summaries
from hoanalysis.errors import ArgumentError, CheckpointError, DataError, HoError, NumericsError, SchemaError
from hoanalysis.study import StudySpec
from tests import oracles

SIZES = (5, 3, 7, 4)
EXACT = {"rtol": 1e-10, "atol": 1e-13}


def make_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.GELU(), nn.Linear(4, 3)).double()


def make_batches(seed: int = 1) -> list:
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(n, 4, generator=g).double(), torch.randint(0, 3, (n,), generator=g)) for n in SIZES]


def make_problem(batches=None, model=None) -> ho.Problem:
    return ho.Problem(model or make_model(), batches or make_batches(), F.cross_entropy)


@functools.cache
def shared_problem() -> ho.Problem:
    """One problem for all examples of a property test, so that its graphs are captured once."""
    return make_problem()


def direction(model: nn.Module, seed: int = 5) -> dict[str, torch.Tensor]:
    return oracles.random_like(dict(model.named_parameters()), seed)


def summarize(problem: ho.Problem, order: int = 3, **kwargs) -> xr.Dataset:
    kwargs.setdefault("direction", direction(problem.model))
    return ho.summarize(problem, order, progress=False, self_check=False, **kwargs)


ENGINES = ["nested", "auto"]


@pytest.fixture(params=ENGINES)
def engine(request) -> str:
    return request.param


# ---- the identities of design.md, u held fixed ------------------------------------------------------------------


@pytest.mark.row("N4")
def test_tensors_are_symmetric(engine: str) -> None:
    ds = summarize(make_problem(), engine=engine)
    for order in (2, 3):
        values = ds[f"D{order}"].values
        for axes in itertools.permutations(range(order)):
            np.testing.assert_allclose(values, values.transpose(axes), **EXACT)


@settings(max_examples=8, deadline=None)
@given(
    c=st.lists(st.floats(-2, 2).filter(lambda v: abs(v) > 0.05), min_size=6, max_size=6),
    engine=st.sampled_from(ENGINES),
)
def test_scaling_a_group_scales_its_entries(c: list[float], engine: str) -> None:
    problem = shared_problem()
    u = direction(problem.model)
    ds = summarize(problem, engine=engine)
    scaled = summarize(problem, engine=engine, direction={n: s * u[n] for s, n in zip(c, u, strict=True)})
    for order in (1, 2, 3):
        factor = np.array(1.0)
        for _ in range(order):
            factor = np.multiply.outer(factor, c)
        np.testing.assert_allclose(scaled[f"D{order}"], ds[f"D{order}"] * factor, **EXACT)


@settings(max_examples=8, deadline=None)
@given(owner=st.lists(st.integers(0, 3), min_size=6, max_size=6), engine=st.sampled_from(ENGINES))
def test_merging_groups_sums_slices(owner: list[int], engine: str) -> None:
    problem = shared_problem()
    fine = ho.Partition.canonical(problem.model)
    groups = {f"g{k}": [x for x, o in zip(fine.labels, owner, strict=True) if o == k] for k in sorted(set(owner))}
    coarse = fine.merge(groups)
    membership = np.array([[x in groups[g] for x in fine.labels] for g in coarse.labels], dtype=float)
    ds, merged = summarize(problem, engine=engine), summarize(problem, engine=engine, partition=coarse)
    for order in (1, 2, 3):
        values = ds[f"D{order}"].values
        for axis in range(order):
            values = np.moveaxis(np.tensordot(membership, values, (1, axis)), 0, axis)
        np.testing.assert_allclose(merged[f"D{order}"], values, **EXACT)
    again = ds.ho.merge(groups)
    for order in (1, 2, 3):
        np.testing.assert_allclose(
            again[f"D{order}"].sel(group=merged.group), merged[f"D{order}"].sel(group=merged.group), **EXACT
        )


@pytest.mark.parametrize("partition", ["canonical", "layer", "kind", "trivial", "discrete"])
def test_the_sum_of_all_entries_is_the_taylor_term(partition: str, engine: str) -> None:
    problem = make_problem()
    order = 2 if partition == "discrete" else 3
    ds = summarize(problem, order, partition=partition, engine=engine)
    terms = ho.taylor_terms(problem, order, direction=direction(problem.model), progress=False)
    for d in range(1, order + 1):
        np.testing.assert_allclose(ds[f"D{d}"].sum(), terms.sel(order=d), **EXACT)


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_union_is_the_weighted_mean_of_its_parts(cut: int, engine: str) -> None:
    batches, model = make_batches(), make_model()
    whole = summarize(make_problem(batches, model), engine=engine)
    parts = [summarize(make_problem(b, model), engine=engine) for b in (batches[:cut], batches[cut:])]
    weights = np.array([sum(SIZES[:cut]), sum(SIZES[cut:])]) / sum(SIZES)
    for name in ("loss", "D1", "D2", "D3"):
        mean = sum(w * p[name] for w, p in zip(weights, parts, strict=True))
        np.testing.assert_allclose(whole[name], mean, **EXACT)


def test_the_derivative_along_u_is_the_next_order_summed_over_an_index(engine: str) -> None:
    problem, h = make_problem(), 2e-3
    theta = {n: p.detach() for n, p in problem.model.named_parameters()}
    u = direction(problem.model)
    ds = summarize(problem, engine=engine)
    at = {
        k: summarize(problem, 2, engine=engine, checkpoint={n: theta[n] + k * h * u[n] for n in theta})
        for k in (-2, -1, 1, 2)
    }
    for order in (1, 2):
        d = {k: a[f"D{order}"] for k, a in at.items()}
        slope = (8 * (d[1] - d[-1]) - (d[2] - d[-2])) / (12 * h)  # error O(h^4)
        np.testing.assert_allclose(slope, ds[f"D{order + 1}"].sum(f"group{order + 1}"), rtol=1e-6, atol=1e-8)


def test_derivatives_equal_forward_mode_on_the_union(engine: str) -> None:
    batches, model = make_batches(), make_model()
    x, y = torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches])
    u = direction(model)
    theta = {n: p.detach() for n, p in model.named_parameters()}
    f = oracles.along_groups(oracles.model_loss(model, x, y, F.cross_entropy), theta, u, [[n] for n in theta])
    expected = oracles.by_forward_mode(f, 6, 3)
    ds = summarize(make_problem(batches, model), engine=engine, diagonal=3)
    for d in (1, 2, 3):
        np.testing.assert_allclose(ds[f"D{d}"], expected[d - 1].numpy(), **EXACT)
    two = summarize(make_problem(batches, model), 2, engine=engine, diagonal=3)
    np.testing.assert_allclose(two.D3_diag, np.einsum("sss->s", expected[2].numpy()), **EXACT)


# ---- statistics -------------------------------------------------------------------------------------------------


def test_standard_errors_and_blocks_follow_the_formula(engine: str) -> None:
    batches, model = make_batches(), make_model()
    ds = summarize(make_problem(batches, model), 2, diagonal=3, keep_batches=10, engine=engine)
    alone = [summarize(make_problem([b], model), 2, diagonal=3, engine=engine) for b in batches]
    weights = np.array(SIZES, dtype=float)
    np.testing.assert_allclose(ds.weight, weights)
    for name in ("loss", "D1", "D2", "D3_diag"):
        values = np.stack([a[name].values for a in alone])
        mean, se = oracles.weighted(values, weights)
        np.testing.assert_allclose(ds[name], mean, **EXACT)
        np.testing.assert_allclose(ds[f"{name}_se"], se, rtol=1e-8, atol=1e-12)
        np.testing.assert_allclose(ds[f"{name}_batch"].values.T, (values.T * weights), **EXACT)
        assert np.isnan(alone[0][f"{name}_se"]).all()


def test_ignored_targets_do_not_count(engine: str) -> None:
    g = torch.Generator().manual_seed(3)
    x, y = torch.randn(12, 4, generator=g).double(), torch.randint(0, 3, (12,), generator=g)
    y[[1, 2, 3, 8]] = -100
    model = make_model()
    split = summarize(make_problem([(x[:5], y[:5]), (x[5:], y[5:])], model), engine=engine)
    whole = summarize(make_problem([(x, y)], model), engine=engine)
    for name in ("loss", "D1", "D2", "D3"):
        np.testing.assert_allclose(split[name], whole[name], **EXACT)


def test_a_sum_reduction_gives_the_derivatives_of_the_sum(engine: str) -> None:
    model, batches = make_model(), make_batches()
    total = ho.Problem(
        model, batches, batch_loss=lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="sum"),
        batch_size=lambda b: len(b[1]), reduction="sum",
    )  # fmt: skip
    ds, mean = summarize(total, engine=engine), summarize(make_problem(batches, model), engine=engine)
    for name in ("loss", "D1", "D2", "D3", "D1_se", "D2_se"):
        np.testing.assert_allclose(ds[name], mean[name] * sum(SIZES), rtol=1e-9, atol=1e-12)


@functools.cache
def forty_batches() -> tuple[list, list[xr.Dataset]]:
    """Forty unlike batches, and the summaries of each alone."""
    model, g = make_model(), torch.Generator().manual_seed(4)
    sizes = torch.randint(20, 60, (40,), generator=g).tolist()
    batches = [(torch.randn(n, 4, generator=g).double(), torch.randint(0, 3, (n,), generator=g)) for n in sizes]
    alone = make_problem(batches[:1], model)
    out = []
    for b in batches:
        alone.data[0] = b
        alone.cache.clear()
        out.append(summarize(alone, 1, diagonal=2, engine="nested"))
    return batches, out


def first_settled(tolerance: float) -> int:
    """How many batches it takes by the rule of `summarize`, in plain numpy."""
    batches, alone = forty_batches()
    weights = np.array([len(y) for _, y in batches], dtype=float)
    for n in range(8, len(batches) + 1):
        worst = 0.0
        for name in ("D1", "D2_diag"):
            mean, se = oracles.weighted(np.stack([a[name].values for a in alone[:n]]), weights[:n])
            matters = np.abs(mean) >= 0.1 * np.abs(mean).max()
            worst = max(worst, float((se[matters] / np.abs(mean[matters])).max()))
        if worst <= tolerance:
            return n
    return len(batches) + 1


@pytest.mark.parametrize("tolerance", [1.0, 0.3, 0.2, 0.18, 0.16, 0.01])
def test_tolerance_stops_where_the_entries_that_matter_are_known(tolerance: float) -> None:
    batches, _ = forty_batches()
    ds = summarize(make_problem(batches), 1, diagonal=2, tolerance=tolerance, keep_batches=40)
    expected = first_settled(tolerance)
    assert int(ds.n_batches) == min(expected, 40)
    assert ds.sizes["batch"] == int(ds.n_batches)
    assert ds.attrs["n_samples"] == sum(len(y) for _, y in batches[:expected])
    told = str(ds.stopping.item())
    if expected <= 40:
        assert told == f"stopped after {expected} batches: the entries that matter are known to {tolerance:.2g}"
    else:
        assert told.startswith("all 40 batches were used, and entries of D")


def test_the_tolerances_of_the_test_above_stop_at_different_batches() -> None:
    stops = [first_settled(t) for t in (1.0, 0.3, 0.2, 0.18, 0.16, 0.01)]
    assert stops == sorted(stops)
    assert len(set(stops)) >= 5


def test_without_a_tolerance_nothing_is_said_of_stopping() -> None:
    assert "stopping" not in summarize(make_problem(), 1).coords


# ---- what comes back --------------------------------------------------------------------------------------------


def test_schema_attrs_and_netcdf_round_trip(tmp_path) -> None:
    ds = ho.summarize(make_problem(), 3, direction="weights", keep_batches=4, progress=False)
    schema.validate(ds)
    assert ds.attrs["n_samples"] == sum(SIZES)
    assert ds.attrs["direction"] == "weights"
    assert float(ds.self_check) < 1e-12
    assert list(ds.group.values) == [n for n, _ in make_model().named_parameters()]
    assert list(ds.layer.values) == ["0", "0", "2", "2", "4", "4"]
    assert list(ds.kind.values) == ["weight", "bias"] * 3
    assert ds["shape"].values[0] == "5x4"
    np.testing.assert_allclose(ds.direction_norm, [float(p.detach().norm()) for p in make_model().parameters()])
    for name in (*ds.data_vars, *ds.coords):
        assert ds[name].attrs["long_name"], name
        assert ds[name].attrs["units"], name
    json.loads(ds.attrs["provenance"])
    ds.to_netcdf(tmp_path / "a.nc", engine="h5netcdf")
    back = xr.load_dataset(tmp_path / "a.nc", engine="h5netcdf")
    schema.validate(back)
    xr.testing.assert_equal(ds, back)


def test_the_model_comes_back_untouched(engine: str) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double()
    model[1].eval()
    for p in model.parameters():
        p.grad = torch.full_like(p, 0.25)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    flags = [m.training for m in model.modules()]
    torch.manual_seed(9)
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    ho.summarize(make_problem(model=model), 2, diagonal=3, direction="random", engine=engine, progress=False)
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    assert [m.training for m in model.modules()] == flags
    assert all(bool((p.grad == 0.25).all()) for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002


def test_gradient_is_that_of_the_whole_data_and_its_error_is_conditional(engine: str) -> None:
    model, batches = make_model(), make_batches()
    ds = ho.summarize(make_problem(batches, model), 1, engine=engine, progress=False)
    x, y = torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches])
    grads = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    np.testing.assert_allclose(ds.D1, [float(g.square().sum()) for g in grads], **EXACT)
    assert json.loads(ds.attrs["provenance"])["standard_errors"] == "conditional on the direction"


def test_float32_model_in_float64_is_the_float64_model(engine: str) -> None:
    model = make_model().float()
    batches = [(x.float(), y) for x, y in make_batches()]
    u = direction(make_model())
    cast = summarize(make_problem(batches, model), direction=u, dtype="float64", engine=engine)
    double = summarize(make_problem([(x.double(), y) for x, y in batches], model.double()), direction=u, engine=engine)
    assert cast.attrs["dtype"] == "float64"
    for name in ("loss", "D1", "D2", "D3"):
        np.testing.assert_allclose(cast[name], double[name], rtol=1e-12, atol=1e-15)


@pytest.mark.row("M8")
def test_frozen_and_unused_parameters(engine: str) -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(4, 3), nn.Linear(2, 2)

        def forward(self, x):
            return self.used(x)

    model = Unused().double()
    model.used.bias.requires_grad_(False)
    problem = make_problem(model=model)
    ds = ho.summarize(problem, 2, direction="weights", engine=engine, progress=False)
    assert list(ds.group.values) == ["used.weight", "idle.weight", "idle.bias"]
    assert json.loads(ds.attrs["provenance"])["frozen"] == ["used.bias"]
    np.testing.assert_array_equal(ds.D2.sel(group=["idle.weight", "idle.bias"]), 0)
    all_of_them = ho.summarize(problem, 2, direction="weights", include_frozen=True, engine=engine, progress=False)
    assert "used.bias" in all_of_them.group


# ---- runs and stores --------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    for step, seed in ((0, 0), (10, 3), (20, 4)):
        save_file(
            {k: v.contiguous() for k, v in make_model(seed).state_dict().items()}, folder / f"m_{step}.safetensors"
        )
    return ho.open_run(folder)


def test_a_run_is_its_checkpoints_stacked(run) -> None:
    problem = make_problem()
    ds = ho.summarize_run(run, problem, 2, diagonal=3, keep_batches=4, progress=False)
    schema.validate(ds)
    assert list(ds.step.values) == [0, 10, 20]
    assert ds.D2.dims == ("step", "group", "group2")
    for i in range(3):
        one = ho.summarize(problem, 2, diagonal=3, keep_batches=4, checkpoint=run[i], progress=False)
        for name in one.data_vars:
            np.testing.assert_array_equal(ds[name].isel(step=i), one[name], err_msg=str(name))
        assert ds.sha256.values[i] == run[i].sha256
    assert ds.direction_norm.dims == ("step", "group")


def test_directions_towards_other_checkpoints(run) -> None:
    problem = make_problem()
    ds = ho.summarize_run(run[:2], problem, 2, direction="to:next", progress=False)
    states = [c.state_dict for c in run]
    u = {n: states[1][n] - states[0][n] for n, _ in problem.model.named_parameters()}
    np.testing.assert_allclose(ds.direction_norm.isel(step=0), [float(t.norm()) for t in u.values()])
    by_hand = ho.summarize(problem, 2, direction=u, checkpoint=run[0], progress=False)
    np.testing.assert_allclose(ds.D2.isel(step=0), by_hand.D2, **EXACT)


def test_a_store_is_filled_once_and_resumed(run, tmp_path, monkeypatch) -> None:
    problem, store = make_problem(), tmp_path / "store"
    first = ho.summarize_run(run, problem, 2, diagonal=3, keep_batches=4, store=store, progress=False)

    def explode(*args, **kwargs):
        raise AssertionError("computed again")

    monkeypatch.setattr(summaries.Work, "unit", explode)
    again = ho.summarize_run(run, problem, 2, diagonal=3, keep_batches=4, store=store, progress=False)
    xr.testing.assert_identical(first.drop_attrs(), again.drop_attrs())
    opened = ho.open_store(store)
    xr.testing.assert_identical(first.drop_attrs(), opened.drop_attrs())
    with pytest.raises(AssertionError, match="computed again"):
        ho.summarize_run(run, problem, 1, store=store, progress=False)


def test_a_store_that_lacks_units_gives_nan_and_its_coverage(run, tmp_path, monkeypatch) -> None:
    problem, store = make_problem(), tmp_path / "store"
    unit = summaries.Work.unit

    def two_then_stop(self, checkpoint, *args, **kwargs):
        if checkpoint.step == 20:
            raise KeyboardInterrupt
        return unit(self, checkpoint, *args, **kwargs)

    monkeypatch.setattr(summaries.Work, "unit", two_then_stop)
    with pytest.raises(KeyboardInterrupt):
        ho.summarize_run(run, problem, 2, keep_batches=4, store=store, progress=False)
    ds = ho.open_store(store)
    schema.validate(ds)
    assert ds.attrs["coverage"] == pytest.approx(2 / 3)
    assert np.isnan(ds.D2.isel(step=2)).all()
    assert np.isfinite(ds.D2.isel(step=1)).all()
    monkeypatch.undo()
    resumed = ho.summarize_run(run, problem, 2, keep_batches=4, store=store, progress=False)
    direct = ho.summarize_run(run, problem, 2, keep_batches=4, progress=False)
    xr.testing.assert_identical(resumed.drop_attrs(), direct.drop_attrs())


# ---- errors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"order": 0}, "order must be a whole number"),
        ({"order": 2.0}, "order must be a whole number"),
        ({"order": True}, "order must be a whole number"),
        ({"diagonal": 0}, "diagonal must be"),
        ({"memory": "lots"}, "is not a size"),
        ({"dtype": "float16"}, "dtype must be"),
        ({"engine": "fast"}, "no engine 'fast'"),
        ({"max_batches": 0}, "max_batches"),
        ({"keep_batches": 1}, "keep_batches"),
        ({"tolerance": 0.0}, "tolerance"),
        ({"partition": "layers"}, "did you mean 'layer'"),
        ({"direction": "gradent"}, "did you mean 'gradient'"),
        ({"order": 14}, "coarser partition"),
        ({"order": 17}, "at most 16"),
        ({"memory": -1}, "is not a size"),
        ({"seed": 2**70}, "64 bits"),
        ({"max_batches": "a"}, "max_batches is a number"),
    ],
)
@pytest.mark.row("N1", "P4")
def test_wrong_arguments_are_named(change: dict, words: str) -> None:
    with pytest.raises(HoError, match=words):
        ho.summarize(make_problem(), **{"order": 2, "progress": False, **change})


def test_unknown_options_of_a_run_are_named(run) -> None:
    with pytest.raises(ArgumentError, match="'parition'"):
        ho.summarize_run(run, make_problem(), 2, parition="layer")


def test_a_checkpoint_that_does_not_fit_is_named(tmp_path) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"0.weight": torch.zeros(2, 2)}, path)
    with pytest.raises(CheckpointError, match=r"0\.bias"):
        ho.summarize(make_problem(), checkpoint=path, progress=False)


@pytest.mark.row("A5")
def test_a_bad_batch_is_named() -> None:
    batches = make_batches()
    batches[2][0][4, 1] = float("nan")
    with pytest.raises(DataError, match="batch 2 has inputs that are not finite") as caught:
        summarize(make_problem(batches), 2)
    assert "[4]" in str(caught.value)


@pytest.mark.parametrize("position", [0, 2])
@pytest.mark.parametrize("recipe", ["gradient", "weights"])
@pytest.mark.row("A6")
def test_a_label_out_of_range_is_named(engine: str, recipe: str, position: int) -> None:
    batches = make_batches()
    batches[position][1][1] = 7
    with pytest.raises(DataError, match=f"(?s)out of range.*batch {position}"):
        ho.summarize(make_problem(batches), 2, direction=recipe, engine=engine, progress=False)


def test_new_weights_are_never_taken_for_the_old_ones(engine: str) -> None:
    """Neither state_dicts at recycled addresses nor weights changed behind autograd's back."""
    model, batches = make_model(), make_batches()
    problem = make_problem(batches, model)
    for seed in range(6):
        weights = {k: v.clone() for k, v in make_model(seed).state_dict().items()}
        ds = ho.summarize(problem, 1, checkpoint=weights, engine=engine, progress=False)
        fresh = ho.summarize(make_problem(batches, make_model(seed)), 1, engine=engine, progress=False)
        del weights
        np.testing.assert_allclose(ds.D1, fresh.D1, **EXACT)
    before = ho.summarize(problem, 1, engine=engine, progress=False)
    for p in model.parameters():
        p.data.add_(0.5)
    after = ho.summarize(problem, 1, engine=engine, progress=False)
    fresh = ho.summarize(make_problem(batches, model), 1, engine=engine, progress=False)
    np.testing.assert_allclose(after.D1, fresh.D1, **EXACT)
    assert not np.allclose(after.D1, before.D1)


@pytest.mark.row("D3", "N3")
def test_an_overflow_is_named() -> None:
    model = make_model().float()
    batches = [(x.float(), y) for x, y in make_batches()]
    u = {n: 1e30 * p.detach() for n, p in model.named_parameters()}
    with pytest.raises(NumericsError, match="D2 is not finite"):
        summarize(make_problem(batches, model), 3, direction=u)


def test_r_of_merged_groups_needs_the_full_third_order() -> None:
    ds = summarize(make_problem(), 2, diagonal=3, keep_batches=4)
    assert np.isfinite(ds.ho.regularizer()).all()
    with pytest.raises(SchemaError, match="D3"):
        ds.ho.merge("layer").ho.regularizer()


@pytest.mark.row("C4")
def test_a_checkpoint_that_fails_does_not_stop_the_others(study, tmp_path, monkeypatch) -> None:
    spec = StudySpec.read(study)
    run, problem = spec.run(), spec.problem()
    real, tried = summaries.Work.unit, []

    def unit(self, checkpoint, *args, **kwargs):
        tried.append(checkpoint.step)
        if checkpoint.step < 20:
            raise NumericsError("D2 overflowed", where="batch 1")
        return real(self, checkpoint, *args, **kwargs)

    monkeypatch.setattr(summaries.Work, "unit", unit)
    with pytest.raises(NumericsError, match="2 of 3 checkpoints failed, at steps '0', '10'; the first: D2 overflowed"):
        ho.summarize_run(run, problem, order=2, store=tmp_path / "store", progress=False)
    assert tried == [0, 10, 20]
    partial = ho.open_dataset(tmp_path / "store")
    assert partial.coverage.values.tolist() == [0, 0, 1]
    assert partial.loss.isnull().values.tolist() == [True, True, False]


def test_one_checkpoint_that_fails_is_named(study, tmp_path, monkeypatch) -> None:
    spec = StudySpec.read(study)
    real = summaries.Work.unit

    def unit(self, checkpoint, *args, **kwargs):
        if checkpoint.step == 10:
            raise kind("boom")
        return real(self, checkpoint, *args, **kwargs)

    monkeypatch.setattr(summaries.Work, "unit", unit)
    for kind in (NumericsError, RuntimeError):
        with pytest.raises(kind, match="boom") as caught:
            ho.summarize_run(spec.run(), spec.problem(), order=2, store=tmp_path / kind.__name__, progress=False)
        assert "step 10" in "".join([str(caught.value), *getattr(caught.value, "__notes__", [])])


def test_a_unit_computed_after_a_kill_has_the_same_bytes(study, tmp_path) -> None:
    """The direction is a unit of its own: a kill between the two leaves it, and the next call reads it."""
    spec = StudySpec.read(study)

    def units(name: str) -> dict[str, bytes]:
        ho.summarize_run(spec.run(), spec.problem(), order=2, store=tmp_path / name, progress=False)
        return {p.name: p.read_bytes() for p in (tmp_path / name / "units").iterdir()}

    quiet = units("quiet")
    assert len(quiet) == 6
    units("killed")
    lost = [p for p in (tmp_path / "killed" / "units").iterdir() if b'"summary"' in p.read_bytes()[:2000]]
    assert len(lost) == 3
    for file in lost:
        file.unlink()
    assert units("killed") == quiet


@pytest.mark.row("C18")
def test_checkpoints_of_the_same_content_share_a_unit(study, tmp_path, monkeypatch) -> None:
    real, computed = summaries.Work.unit, []

    def unit(self, checkpoint, *args, **kwargs):
        computed.append(checkpoint.step)
        return real(self, checkpoint, *args, **kwargs)

    monkeypatch.setattr(summaries.Work, "unit", unit)
    (study.parent / "step_20.safetensors").write_bytes((study.parent / "step_0.safetensors").read_bytes())
    spec = StudySpec.read(study)
    ds = ho.summarize_run(spec.run(), spec.problem(), order=2, store=tmp_path / "store", progress=False)
    assert len(list((tmp_path / "store" / "units").iterdir())) == 4  # two directions, two summaries
    assert sorted(computed) in ([0, 10], [10, 20])
    np.testing.assert_array_equal(ds.D2.sel(step=20), ds.D2.sel(step=0))


@pytest.mark.row("A8")
def test_S6_changed_data_and_checkpoints_are_shown(study, tmp_path) -> None:
    from hoanalysis.store import Store

    def register() -> list[str]:
        spec = StudySpec.read(study)
        work = summaries.Work(spec.problem(), summaries.Settings(order=2))
        with Store.open(tmp_path / "store", mode="w") as store:
            return store.register(work.name, work.plan(work.steps(spec.run()), series=True))

    assert register() == []
    (study.parent / "step_20.safetensors").write_bytes((study.parent / "step_0.safetensors").read_bytes())
    (line,) = register()
    assert line.startswith("study.checkpoints.20: '")
    study.write_text(study.read_text().replace("max_samples = 32", "max_samples = 24"))
    assert any(line.startswith("study.data: '") for line in register())


@pytest.mark.parametrize("order", list(itertools.permutations(range(3)))[1:])
def test_the_order_in_which_checkpoints_are_computed_does_not_matter(study, tmp_path, order: tuple[int, ...]) -> None:
    spec = StudySpec.read(study)
    run = spec.run()

    def filled(name: str, *parts) -> tuple[xr.Dataset, dict[str, bytes]]:
        for part in parts:
            problem = spec.problem()  # a new process: nothing cached
            ds = ho.summarize_run(part, problem, order=2, store=tmp_path / name, progress=False)
        ds.attrs.pop("created_at")
        return ds, {p.name: p.read_bytes() for p in (tmp_path / name / "units").iterdir()}

    quiet, units = filled("quiet", run)
    mixed, others = filled("mixed", *(run[i : i + 1] for i in order), run)
    xr.testing.assert_identical(mixed, quiet)
    assert others == units
