"""Every threshold of the verdict, from both of its sides: what is just below it and just above it."""

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from hoanalysis.analysis.autopsy import autopsy
from hoanalysis.analysis.contributions import POLYNOMIAL, Shares
from hoanalysis.analysis.groups import null_groups
from hoanalysis.analysis.update_rule import chains, update_rule
from hoanalysis.analysis.verdict import _momentum, _rates, break_of, guilty_of

from .trajectory import Cubic, series, train


def rule(rates, errors=1e-6, momentum=0.9, momentum_se=0.01):
    """What `update_rule` would have read of one chain."""
    rates = np.asarray(rates, float)
    one = {"learning_rate": 1.0, "learning_rate_se": 1e-6, "momentum": momentum, "momentum_se": momentum_se}
    data = {k: ("chain", [v]) for k, v in one.items()}
    data["learning_rates"] = (("chain", "group"), rates[None])
    data["learning_rates_se"] = (("chain", "group"), np.broadcast_to(np.asarray(errors, float), rates.shape)[None])
    return xr.Dataset(
        data, {"group": [f"g{i}" for i in range(len(rates))], "first": ("chain", [0]), "last": ("chain", [8])}
    )


def blamed(found):
    return [s.groups[0] for s in found if s.alarm]


@pytest.mark.parametrize("factor", [5.0, 1 / 5.0])
def test_a_rate_is_five_times_that_of_the_others_by_two_standard_errors(factor):
    far, near = (factor * f if factor > 1 else factor / f for f in (1.02, 0.98))
    assert blamed(_rates(rule([1, 1, 1, far]))) == ["g3"]
    assert blamed(_rates(rule([1, 1, 1, near]))) == []
    edge = abs(2 * far - factor)  # twice as far as need be, with the error at which 2 of them just reach back
    for share, expected in ((0.98, ["g3"]), (1.02, [])):
        errors = [0, 0, 0, share * edge / 2] if factor > 1 else [0, 0, 0, share * (factor - far / 2) / 2]
        assert blamed(_rates(rule([1, 1, 1, 2 * far if factor > 1 else far / 2], errors))) == expected


def test_three_quarters_of_the_groups_agree_or_there_is_no_common_rate():
    assert blamed(_rates(rule([1] * 6 + [30, 1 / 30]))) == ["g6", "g7"]
    assert blamed(_rates(rule([1] * 5 + [30, 1 / 30, 1 / 40]))) == []


def test_momentum_is_over_1_by_two_standard_errors():
    for momentum, error, alarm in ((1.05, 0.024, True), (1.05, 0.026, False), (0.99, 1e-4, False), (1.01, 1e-4, True)):
        assert [s.alarm for s in _momentum(rule([1, 1], momentum=momentum, momentum_se=error))] == [alarm]


def pulled(noise, numel=500, decay=0.08, steps=12, size=500):
    """Norms of a series that decays beside noise, and the share of the steps' squared length that pulls, by vectors."""
    rng = np.random.default_rng(0)
    x, rows, along, total = rng.normal(size=size), [], 0.0, 0.0
    for i in range(steps):
        u = -decay * x + noise * rng.normal(size=size)
        rows.append((np.linalg.norm(x), np.linalg.norm(u)))
        if i < steps - 2:  # of the last step the norm at its end is not in the series
            along, total = along + min(x @ u, 0) ** 2 / (x @ x), total + u @ u
        x = x + u
    theta, move = np.array(rows).T[:, :, None]
    ds = xr.Dataset(
        {"loss": ("step", np.ones(steps)), "D1": (("step", "group"), -np.ones((steps, 1)))}
        | {"D2": (("step", "group", "group2"), np.ones((steps, 1, 1)))},
        coords={"step": np.arange(steps), "group": ["a"], "group2": ["a"], "numel": ("group", [numel])},
        attrs={"direction": "to:next"},
    )
    at = ("step", "group")
    ds.D1[-1] = np.nan
    return ds.assign_coords(parameter_norm=(at, theta), direction_norm=(at, move)), along / total


def test_a_pull_is_half_of_the_steps_and_of_twenty_parameters():
    seen = set()
    for noise in np.linspace(0.04, 0.09, 26):
        ds, share = pulled(noise)
        if abs(share - 0.5) > 0.02:
            alarm = bool(autopsy(ds).suspects.query("kind == 'weight decay'")["alarm"].any())
            assert alarm == (share > 0.5)
            seen.add((alarm, abs(share - 0.5) < 0.08))
    assert {(True, True), (False, True)} <= seen  # near the threshold on both sides
    for numel, alarm in ((19, False), (20, True)):
        assert autopsy(pulled(0.01, numel)[0]).suspects["alarm"].any() == alarm


