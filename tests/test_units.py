"""Sums over batches against the formulas of the design in plain numpy, and Datasets against what went into them."""

import itertools
import json

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from hoanalysis import schema
from hoanalysis.analysis.merge import merge
from hoanalysis.units import Accumulator, add_shards, assemble, quantities, summary

SHAPES = {"loss": (), "D1": (3,), "D2": (3, 3), "D3_diag": (3,)}


def batches(n: int, seed: int = 0, mean: float = 0.0, spread: float = 1.0) -> list[tuple[dict, float, int]]:
    """(values, weight, rows) of n batches with unequal weights."""
    rng = np.random.default_rng(seed)
    return [
        (
            {k: np.asarray(mean + spread * rng.normal(size=shape)) for k, shape in SHAPES.items()},
            float(rng.uniform(0.5, 30)),
            int(rng.integers(1, 40)),
        )
        for _ in range(n)
    ]


def accumulated(items, keep_batches: int = 0) -> Accumulator:
    out = Accumulator(keep_batches)
    for values, weight, rows in items:
        out.add(values, weight, rows)
    return out


def unit_of(items, keep_batches: int = 0, **facts) -> xr.Dataset:
    norms = {"direction_norm": [1.0, 2.0, 3.0], "parameter_norm": [4.0, 5.0, 6.0]}
    return accumulated(items, keep_batches).unit(norms, {"engine": "nested", "engine_detail": "", **facts})


def plain(items, name: str) -> tuple[np.ndarray, np.ndarray]:
    """The weighted mean, and se^2 = n/(n-1) sum w^2 (x - mean)^2 / (sum w)^2; in extended precision."""
    x = np.stack([values[name] for values, _, _ in items]).astype(np.longdouble)
    w = np.array([weight for _, weight, _ in items], dtype=np.longdouble)
    n, wide = len(w), w.reshape(-1, *[1] * (x.ndim - 1))
    mean = (wide * x).sum(0) / w.sum()
    se = np.sqrt(n / (n - 1) * (wide**2 * (x - mean) ** 2).sum(0)) / w.sum() if n > 1 else np.full_like(mean, np.nan)
    return mean.astype(float), se.astype(float)


# ---- means and standard errors ----------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(0, 1000))
def test_means_and_errors_are_those_of_the_design(n, seed):
    items = batches(n, seed)
    sums = accumulated(items)
    for name in SHAPES:
        mean, se = plain(items, name)
        got_mean, got_se = sums.mean_and_error(name)
        np.testing.assert_allclose(got_mean, mean, rtol=1e-12, atol=1e-13)
        np.testing.assert_allclose(got_se, se, rtol=1e-11, atol=1e-13)
        total, total_se = sums.mean_and_error(name, "sum")
        w = sum(weight for _, weight, _ in items)
        np.testing.assert_allclose(total, mean * w, rtol=1e-12, atol=1e-11)
        np.testing.assert_allclose(total_se, se * w, rtol=1e-11, atol=1e-11)
    assert (sums.n_batches, sums.n_samples) == (n, sum(rows for _, _, rows in items))


def test_equal_weights_give_the_textbook_standard_error():
    items = [({"D1": np.array([x])}, 8.0, 8) for x in (1.0, 2.0, 6.0, 7.0)]
    mean, se = accumulated(items).mean_and_error("D1")
    np.testing.assert_allclose(mean, [4.0])
    np.testing.assert_allclose(se, [np.std([1, 2, 6, 7], ddof=1) / 2])


def test_a_tiny_spread_around_a_huge_mean_does_not_drown():
    items = batches(50, 3, mean=1e9, spread=1e-4)
    for name in SHAPES:
        mean, se = plain(items, name)
        got_mean, got_se = accumulated(items).mean_and_error(name)
        np.testing.assert_allclose(got_mean, mean, rtol=1e-15)
        np.testing.assert_allclose(got_se, se, rtol=1e-3)  # the values carry 1e-7 of rounding each


def test_batches_that_agree_have_no_error():
    items = [(batches(1)[0][0], w, 1) for w in (1.0, 2.0, 7.0)]
    np.testing.assert_allclose(accumulated(items).mean_and_error("D2")[1], 0, atol=1e-15)


def test_one_batch_has_no_error_to_tell():
    assert np.isnan(accumulated(batches(1)).mean_and_error("D2")[1]).all()


