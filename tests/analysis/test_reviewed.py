"""What a verb must not mistake: factors that act only together, half selections, sums, errors that leave out u."""

import json

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn

import hoanalysis as ho
from hoanalysis.analysis.autopsy import autopsy
from hoanalysis.analysis.example import example
from hoanalysis.errors import HoError, SchemaError

from .trajectory import Cubic, series, train


def two_groups(d1, d2) -> xr.Dataset:
    ds = example(layers=1).isel(group=slice(2), group2=slice(2), group3=slice(2), drop=False)
    ds = ds[["loss", "D1", "D2"]].copy(deep=True)
    ds["D1"].values[...], ds["D2"].values[...] = d1, d2
    return ds.assign_coords(direction_norm=("group", np.ones(2)))


def test_a_factor_whose_other_factor_is_zero_has_an_effect():
    """L = a b + b^2 at a = 0, slope along b: the step goes along a, and the curvature is 1 -+ sqrt 2."""
    ds = two_groups([0.0, 1.0], [[0.0, 1.0], [1.0, 2.0]])
    assert not ds.ho.null_groups().any()
    np.testing.assert_allclose(ds.ho.learning_rates().learning_rates, [1.0, 0.0], atol=1e-12)
    np.testing.assert_allclose(sorted(ds.ho.spectrum().values), [1 - np.sqrt(2), 1 + np.sqrt(2)], rtol=1e-12)


def test_a_group_that_does_not_act_with_any_other_is_null():
    assert two_groups([0.0, 1.0], [[0.0, 0.0], [0.0, 2.0]]).ho.null_groups().values.tolist() == [True, False]


@pytest.mark.parametrize("select", [{"group": [2, 3]}, {"group2": slice(None, None, -1)}])
def test_merging_and_comparing_refuse_half_a_selection(select):
    whole = example(layers=3)
    part = whole.isel(select)
    with pytest.raises(SchemaError, match=r"are not those (along|of) 'group'"):
        part.ho.merge("layer")
    with pytest.raises(SchemaError, match=r"are not those (along|of) 'group'"):
        whole.ho.compare(part)
    with pytest.raises(SchemaError, match=r"are not those (along|of) 'group'"):
        part.ho.compare(whole)


def test_zero_weights_are_not_called_scale_invariant():
    """A bias that starts at 0 has nothing to remove; weights before a norm have."""
    ds = two_groups([0.0, 1.0], [[0.0, 0.0], [0.0, 2.0]]).assign_attrs(direction="weights")
    first = str(ds.group.values[0])
    assert f"scale-invariant: the loss does not depend on the scale of {first!r}" in ds.ho.saliency().status.item()
    zero = ds.assign_coords(direction_norm=("group", np.array([0.0, 1.0])))
    for said in (zero.ho.saliency().status.item(), zero.ho.flatness().status.item()):
        assert f"zero weights: all entries of {first!r} are 0" in said
        assert "scale-invariant" not in said


def test_laplace_of_a_loss_that_is_a_sum():
    """The same posterior as of the mean: N D2 of the mean is D2 of the sum."""
    torch.manual_seed(0)
    x, y = torch.randn(30, 3).double(), torch.randn(30, 2).double()
    model = nn.Linear(3, 2).double()
    found = []
    for reduction in ("mean", "sum"):
        problem = ho.Problem(
            model, [(x, y)], batch_loss=lambda m, b, r=reduction: ((m(b[0]) - b[1]) ** 2).sum(1).__getattribute__(r)(),
            batch_size=lambda b: len(b[0]), reduction=reduction,
        )  # fmt: skip
        found.append(ho.summarize(problem, 2, direction="weights", progress=False).ho.laplace().covariance)
    np.testing.assert_allclose(found[1], found[0], rtol=1e-10)


def test_differences_along_the_gradient_say_that_their_errors_are_too_small():
    a, b = example(), example(seed=1)
    assert a.attrs["direction"] == "gradient"
    b.attrs["provenance"] = json.dumps({**json.loads(b.attrs.get("provenance") or "{}"), "data": "other"})
    assert "errors too small" in a.ho.compare(b).status.item()
    told = [one.assign_attrs(standard_errors="unconditional: with the influence of u") for one in (a, b)]
    assert "errors too small" not in told[0].ho.compare(told[1]).status.item()


def test_advice_is_about_the_matrix_that_was_solved_with():
    ds = two_groups([1.0, 1.0], [[2.0, 0.0], [0.0, 3.0]])
    assert ds.ho.learning_rates().status.item().startswith("ok: H-bar is")
    assert ds.ho.learning_rates("ridge").status.item().startswith("ok: the regularized H-bar is")


def test_a_verdict_does_not_clear_what_it_could_not_read():
    """Without the gradient no momentum and no rates are read from the steps."""
    ds = series(Cubic(), train(Cubic(), 25, rates=0.02, momentum=0.8, seed=0))
    assert (
        autopsy(ds["to:next"]).verdict[0].startswith("No step broke the run. Learning rates and momentum were not read")
    )


def renamed(ds, *labels):
    return ds.assign_coords({d: [*labels, *ds.group.values[len(labels) :]] for d in ("group", "group2", "group3")})


@pytest.mark.parametrize(
    "call",
    [
        lambda one, ds: one.ho.compare(one.isel(group=0)),
        lambda one, ds: one.ho.compare(one.isel(group=[0, 1])),
        lambda one, ds: one.rename(group="g").ho.learning_rates(),
        lambda one, ds: one.rename(group2="h").ho.interactions(),
        lambda one, ds: one.rename(group="g").ho.findings(),
        lambda one, ds: ds.rename(step="epoch").ho.findings(),
        lambda one, ds: xr.Dataset().ho.findings(),
        lambda one, ds: one.ho.learning_rates("ridge", "1"),
        lambda one, ds: one.ho.learning_rates("ridge", -1),
        lambda one, ds: one.ho.taylor("1"),
        lambda one, ds: one.ho.taylor({"layer0.weight": "a"}),
        lambda one, ds: one.ho.taylor(1.0, True),
        lambda one, ds: one.ho.taylor_step(share="a"),
        lambda one, ds: one.ho.compare(one, step="foo"),
        lambda one, ds: one.ho.suggest_partition(2, within=3),
        lambda one, ds: one.ho.suggest_partition(2, epsilon=-1),
        lambda one, ds: one.ho.interactions("3"),
        lambda one, ds: renamed(one, "a", "a").ho.interactions(),
        lambda one, ds: renamed(one, "a", "a").ho.merge({"b": ["a"]}),
        lambda one, ds: one.ho.compare(renamed(one, "a", "a")),
        lambda one, ds: ds.isel(step=slice(None, None, -1)).ho.findings(),
    ],
)
def test_what_a_user_gets_wrong_is_an_error_in_his_words(call):
    with pytest.raises(HoError):
        call(example(), example(steps=3))


def test_a_group_that_stands_still_is_not_blamed_where_its_gradient_is_unknown():
    found = autopsy(series(Cubic(), train(Cubic(), 12, rates=[0.02, 0.02, 0.02, 0.0], momentum=0.0))["to:next"])
    assert not found.suspects["alarm"].any()
    assert "whether it has a gradient was not computed" in "\n".join(found.suspects["statement"])
