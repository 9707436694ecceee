"""Taylor steps on polynomials with known minima, and against a constrained minimization by SLSQP."""

import itertools

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from hoanalysis.analysis.example import example
from hoanalysis.analysis.merge import merge
from hoanalysis.analysis.steps import learning_rates
from hoanalysis.analysis.taylor import taylor, taylor_terms
from hoanalysis.analysis.taylor_step import taylor_step
from hoanalysis.errors import ArgumentError, SchemaError

from .test_steps import rescaled, with_null_group

DIMS = ("group", "group2", "group3", "group4")


def symmetric(rng, n, order):
    out = np.zeros((n,) * order)
    for index in np.ndindex(out.shape):
        if list(index) == sorted(index):
            value = rng.normal()
            for other in set(itertools.permutations(index)):
                out[other] = value
    return out


def of_tensors(*tensors):
    names = [f"g{i}" for i in range(len(tensors[0]))]
    variables = {f"D{d}": (DIMS[:d], t) for d, t in enumerate(tensors, 1)}
    return xr.Dataset(variables, coords={dim: names for dim in DIMS[: len(tensors)]})


def around(minimum, *derivatives):
    """D1, D2, .. at 0 of the polynomial with these derivatives (of orders 2, 3, ..) at its minimum."""
    order = len(derivatives) + 1
    tensors = []
    for d in range(1, order + 1):
        total = np.zeros((len(minimum),) * d)
        for k in range(max(d, 2), order + 1):
            part = derivatives[k - 2]
            for j in range(k - d):
                part = part @ (-minimum) / (j + 1)
            total = total + part
        tensors.append(total)
    return of_tensors(*tensors)


def positive(rng, n):
    root = rng.normal(size=(n, n))
    return root @ root.T / n + np.eye(n)


@pytest.mark.parametrize("seed", range(4))
def test_on_a_quadratic_it_is_newton(seed):
    rng = np.random.default_rng(seed)
    h, g = positive(rng, 5), rng.normal(size=5)
    found = taylor_step(of_tensors(g, h, np.zeros((5, 5, 5))))
    np.testing.assert_allclose(found.learning_rates.values, np.linalg.solve(h, g), rtol=1e-10)
    np.testing.assert_allclose(found.predicted.item(), -g @ np.linalg.solve(h, g) / 2, rtol=1e-10)
    assert found.ridge.item() == 0
    assert found.status.item().startswith(
        "minimum: these rates minimize the polynomial of order 3; its last term is 0.0%"
    )
    hard = h + 0.0
    hard[0] = hard[:, 0] = 0
    hard[0, 0] = 1e-9  # ill-conditioned raw, not equilibrated
    np.testing.assert_allclose(
        taylor_step(of_tensors(g, hard, np.zeros((5, 5, 5)))).learning_rates.values, np.linalg.solve(hard, g), rtol=1e-9
    )


def test_a_nearly_singular_quadratic_is_still_newton():
    h = np.array([[1.0, 1 - 1e-9], [1 - 1e-9, 1.0]])
    g = h @ [3.0, -2.0]
    found = taylor_step(of_tensors(g, h, np.zeros((2, 2, 2))))
    np.testing.assert_allclose(found.learning_rates.values, [3.0, -2.0], rtol=1e-5)
    assert found.ridge.item() == 0


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("order", [3, 4])
def test_it_finds_a_known_minimum(seed, order):
    rng = np.random.default_rng(seed)
    minimum, tensors = (
        rng.normal(size=4) * 0.3,
        [positive(rng, 4), 0.3 * symmetric(rng, 4, 3), 0.3 * symmetric(rng, 4, 4)],
    )
    ds = around(minimum, *tensors[: order - 1])
    found = taylor_step(ds)
    np.testing.assert_allclose(found.learning_rates.values, -minimum, rtol=1e-9, atol=1e-12)
    assert found.attrs["order"] == order
    assert found.ridge.item() == 0
    assert found.status.item().startswith(f"minimum: these rates minimize the polynomial of order {order}")
    np.testing.assert_allclose(found.predicted.item(), taylor(ds, minimum).item(), rtol=1e-9)
    slope = [taylor(ds, minimum + 1e-5 * e).item() - taylor(ds, minimum - 1e-5 * e).item() for e in np.eye(4)]
    np.testing.assert_allclose(slope, 0, atol=1e-10)
    if order == 4:  # the cubic model of the same loss has another minimum
        assert np.abs(taylor_step(ds, 3).learning_rates.values + minimum).max() > 1e-4


