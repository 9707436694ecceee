import numpy as np
import pytest

from hoanalysis.analysis.curvature import MEASURES, curvature
from hoanalysis.analysis.example import example
from hoanalysis.analysis.merge import merge
from hoanalysis.analysis.spectra import spectrum
from hoanalysis.errors import SchemaError

from .test_steps import rescaled, with_null_group


def by_hand(d2, norm):
    """The six measures from numpy's general eigenvalues."""
    values = np.sort(np.linalg.eigvals(d2 / np.outer(norm, norm)).real)
    size = np.sqrt(np.abs(np.diag(d2)))
    scale_free = np.linalg.cond(d2 / np.outer(size, size))
    negative = -values[values < 0].sum() / np.abs(values).sum()
    condition = np.abs(values).max() / np.abs(values).min()
    return np.array([values[-1], values[0], values[-1] / values[0], condition, scale_free, negative])


def indefinite():
    """D2 and its blocks moved alike, so that one eigenvalue is negative in all of them."""
    ds = example(2)
    shift = np.zeros((4, 4))
    shift[0, 0] = 60.0
    blocks = ds.D2_batch.copy(data=ds.D2_batch.values - ds.weight.values[:, None, None] * shift)
    return ds.assign(D2=ds.D2 - shift, D2_batch=blocks)


@pytest.mark.parametrize("make", [lambda: example(2), indefinite], ids=["positive", "indefinite"])
def test_the_measures_and_their_jackknife(make):
    ds = make()
    found, norm = curvature(ds), ds.direction_norm.values
    expected = by_hand(ds.D2.values, norm)
    np.testing.assert_allclose([found[n].item() for n in MEASURES], expected, rtol=1e-9)
    w, total, n, squares = ds.weight.values, ds.weight.values.sum(), ds.sizes["batch"], 0.0
    np.testing.assert_allclose(np.tensordot(w / total, ds.D2_batch.values / w[:, None, None], 1), ds.D2.values)
    for b in range(n):
        keep = np.arange(n) != b
        other = by_hand(ds.D2_batch.values[keep].sum(0) / w[keep].sum(), norm)
        squares = squares + ((total - w[b]) / total * (other - expected)) ** 2
    errors = np.sqrt(n / (n - 1) * squares)
    np.testing.assert_allclose([found[f"{name}_se"].item() for name in MEASURES], errors, rtol=1e-6, atol=1e-14)


def test_negative_curvature_is_counted_and_told():
    found = curvature(indefinite())
    assert (found.negative.item(), found.negative_clear.item()) == (1, 1)
    assert found.status.item().startswith("negative curvature: 1 of 4 eigenvalues are negative, 1 of them told from 0.")
    assert found.ratio.item() < 0
    assert 0 < found.negative_share.item() < 1
    bare = curvature(indefinite().drop_vars("D2_batch"))
    assert bare.negative_clear.item() == -1
    assert "without standard errors" in bare.status.item()
    noisy = indefinite()
    noisy["D2_batch"] = noisy.D2_batch + 1e4 * np.random.default_rng(0).normal(size=(8, 4, 4))
    found = curvature(noisy)
    assert (found.negative.item(), found.negative_clear.item()) == (1, 0)
    assert "none of them told from 0" in found.status.item()
    assert "no upper limit" in found.status.item()


def test_a_positive_spectrum_is_ok():
    found = curvature(example(2))
    assert (found.negative.item(), found.negative_clear.item(), found.negative_share.item()) == (0, 0, 0)
    assert found.status.item() == "ok: all eigenvalues are positive and told from 0."
    assert curvature(example(2).drop_vars("weight")).status.item() == "ok: all eigenvalues are positive."


def test_rescaling_changes_neither_condition_nor_share():
    """|U^s| is rescaled with U^s, so that the compression is the same, and C is scale-free."""
    ds = example(3)
    before, after = curvature(ds), curvature(rescaled(ds, np.array([1e-3, 5.0, 1.0, 200.0])))
    for name in MEASURES:
        np.testing.assert_allclose(after[name].item(), before[name].item(), rtol=1e-9)


def test_null_groups_are_left_out_of_spectrum_and_condition():
    ds = with_null_group()
    keep, norm = [0, 2, 3], ds.direction_norm.values
    expected = by_hand(ds.D2.values[np.ix_(keep, keep)], norm[keep])
    np.testing.assert_allclose([curvature(ds)[n].item() for n in MEASURES], expected, rtol=1e-9)
    values = spectrum(ds).values
    assert np.isfinite(values).tolist() == [True, True, True, False]
    np.testing.assert_allclose(values[[0, 2]], expected[:2], rtol=1e-9)


def test_ill_conditioning_is_told():
    ds = example(2)
    ds.D2[1] = ds.D2[0] * (1 + 1e-14)
    ds.D2[:, 1] = ds.D2[:, 0]
    assert "ill-conditioned" in curvature(ds).status.item()


def test_one_group_series_and_gaps():
    ds = merge(example(2, steps=2), 1)
    found = curvature(ds)
    np.testing.assert_allclose(found.largest.values, ds.D2.values.ravel() / ds.direction_norm.values.ravel() ** 2)
    np.testing.assert_array_equal(found.smallest.values, found.largest.values)
    np.testing.assert_allclose(found.condition.values, 1)
    ds = example(2, steps=2)
    ds.D2[1] = np.nan
    found = curvature(ds)
    assert np.isnan(found.condition.values[1])
    assert np.isfinite(found.condition.values[0])
    assert found.status.values[1].startswith("not computed")
    assert found.negative.values[1] == 0
    with pytest.raises(SchemaError, match="direction_norm"):
        curvature(example().drop_vars("direction_norm"))


def test_a_singular_matrix_has_an_infinite_condition():
    ds = example(2)
    ds.D2[:] = np.diag([4.0, 1.0, 2.0, 0.0])
    found = curvature(ds.drop_vars("D2_batch"))
    assert found.condition.item() == np.inf
    assert found.ratio.item() == np.inf
