"""Differences and their errors against loops in plain numpy: added squares, and a paired jackknife by hand."""

import itertools
import json
import re

import numpy as np
import pytest
import xarray as xr

from hoanalysis.analysis.compare import compare, differences
from hoanalysis.analysis.example import example
from hoanalysis.analysis.interactions import shares
from hoanalysis.analysis.inverse import scale_free
from hoanalysis.analysis.merge import merge
from hoanalysis.analysis.steps import learning_rates
from hoanalysis.errors import ArgumentError, SchemaError

DATA = json.dumps({"data": "the same", "seed": 0})


def two_points(**kwargs):
    """Two checkpoints of one polynomial on the same blocks, and the record that says so."""
    ds = example(1, steps=2, **kwargs).assign_attrs(provenance=DATA)
    return ds.isel(step=0), ds.isel(step=1)


def test_independent_errors_add_in_squares():
    a, b = example(1), example(2)
    found = compare(a, b)
    assert found.attrs["errors"] == "independent"
    for name in ("loss", "D1", "D2", "D3"):
        np.testing.assert_allclose(found[name].values, b[name].values - a[name].values, rtol=1e-12)
        np.testing.assert_array_equal(found[f"{name}_a"].values, a[name].values)
        np.testing.assert_array_equal(found[f"{name}_b"].values, b[name].values)
        expected = np.sqrt(a[f"{name}_se"].values ** 2 + b[f"{name}_se"].values ** 2)
        np.testing.assert_allclose(found[f"{name}_se"].values, expected, rtol=1e-12)
        np.testing.assert_allclose(
            found[f"{name}_significance"].values, np.abs(found[name].values) / expected, rtol=1e-12
        )
    for name, value, error in [
        ("scale_free", scale_free, "scale_free_se"),
        ("learning_rates", lambda ds: learning_rates(ds).learning_rates, None),
        ("off_block", lambda ds: shares(ds).off_block, None),
    ]:
        np.testing.assert_allclose(found[name].values, value(b).values - value(a).values, rtol=1e-9, atol=1e-14)
        if error:
            expected = np.hypot(scale_free(a)[error].values, scale_free(b)[error].values)
            np.testing.assert_allclose(found[f"{name}_se"].values, expected, rtol=1e-9, atol=1e-16)


def test_the_same_blocks_of_the_same_data_are_paired():
    a, b = two_points()
    found = compare(a, b)
    assert "paired by block" in found.attrs["errors"]
    w, n = a.weight.values, a.sizes["batch"]
    total = w.sum()
    for name in ("D1", "D2"):
        x = (b[f"{name}_batch"].values - a[f"{name}_batch"].values) / w.reshape(-1, *[1] * (a[name].ndim))
        mean = np.tensordot(w, x, 1) / total
        squares = sum(w[k] ** 2 * (x[k] - mean) ** 2 for k in range(n))
        np.testing.assert_allclose(found[f"{name}_se"].values, np.sqrt(n / (n - 1) * squares) / total, rtol=1e-7)
    rates, squares = found.learning_rates.values, 0.0
    for k in range(n):
        keep = np.arange(n) != k
        left, right = (
            np.linalg.solve(*(one[f"D{d}_batch"].values[keep].sum(0) / w[keep].sum() for d in (2, 1))) for one in (a, b)
        )
        squares = squares + ((total - w[k]) / total * (right - left - rates)) ** 2
    np.testing.assert_allclose(found.learning_rates_se.values, np.sqrt(n / (n - 1) * squares), rtol=1e-7)
    apart = compare(a, b, paired=False)
    assert np.median(found.D2_se.values / apart.D2_se.values) < 0.9  # what both share through their data cancels


def test_a_checkpoint_does_not_differ_from_itself():
    a, _ = two_points()
    found = compare(a, a)
    np.testing.assert_array_equal(found.D2.values, 0)
    np.testing.assert_array_equal(found.D2_se.values, 0)
    assert np.isnan(found.D2_significance.values).all()
    assert np.isfinite(compare(a, a, paired=False).D2_se.values).all()


