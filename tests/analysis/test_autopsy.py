"""The terms of a step against inclusion and exclusion of groups, the shares against an integral along the step."""

from itertools import chain, combinations

import numpy as np
import pandas as pd
import pytest
from numpy.testing import assert_allclose

from hoanalysis.analysis.autopsy import autopsy
from hoanalysis.analysis.contributions import shares, terms
from hoanalysis.analysis.example import example
from hoanalysis.analysis.merge import merge
from hoanalysis.analysis.prediction import prediction
from hoanalysis.errors import ArgumentError, SchemaError
from tests.oracles import weighted

from .trajectory import NAMES, OWNER, Cubic, series, summaries, train


@pytest.fixture(scope="module")
def run():
    model = Cubic(third=0.3)
    points = train(model, 5)
    return model, points, summaries(model, points, "to:next")


def moved(u, groups):
    return np.where(np.isin(OWNER, groups), u, 0.0)


def test_terms_of_a_set_of_groups_are_those_of_inclusion_and_exclusion(run):
    """sum over B in A of (-1)^|A - B| (L(theta + u_B) - L(theta)) is the sum of the terms with exactly the groups A."""
    model, points, ds = run
    x, u = points[1], points[2] - points[1]
    found = terms(ds.isel(step=1))
    assert len(found) == 4 + 10 + 20
    for a in chain.from_iterable(combinations(range(4), n) for n in (1, 2, 3)):
        parts = chain.from_iterable(combinations(a, n) for n in range(1, len(a) + 1))
        expected = sum((-1) ** (len(a) - len(b)) * (model.loss(x + moved(u, b)) - model.loss(x)) for b in parts)
        exactly = found["groups"].map(lambda g, a=a: set(g) == {NAMES[s] for s in a})
        assert_allclose(found.loc[exactly, "value"].sum(), expected, rtol=1e-8, atol=1e-13)


def test_terms_have_their_formulas_and_errors(run):
    model, points, ds = run
    x, u = points[1], points[2] - points[1]
    _, hessian, third = model.derivatives(x)
    found = terms(ds.isel(step=1)).set_index(["order", "term"])
    a, b = (moved(u, [s]) for s in (0, 2))
    for key, blocks in {
        (2, "a.weight × a.weight"): hessian @ a @ a / 2,
        (2, "a.weight × b.weight"): hessian @ a @ b,
        (3, "a.weight × a.weight × b.weight"): third @ a @ a @ b / 2,
        (3, "a.weight × a.weight × a.weight"): third @ a @ a @ a / 6,
    }.items():
        mean, se = weighted(blocks, model.weight)
        assert_allclose(found.loc[[key], "value"], [mean], rtol=1e-10)
        assert_allclose(found.loc[[key], "se"], [se], rtol=1e-10)
    sizes = found["value"].abs().to_numpy()
    assert (np.diff(sizes) <= 0).all()


def test_the_sums_are_exact(run):
    _, _, ds = run
    found = autopsy(ds, 1)
    assert_allclose(found.terms["value"].sum(), found.predicted, rtol=1e-12)
    assert_allclose(found.shares["share"].sum(), found.predicted, rtol=1e-12)
    assert_allclose(found.predicted + found.unexplained, found.measured, rtol=1e-12)
    second = autopsy(ds.drop_vars(["D3", "D3_se", "D3_batch"]), 1)
    assert set(second.terms["order"]) == {1, 2}
    assert abs(second.unexplained) > 1e-4 * abs(second.measured) > abs(found.unexplained)


def test_the_share_of_a_group_is_its_slope_integrated_along_the_step(run):
    """The Aumann-Shapley value: the integral over t in 0..1 of U^s . gradient(theta + t u), by Simpson's exact rule."""
    model, points, ds = run
    x, u = points[1], points[2] - points[1]
    slopes = (model.derivatives(x)[0] + 4 * model.derivatives(x + u / 2)[0] + model.derivatives(x + u)[0]) / 6
    found = shares(ds.isel(step=1)).set_index("group").loc[NAMES]
    for s, name in enumerate(NAMES):
        mean, se = weighted(slopes @ moved(u, [s]), model.weight)
        assert_allclose(found.loc[name, ["share", "share_se"]].to_numpy(float), [mean, se], rtol=1e-9)
    own = moved(u, [0])
    curvature = (model.share @ (model.derivatives(x)[1] @ own)) @ own
    assert_allclose(found.loc["a.weight", "overshoot"], -curvature / (model.gradient(x) @ own), rtol=1e-9)


