"""Taylor terms of real steps on a cubic polynomial, where order 3 is exact and every number has a second way to it."""

import numpy as np
import pytest
from numpy.testing import assert_allclose

from hoanalysis.analysis.example import example
from hoanalysis.analysis.merge import merge
from hoanalysis.analysis.prediction import prediction, single_steps
from hoanalysis.errors import SchemaError
from tests.oracles import weighted

from .trajectory import NAMES, OWNER, Cubic, summaries, train


@pytest.fixture(scope="module")
def run():
    model = Cubic()
    points = train(model, 6)
    return model, points, summaries(model, points, "to:next")


def coefficients(model, x, u):
    """t -> L(x + t u) - L(x) by a fit through five values."""
    t = np.linspace(-1, 1, 5)
    return np.polynomial.Polynomial.fit(t, [model.loss(x + s * u) for s in t], 3, domain=(-1, 1)).coef[1:]


def test_each_order_is_the_taylor_polynomial_and_order_3_is_the_measured_change(run):
    model, points, ds = run
    told = prediction(ds)
    for i in range(5):  # of the step to the last checkpoint, whose loss is not in the series, nothing is measured
        x, u = points[i], points[i + 1] - points[i]
        change = model.loss(points[i + 1]) - model.loss(x)
        assert_allclose(told.measured[i], change, rtol=1e-10, atol=1e-13)
        assert_allclose(told.predicted[i], np.cumsum(coefficients(model, x, u)), rtol=1e-9, atol=1e-12)
        assert_allclose(told.unexplained[i], change - told.predicted[i], rtol=0, atol=1e-13)
        assert_allclose(told.unexplained[i, 2], 0, atol=1e-12)
        for s in range(4):
            alone = np.where(s == OWNER, u, 0.0)
            assert_allclose(
                told.predicted_alone[i].sel(group=NAMES[s]), np.cumsum(coefficients(model, x, alone)), atol=1e-12
            )
    assert told.within.sel(order=3)[:5].all()
    assert not told.within.sel(order=1)[:5].all()
    assert np.isnan(told.measured[5:]).all()
    assert np.isnan(told.within[5:]).all()
    assert np.isfinite(told.predicted[5]).all()
    assert np.isnan(told.predicted[6]).all()


def test_errors_are_those_of_paired_differences(run):
    model, points, ds = run
    told = prediction(ds)
    changes = model.losses(points[2]) - model.losses(points[1])
    assert_allclose(told.measured_se[1], weighted(changes, model.weight)[1], rtol=1e-9)
    u = points[2] - points[1]
    gradient, hessian, _ = model.derivatives(points[1])
    second = gradient @ u + hessian @ u @ u / 2
    assert_allclose(told.predicted_se[1, 1], weighted(second, model.weight)[1], rtol=1e-9)
    assert_allclose(told.unexplained_se[1, 1], weighted(changes - second, model.weight)[1], rtol=1e-9)
    assert told.measured_se[1] < 0.5 * ds.loss_se[1]  # the noise of the two losses cancels
    bare = prediction(ds.drop_vars([v for v in ds if str(v).endswith("_batch")]))
    assert_allclose(bare.predicted, told.predicted)
    assert np.isnan(bare.measured_se).all()
    assert np.isnan(bare.unexplained_se).all()


def test_other_blocks_at_one_checkpoint_leave_no_paired_error(run):
    _, _, ds = run
    ds = ds.copy(deep=True)
    ds.weight[3] *= 2
    assert np.isnan(prediction(ds).measured_se).all()


def test_what_was_measured_along_the_step_goes_before_the_next_checkpoint(run):
    model, points, ds = run
    taus = np.array([-1.0, 0.25, 0.5, 1.0, 2.0, 4.0])
    along = np.full((7, 6), np.nan)
    for i in range(6):
        x, u = points[i], points[i + 1] - points[i]
        along[i] = [model.loss(x + t * u) - model.loss(x) for t in taus]
    ds = ds.assign(change_along=(("step", "tau"), along)).assign_coords(tau=taus)
    told = prediction(ds)
    assert_allclose(told.measured, along[:, 3])
    for i in range(6):
        c = coefficients(model, points[i], points[i + 1] - points[i])
        for order in (1, 2, 3):
            reach = 0.0
            for tau in taus[1:]:
                real = sum(c[k] * tau ** (k + 1) for k in range(3))
                if abs(sum(c[k] * tau ** (k + 1) for k in range(order)) - real) > 0.1 * abs(real):
                    break
                reach = tau
            assert told.reach[i].sel(order=order) == reach
    assert (told.reach.sel(order=3)[:-1] == 4).all()
    assert (told.reach.sel(order=1)[:-1] < 4).any()
    one = prediction(ds.isel(step=2))
    assert_allclose(one.measured, along[2, 3])
    assert one.predicted.dims == ("order",)


def test_nothing_to_compare_with_is_an_error():
    with pytest.raises(SchemaError, match="no measured change"):
        prediction(example(steps=3))
    with pytest.raises(SchemaError, match="no measured change"):
        prediction(example())


def test_steps_that_skip_are_told_from_single_ones(run):
    model, points, _ = run
    ds = summaries(model, points, "to:next", labels=[0, 1, 2, 40, 41, 80, 81])
    assert single_steps(ds) == [0, 1, 3, 5]
    assert prediction(ds).steps.values[:-1].tolist() == [1, 1, 38, 1, 39, 1]
    assert single_steps(summaries(model, points, "to:next", labels=[0, 10, 20, 30, 40, 50, 60])) == list(range(6))


def test_merged_groups_predict_the_same(run):
    _, _, ds = run
    assert_allclose(prediction(merge(ds, "layer")).predicted, prediction(ds).predicted, atol=1e-14)


def test_reach_within_its_errors_and_the_stored_error_without_blocks(run):
    """Two standard errors of the difference between predicted and measured, paired over the blocks, at each tau."""
    model, points, ds = run
    taus, w = np.array([0.25, 0.5, 1.0, 2.0, 4.0]), model.weight
    moves = [(points[i], points[i + 1] - points[i]) for i in range(6)]
    each = np.array([[model.losses(x + t * u) - model.losses(x) for t in taus] for x, u in moves])  # step, tau, block
    rows = np.concatenate([each, np.full((1, 5, 6), np.nan)])
    mean, se = (np.array([[weighted(b, w)[k] for b in row] for row in rows]) for k in (0, 1))
    ds = ds.assign(change_along=(("step", "tau"), mean), change_along_se=(("step", "tau"), se)).assign_coords(tau=taus)
    kept = ds.assign(change_along_batch=(("step", "batch", "tau"), (rows * w).transpose(0, 2, 1)))
    told = prediction(kept)
    for i, (x, u) in enumerate(moves):
        first = model.derivatives(x)[0] @ u
        for name, doubt in (("reach", 0), ("reach_low", 2), ("reach_high", -2)):
            reach = 0.0
            for k, t in enumerate(taus):
                left, error = weighted(t * first - each[i, k], w)
                if abs(left) + doubt * error > 0.1 * abs(mean[i, k]):
                    break
                reach = t
            assert told[name][i].sel(order=1) == reach
    assert (told.reach_low < told.reach_high).any()
    bare = prediction(ds.drop_vars([v for v in ds if str(v).endswith("_batch")]))
    assert_allclose(bare.measured_se[:6], se[:6, 2])
    assert_allclose(bare.reach, prediction(ds).reach)
    assert np.isnan(bare.reach_low).all()
