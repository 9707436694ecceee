import numpy as np
import pytest

from hoanalysis.analysis.example import example
from hoanalysis.analysis.merge import merge
from hoanalysis.analysis.regularizer import regularizer
from hoanalysis.errors import SchemaError


def test_r_is_the_diagonal_to_two_thirds_whichever_way_it_is_stored():
    full, diagonal = example(3, order=3), example(3, order=2)
    expected = [abs(full.D3.values[s, s, s]) ** (2 / 3) for s in range(4)]
    for ds in (full, diagonal):
        np.testing.assert_allclose(regularizer(ds).values, expected, rtol=1e-13)


def test_error_is_the_slope_times_the_error():
    ds, h = example(3, order=2), 1e-6
    x, se = ds.D3_diag.values, ds.D3_diag_se.values
    slope = (np.abs(x + h) ** (2 / 3) - np.abs(x - h) ** (2 / 3)) / (2 * h)
    np.testing.assert_allclose(regularizer(ds).regularizer_se.values, np.abs(slope) * se, rtol=1e-6)


def test_exact_zeros_are_named_and_have_no_error():
    ds = example(order=2, steps=2)
    ds.D3_diag[1, 2], ds.D3_diag_se[1, 2] = 0.0, 0.0
    ds.D3_diag[1, 3] = 0.0
    r = regularizer(ds)
    assert r.values[1, 2] == 0
    assert r.regularizer_se.values[1, 2] == 0
    assert np.isnan(r.regularizer_se.values[1, 3])
    assert r.status.values[0].startswith("ok")
    assert "'layer1.weight', 'layer1.bias'" in r.status.values[1]
    assert "ridge" in r.status.values[1]


def test_missing_third_order_says_how_to_get_it():
    with pytest.raises(SchemaError, match="diagonal=3"):
        regularizer(example(order=2).drop_vars("D3_diag"))
    with pytest.raises(SchemaError, match="merged groups needs the full D3"):
        regularizer(merge(example(order=2), "layer"))
    merged = merge(example(order=3), "layer")
    np.testing.assert_allclose(regularizer(merged).values, np.abs(np.einsum("sss->s", merged.D3.values)) ** (2 / 3))


def test_checkpoints_not_computed_are_nan():
    ds = example(order=2, steps=2)
    ds.D3_diag[1] = np.nan
    r = regularizer(ds)
    assert np.isnan(r.values[1]).all()
    assert r.status.values[1].startswith("not computed")