def test_shares_are_those_of_the_order_that_predicts_the_step(run):
    """A third order that has outgrown the others is blamed on no group."""
    _, _, ds = run
    found = autopsy(ds, 1)
    assert found.shares_order == 3
    wild = ds.copy(deep=True)
    for name in ("D3", "D3_batch"):
        wild[name][:] *= -50
    second = autopsy(wild, 1)
    assert second.shares_order == 2
    plain = shares(ds.isel(step=1).drop_vars(["D3", "D3_se", "D3_batch"]))
    pd.testing.assert_frame_equal(second.shares.drop(columns="left_out"), plain.drop(columns="left_out"))
    # what is stored and left out counts: the sixths of the third order that were not believed
    third = np.abs(wild.D3.isel(step=1).values.sum((1, 2)) / 6)
    left = second.shares.set_index("group")["left_out"].reindex(NAMES).to_numpy()
    assert_allclose(left, np.maximum(third, abs(prediction(wild).unexplained[1, 1].item())), rtol=1e-12)
    assert_allclose(second.terms["value"].sum(), second.predicted, rtol=1e-12)  # the waterfall shows every order
    unmeasured = wild.copy(deep=True)
    unmeasured.loss[2] = np.nan
    assert autopsy(unmeasured, 1).shares_order == 3


def test_without_a_step_it_is_where_the_run_broke_or_the_worst_single_step():
    model = Cubic()
    healthy = summaries(model, train(model, 12, rates=0.01, momentum=0.0), "to:next")
    rises = np.diff(healthy.loss.values[:-1])
    assert autopsy(healthy).step == int(np.argmax(rises))
    model = Cubic(third=0.0)
    broken = train(model, 16, rates=0.02, momentum=0.0, change=(9, {"rates": 6.0}))
    found = autopsy(summaries(model, broken, "to:next"))
    loss = np.array([model.loss(x) for x in broken])
    first = int(np.flatnonzero(np.diff(loss) > 0)[0])
    assert first >= 9
    assert found.broke is not None
    assert (found.step, found.to_step, found.broke.step) == (first, first + 1, first)


def test_wrong_calls_are_named(run):
    _, _, ds = run
    with pytest.raises(ArgumentError, match="no step that starts at 77"):
        autopsy(ds, 77)
    with pytest.raises(ArgumentError, match="no step that starts at 5"):
        autopsy(ds, 5)  # the last checkpoint, which has no next one
    with pytest.raises(SchemaError, match="along the steps that training took"):
        autopsy(example(steps=3))
    with pytest.raises(SchemaError, match="along the steps that training took"):
        autopsy(ds.isel(step=1))
    with pytest.raises(SchemaError, match="needs D2"):
        autopsy(ds.drop_vars(["D2", "D2_se", "D2_batch"]))
    empty = ds.map(lambda a: a * np.nan, keep_attrs=True)
    with pytest.raises(ArgumentError, match="no step of this series is computed"):
        autopsy(empty)


@pytest.mark.parametrize("bare", [False, True])
def test_odd_datasets(bare):
    model = Cubic()
    all_ = series(model, train(model, 6, seed=1))
    odd = {d: "<b>\u6f22\u202e" if d == "a.bias" else d for d in NAMES}
    for ds in (merge(all_["to:next"], 1), all_["to:next"].isel(step=[0, 1])):
        ds = ds.drop_vars([v for v in ds if str(v).endswith(("_batch", "_se"))] + ["weight"]) if bare else ds
        found = autopsy(ds)
        assert np.isnan(found.predicted_se) == bare
        assert_allclose(found.terms["value"].sum(), found.predicted)
        assert found.verdict
    renamed = {
        d: ds.assign_coords({dim: list(odd.values()) for dim in ("group", "group2", "group3")})
        for d, ds in all_.items()
    }
    found = autopsy(renamed["to:next"], gradient=renamed["gradient"], weights=renamed["weights"])
    assert odd["a.bias"] in set(found.shares["group"])
