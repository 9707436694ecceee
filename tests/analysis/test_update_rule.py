"""The optimizer read off the checkpoints, where it is known."""

import numpy as np
import pandas as pd
import pytest
from numpy.testing import assert_allclose

from hoanalysis.analysis.update_rule import _Parts, _solved, chains, update_rule
from hoanalysis.errors import ArgumentError

from .trajectory import NAMES, OWNER, Cubic, series, train


def rule(model, points, labels=None, log=None, weights=True):
    ds = series(model, points, labels)
    return update_rule(ds["to:next"], ds["gradient"], ds["weights"] if weights else None, log)


@pytest.mark.parametrize("momentum", [0.0, 0.9, 1.1])
def test_full_batch_sgd_is_read_exactly(momentum):
    """A cubic loss has no fourth derivative, so that the slope at the end of a step is exact at order 3."""
    model = Cubic()
    found = rule(model, train(model, 8, rates=0.03, momentum=momentum, decay=0.2)).isel(chain=0)
    assert_allclose(found.momentum, momentum, atol=1e-7)
    assert_allclose(found.learning_rates, 0.03, rtol=1e-6)
    assert_allclose(found.learning_rate, 0.03, rtol=1e-6)
    assert_allclose(found.decay, 0.03 * 0.2, rtol=1e-6)
    assert found.pairs == 7
    for name in ("momentum", "learning_rates", "decay"):
        assert np.max(found[f"{name}_se"].values) < 1e-6


def test_each_group_has_its_own_rate_and_one_that_stands_still_has_0():
    model, rates = Cubic(), [0.03, 0.3, 0.0, 0.003]
    found = rule(model, train(model, 8, rates=rates, momentum=0.5)).isel(chain=0)
    assert found.group.values.tolist() == NAMES
    assert_allclose(found.learning_rates, rates, rtol=1e-5, atol=1e-12)
    assert_allclose(found.momentum, 0.5, atol=1e-6)


def test_without_the_weights_decay_is_not_told():
    model = Cubic()
    found = rule(model, train(model, 8, rates=0.03, momentum=0.5), weights=False).isel(chain=0)
    assert_allclose(found.learning_rates, 0.03, rtol=1e-6)
    assert_allclose(found.momentum, 0.5, atol=1e-6)
    assert np.isnan(found.decay)
    assert np.isnan(found.decay_se)


def test_with_the_noise_of_batches_the_errors_say_how_far_off_it_is():
    model, off = Cubic(spread=0.3), []
    for seed in range(30):
        found = rule(model, train(model, 12, rates=0.03, momentum=0.8, seed=seed)).isel(chain=0)
        off.append([(found.momentum - 0.8) / found.momentum_se, (found.learning_rate - 0.03) / found.learning_rate_se])
    sizes = np.abs(np.array(off, dtype=float))
    assert (np.median(sizes, axis=0) < 2).all()  # 0.7 if the jackknife of ten dependent pairs were perfect
    assert (np.median(sizes, axis=0) > 0.2).all()  # and errors that are far too large say nothing


def test_groups_that_disagree_on_the_momentum_widen_its_error():
    """What looks like momentum and is another force is not the same in all groups."""
    momentum = np.array([1.1, 1.0, 0.7, 0.6])
    points = train(Cubic(), 8, rates=0.03, momentum=momentum[OWNER])
    found = rule(Cubic(), points).isel(chain=0)
    assert 0.6 < found.momentum < 1.1
    assert found.momentum_se >= np.std(momentum, ddof=1) / 2
    alone = np.array([_solved([_of_group(e, g) for e in _equations(points)], 4)[1] for g in range(4)])
    assert_allclose(alone, momentum, atol=1e-6)


def _equations(points):
    ds = series(Cubic(), points)
    parts = _Parts(ds["to:next"], ds["gradient"], None)
    return [e for i in range(len(points) - 2) if (e := parts.equations(i)) is not None]


def _of_group(equations, g):
    left, right = equations
    return left[left[:, 2 + g] != 0], right[left[:, 2 + g] != 0]


def test_chains_are_cut_at_gaps_and_where_the_log_changes_the_rate():
    model = Cubic()
    points = train(model, 11, rates=0.03, momentum=0.5, change=(6, {"rates": 0.12}))
    labels = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 50]
    ds = series(model, points, labels)["to:next"]
    assert [c.positions for c in chains(ds)] == [tuple(range(10))]
    log = pd.DataFrame({"step": [0, 6], "learning_rate": [0.03, 0.12]})
    assert [c.positions for c in chains(ds, log)] == [tuple(range(6)), tuple(range(6, 10))]
    found = rule(model, points, labels, log)
    assert_allclose(found.learning_rate, [0.03, 0.12], rtol=1e-5)
    assert found["first"].values.tolist() == [0, 6]
    assert found["last"].values.tolist() == [6, 10]
    mixed = rule(model, points, labels)
    assert np.abs(mixed.learning_rate.values[0] - np.array([0.03, 0.12])).min() > 0.01
    gaps = series(model, points, [0, 1, 2, 30, 31, 32, 33, 34, 60, 61, 62, 63])["to:next"]
    assert [c.positions for c in chains(gaps)] == [(0, 1), (3, 4, 5, 6), (8, 9, 10)]