def test_the_values_that_are_added_are_not_kept_by_reference():
    values = {"D1": np.ones(3)}
    sums = Accumulator(2)
    for _ in range(3):
        sums.add(values, 1.0, 1)
        values["D1"] += 1
    np.testing.assert_allclose(sums.mean_and_error("D1")[0], [2.0] * 3)
    np.testing.assert_allclose(sums.center["D1"], [1.0] * 3)


def test_the_relative_error_looks_at_the_large_entries():
    items = batches(12, 1, mean=5.0)
    for values, _, _ in items:
        values["D1"] = values["D1"] * np.array([1.0, 0.01, 1.0])  # small: its relative error does not count
        values["D2"] = 0 * values["D2"]
    sums = accumulated(items)
    mean, se = plain(items, "D1")
    np.testing.assert_allclose(sums.relative_error("D1"), max(se[0] / abs(mean[0]), se[2] / abs(mean[2])), rtol=1e-9)
    np.testing.assert_allclose(sums.relative_error("D1", share=0), (se / np.abs(mean)).max(), rtol=1e-9)
    assert sums.relative_error("D2") == 0.0
    mean, se = plain(items, "loss")
    np.testing.assert_allclose(sums.relative_error("loss"), se / abs(mean), rtol=1e-9)
    assert accumulated(items[:1]).relative_error("D1") == np.inf


