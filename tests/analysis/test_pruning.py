"""Scores against direct evaluation and minimization of the quadratic."""

import numpy as np
import pytest
from scipy.optimize import minimize

from hoanalysis.analysis.example import example
from hoanalysis.analysis.pruning import saliency
from hoanalysis.errors import SchemaError


def weights(**kwargs):
    return example(**kwargs).assign_attrs(direction="weights")


def change(ds, eta):
    return ds.D1.values @ eta + eta @ ds.D2.values @ eta / 2


def test_obd_is_the_quadratic_at_removal():
    ds = weights()
    found, e = saliency(ds), np.eye(4)
    np.testing.assert_allclose(found.obd.values, [change(ds, e[s]) for s in range(4)], rtol=1e-12)
    for s in range(4):
        for t in range(4):
            if s != t:
                np.testing.assert_allclose(found.obd_pair.values[s, t], change(ds, e[s] + e[t]), rtol=1e-12)


def test_obs_is_the_minimum_over_the_other_groups():
    ds = weights()
    found = saliency(ds).obs.values
    for s in range(4):
        rest = [t for t in range(4) if t != s]

        def objective(x, s=s, rest=rest):
            eta = np.ones(4)
            eta[rest] = x
            return change(ds, eta)

        np.testing.assert_allclose(found[s], minimize(objective, np.zeros(3), tol=1e-12).fun, rtol=1e-6, atol=1e-8)


def test_without_slope_obs_is_hassibis_formula():
    ds = weights()
    ds.D1[:] = 0.0
    expected = 1 / (2 * np.diag(np.linalg.inv(ds.D2.values)))
    np.testing.assert_allclose(saliency(ds).obs.values, expected, rtol=1e-9)


def test_errors_of_obd_are_linear():
    ds = weights()
    w, n = ds.weight.values, ds.sizes["batch"]
    x = (ds.D1_batch.values + np.einsum("bss->bs", ds.D2_batch.values) / 2) / w[:, None]
    mean = w @ x / w.sum()
    expected = np.sqrt(n / (n - 1) * (w[:, None] ** 2 * (x - mean) ** 2).sum(0)) / w.sum()
    np.testing.assert_allclose(saliency(ds).obd_se.values, expected, rtol=1e-8)


def test_scale_invariant_groups_are_flagged_and_saddles_are_named():
    ds = weights()
    ds.D1[1] = 0.0
    ds.D2[1, :] = ds.D2[:, 1] = 0.0
    found = saliency(ds)
    assert found.scale_invariant.values.tolist() == [False, True, False, False]
    assert found.obd.values[1] == 0
    assert "scale-invariant: the loss does not depend on the scale of 'layer0.bias'" in found.status.item()
    ds = weights()
    ds.D2[0, 0] = -5.0
    found = saliency(ds)
    assert np.isfinite(found.obs.values).tolist() == [True, False, False, False]
    assert "no minimum" in found.status.item()


def test_other_directions_are_refused_and_series_work():
    with pytest.raises(SchemaError, match="direction='weights'"):
        saliency(example())
    ds = weights(steps=2)
    ds.D1[1] = np.nan
    found = saliency(ds)
    assert found.obd_pair.dims == ("step", "group", "group2")
    assert np.isnan(found.obs.values[1]).all()
