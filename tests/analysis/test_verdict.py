"""What each fault looks like, planted in a run whose every number is known; and what is none."""

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from numpy.testing import assert_allclose

from hoanalysis.analysis.autopsy import autopsy
from hoanalysis.analysis.verdict import best_multiple, break_of

from .trajectory import NAMES, Cubic, series, summaries, train


def looked_into(points, model=None, labels=None, **more):
    ds = series(model or Cubic(), points, labels)
    return autopsy(ds["to:next"], gradient=ds["gradient"], weights=ds["weights"], **more)


def first_alarm(found):
    alarms = found.suspects[found.suspects["alarm"]]
    return ("none", ()) if alarms.empty else (alarms["kind"].iloc[0], alarms["groups"].iloc[0])


@pytest.mark.parametrize("seed", range(8))
def test_no_alarm_where_nothing_is_wrong(seed):
    found = looked_into(train(Cubic(), 25, rates=0.02, momentum=0.8, decay=1e-3, seed=seed))
    assert first_alarm(found) == ("none", ())
    assert found.broke is None
    assert found.verdict == ["No step broke the run, and its steps show no fault."]


@pytest.mark.parametrize("group", range(4))
def test_a_learning_rate_30_times_the_others_is_named(group):
    rates = [0.002] * 4
    rates[group] *= 30
    found = looked_into(train(Cubic(), 15, rates=rates, momentum=0.8))
    assert first_alarm(found) == ("learning rate", (NAMES[group],))


@pytest.mark.parametrize("group", range(4))
def test_a_group_that_stands_still_is_named_and_since_when(group):
    rates = [0.02] * 4
    rates[group] = 0.0
    found = looked_into(train(Cubic(), 25, rates=rates, momentum=0.0, seed=3))
    assert first_alarm(found) == ("does not move", (NAMES[group],))
    later = looked_into(train(Cubic(), 25, rates=0.02, momentum=0.0, seed=3, change=(10, {"rates": rates})))
    alarm = later.suspects.iloc[0]
    assert (alarm["kind"], alarm["groups"], alarm["step"]) == ("does not move", (NAMES[group],), 10)


def test_a_group_without_a_gradient_is_not_blamed():
    model = Cubic()
    ds = series(model, train(model, 12, rates=[0.02, 0.02, 0.02, 0.0], momentum=0.0))
    norm = ds["gradient"].direction_norm.copy()
    norm[:, 3] = 0.0
    found = autopsy(ds["to:next"], gradient=ds["gradient"].assign_coords(direction_norm=norm))
    assert first_alarm(found) == ("none", ())
    assert "has no gradient" in "\n".join(found.suspects["statement"])


def test_momentum_over_1_is_named():
    found = looked_into(train(Cubic(), 25, rates=0.005, momentum=1.05, seed=3))
    assert first_alarm(found)[0] == "momentum"


def norms_alone(decay, noise=0.01, steps=12, size=500, seed=0):
    """A series along to:next of two groups that move by noise, a gradient across theta and decay."""
    rng, rows = np.random.default_rng(seed), []
    x = rng.normal(size=(2, size))
    for _ in range(steps):
        u = -decay * x + noise * rng.normal(size=x.shape)
        rows.append((np.linalg.norm(x, axis=1), np.linalg.norm(u, axis=1)))
        x = x + u
    theta, move = (np.stack(r) for r in zip(*rows, strict=True))
    names = ["a", "b"]
    ds = xr.Dataset(
        {"loss": ("step", np.ones(steps)), "D1": (("step", "group"), -np.ones((steps, 2)))}
        | {"D2": (("step", "group", "group2"), np.ones((steps, 2, 2)))},
        coords={"step": np.arange(steps), "group": names, "group2": names, "numel": ("group", [size, size])},
        attrs={"direction": "to:next"},
    )
    return ds.assign_coords(parameter_norm=(("step", "group"), theta), direction_norm=(("step", "group"), move))


def test_weight_decay_that_pulls_more_than_the_data_is_named_from_norms_alone():
    found = autopsy(norms_alone(0.08))
    assert first_alarm(found)[0] == "weight decay"
    assert "halves them in 9 steps" in found.verdict[0]  # ln 2 / 0.08 = 8.7
    assert first_alarm(autopsy(norms_alone(0.0))) == ("none", ())
    assert first_alarm(autopsy(norms_alone(0.005))) == ("none", ())  # a fifth of the step
    # a network without gradients, whose weights shrink slowly beside the run
    assert first_alarm(autopsy(norms_alone(0.005, noise=1e-5))) == ("none", ())
    few = norms_alone(0.08).assign_coords(numel=("group", [1, 1]))  # of one parameter every step is along theta
    assert first_alarm(autopsy(few)) == ("none", ())


def test_steps_that_follow_other_data_are_not_blamed_on_learning_rates():
    model, other = Cubic(), Cubic(seed=0)
    other.a = -model.a * 3
    points = train(model, 40, rates=0.01, momentum=0.5, change=(25, {"data": other}))
    found = looked_into(points, model)
    assert first_alarm(found)[0] == "data"
    assert found.broke.step in (25, 26)
    assert not found.suspects.loc[found.suspects["kind"].isin(("learning rate", "overshoot")), "alarm"].any()
    assert "No learning rate is to blame." in found.verdict[1]


