"""The rule against its own definition: moments, and functions with kinks whose integrals are known."""

import numpy as np
import pytest
from numpy.testing import assert_allclose

from hoanalysis.quadrature import KEPT, NODES, integral, integral_error, weights


def test_polynomials_up_to_degree_9_are_exact_and_of_10_not() -> None:
    t = np.array(NODES)
    for k in range(10):
        assert_allclose(weights() @ t**k, 1 / (k + 1), rtol=1e-13)
    assert abs(weights() @ t**10 - 1 / 11) > 1e-7
    assert len(KEPT) == 10
    for kept in KEPT:
        assert_allclose(weights(kept) @ t ** (len(kept) - 1), 1 / len(kept), rtol=1e-12)
        assert set(np.flatnonzero(weights(kept))) <= set(kept)


@pytest.mark.parametrize("kinks", [1, 40])
def test_the_error_covers_kinks_and_waves(kinks: int) -> None:
    """|t - a| integrates to (a^2 + (1 - a)^2) / 2, sin w t to (1 - cos w) / w."""
    rng, t, ratio = np.random.default_rng(0), np.array(NODES), []
    for _ in range(1000):
        a, height, w, wave = rng.uniform(0, 1, kinks), rng.normal(size=kinks), rng.uniform(0, 6), rng.normal()
        values = np.abs(t[:, None] - a) @ height + wave * np.sin(w * t)
        truth = height @ (a**2 + (1 - a) ** 2) / 2 + wave * (1 - np.cos(w)) / w
        ratio.append(abs(integral(values[:, None])[0] - truth) / integral_error(values[:, None])[0])
    assert np.mean(np.array(ratio) > 1) < 0.02
    assert np.median(ratio) > 0.02  # nor is it absurdly large


def test_stacked_values() -> None:
    values = np.random.default_rng(1).normal(size=(2, 3, 7, 4))
    assert integral(values).shape == integral_error(values).shape == (2, 3, 4)
    assert_allclose(integral(values)[1, 2], integral(values[1, 2]), rtol=1e-13)
    assert_allclose(integral_error(values)[1, 2], integral_error(values[1, 2]), rtol=1e-13)
