"""The cubic step against a direct minimization of its model, from many starts."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from hoanalysis.analysis.cubic import cubic_step


def model(eta, h, g, r, strength):
    return -g @ eta + eta @ h @ eta / 2 + strength / 6 * (r @ eta**2) ** 1.5


def slope(eta, h, g, r, strength):
    return -g + h @ eta + strength / 2 * np.sqrt(r @ eta**2) * r * eta


def best_of_many(h, g, r, strength, rng):
    starts = rng.normal(size=(12, len(g))) * 3
    found = [minimize(model, x, (h, g, r, strength), jac=slope, method="BFGS", tol=1e-12) for x in starts]
    return min(found, key=lambda result: result.fun)


def problem(seed, n=4, shift=0.0):
    rng = np.random.default_rng(seed)
    h = rng.normal(size=(n, n))
    return (h + h.T) / 2 + shift * np.eye(n), rng.normal(size=n), rng.uniform(0.3, 2, n), rng


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("strength", [0.1, 1.0, 10.0])
def test_it_is_the_global_minimizer(seed, strength):
    h, g, r, rng = problem(seed)
    step, best = cubic_step(h, g, r, strength), best_of_many(h, g, r, strength, rng)
    assert model(step.eta, h, g, r, strength) <= best.fun + 1e-9
    np.testing.assert_allclose(step.eta, best.x, rtol=2e-4, atol=2e-4)
    np.testing.assert_allclose(slope(step.eta, h, g, r, strength), 0, atol=1e-9 * max(1, np.abs(g).max()))
    assert not step.hard


@pytest.mark.parametrize("seed", range(4))
def test_groups_without_r_are_eliminated(seed):
    h, g, r, rng = problem(seed, shift=3.0)
    r[1] = r[3] = 0
    step, best = cubic_step(h, g, r, 1.0), best_of_many(h, g, r, 1.0, rng)
    np.testing.assert_allclose(step.eta, best.x, rtol=2e-4, atol=2e-4)
    np.testing.assert_allclose(slope(step.eta, h, g, r, 1.0), 0, atol=1e-10)


def test_the_hard_case_has_the_value_of_the_minimum():
    h, g, r = np.diag([-2.0, 1.0, 3.0]), np.array([0.0, 0.5, 1.0]), np.array([1.0, 0.7, 2.0])
    step, best = cubic_step(h, g, r, 1.0), best_of_many(h, g, r, 1.0, np.random.default_rng(0))
    assert step.hard
    assert step.eta[0] > 0
    np.testing.assert_allclose(model(step.eta, h, g, r, 1.0), best.fun, rtol=1e-9)
    np.testing.assert_allclose(slope(step.eta, h, g, r, 1.0), 0, atol=1e-12)
    np.testing.assert_allclose(np.abs(step.eta), np.abs(best.x), rtol=1e-4, atol=1e-5)


def test_the_hard_case_in_a_turned_basis_and_its_neighbourhood():
    rng = np.random.default_rng(1)
    q, _ = np.linalg.qr(rng.normal(size=(4, 4)))
    h = q @ np.diag([-1.0, 0.5, 1.0, 2.0]) @ q.T
    g = q[:, 1:] @ rng.normal(size=3)
    hard = cubic_step(h, g, np.ones(4), 1.0)
    assert hard.hard
    for tiny in (1e-6, 1e-9):
        near = cubic_step(h, g + tiny * q[:, 0], np.ones(4), 1.0)
        assert not near.hard
        np.testing.assert_allclose(
            model(near.eta, h, g, np.ones(4), 1.0), model(hard.eta, h, g, np.ones(4), 1.0), rtol=1e-5
        )


def test_no_r_at_all_is_newton_and_no_slope_is_no_step():
    h, g, r, _ = problem(0, shift=4.0)
    np.testing.assert_allclose(cubic_step(h, g, 0 * r, 1.0).eta, np.linalg.solve(h, g))
    np.testing.assert_allclose(cubic_step(h, 0 * g, r, 1.0).eta, 0)


def test_weak_regularization_tends_to_newton():
    h, g, r, _ = problem(0, shift=4.0)
    np.testing.assert_allclose(cubic_step(h, g, r, 1e-9).eta, np.linalg.solve(h, g), rtol=1e-8)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.lists(st.floats(0.1, 10), min_size=4, max_size=4))
def test_rescaling_groups_divides_the_step(seed, scales):
    h, g, r, _ = problem(seed)
    c = np.array(scales)
    step, scaled = cubic_step(h, g, r, 1.0), cubic_step(h * np.outer(c, c), g * c, r * c**2, 1.0)
    np.testing.assert_allclose(scaled.eta * c, step.eta, rtol=1e-8, atol=1e-10)