def test_errors_are_paired_only_where_the_blocks_are_the_same():
    a, b = two_points()
    assert compare(a, b.assign_attrs(provenance="")).attrs["errors"] == "independent"
    assert "not paired" not in compare(a, b.assign_attrs(provenance="")).status.item()
    other = b.copy()
    other["weight"] = b.weight + 1
    assert compare(a, other).attrs["errors"] == "independent"
    assert "not paired: both are of the same data" in compare(a, other).status.item()
    with pytest.raises(ArgumentError, match="cannot be paired"):
        compare(a, other, paired=True)
    assert "paired by block" in compare(a, b.assign_attrs(provenance="{"), paired=True).attrs["errors"]


def test_groups_are_matched_by_label_whatever_their_order():
    a, b = example(1, layers=3), example(2, layers=3)
    order = [5, 1, 3, 2]
    moved = b.isel(dict.fromkeys(("group", "group2", "group3"), order))
    found, full = compare(a, moved), compare(a, b)
    kept = [1, 2, 3, 5]
    assert found.group.values.tolist() == a.group.values[kept].tolist()
    np.testing.assert_allclose(found.D2.values, full.D2.values[np.ix_(kept, kept)], rtol=1e-12)
    np.testing.assert_allclose(found.D3_se.values, full.D3_se.values[np.ix_(kept, kept, kept)], rtol=1e-12)
    assert json.loads(found.attrs["unmatched_a"]) == ["layer0.weight", "layer2.weight"]
    assert json.loads(found.attrs["unmatched_b"]) == []
    assert "unmatched groups: only a has 'layer0.weight', 'layer2.weight'." in found.status.item()
    np.testing.assert_allclose(  # of all groups of b, not of the common ones
        found.learning_rates_b.values,
        learning_rates(b.isel(group=order, group2=order)).learning_rates.values[[1, 3, 2, 0]],
    )


def test_runs_are_compared_at_the_steps_that_both_have():
    a, b = example(1, steps=3), example(2, steps=3).assign_coords(step=[10, 20, 30])
    found = compare(a, b)
    assert found.step.values.tolist() == [10, 20]
    for i, step in enumerate((10, 20)):
        alone = compare(a.sel(step=step), b.sel(step=step))
        np.testing.assert_allclose(found.D2_significance.values[i], alone.D2_significance.values, rtol=1e-12)
    assert "unmatched steps: only a has '0'; only b has '30'." in found.status.values[0]
    pair = compare(a, b, step=(0, "last"))
    np.testing.assert_allclose(pair.D1.values, b.D1.values[2] - a.D1.values[0])
    assert (pair.step_a.item(), pair.step_b.item()) == (0, 30)
    np.testing.assert_allclose(compare(a, b, step="first").D1.values, b.D1.values[0] - a.D1.values[0])
    np.testing.assert_allclose(compare(a, b.isel(step=1), step=20).D1.values, b.D1.values[1] - a.D1.values[2])


def test_gaps_stay_gaps():
    a, b = example(1, steps=2), example(2, steps=2)
    for name in ("loss", "D1", "D2", "D3"):
        b[name][1] = np.nan
    found = compare(a, b)
    assert np.isfinite(found.D2.values[0]).all()
    assert np.isnan(found.D2.values[1]).all()
    assert "D2: no standard errors" in found.status.values[1]
    np.testing.assert_allclose(compare(a, b, step="last").D1.values, b.D1.values[0] - a.D1.values[1])


def test_rows_are_the_entries_once_and_sorted():
    found = compare(example(1, steps=2), example(2, steps=2))
    frame = differences(found)
    counts = frame.groupby("quantity", sort=False).size().to_dict()
    assert counts == {"loss": 2, "D1": 8, "D2": 20, "D3": 40, "scale_free": 20, "learning_rates": 8} | {
        "off_diagonal": 2,
        "off_block": 2,
    }
    told = frame["significance"].dropna()
    assert (told.diff().dropna() <= 0).all()
    assert frame["significance"][: len(told)].notna().all()
    for row in frame[frame.quantity == "D3"].itertuples():
        entry = found.sel(step=row.step, group=row.group, group2=row.group2, group3=row.group3)
        np.testing.assert_array_equal(
            [row.a, row.b, row.difference, row.se, row.significance],
            [entry[v].item() for v in ("D3_a", "D3_b", "D3", "D3_se", "D3_significance")],
        )
    seen = {tuple(sorted(r)) for r in frame[frame.quantity == "D3"][["group", "group2", "group3"]].values.tolist()}
    assert len(seen) == len(list(itertools.combinations_with_replacement(range(4), 3)))
    assert len(differences(found, 3)) == 3