def climbing(first, steps, climb=2.0):
    """A loss that climbs by ``climb`` in so many equal steps, of which the first order makes the share ``first``."""
    loss = np.concatenate([[3.0, 2.0], 1 + climb * np.arange(steps + 1) / steps])
    n = len(loss)
    slope = np.where(np.arange(n) < 2, -1.0, first * climb / steps)
    rest = np.append(np.diff(loss), 0) - slope
    return xr.Dataset(
        {"loss": ("step", loss), "D1": (("step", "group"), slope[:, None])}
        | {"D2": (("step", "group", "group2"), 2 * rest[:, None, None])},
        coords={
            "step": np.arange(n),
            "group": ["a"],
            "group2": ["a"],
            "direction_norm": (("step", "group"), np.ones((n, 1))),
        }
        | {"parameter_norm": (("step", "group"), np.full((n, 1), np.nan))},
        attrs={"direction": "to:next"},
    )


@pytest.mark.parametrize(
    ("first", "steps", "expected"),
    [
        (0.55, 4, {"data"}),
        (0.45, 4, {"overshoot"}),
        (0.9, 3, {"data"}),
        (0.9, 2, set()),  # two steps uphill are no proof of other data
        (0.1, 2, {"overshoot"}),
    ],
)
def test_half_of_the_climb_and_three_steps_tell_the_data_from_an_overshoot(first, steps, expected):
    found = autopsy(climbing(first, steps)).suspects
    assert set(found.loc[found["alarm"], "kind"]) == expected


def test_the_guilty_make_half_of_the_rise_and_the_tied_are_within_two_errors_of_the_last():
    value = np.array([-5.0, 4.0, 1.0, 3.0, 2.0])
    for error, tied in ((0.1, []), (0.36, [4]), (0.34, []), (0.75, [4, 2])):  # 3 - 2 against 2 sqrt(2) error
        assert guilty_of(Shares(value, None, None, np.full(5, error), POLYNOMIAL, 3)) == ([1, 3], tied)
    assert guilty_of(Shares(-np.ones(3), None, None, np.zeros(3), POLYNOMIAL, 3)) == ([], [])


@pytest.mark.parametrize(
    ("loss", "error", "expected"),
    [
        ([3, 2, 1, 1.48], 0.0, None),  # a quarter of the progress of 2
        ([3, 2, 1, 1.52], 0.0, 2),
        ([3, 2, 1, 1.09, 2.0], 0.0, 3),  # the first step that took a tenth of the climb
        ([3, 2, 1, 1.11, 2.0], 0.0, 2),
        ([3, 2, 1, 2], 0.37, None),  # 2 errors of a difference, 2 sqrt(2) 0.37 = 1.05
        ([3, 2, 1, 2], 0.33, 2),
    ],
)
def test_a_break_is_a_quarter_of_the_progress_and_starts_with_a_tenth_of_the_climb(loss, error, expected):
    loss = np.array(loss, float)
    ds = xr.Dataset(
        {"loss": ("step", loss), "loss_se": ("step", np.full(len(loss), error))}
        | {"D1": (("step", "group"), -np.ones((len(loss), 1)))},
        coords={"step": np.arange(len(loss)), "group": ["g"]},
    )
    found = break_of(ds)
    assert (None if found is None else found.step) == expected


def test_a_chain_is_cut_above_a_quarter_and_fitted_from_three_pairs():
    ds = series(Cubic(), train(Cubic(), 8, rates=0.03))["to:next"]
    for factor, parts in ((1.24, 1), (1.26, 2), (1 / 1.24, 1), (1 / 1.26, 2)):
        log = pd.DataFrame({"step": [0, 4], "learning_rate": [0.03, 0.03 * factor]})
        assert len(chains(ds, log)) == parts
    for steps, known in ((3, False), (4, True)):  # 2 and 3 pairs
        whole = series(Cubic(), train(Cubic(), steps, rates=0.03))
        found = update_rule(whole["to:next"], whole["gradient"], whole["weights"])
        assert found.pairs.item() == steps - 1
        assert np.isfinite(found.momentum.item()) == known
    for samples, warned in ((512, True), (513, False)):
        told = update_rule(
            ds, series(Cubic(), train(Cubic(), 8, rates=0.03))["gradient"].assign_attrs(n_samples=samples)
        )
        assert bool(told.attrs["status"]) == warned


def test_a_step_is_trusted_to_half_of_its_measured_change():
    whole = series(Cubic(), train(Cubic(), 8, rates=0.03))
    for share, pairs in ((0.4, 7), (0.6, 0)):
        steps = whole["to:next"].copy(deep=True)
        change = np.append(np.diff(whole["gradient"].loss.values), np.nan)
        measured = (change / (1 - share))[:, None]  # the prediction is right of the rest only
        steps = steps.assign(change_along=(("step", "tau"), measured)).assign_coords(tau=[1.0])
        assert update_rule(steps, whole["gradient"]).pairs.item() == pairs


@pytest.mark.parametrize(("units", "null"), [(16, True), (64, False)])
def test_a_group_is_null_within_32_units_of_rounding(units, null):
    small = units * 2.0**-52
    ds = xr.Dataset(
        {"D1": ("group", [1.0, small]), "D2": (("group", "group2"), [[1.0, 0.0], [0.0, small]])},
        coords={"group": ["a", "b"], "group2": ["a", "b"], "direction_norm": ("group", [1.0, 1.0])},
        attrs={"dtype": "float64"},
    )
    assert null_groups(ds).values.tolist() == [False, null]
