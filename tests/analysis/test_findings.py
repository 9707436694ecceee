import re

import numpy as np
import pandas as pd
import pytest

import hoanalysis.accessor  # noqa: F401
from hoanalysis.analysis.example import example
from hoanalysis.analysis.findings import findings, pm
from hoanalysis.analysis.interactions import interactions, shares
from hoanalysis.analysis.merge import merge
from hoanalysis.analysis.prediction import prediction
from hoanalysis.analysis.steps import learning_rates
from hoanalysis.analysis.verdict import best_multiple

from .test_steps import with_null_group
from .trajectory import Cubic, series, train


def told(ds, log=None, word=""):
    return next(s for s in findings(ds, log) if word in s)


def test_the_numbers_are_those_of_the_verbs():
    ds = example(steps=3)
    text = "\n".join(findings(ds))
    assert (
        f"from {pm(ds.loss.values[0], ds.loss_se.values[0])} to {pm(ds.loss.values[2], ds.loss_se.values[2])}" in text
    )
    pair = interactions(merge(ds, "layer").sel(step=20)).iloc[0]
    assert f"'{pair.group}' and '{pair.group2}' interact most" in text
    assert pm(pair.scale_free, pair.scale_free_se) in text
    found = shares(ds)
    assert (
        f"{pm(found.off_block.values[2], found.off_block_se.values[2], True)} between different layers at step 20"
        in text
    )
    rates = learning_rates(ds).isel(step=2)
    low = int(rates.learning_rates.values.argmin())
    assert pm(rates.learning_rates.values[low], rates.learning_rates_se.values[low]) in text


def test_rates_beside_the_used_one_are_counted_with_their_errors():
    ds = example(steps=2)
    rates = learning_rates(ds).isel(step=1)
    log = pd.DataFrame({"step": [0, 5, 10], "learning_rate": [9.0, 9.0, 0.5]})
    above = int((rates.learning_rates - 2 * rates.learning_rates_se > 0.5).sum())
    below = int((rates.learning_rates + 2 * rates.learning_rates_se < 0.5).sum())
    assert f"The run used 0.5: {above} groups ask for more and {below} for less" in "\n".join(findings(ds, log))


def test_null_groups_zero_r_and_negative_curvature_are_named():
    ds = with_null_group()
    assert "'layer0.bias'" in told(ds, word="no effect")
    ds = example(order=2)
    ds.D3_diag[1] = 0.0
    assert "'layer0.bias'" in told(ds, word="exactly 0")
    ds.D2[0, 0] = -300.0
    assert re.search(r"1 of 4 eigenvalues .* negative, the lowest .*downwards", "\n".join(findings(ds)))
    ds.D2_se[3, 3] = 100.0
    assert "'layer1.bias'" in told(ds, word="within 2 standard errors of 0")


def test_missing_checkpoints_are_counted():
    ds = example(steps=3)
    for name in ("loss", "D1", "D2"):
        ds[name][1] = np.nan
    assert "1 of 3 checkpoints are not computed: steps '10'" in findings(ds)[0]
    for name in ("loss", "D1", "D2"):
        ds[name][:] = np.nan
    assert findings(ds) == ["None of 3 checkpoints is computed yet."]


def test_quality_is_said():
    ds = example(steps=2).assign_attrs(coverage=0.5)
    value = np.median((ds.D2_se / np.abs(ds.D2)).values)
    text = findings(ds)[-1]
    assert f"of D2 is {value:.1%}" in text
    assert "1.0e-15" in text
    assert "coverage is 50%" in text


@pytest.mark.parametrize("drop", [["D2_batch"], ["D1_se", "D2_se", "loss_se"], ["D2", "D2_se"], ["D3", "D3_se"]])
def test_what_is_not_held_is_not_told(drop):
    assert findings(example(steps=2).drop_vars(drop))
    assert findings(example().drop_vars(drop))


def test_one_group():
    assert findings(merge(example(steps=2), 1))


# ---- the steps that training took -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def broken():
    """A run of a quadratic whose learning rate is far too high from step 12 on."""
    model = Cubic(third=0.0)
    return series(model, train(model, 20, rates=0.02, momentum=0.0, change=(12, {"rates": 4.0})))


def test_the_steps_are_judged_along_to_next_and_beside_the_gradient(broken):
    log = pd.DataFrame({"step": [0, 12], "learning_rate": [0.02, 4.0]})
    others = {d: ds for d, ds in broken.items() if d != "gradient"}
    verdict = broken["to:next"].ho.autopsy(gradient=broken["gradient"], weights=broken["weights"], log=log).verdict
    beside = findings(broken["gradient"], log, others)
    along = findings(broken["to:next"], log, {d: ds for d, ds in broken.items() if d != "to:next"})
    for said in (beside, along):
        assert [s for s in said if s in verdict] == verdict
        assert verdict[0].startswith("The run broke at step 12")
        assert "from 0.02 to 4" in verdict[0]
    assert not any("broke" in s for s in findings(broken["gradient"], log))


