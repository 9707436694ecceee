"""Unsettled signs against a loop, and the number of batches against drawing that many."""

import itertools

import numpy as np
import pytest

from hoanalysis.analysis.example import example
from hoanalysis.analysis.steps import learning_rates
from hoanalysis.analysis.unsettled import unsettled
from hoanalysis.errors import SchemaError

from .test_steps import with_null_group


def noisy(**kwargs):
    ds = example(1, **kwargs)
    for d in (1, 2, 3):
        rng = np.random.default_rng(d)
        ds[f"D{d}_se"] = np.abs(ds[f"D{d}"]) * rng.uniform(0.1, 1.5, ds[f"D{d}"].shape)
    return ds


def test_every_entry_below_two_standard_errors_and_no_other():
    ds = noisy(steps=2)
    frame = unsettled(ds)
    for (step, name), part in frame.groupby(["step", "quantity"], sort=False):
        one = ds.sel(step=step)
        if name == "learning_rates":
            found = learning_rates(one)
            values, errors = found.learning_rates.values, found.learning_rates_se.values
        else:
            values, errors = one[name].values, one[f"{name}_se"].values
        expected = {}
        for at in itertools.combinations_with_replacement(range(4), values.ndim):
            if abs(values[at]) < 2 * errors[at]:
                key = tuple(ds.group.values[list(at)]) + ("",) * (3 - values.ndim)
                expected[key] = (2 * errors[at] / values[at]) ** 2
        found = {tuple(r): t for *r, t in part[["group", "group2", "group3", "times"]].itertuples(index=False)}
        assert found.keys() == expected.keys()
        np.testing.assert_allclose([found[k] for k in expected], list(expected.values()), rtol=1e-10)
        assert (part.times.diff().dropna() >= 0).all()
        np.testing.assert_allclose(part.batches, part.times * 8)
    assert {"D1", "D2", "D3"} <= set(frame.quantity)
    few = unsettled(ds, 2).groupby(["step", "quantity"]).size()
    assert few.max() == 2


def test_the_sentence():
    ds = noisy()
    ds.D2_se[0, 1] = ds.D2_se[1, 0] = np.sqrt(3.2) * np.abs(ds.D2.values[0, 1]) / 2
    frame = unsettled(ds)
    (row,) = frame[
        (frame.quantity == "D2") & (frame.group == "layer0.weight") & (frame.group2 == "layer0.bias")
    ].itertuples()
    assert row.says == (
        "needs about 3.20 times as many batches (26 in all) to settle the sign of "
        "D2 of ('layer0.weight', 'layer0.bias'). "
        "The errors leave out what the data do through u, so that it takes more."
    )
    fixed = unsettled(ds.assign_attrs(direction="weights"))  # u does not move with the data
    assert not fixed["says"].str.contains("leave out").any()
    ds.D2[0, 1] = ds.D2[1, 0] = 0.0
    frame = unsettled(ds.drop_vars("n_batches"))
    row = frame[(frame.quantity == "D2") & (frame.group == "layer0.weight") & (frame.group2 == "layer0.bias")].iloc[0]
    assert np.isinf(row.times)
    assert row.says.startswith("no number of batches settles the sign")
    assert frame.batches.isna().all()


def test_so_many_batches_settle_the_sign():
    """Means over k times as many batches of the same distribution are 2 standard errors from 0, on average."""
    rng, n, mean, spread = np.random.default_rng(0), 16, 0.3, 1.0
    se = spread / np.sqrt(n)
    ds = example(1)
    ds.D1[:], ds.D1_se[:] = mean, se
    times = unsettled(ds)[lambda f: f.quantity == "D1"].times.iloc[0]
    drawn = rng.normal(mean, spread, (4000, round(n * times)))
    ratios = drawn.mean(1) / (drawn.std(1, ddof=1) / np.sqrt(drawn.shape[1]))
    np.testing.assert_allclose(np.median(ratios), 2, atol=0.06)


def test_settled_exact_and_unknown_entries_are_left_out():
    ds = example(1)
    for d in (1, 2, 3):
        ds[f"D{d}_se"] = np.abs(ds[f"D{d}"]) * 0.1
    assert not set(unsettled(ds).quantity) - {"learning_rates"}
    ds.D2[0, 1] = ds.D2_se[0, 1] = 0.0
    ds.D1_se[2] = np.nan
    assert not set(unsettled(ds).quantity) - {"learning_rates"}
    null = with_null_group()
    null.D2_se[:] = 100.0
    frame = unsettled(null)
    assert "layer0.bias" not in set(frame.group) | set(frame.group2)
    with pytest.raises(SchemaError, match="no standard errors"):
        unsettled(example().drop_vars(["D1_se", "D2_se", "D3_se"]))