def shares_of(ds, eta):
    size = np.abs(taylor_terms(ds, -eta).values)
    return size[-1] / size[:-1].sum()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("size", "ending"), [(0.5, "limited"), (3.0, "open")])
def test_where_it_stops_it_is_the_minimum_within_what_is_vouched_for(seed, size, ending):
    rng = np.random.default_rng(seed)
    share = 0.02 if ending == "limited" else 1.0
    ds = of_tensors(2 * rng.normal(size=4), positive(rng, 4), size * symmetric(rng, 4, 3))
    found = taylor_step(ds, share=share)
    eta, w = found.learning_rates.values, np.diag(ds.D2.values)
    assert found.status.item().startswith(ending)
    if ending == "limited":
        np.testing.assert_allclose(shares_of(ds, eta), share, rtol=1e-7)
    else:
        curvature = (ds.D2.values - ds.D3.values @ eta) / np.sqrt(np.outer(w, w))
        np.testing.assert_allclose(found.ridge.item(), -2 * np.linalg.eigvalsh(curvature)[0], rtol=1e-7)
    radius = eta @ (w * eta)

    def objective(x):
        return taylor(ds, -x).item()

    box = [(-edge, edge) for edge in np.sqrt(radius / w)]
    best = minimize(
        objective, 0.7 * eta, method="SLSQP", constraints={"type": "ineq", "fun": lambda x: radius - x @ (w * x)},
        bounds=box, options={"ftol": 1e-14, "maxiter": 500},
    )  # fmt: skip
    np.testing.assert_allclose(found.predicted.item(), best.fun, rtol=1e-5)
    np.testing.assert_allclose(eta, best.x, rtol=2e-3, atol=2e-3 * np.abs(eta).max())
    assert found.predicted.item() < 0
    slope = [-(objective(eta + 1e-5 * e) - objective(eta - 1e-5 * e)) / 2e-5 for e in np.eye(4)]
    np.testing.assert_allclose(slope, found.ridge.item() * w * eta, rtol=1e-5, atol=1e-7)


def test_a_larger_share_never_predicts_less():
    rng = np.random.default_rng(0)
    ds = of_tensors(2 * rng.normal(size=4), positive(rng, 4), 3 * symmetric(rng, 4, 3))
    predicted = [taylor_step(ds, share=share).predicted.item() for share in (0.01, 0.03, 0.1, 0.3, 1.0)]
    assert (np.diff(predicted) <= 1e-12).all()


def test_negative_curvature_leaves_it_open():
    rng = np.random.default_rng(3)
    h, g = np.diag([2.0, 1.0, -3.0]) + 0.1 * symmetric(rng, 3, 2), rng.normal(size=3)
    found = taylor_step(of_tensors(g, h, np.zeros((3, 3, 3))))
    w = np.abs(np.diag(h))
    lowest = np.linalg.eigvalsh(h / np.sqrt(np.outer(w, w)))[0]
    np.testing.assert_allclose(found.ridge.item(), -2 * lowest, rtol=1e-10)
    expected = np.linalg.solve(h - 2 * lowest * np.diag(w), g)
    np.testing.assert_allclose(found.learning_rates.values, expected, rtol=1e-9)
    assert found.status.item().startswith("open: the polynomial curves downwards")


