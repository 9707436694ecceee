"""The strongest triples against loops over all entries, and a jackknife by hand."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hoanalysis.analysis.example import example
from hoanalysis.analysis.merge import merge
from hoanalysis.analysis.triples import triple_values, triples
from hoanalysis.errors import SchemaError

from .test_steps import rescaled, with_null_group

GROUPS = ["group", "group2", "group3"]


def loop(h, third):
    out = np.zeros_like(third)
    for s, t, u in itertools.product(range(len(h)), repeat=3):
        out[s, t, u] = third[s, t, u] / np.sqrt(abs(h[s, s] * h[t, t] * h[u, u]))
    return out


@pytest.mark.parametrize("distinct", [True, False])
def test_triples_are_ranked_by_their_scale_free_entry(distinct):
    ds = example(3, steps=2)
    frame = triples(ds, distinct=distinct)
    choose = itertools.combinations if distinct else itertools.combinations_with_replacement
    entries = list(choose(range(4), 3))
    assert len(frame) == 2 * len(entries)
    for step, part in frame.groupby("step"):
        one = ds.sel(step=step)
        free = loop(one.D2.values, one.D3.values)
        assert part["rank"].tolist() == list(range(1, len(entries) + 1))
        assert (part.scale_free.abs().diff().dropna() <= 0).all()
        at = [tuple(ds.group.values.tolist().index(g) for g in row) for row in part[GROUPS].values.tolist()]
        assert sorted(at) == entries
        np.testing.assert_allclose(part.value, [one.D3.values[i] for i in at])
        np.testing.assert_allclose(part.value_se, [one.D3_se.values[i] for i in at])
        np.testing.assert_allclose(part.scale_free, [free[i] for i in at], rtol=1e-12)
        np.testing.assert_allclose(part.significance, part.scale_free.abs() / part.scale_free_se)
        equal = [sum(sorted(j) == sorted(i) for j in itertools.product(range(4), repeat=3)) for i in at]
        sizes = [n * abs(free[i]) for n, i in zip(equal, at, strict=True)]
        np.testing.assert_allclose(part.share, np.array(sizes) / np.abs(free).sum(), rtol=1e-12)
        assert part.layer.tolist() == [g.split(".")[0] for g in part.group]
        assert part.layer3.tolist() == [g.split(".")[0] for g in part.group3]
    if not distinct:
        np.testing.assert_allclose(frame.groupby("step").share.sum(), 1, rtol=1e-12)
    assert triples(ds, 2)["rank"].tolist() == [1, 2, 1, 2]


def test_errors_are_a_delete_one_jackknife():
    ds = example(5)
    frame = triples(ds, distinct=False)
    w, total, n = ds.weight.values, ds.weight.values.sum(), ds.sizes["batch"]
    full, squares = loop(ds.D2.values, ds.D3.values), 0.0
    for b in range(n):
        keep = np.arange(n) != b
        h, third = (ds[f"D{d}_batch"].values[keep].sum(0) / w[keep].sum() for d in (2, 3))
        squares = squares + ((total - w[b]) / total * (loop(h, third) - full)) ** 2
    errors = np.sqrt(n / (n - 1) * squares)
    labels = ds.group.values.tolist()
    expected = [errors[tuple(labels.index(g) for g in row)] for row in frame[GROUPS].values.tolist()]
    np.testing.assert_allclose(frame.scale_free_se, expected, rtol=1e-7)
    assert np.isnan(triples(ds.drop_vars("D3_batch")).scale_free_se).all()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 50), st.lists(st.floats(0.1, 10), min_size=4, max_size=4))
def test_nothing_changes_when_groups_are_rescaled(seed, scales):
    ds = example(seed)
    before, after = triples(ds), triples(rescaled(ds, np.array(scales)))
    assert before[GROUPS].equals(after[GROUPS])
    for name in ("scale_free", "scale_free_se", "share", "significance"):
        np.testing.assert_allclose(after[name], before[name], rtol=1e-8)


def test_the_meaning_of_the_scale():
    """With the curvature of each group alone worth E, the triple changes the loss by (2 E)^(3/2) A."""
    ds, energy = example(1), 0.3
    row = triples(ds, 1).iloc[0]
    at = [ds.group.values.tolist().index(row[g]) for g in GROUPS]
    eta = np.sqrt(2 * energy / np.abs(np.diag(ds.D2.values)))[at]
    third = ds.D3.values[np.ix_(at, at, at)]
    distinct = sum(third[p] * np.prod(eta[list(p)]) for p in itertools.permutations(range(3))) / 6
    np.testing.assert_allclose(distinct, (2 * energy) ** 1.5 * row.scale_free, rtol=1e-12)


def test_null_groups_and_missing_checkpoints_are_left_out():
    ds = with_null_group()
    third = np.random.default_rng(0).normal(size=(4, 4, 4))
    ds["D3"] = (("group", "group2", "group3"), third)
    frame = triples(ds)
    assert len(frame) == 1
    assert "layer0.bias" not in set(frame[GROUPS].values.ravel())
    ds = example(steps=2)
    ds.D3[0] = np.nan
    assert set(triples(ds).step) == {10}


def test_too_few_groups_have_no_triple():
    for n in (1, 2):
        ds = merge(example(steps=2), n)
        assert triples(ds).empty
        assert triple_values(ds).empty
    assert len(triples(merge(example(steps=2), 1), distinct=False)) == 2


def test_strongest_triples_are_followed_over_all_steps():
    rows = triple_values(example(steps=3), top=2)
    assert rows.groupby(GROUPS).size().tolist() == [3, 3]
    best = triples(example(steps=3)).sort_values("scale_free", key=np.abs, ascending=False).iloc[0]
    assert (rows[GROUPS] == best[GROUPS]).all(axis=1).sum() == 3


def test_the_full_third_order_is_asked_for():
    with pytest.raises(SchemaError, match="order=3"):
        triples(example(order=2))
