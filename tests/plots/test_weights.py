"""Plots along u = weights show the numbers of their verbs; along other directions they say what they need."""

import numpy as np
import pytest

from hoanalysis import plots
from hoanalysis.analysis.example import example
from hoanalysis.analysis.flatness import flatness
from hoanalysis.analysis.laplace import laplace
from hoanalysis.analysis.pruning import saliency


def drawn(ax):
    """name of the series -> values and half lengths of the bars."""
    found = {}
    for container in ax.containers:
        line, _, bars = container.lines
        segments = np.array([s[:, 0] for s in bars[0].get_segments()])
        found[container.get_label()] = line.get_xdata().astype(float), (segments[:, 1] - segments[:, 0]) / 2
    return found


def weights(**kwargs):
    return example(3, **kwargs).assign_attrs(direction="weights")


def test_saliency_and_its_errors():
    ds = weights(steps=2)
    shown, found = drawn(plots.saliency(ds, step=0)), saliency(ds).isel(step=0)
    for label, name in (("removed alone (OBD)", "obd"), ("others rescaled (OBS)", "obs")):
        np.testing.assert_allclose(shown[label][0], found[name].values)
        np.testing.assert_allclose(shown[label][1], 2 * found[f"{name}_se"].values)
    assert plots.saliency(ds).get_title() == "Removing groups, step 10"


def test_measured_changes_are_drawn_beside_the_scores():
    ds = weights()
    assert "removed alone, measured" not in drawn(plots.saliency(ds))
    ds["change_removed"] = saliency(ds).obd * 1.1
    ds["change_removed_se"] = np.abs(ds.change_removed) * 0.01
    values, bars = drawn(plots.saliency(ds))["removed alone, measured"]
    np.testing.assert_allclose(values, ds.change_removed.values)
    np.testing.assert_allclose(bars, 2 * ds.change_removed_se.values)


def test_flatness_at_the_first_and_last_checkpoint():
    ds = weights(steps=3)
    shown, found = drawn(plots.flatness(ds)), flatness(ds)
    assert list(shown) == ["step 0", "step 20"]
    np.testing.assert_allclose(shown["step 20"][0], found.sharpness.values[2])
    np.testing.assert_allclose(shown["step 20"][1], 2 * found.sharpness_se.values[2])


def test_laplace_beside_independent_layers():
    ds = weights()
    shown, found = drawn(plots.laplace(ds, prior_precision=2.0)), laplace(ds, 2.0)
    np.testing.assert_allclose(shown["all layers"][0] ** 2, np.diag(found.covariance.values))
    np.testing.assert_allclose(shown["layers independent"][0] ** 2, np.diag(found.block_diagonal.values))
    slope = np.diag(found.covariance_se.values) / (2 * shown["all layers"][0])
    np.testing.assert_allclose(shown["all layers"][1], 2 * slope)
    assert (shown["all layers"][0] > shown["layers independent"][0]).all()
    ds.D2[0, 0] = -50.0
    assert "not at a minimum" in plots.laplace(ds).texts[0].get_text()


@pytest.mark.parametrize("name", ["saliency", "flatness", "laplace"])
def test_other_directions_are_told_what_is_needed(name):
    (text,) = getattr(plots, name)(example()).texts
    assert text.get_text() == "this needs summaries along the direction 'weights'"


def test_a_score_that_no_group_has_is_left_out():
    ds = weights()
    ds["D2"] = -abs(ds.D2)  # the others have no minimum to go to
    assert np.isnan(saliency(ds).obs).all()
    shown = drawn(plots.saliency(ds))
    assert list(shown) == ["removed alone (OBD)"]