# ---- blocks -----------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 70), st.integers(2, 9))
def test_blocks_are_few_contiguous_and_add_up(n, keep):
    """Batch i is a unit vector, so that a block shows which batches it holds."""
    rng = np.random.default_rng(n)
    weights = rng.uniform(1, 5, n)
    unit = accumulated([({"D1": np.eye(n)[i]}, weights[i], 1) for i in range(n)], keep).unit({}, {})
    blocks, w = unit["D1_batch"].values, unit["weight"].values
    assert len(blocks) <= keep
    assert len(blocks) >= min(n, keep // 2)  # not fewer than half of what was asked for
    members = [np.flatnonzero(b).tolist() for b in blocks]
    assert [i for m in members for i in m] == list(range(n))
    assert len({len(m) for m in members[:-1]}) <= 1
    np.testing.assert_allclose(w, [weights[m].sum() for m in members])
    np.testing.assert_allclose(blocks.sum(0), unit["D1_sum"].values)
    np.testing.assert_allclose(blocks.sum(0), weights)


def test_no_blocks_unless_asked_for():
    unit = unit_of(batches(5))
    assert schema.BATCH not in unit.dims
    assert "weight" not in unit


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_blocks_of_single_batches_give_the_stored_errors(reduction):
    """What the analysis computes from blocks (sum / weight of each) must be the errors that are stored beside them."""
    ds = xr.Dataset(summary(unit_of(batches(6), 6), reduction))
    w = ds["weight"].values
    for name in SHAPES:
        sums = ds[f"{name}_batch"].values
        wide = w.reshape(-1, *[1] * (sums.ndim - 1))
        mean = sums.sum(0) / w.sum()
        se = np.sqrt(6 / 5 * (wide**2 * (sums / wide - mean) ** 2).sum(0)) / w.sum()
        np.testing.assert_allclose(ds[name].values, mean, rtol=1e-12)
        np.testing.assert_allclose(ds[f"{name}_se"].values, se, rtol=1e-11)


# ---- shards -----------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 14).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(1, 13)).map(sorted))),
    st.sampled_from([(0.0, 1.0), (1e6, 1e-2)]),
    st.sampled_from([0, 4]),
)
def test_the_shards_of_any_split_add_up_to_the_whole(split, scale, keep):
    n, cuts = split
    items = batches(n, n, *scale)
    edges = [0, *(c for c in cuts if c < n), n]
    shards = [unit_of(items[a:b], keep) for a, b in itertools.pairwise(edges)]
    copies = [s.copy(deep=True) for s in shards]
    added, whole = add_shards(shards), unit_of(items, keep)
    for name in ("n_batches", "n_samples", "weight_sum", "weight_sq_sum"):
        np.testing.assert_allclose(added[name], whole[name], rtol=1e-12)
    got, expected = xr.Dataset(summary(added)), xr.Dataset(summary(whole))
    mean, spread = scale
    rounding = 1e-11 * max(1, mean / spread)
    for name in SHAPES:
        np.testing.assert_allclose(got[name], expected[name], rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(got[f"{name}_se"], expected[f"{name}_se"], rtol=rounding, atol=1e-12)
    if keep:
        np.testing.assert_allclose(added["weight"].sum(), whole["weight_sum"], rtol=1e-12)
        np.testing.assert_allclose(added["D2_batch"].sum("batch"), whole["D2_sum"], rtol=1e-12, atol=1e-12)
    for s, c in zip(shards, copies, strict=True):
        xr.testing.assert_identical(s, c)


def test_quantities_are_what_was_added():
    assert sorted(quantities(unit_of(batches(2), 2))) == sorted(SHAPES)


def test_a_unit_survives_netcdf(tmp_path):
    unit = unit_of(batches(5), 4, self_check=float("nan"), notes=["a", "é"])
    unit.to_netcdf(tmp_path / "unit.nc", engine="h5netcdf")
    back = xr.load_dataset(tmp_path / "unit.nc", engine="h5netcdf")
    xr.testing.assert_identical(back, unit)
    assert json.loads(back.attrs["unit"])["notes"] == ["a", "é"]


# ---- the Dataset ------------------------------------------------------------------------------------------------

LABELS = ["fc.weight", "fc.bias", 'a/b.c$"<é>']


def plan_of(steps, series=True, reduction="mean", order=2, shards=1) -> dict:
    wanted = {"loss": 0} | {f"D{d}": d for d in range(1, order + 1)} | {"D3_diag": 1}
    return {
        "groups": {
            "label": LABELS,
            "layer": ["fc", "fc", "a/b"],
            "kind": ["weight", "bias", "other"],
            "numel": [6, 2, 1],
            "shape": ["2x3", "2", ""],
            "aliases": ["", "head.bias;x", ""],
        },
        "quantities": wanted,
        "steps": [
            {"step": s, "sha256": f"sha of {s}", "units": [{"step": s, "shard": k} for k in range(shards)]}
            for s in steps
        ],
        "series": series,
        "reduction": reduction,
        "attrs": {
            "schema_version": schema.SCHEMA_VERSION,
            "order": order,
            "direction": "gradient",
            "partition": "canonical",
            "dtype": "float64",
            "created_at": "2026-01-01T00:00:00+00:00",
            "creation_library": "hoanalysis",
            "creation_library_version": "0",
            "torch_version": "0",
            "torch_threads": 1,
            "provenance": "{}",
        },
    }


def reader(units: dict):
    """Key -> unit, from {(step, shard): unit}."""
    return lambda key: units.get((key["step"], key["shard"]))


def check_schema(ds: xr.Dataset, tmp_path) -> xr.Dataset:
    """It validates, everything is described, and netCDF gives it back."""
    schema.validate(ds)
    for name in ds.variables:
        assert ds[name].attrs["long_name"], name
        assert ds[name].attrs["units"] == ("loss" if name not in ds.coords and name != "weight" else "1"), name
    ds.to_netcdf(tmp_path / "ds.nc", engine="h5netcdf")
    back = xr.load_dataset(tmp_path / "ds.nc", engine="h5netcdf")
    xr.testing.assert_equal(back, ds)
    assert {k: v for k, v in back.attrs.items() if k != "torch_threads"} == {
        k: v for k, v in ds.attrs.items() if k != "torch_threads"
    }
    schema.validate(back)
    return back


@pytest.mark.parametrize("keep", [0, 4])
def test_one_checkpoint(tmp_path, keep):
    items = batches(5)
    unit = unit_of(items, keep, self_check=1e-12)
    ds = assemble(plan_of([7], series=False), reader({(7, 0): unit}))
    check_schema(ds, tmp_path)
    assert schema.STEP not in ds.dims
    assert ds["D2"].dims == ("group", "group2")
    for dim in ("group", "group2"):
        assert ds[dim].values.tolist() == LABELS
    for name in SHAPES:
        mean, se = plain(items, name)
        np.testing.assert_allclose(ds[name], mean, rtol=1e-12)
        np.testing.assert_allclose(ds[f"{name}_se"], se, rtol=1e-11)
    for name, values in plan_of([7])["groups"].items():
        if name != "label":
            assert ds[name].values.tolist() == values
    assert ds["direction_norm"].values.tolist() == [1, 2, 3]
    assert (ds["sha256"].item(), ds["engine"].item(), ds["n_batches"].item()) == ("sha of 7", "nested", 5)
    assert (ds["self_check"].item(), ds.attrs["coverage"]) == (1e-12, 1.0)
    assert ds.attrs["n_samples"] == sum(rows for _, _, rows in items)
    assert (schema.BATCH in ds.dims) == bool(keep)


@pytest.mark.parametrize("steps", [[3], [0, 10, 20]], ids=["one step", "three steps"])
def test_a_series_keeps_what_belongs_to_each_step(tmp_path, steps):
    units = {}
    for i, s in enumerate(steps):
        units[s, 0] = unit_of(batches(4 + i, seed=i), engine=f"engine {i}", engine_detail=f"why {i}", self_check=i / 8)
        units[s, 0]["direction_norm"] = units[s, 0]["direction_norm"] + i
    ds = assemble(plan_of(steps), reader(units))
    check_schema(ds, tmp_path)
    assert ds[schema.STEP].values.tolist() == steps
    for i, s in enumerate(steps):
        for name in SHAPES:
            mean, se = plain(batches(4 + i, seed=i), name)
            np.testing.assert_allclose(ds[name].sel(step=s), mean, rtol=1e-12)
            np.testing.assert_allclose(ds[f"{name}_se"].sel(step=s), se, rtol=1e-11)
        told = [ds[k].sel(step=s).item() for k in ("sha256", "engine", "engine_detail", "self_check", "n_batches")]
        assert told == [f"sha of {s}", f"engine {i}", f"why {i}", i / 8, 4 + i]
        assert ds["direction_norm"].sel(step=s).values.tolist() == [1 + i, 2 + i, 3 + i]
        assert ds["parameter_norm"].sel(step=s).values.tolist() == [4, 5, 6]
    for name in (*schema.STEP_COORDS, "engine_detail"):
        assert ds[name].dims == ("step",)
    for name in schema.GROUP_COORDS_BY_STEP:
        assert ds[name].dims == ("step", "group")
    for name in schema.GROUP_COORDS:
        assert ds[name].dims == ("group",)
    for name in ("loss", "D1", "D2", "D3_diag"):
        assert ds[name].dims[0] == "step"


@pytest.mark.parametrize("present", [[], [1], [0, 2]])
@pytest.mark.parametrize("keep", [0, 4])
def test_a_missing_unit_is_nan_and_uncovered(tmp_path, present, keep):
    ds = assemble(plan_of([0, 1, 2]), reader({(s, 0): unit_of(batches(4, s), keep) for s in present}))
    check_schema(ds, tmp_path)
    assert ds.attrs["coverage"] == len(present) / 3
    for s in range(3):
        assert ds["n_batches"].sel(step=s) == (4 if s in present else 0)
        for name in SHAPES:
            assert bool(ds[name].sel(step=s).notnull().all()) == (s in present)
            assert bool(ds[f"{name}_se"].sel(step=s).notnull().all()) == (s in present)
    assert ds["sha256"].values.tolist() == [f"sha of {s}" for s in range(3)]


def test_a_single_missing_unit(tmp_path):
    ds = assemble(plan_of([5], series=False), reader({}))
    check_schema(ds, tmp_path)
    assert ds.attrs["coverage"] == 0
    assert ds.attrs["n_samples"] == 0
    assert ds["D2"].dims == ("group", "group2")
    assert ds["D2"].isnull().all()


def test_a_missing_shard_counts_in_the_coverage(tmp_path):
    items = batches(6)
    units = {(0, 0): unit_of(items[:4]), (0, 1): unit_of(items[4:]), (1, 1): unit_of(items[4:])}
    ds = assemble(plan_of([0, 1], shards=2), reader(units))
    check_schema(ds, tmp_path)
    assert ds.attrs["coverage"] == 3 / 4
    assert ds["n_batches"].values.tolist() == [6, 0]
    np.testing.assert_allclose(ds["D2"].sel(step=0), plain(items, "D2")[0], rtol=1e-12)
    assert ds["D2"].sel(step=1).isnull().all()  # a part of the data is not shown as the whole
    assert ds.attrs["n_samples"] == sum(rows for _, _, rows in items)


def test_a_shard_that_nested_computed_makes_the_step_one_of_nested():
    engines = {0: ("tangents", ""), 1: ("nested", "nested instead of tangents")}
    units = {(0, k): unit_of(batches(3), engine=e, engine_detail=why) for k, (e, why) in engines.items()}
    ds = assemble(plan_of([0], shards=2), reader(units))
    assert ds["engine"].item() == "nested"
    assert ds["engine_detail"].item() == "nested instead of tangents"


def test_the_worst_self_check_of_the_shards_is_told():
    units = {(0, k): unit_of(batches(3, k), self_check=c) for k, c in enumerate([1e-9, 1e-3, float("nan")])}
    assert assemble(plan_of([0], shards=3), reader(units))["self_check"].item() == 1e-3
    units = {(0, 0): unit_of(batches(3), self_check=float("nan"))}
    assert np.isnan(assemble(plan_of([0]), reader(units))["self_check"].item())


def test_steps_with_fewer_blocks_are_padded_with_blocks_of_no_weight(tmp_path):
    items = {0: batches(4, 0), 1: batches(2, 1), 2: batches(3, 2)}
    ds = assemble(plan_of([0, 1, 2, 3]), reader({(s, 0): unit_of(b, 4) for s, b in items.items()}))
    check_schema(ds, tmp_path)
    assert ds.sizes["batch"] == 4
    assert (ds["weight"] > 0).sum("batch").values.tolist() == [4, 2, 3, 0]
    for s, b in items.items():
        for name in SHAPES:
            sums = [w * values[name] for values, w, _ in b] + [np.zeros(SHAPES[name])] * (4 - len(b))
            np.testing.assert_allclose(ds[f"{name}_batch"].sel(step=s), np.stack(sums), rtol=1e-13)
    assert not ds["D2_batch"].sel(step=3).any()


def test_padding_leaves_merged_errors_alone():
    items = {0: batches(6, 0), 1: batches(3, 1)}
    together = assemble(plan_of([0, 1]), reader({(s, 0): unit_of(b, 6) for s, b in items.items()}))
    for s, b in items.items():
        alone = assemble(plan_of([s]), reader({(s, 0): unit_of(b, 6)}))
        for how in ("layer", 1):
            a, t = merge(alone, how), merge(together, how)
            for name in ("D1", "D2", "D1_se", "D2_se"):
                np.testing.assert_allclose(t[name].sel(step=s), a[name].sel(step=s), rtol=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_sums_over_the_data(tmp_path, reduction):
    items = batches(5)
    ds = assemble(plan_of([0, 1], reduction=reduction), reader({(0, 0): unit_of(items, 6)}))
    check_schema(ds, tmp_path)
    w = sum(weight for _, weight, _ in items) if reduction == "sum" else 1.0
    for name in SHAPES:
        mean, se = plain(items, name)
        np.testing.assert_allclose(ds[name].sel(step=0), mean * w, rtol=1e-12)
        np.testing.assert_allclose(ds[f"{name}_se"].sel(step=0), se * w, rtol=1e-11)
    merged = merge(ds, {"both": LABELS[:2]}).sel(step=0)
    values = [({"D1": np.array([v["D1"][:2].sum(), v["D1"][2]])}, weight, 1) for v, weight, _ in items]
    mean, se = plain(values, "D1")
    np.testing.assert_allclose(merged["D1"], mean * w, rtol=1e-12)
    np.testing.assert_allclose(merged["D1_se"], se * w, rtol=1e-11)


def test_orders_up_to_ten_have_their_dims():
    unit = accumulated([({"loss": np.array(1.0), "D10": np.ones((1,) * 10)}, 1.0, 1)] * 2).unit(
        {"direction_norm": [1.0], "parameter_norm": [1.0]}, {}
    )
    plan = plan_of([0], series=False, order=1)
    plan["quantities"] = {"loss": 0, "D10": 10}
    plan["groups"] = {k: v[:1] for k, v in plan["groups"].items()}
    ds = schema.validate(assemble(plan, reader({(0, 0): unit})))
    assert ds["D10"].dims == schema.group_dims(10)
    assert all(ds[d].values.tolist() == LABELS[:1] for d in schema.group_dims(10))