@pytest.mark.parametrize("seed", [1, 4])
def test_errors_are_a_delete_one_jackknife(seed):
    ds = example(seed)
    found = taylor_step(ds)
    w, total, n, squares = ds.weight.values, ds.weight.values.sum(), ds.sizes["batch"], 0.0
    full = np.append(found.learning_rates.values, found.predicted.item())
    for b in range(n):
        keep = np.arange(n) != b
        other = ds.copy()
        for d in (1, 2, 3):
            other[f"D{d}"] = ds[f"D{d}"].copy(data=ds[f"D{d}_batch"].values[keep].sum(0) / w[keep].sum())
        step = taylor_step(other.drop_vars("weight"))
        moved = np.append(step.learning_rates.values, step.predicted.item()) - full
        squares = squares + ((total - w[b]) / total * moved) ** 2
    errors = np.sqrt(n / (n - 1) * squares)
    np.testing.assert_allclose(np.append(found.learning_rates_se, found.predicted_se), errors, rtol=1e-4)
    assert np.isnan(taylor_step(ds.drop_vars("D3_batch")).learning_rates_se.values).all()


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 50), st.lists(st.floats(0.1, 10), min_size=4, max_size=4))
def test_the_step_does_not_change_when_groups_are_rescaled(seed, scales):
    ds, c = example(seed).drop_vars("weight"), np.array(scales)
    before, after = taylor_step(ds), taylor_step(rescaled(ds, c))
    size = np.abs(before.learning_rates.values).max()
    np.testing.assert_allclose(
        after.learning_rates.values * c, before.learning_rates.values, rtol=1e-8, atol=1e-8 * size
    )
    np.testing.assert_allclose(after.predicted.item(), before.predicted.item(), rtol=1e-8)


def test_one_group_is_the_root_of_a_parabola():
    ds = merge(example(2, steps=2), 1)
    found = taylor_step(ds, share=1.0)
    for i in range(2):
        g, h, t = ds.D1.values[i, 0], ds.D2.values[i, 0, 0], ds.D3.values[i, 0, 0, 0]
        roots = np.roots([-t / 2, h, -g])  # d/d eta of -g eta + h eta^2/2 - t eta^3/6
        expected = min(roots[np.isreal(roots)].real, key=abs)
        np.testing.assert_allclose(found.learning_rates.values[i, 0], expected, rtol=1e-9)
    assert all(s.startswith("minimum") for s in found.status.values)


def test_null_groups_gaps_and_missing_entries():
    ds = with_null_group()
    ds["D3"] = (DIMS[:3], np.zeros((4, 4, 4)))
    found = taylor_step(ds)
    keep = [0, 2, 3]
    expected = np.linalg.solve(ds.D2.values[np.ix_(keep, keep)], ds.D1.values[keep])
    np.testing.assert_allclose(found.learning_rates.values[keep], expected, rtol=1e-9)
    assert np.isnan(found.learning_rates.values[1])
    assert "null groups: 'layer0.bias'" in found.status.item()
    ds = example(1, steps=3)
    for name in ("D1", "D2", "D3"):
        ds[name][1] = np.nan
    found = taylor_step(ds)
    assert np.isnan(found.learning_rates.values[1]).all()
    assert found.status.values[1].startswith("not computed")
    xr.testing.assert_allclose(found.isel(step=2), taylor_step(ds.isel(step=2)))
    ds = example(1)
    ds.D3[0, 1, 1] = np.nan
    found = taylor_step(ds)
    assert np.isnan(found.learning_rates.values).all()
    assert "missing entries" in found.status.item()


def test_at_a_minimum_there_is_no_step():
    ds = example(1)
    ds.D1[:] = 0.0
    found = taylor_step(ds.drop_vars("weight"))
    np.testing.assert_allclose(found.learning_rates.values, 0, atol=1e-15)
    assert found.predicted.item() == 0


def test_wrong_arguments():
    with pytest.raises(SchemaError, match="cubic"):
        taylor_step(example(order=2))
    with pytest.raises(SchemaError, match="needs D4"):
        taylor_step(example(), 4)
    for order in (2, 2.5, True):
        with pytest.raises(ArgumentError, match="from 3 on"):
            taylor_step(example(), order)
    for share in (0.0, 1.5, np.nan):
        with pytest.raises(ArgumentError, match="share"):
            taylor_step(example(), share=share)


def test_it_predicts_more_than_the_ridge_of_the_same_size():
    """On the same ridge the quadratic step ignores D3, so that the polynomial's own minimizer predicts less loss."""
    ds = example(4).drop_vars("weight")
    found = taylor_step(ds, share=0.005)
    sigma, w = found.ridge.item(), np.abs(np.diag(ds.D2.values))
    ridge = learning_rates(ds, "ridge", sigma).learning_rates

    def regularized(eta):
        return taylor(ds, -eta).item() + sigma / 2 * eta @ (w * eta)

    assert found.status.item().startswith("limited")
    assert regularized(found.learning_rates.values) < regularized(ridge.values)
