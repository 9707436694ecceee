import numpy as np
import pytest

from hoanalysis.analysis.example import example
from hoanalysis.analysis.inverse import blocks, inverse, matrix, scale_free
from hoanalysis.analysis.regularizer import regularizer
from hoanalysis.errors import ArgumentError

from .test_steps import rescaled, with_null_group


def test_inverse_is_numpys():
    ds = example(steps=2)
    for i in range(2):
        np.testing.assert_allclose(inverse(ds).values[i], np.linalg.inv(ds.D2.values[i]), rtol=1e-9)
        regularized = ds.D2.values[i] + 0.5 * np.diag(regularizer(ds).values[i])
        np.testing.assert_allclose(inverse(ds, "r", 0.5).values[i], np.linalg.inv(regularized), rtol=1e-9)


def test_null_groups_are_nan_and_the_rest_is_inverted():
    ds, keep = with_null_group(), [0, 2, 3]
    found = inverse(ds).values
    assert np.isnan(found[1]).all()
    assert np.isnan(found[:, 1]).all()
    np.testing.assert_allclose(found[np.ix_(keep, keep)], np.linalg.inv(ds.D2.values[np.ix_(keep, keep)]), rtol=1e-9)


def test_errors_are_a_delete_one_jackknife():
    ds = example(2)
    w, total, n = ds.weight.values, ds.weight.values.sum(), ds.sizes["batch"]
    for values, errors, function in [
        (inverse(ds).values, inverse(ds).inverse_se.values, np.linalg.inv),
        (
            scale_free(ds).values,
            scale_free(ds).scale_free_se.values,
            lambda h: h / np.sqrt(np.abs(np.outer(np.diag(h), np.diag(h)))),
        ),
    ]:
        squares = 0.0
        for b in range(n):
            keep = np.arange(n) != b
            other = function(ds.D2_batch.values[keep].sum(0) / w[keep].sum())
            squares = squares + ((total - w[b]) / total * (other - values)) ** 2
        np.testing.assert_allclose(errors, np.sqrt(n / (n - 1) * squares), rtol=1e-7, atol=1e-14)


def test_scale_free_does_not_change_when_groups_are_rescaled():
    ds = example()
    other = rescaled(ds, np.array([1e-3, 1, 50, 7]))
    np.testing.assert_allclose(scale_free(other).values, scale_free(ds).values, rtol=1e-10)
    np.testing.assert_allclose(np.diag(scale_free(ds).values), 1)


def test_blocks_are_blocks_of_the_inverse():
    ds = example()
    found, full = blocks(ds, "inverse"), np.linalg.inv(ds.D2.values)
    assert list(found) == ["WW", "BB", "WB"]
    np.testing.assert_allclose(found["WB"].values, full[np.ix_([0, 2], [1, 3])], rtol=1e-9)
    assert found["WB"].group.values.tolist() == ["layer0.weight", "layer1.weight"]
    assert found["WB"].group2.values.tolist() == ["layer0.bias", "layer1.bias"]


def test_other_kinds_get_a_block_per_pair():
    ds = example(layers=2)
    ds = ds.assign_coords(kind=("group", ["weight", "bias", "norm", "embedding"]))
    assert list(blocks(ds)) == ["WW", "BB", "WB", "NN", "EE", "WN", "WE", "BN", "BE", "NE"]
    assert list(blocks(ds.assign_coords(kind=("group", ["strange"] * 4)))) == ["OO"]


def test_matrix_h_carries_the_stored_error():
    ds = example(steps=2)
    np.testing.assert_array_equal(matrix(ds).H_se.values, ds.D2_se.values)
    assert np.isnan(matrix(ds.drop_vars("D2_se")).H_se.values).all()
    with pytest.raises(ArgumentError, match="did you mean 'inverse'"):
        matrix(ds, "invers")