def test_too_few_steps_and_steps_beyond_the_series_are_not_told():
    model = Cubic()
    short = rule(model, train(model, 3, rates=0.03))
    assert np.isnan(short.momentum[0])
    assert np.isnan(short.learning_rates).all()
    points = train(model, 8, rates=0.03)
    ds = series(model, points)
    cut = {d: v.drop_vars(["D3", "D3_se", "D3_batch"]) for d, v in ds.items()}
    jump = cut["to:next"].copy(deep=True)
    jump.loss[:] = np.arange(9.0) * 100  # nothing is predicted: the slope at the end of no step can be trusted
    assert update_rule(jump, cut["gradient"], cut["weights"]).pairs[0] == 0


def test_other_datasets_are_refused():
    model = Cubic()
    ds = series(model, train(model, 6))
    with pytest.raises(ArgumentError, match="gradient= is a Dataset along 'weights'"):
        update_rule(ds["to:next"], ds["weights"])
    with pytest.raises(ArgumentError, match="weights= is a Dataset along 'gradient'"):
        update_rule(ds["to:next"], ds["gradient"], ds["gradient"])
    with pytest.raises(ArgumentError, match="other groups or checkpoints"):
        update_rule(ds["to:next"], ds["gradient"].isel(step=slice(2)))
    with pytest.raises(ArgumentError, match="needs a series"):
        update_rule(ds["to:next"], ds["gradient"].isel(step=0))


def test_a_schedule_that_changes_every_step_is_divided_out():
    """PyTorch's SGD, u' = -a' v' with v' = mu v + g, at a rate that falls by 5 % a step: exact on full batches."""
    model, momentum, factors = Cubic(), 0.6, np.array([1.0, 3.0, 1.0, 0.5])
    rates = 0.03 * 0.95 ** np.arange(12)
    x, v, points = np.full(len(OWNER), 0.5), np.zeros(len(OWNER)), []
    for rate in rates:
        points.append(x)
        v = momentum * v + factors[OWNER] * model.gradient(x)
        x = x - rate * v
    log = pd.DataFrame({"step": np.arange(12), "learning_rate": rates})
    ds = series(model, points)["to:next"]
    assert [c.positions for c in chains(ds, log)] == [tuple(range(11))]
    found = rule(model, points, log=log).isel(chain=0)
    assert_allclose(found.momentum, momentum, atol=1e-6)
    plain = rule(model, points).isel(chain=0)
    assert abs(plain.momentum - momentum) > 0.01
    assert_allclose(found.learning_rates, factors * rates[:11].mean(), rtol=1e-5)


def test_rates_on_few_samples_carry_a_warning():
    model = Cubic()
    ds = series(model, train(model, 8))
    assert "on more data" in update_rule(ds["to:next"], ds["gradient"]).attrs["status"]
    few, many = (ds["gradient"].assign_attrs(n_samples=n) for n in (512, 513))
    assert "over 512 samples" in update_rule(ds["to:next"], few).attrs["status"]
    assert update_rule(ds["to:next"], many).attrs["status"] == ""


def test_decay_at_its_bound_has_the_error_of_the_fit_without_bounds():
    """Steps that move away from 0 are fitted by no decay, whichever pair is left out; the oracle is plain lstsq."""
    points = train(Cubic(spread=0.3), 9, rates=0.03, momentum=0.5, decay=-2.0, seed=1)
    ds = series(Cubic(spread=0.3), points)
    found = update_rule(ds["to:next"], ds["gradient"], ds["weights"]).isel(chain=0)
    parts = _Parts(ds["to:next"], ds["gradient"], ds["weights"])
    pairs = [e for i in range(len(points) - 2) if (e := parts.equations(i)) is not None]
    assert len(pairs) == found.pairs

    def free(kept):
        left, right = (np.concatenate(p) for p in zip(*kept, strict=True))
        return np.linalg.lstsq(left, right)[0][1]

    without = np.array([free([e for j, e in enumerate(pairs) if j != i]) for i in range(len(pairs))])
    assert (without < 0).all()
    assert found.decay == 0
    expected = np.sqrt((len(pairs) - 1) / len(pairs) * ((without - free(pairs)) ** 2).sum())
    assert expected > 0
    assert_allclose(found.decay_se, expected, rtol=1e-6)