def test_steps_that_are_too_long_are_told_from_other_data():
    model = Cubic(third=0.0)
    points = train(model, 20, rates=0.02, momentum=0.0, change=(12, {"rates": 2.0}))
    log = pd.DataFrame({"step": [0, 12], "learning_rate": [0.02, 2.0]})
    found = looked_into(points, model, log=log)
    loss = np.array([model.loss(x) for x in points])
    assert found.broke.step == int(np.flatnonzero(np.diff(loss) > 0)[0])
    assert first_alarm(found)[0] == "overshoot"
    one = found.shares.iloc[0]
    assert first_alarm(found)[1][0] == one["group"]
    assert one["overshoot"] > 2


def test_the_log_says_what_changed_at_the_break():
    model = Cubic(third=0.0)
    ds = summaries(model, train(model, 20, rates=0.02, momentum=0.0, change=(12, {"rates": 4.0})), "to:next")
    assert break_of(ds).step == 12
    log = pd.DataFrame({"step": [0, 5, 12, 13], "learning_rate": [0.02, 0.02, 4.0, 4.0]})
    assert autopsy(ds, log=log).verdict[0].endswith("The log changes the learning rate there, from 0.02 to 4.")
    for other in (None, log.drop(columns="learning_rate"), log.assign(learning_rate=0.02), log[log["step"] >= 12]):
        assert "The log" not in autopsy(ds, log=other).verdict[0]


def bare(loss, labels=None, error=0.0):
    """A series of nothing but losses."""
    loss = np.asarray(loss, float)
    labels = np.arange(len(loss)) if labels is None else labels
    d1 = np.where(np.isnan(loss), np.nan, -1.0)[:, None]
    return xr.Dataset(
        {"loss": ("step", loss), "loss_se": ("step", np.full(len(loss), error)), "D1": (("step", "group"), d1)},
        coords={"step": labels, "group": ["g"]},
    )


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        ([3, 2, 1, 0.9, 0.8], None),
        ([3, 2, 1, 1.2, 1.1, 1.3], None),  # less than a quarter of the 2 that were gained
        ([3, 2, 1, 1.02, 1.6, 2.5, 2.0], (3, 4, 5, 1.02, 2.5)),  # the first step that took a tenth of the climb
        ([3, 2, 1, 4, 1, 0.5], None),  # a spike that passes
        ([3, 2, 1, *[4] * 9, 1.0, 0.5], None),
        ([3, 2, 1, *[4] * 10, 1.0, 0.5], (2, 3, 3, 1, 4)),  # after more than ten steps it is a break
        ([2, 4, 1, 0.5, 3, 3], (3, 4, 4, 0.5, 3)),  # a break after a spike
        ([1, 1.2, 1.3], (0, 1, 2, 1, 1.3)),  # no progress at all: a quarter of the loss itself
        ([3, 2, np.nan, 1, 2.5], (3, 4, 4, 1, 2.5)),
        ([np.nan] * 3, None),
        ([3, 1, np.inf], (1, 2, 2, 1, np.inf)),
        ([3, 1, *(1 + np.arange(1, 40) / 30)], ("slowly",)),  # no step took a tenth of it
    ],
)
def test_where_it_broke(loss, expected):
    found = break_of(bare(loss))
    got = None if found is None else (found.step, found.next_step, found.to_step, found.before, found.after)
    if expected is None or "slowly" in expected:
        assert (got is None) == (expected is None)
    else:
        assert got == expected


def test_a_climb_within_the_noise_is_none():
    assert break_of(bare([3, 1, 1.9])) is not None
    assert break_of(bare([3, 1, 1.9], error=0.5)) is None


def test_a_climb_between_kept_checkpoints_is_said_to_be_unseen():
    found = break_of(bare([3, 1, 2.5], labels=[0, 1, 40]))
    assert (found.step, found.next_step, found.single) == (1, 40, False)
    model = Cubic()
    points = train(model, 12, rates=0.02, momentum=0.0, change=(8, {"rates": 3.0}))
    kept = [*points[:9], points[-1]]
    said = autopsy(
        summaries(model, kept, "to:next", labels=[*range(9), 50]),
        gradient=summaries(model, kept, "gradient", labels=[*range(9), 50]),
    )
    assert said.broke is not None
    assert "who did it is not seen" in said.verdict[-1]


def test_the_last_loss_comes_from_the_gradient():
    ds = bare([3, 1, np.nan])
    assert break_of(ds) is None
    assert break_of(ds, bare([3, 1, 2.9])).after == 2.9


def test_the_best_multiple_of_a_step_is_where_the_polynomial_turns():
    def one(*terms):
        names = {
            f"D{d}": (tuple(f"group{'' if i == 0 else i + 1}" for i in range(d)), np.full((1,) * d, float(t)))
            for d, t in enumerate(terms, 1)
        }
        return xr.Dataset(names)

    assert_allclose(best_multiple(one(-1, 4)), 0.25)
    assert_allclose(best_multiple(one(-1, 0, 2)), 1.0)  # -t + t^3/3
    assert np.isnan(best_multiple(one(1, 4)))  # starts uphill
    assert np.isnan(best_multiple(one(-1, -4)))  # only ever goes down
    model = Cubic(third=0.0)
    points = train(model, 3, rates=0.5, momentum=0.0)
    ds = summaries(model, points, "to:next").isel(step=1)
    t = best_multiple(ds)
    u = points[2] - points[1]
    assert_allclose(model.gradient(points[1] + t * u) @ u, 0, atol=1e-10)