def test_chance_is_told_beside_the_count():
    """Two checkpoints that are the same but for the noise of their data: about 5 % of the entries look different."""
    a, rng = example(1, layers=6), np.random.default_rng(0)
    b = a.copy(deep=True)
    b["D2"] = a.D2 + rng.normal(size=a.D2.shape) * np.sqrt(2) * a.D2_se
    whole = {"standard_errors": "unconditional: with what the data do through the direction"}
    text = compare(a.assign_attrs(whole), b.assign_attrs(whole)).status.item()
    assert "errors too small" not in text
    (line,) = [line for line in text.split("\n") if line.startswith("D2:")]
    far = int(line.split()[1])
    # 8 blocks: Student's t with 7 degrees of freedom is beyond 2 in 8.56 % of 78 entries, not in 4.55 %
    assert line.endswith("about 6.7 would by chance.")
    assert far <= 12


@pytest.mark.parametrize("paired", [True, False])
def test_errors_that_hold_a_gradient_fixed_are_told_paired_or_not(paired):
    """Pairing cancels what both have in common through their data, and not that each u is a mean of them."""
    a, b = two_points()
    whole = {"standard_errors": "unconditional: with what the data do through the direction"}
    for one, other in ((a, b), (a.assign_attrs(whole), b), (a, b.assign_attrs(whole))):
        told = compare(one, other, paired=paired).status.item()
        assert "errors too small: u is the gradient of the data" in told
        assert "would by chance" not in told
        assert re.search(r"^D2: \d+ of 10 entries differ by 2 standard errors or more\.$", told, re.MULTILINE)
    for sure in (whole, {"direction": "to:next"}):
        told = compare(a.assign_attrs(sure), b.assign_attrs(sure), paired=paired).status.item()
        assert "errors too small" not in told
        assert "would by chance" in told


def test_what_both_hold_is_compared():
    a, b = example(1), example(2, order=2)
    assert {"D3", "D3_diag"} & set(compare(a, b).data_vars) == set()
    assert "D3_diag" in compare(b, b)
    only = compare(a.drop_vars("D2"), b)
    assert {"D1", "loss"} <= set(only.data_vars)
    assert "scale_free" not in only
    bare = compare(a.drop_vars(["D2_se"]), b)
    assert np.isnan(bare.D2_se.values).all()


def test_other_sizes_and_other_seeds_are_told():
    a, b = example(1), example(1, size=5)
    assert "other sizes: 'layer0.weight', 'layer1.weight'" in compare(a, b).status.item()
    one, two = (example(1).assign_attrs(direction="random", provenance=json.dumps({"seed": s})) for s in (1, 2))
    assert "random direction of seed 1, b along that of seed 2" in compare(one, two).status.item()
    assert "random direction" not in compare(one, one).status.item()


def test_what_cannot_be_compared_is_refused():
    a = example(1)
    with pytest.raises(ArgumentError, match="along different directions: 'gradient' and 'weights'"):
        compare(a, a.assign_attrs(direction="weights"))
    with pytest.raises(ArgumentError, match="no group has the same label") as error:
        compare(a, merge(a, "layer"))
    assert "'canonical merged by layer'" in str(error.value)
    assert "ds.ho.merge" in str(error.value)
    with pytest.raises(ArgumentError, match="not str"):
        compare(a, "summaries.nc")
    with pytest.raises(SchemaError, match="does not hold summaries"):
        compare(a, xr.Dataset())
    series = example(1, steps=3)
    with pytest.raises(ArgumentError, match="give step=, one of '0', '10', '20'"):
        compare(series, a)
    with pytest.raises(ArgumentError, match="b has no checkpoint at step 5"):
        compare(series, series, step=(0, 5))
    with pytest.raises(ArgumentError, match="no step in common"):
        compare(series, series.assign_coords(step=[1, 2, 3]))


def test_the_result_can_be_stored(tmp_path):
    for found in (compare(example(1), example(2)), compare(example(1, steps=2), example(2, steps=2))):
        found.to_netcdf(tmp_path / "d.nc", engine="h5netcdf")
        with xr.open_dataset(tmp_path / "d.nc", engine="h5netcdf") as again:
            xr.testing.assert_allclose(again.load(), found)
        (tmp_path / "d.nc").unlink()
