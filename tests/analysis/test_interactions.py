import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hoanalysis.analysis.example import example
from hoanalysis.analysis.interactions import interactions, pair_values, shares
from hoanalysis.analysis.merge import merge
from hoanalysis.errors import ArgumentError

from .test_steps import rescaled, with_null_group


def loop_shares(h: np.ndarray, layers) -> list[float]:
    free, out = np.zeros_like(h), []
    for s in range(len(h)):
        for t in range(len(h)):
            free[s, t] = h[s, t] / np.sqrt(abs(h[s, s] * h[t, t]))
    for a in (free, h):
        off = sum(abs(a[s, t]) for s in range(len(a)) for t in range(len(a)) if s != t)
        apart = sum(abs(a[s, t]) for s in range(len(a)) for t in range(len(a)) if layers[s] != layers[t])
        out += [off / np.abs(a).sum(), apart / np.abs(a).sum()]
    return out


def test_pairs_are_ranked_by_their_scale_free_entry():
    ds = example(3, steps=2)
    frame = interactions(ds)
    assert len(frame) == 2 * 6
    for step, part in frame.groupby("step"):
        one = ds.sel(step=step)
        assert part["rank"].tolist() == [1, 2, 3, 4, 5, 6]
        assert (part.scale_free.abs().diff().dropna() <= 0).all()
        for row in part.itertuples():
            h = one.D2.sel(group=row.group, group2=row.group2).item()
            size = (
                one.D2.sel(group=row.group, group2=row.group).item()
                * one.D2.sel(group=row.group2, group2=row.group2).item()
            )
            np.testing.assert_allclose([row.value, row.scale_free], [h, h / np.sqrt(abs(size))])
            se = one.D2_se.sel(group=row.group, group2=row.group2).item()
            np.testing.assert_allclose(row.value_se, se)
            np.testing.assert_allclose(row.significance, abs(row.scale_free) / row.scale_free_se)
    np.testing.assert_allclose(frame.groupby("step").share.sum(), shares(ds).off_diagonal.values)
    assert interactions(ds, 2)["rank"].tolist() == [1, 2, 1, 2]


def test_shares_and_their_jackknife():
    ds = example(5)
    found, layers = shares(ds), ds.layer.values
    names = ["off_diagonal", "off_block", "off_diagonal_raw", "off_block_raw"]
    expected = np.array(loop_shares(ds.D2.values, layers))
    np.testing.assert_allclose([found[n].item() for n in names], expected, rtol=1e-12)
    w, total, n, squares = ds.weight.values, ds.weight.values.sum(), ds.sizes["batch"], 0.0
    for b in range(n):
        keep = np.arange(n) != b
        other = np.array(loop_shares(ds.D2_batch.values[keep].sum(0) / w[keep].sum(), layers))
        squares = squares + ((total - w[b]) / total * (other - expected)) ** 2
    np.testing.assert_allclose(
        [found[f"{name}_se"].item() for name in names], np.sqrt(n / (n - 1) * squares), rtol=1e-8
    )


def test_shares_of_the_inverse():
    ds = example(5)
    found, layers = shares(ds, "inverse"), ds.layer.values
    names = ["off_diagonal", "off_block", "off_diagonal_raw", "off_block_raw"]
    expected = np.array(loop_shares(np.linalg.inv(ds.D2.values), layers))
    np.testing.assert_allclose([found[n].item() for n in names], expected, rtol=1e-9)
    w, total, n, squares = ds.weight.values, ds.weight.values.sum(), ds.sizes["batch"], 0.0
    for b in range(n):
        keep = np.arange(n) != b
        other = np.array(loop_shares(np.linalg.inv(ds.D2_batch.values[keep].sum(0) / w[keep].sum()), layers))
        squares = squares + ((total - w[b]) / total * (other - expected)) ** 2
    np.testing.assert_allclose(
        [found[f"{name}_se"].item() for name in names], np.sqrt(n / (n - 1) * squares), rtol=1e-7
    )
    assert "inverse of H-bar" in found.off_block.attrs["long_name"]
    null = shares(with_null_group(), "inverse")
    keep = [0, 2, 3]
    expected = loop_shares(np.linalg.inv(with_null_group().D2.values[np.ix_(keep, keep)]), layers[keep])
    np.testing.assert_allclose([null[n].item() for n in names], expected, rtol=1e-9)
    with pytest.raises(ArgumentError, match="did you mean 'inverse'"):
        shares(ds, "invers")


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 50), st.lists(st.floats(0.1, 10), min_size=4, max_size=4))
def test_scale_free_shares_do_not_change_when_groups_are_rescaled(seed, scales):
    ds = example(seed)
    before, after = shares(ds), shares(rescaled(ds, np.array(scales)))
    for name in ("off_diagonal", "off_block", "off_diagonal_se", "off_block_se"):
        np.testing.assert_allclose(after[name].item(), before[name].item(), rtol=1e-8)


def test_null_groups_and_missing_checkpoints_are_left_out():
    frame = interactions(with_null_group())
    assert len(frame) == 3
    assert "layer0.bias" not in {*frame.group, *frame.group2}
    ds = example(steps=2)
    ds.D2[0] = np.nan
    assert set(interactions(ds).step) == {10}
    assert np.isnan(shares(ds).off_block.values[0])


def test_one_group_has_no_pair():
    ds = merge(example(steps=2), 1)
    assert interactions(ds).empty
    assert shares(ds).off_diagonal.values.tolist() == [0, 0]
    assert pair_values(ds).empty


def test_strongest_pairs_are_followed_over_all_steps():
    rows = pair_values(example(steps=3), top=2)
    assert rows.groupby(["group", "group2"]).size().tolist() == [3, 3]


@pytest.mark.parametrize("steps", [None, 2])
def test_without_blocks_the_errors_are_nan(steps):
    ds = example(steps=steps).drop_vars("D2_batch")
    assert np.isnan(shares(ds).off_block_se.values).all()
    assert interactions(ds).value_se.notna().all()