def test_learning_rates_are_said_of_directions_that_a_step_is_minus_a_rate_times(broken):
    log = pd.DataFrame({"step": [0], "learning_rate": [0.02]})
    assert any("solve H-bar eta = g-bar" in s for s in findings(broken["gradient"], log))
    for direction in ("to:next", "weights"):
        assert not any("solve H-bar eta = g-bar" in s for s in findings(broken[direction], log))


def test_a_log_without_learning_rates_is_no_error(broken):
    log = pd.DataFrame({"step": [0, 12], "loss": [1.0, 2.0]})
    others = {d: ds for d, ds in broken.items() if d != "gradient"}
    assert findings(broken["gradient"], log, others) == findings(broken["gradient"], None, others)


def test_how_many_steps_were_predicted_is_counted(broken):
    ds = broken["to:next"]
    told, text = prediction(ds), "\n".join(findings(ds))
    cut = ds.ho.autopsy().broke.position
    assert 10 < cut < 15
    for when, part in ((" before the break", slice(cut)), (" from the break on", slice(cut, 20))):
        one = told.isel(step=part)
        known = np.isfinite(one.measured.values)
        shares = [f"{one.within.sel(order=d).values[known].mean():.0%}" for d in (1, 2, 3)]
        assert f"Of {known.sum()} single steps{when}" in text
        assert f"in {', '.join(shares)} at the orders 1 to 3" in text
    assert "times the step in the median" not in text
    best = np.array([best_multiple(ds.isel(step=i)) for i in range(20)])
    assert f"the best multiple is {_median(best)} in the median" in text


def _median(values: np.ndarray, times: float = 1.0) -> str:
    """The median, and the error of one of a normal sample, from its middle 68 %."""
    known = values[np.isfinite(values)] * times
    spread = np.quantile(known, 0.8413) - np.quantile(known, 0.1587)
    return pm(np.median(known), np.sqrt(np.pi / 2) * spread / 2 / np.sqrt(len(known)))


def test_the_rates_that_were_needed_are_told_regime_by_regime(broken):
    """A median over steps at one rate is not multiplied by that of another."""
    ds, log = broken["to:next"], pd.DataFrame({"step": [0, 12], "learning_rate": [0.02, 4.0]})
    text = "\n".join(findings(ds, log))
    best = np.array([best_multiple(ds.isel(step=i)) for i in range(20)])
    for rate, part in ((0.02, best[:12]), (4.0, best[12:])):
        if np.isfinite(part).any():
            assert f"Of the {len(part)} steps taken at a learning rate of {rate:.2g}," in text
            assert f"in the median, a learning rate of {_median(part, rate)}." in text
    schedule = pd.DataFrame({"step": range(20), "learning_rate": np.linspace(0.02, 0.04, 20)})
    assert "times the rate that the log has at each." in "\n".join(findings(ds, schedule))


def test_how_far_each_order_reaches_is_said_where_it_was_measured(broken):
    ds = broken["to:next"]
    order = [
        ds[f"D{d}"].sum([f"group{i}" if i > 1 else "group" for i in range(1, d + 1)], skipna=False) for d in (1, 2)
    ]
    taus = np.array([0.5, 1.0, 2.0])
    along = np.stack([order[0] * t + order[1] * t**2 / 2 for t in taus], axis=-1)  # a quadratic: order 2 is exact
    told = ds.assign(change_along=(("step", "tau"), along)).assign_coords(tau=taus)
    reach = prediction(told).reach.isel(step=slice(20)).median("step").values
    assert reach[1] == reach[2] == 2
    whole = told.isel(step=slice(12))  # before the break, so that one sentence tells of all
    reach = prediction(whole).reach.isel(step=slice(12)).median("step").values
    assert f"up to {reach[0]:.2g}, 2, 2 times the step in the median" in "\n".join(findings(whole))


def test_the_last_checkpoint_of_to_next_is_not_missing(broken):
    ds = broken["to:next"]
    assert "1 of 21 checkpoints are not computed" in findings(ds)[0]
    told = ds.assign_coords(gap=("step", [""] * 20 + ["it has no next one"]))
    assert "not computed" not in findings(told)[0]


def test_the_steps_of_a_series_that_is_not_computed_are_not_judged(broken):
    empty = broken["to:next"].map(lambda a: a * np.nan, keep_attrs=True)
    assert not any("step from" in s for s in findings(broken["gradient"], None, {"to:next": empty}))
    assert findings(empty) == ["None of 21 checkpoints is computed yet."]
    first = broken["to:next"].drop_vars(["D2", "D2_se", "D2_batch", "D3", "D3_se", "D3_batch"])
    assert findings(first)


def test_findings_say_what_the_errors_are_conditional_on():
    ds = example()
    assert "Standard errors are conditional on the direction." in ds.ho.findings()[-1]
    told = ds.assign_attrs(standard_errors="unconditional: with the influence of the data through the gradient")
    assert "Standard errors are unconditional: with the influence" in told.ho.findings()[-1]
