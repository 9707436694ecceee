"""Merging equals recomputing: against the polynomial's own derivatives contracted with the summed direction."""

import itertools

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from hoanalysis.analysis.example import example
from hoanalysis.analysis.merge import merge
from hoanalysis.errors import ArgumentError


def loop_merge(full: np.ndarray, members: list[list[int]]) -> np.ndarray:
    """The definition, entry by entry."""
    out = np.zeros([len(members)] * full.ndim)
    for index in itertools.product(range(len(members)), repeat=full.ndim):
        for old in itertools.product(*(members[i] for i in index)):
            out[index] += full[old]
    return out


def loop_error(sums: np.ndarray, weight: np.ndarray) -> np.ndarray:
    n, total = len(weight), weight.sum()
    mean, out = sums.sum(0) / total, 0.0
    for s, w in zip(sums, weight, strict=True):
        out = out + w**2 * (s / w - mean) ** 2
    return np.sqrt(n / (n - 1) * out) / total


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=6, max_size=6), st.integers(0, 5))
def test_any_merge_equals_the_sum_of_slices_and_recomputed_errors(owner, seed):
    ds = example(seed, layers=3)
    labels = ds.group.values
    names = list(dict.fromkeys(owner))
    members = [[i for i, o in enumerate(owner) if o == name] for name in names]
    merged = merge(ds, {f"new{name}": [labels[i] for i in m] for name, m in zip(names, members, strict=True)})
    for name in ("D1", "D2", "D3"):
        np.testing.assert_allclose(merged[name].values, loop_merge(ds[name].values, members), rtol=1e-12, atol=1e-12)
        sums = np.stack([loop_merge(block, members) for block in ds[f"{name}_batch"].values])
        np.testing.assert_allclose(merged[f"{name}_batch"].values, sums, rtol=1e-12, atol=1e-10)
        np.testing.assert_allclose(
            merged[f"{name}_se"].values, loop_error(sums, ds.weight.values), rtol=1e-9, atol=1e-12
        )


def test_trivial_merge_is_the_taylor_term():
    ds = example(layers=3)
    merged = merge(ds, 1)
    for name in ("D1", "D2", "D3"):
        np.testing.assert_allclose(merged[name].item(), ds[name].values.sum(), rtol=1e-12)


def test_series_by_layer_has_the_coordinates_of_the_layers():
    ds = example(layers=2, steps=3)
    merged = merge(ds, "layer")
    assert merged.group.values.tolist() == ["layer0", "layer1"]
    assert merged.kind.values.tolist() == ["other", "other"]
    assert merged.layer.values.tolist() == ["layer0", "layer1"]
    assert merged.numel.values.tolist() == [4, 4]
    assert merged.D2_se.dims == ("step", "group", "group2")
    assert merged.attrs["partition"] == "canonical merged by layer"
    norms = np.sqrt((ds.direction_norm.values**2).reshape(3, 2, 2).sum(-1))
    np.testing.assert_allclose(merged.direction_norm.values, norms)
    for i in range(3):
        alone = merge(ds.isel(step=i), "layer")
        xr.testing.assert_allclose(merged.D2_se.isel(step=i, drop=True), alone.D2_se.drop_vars("step"))


def test_common_prefix_of_layers():
    ds = example(layers=2)
    ds = ds.assign_coords(layer=("group", ["enc.0.a", "enc.0.a", "enc.0.b", "enc.0.b"]))
    assert merge(ds, 1).layer.item() == "enc.0"
    assert merge(ds.assign_coords(layer=("group", list("abcd"))), 1).layer.item() == ""


def test_without_blocks_errors_are_dropped_and_diagonals_never_survive():
    ds = example(order=2).drop_vars(["D1_batch", "D2_batch", "D3_diag_batch", "weight"])
    merged = merge(ds, "kind")
    assert {"D1", "D2", "loss", "loss_se"} == set(merged.data_vars)


def test_one_member_each_keeps_everything():
    ds = example(order=2)
    same = merge(ds, 4)
    xr.testing.assert_identical(same.D3_diag, ds.D3_diag)
    assert merge(ds, {"first": ["layer0.weight"]}).group.values.tolist()[0] == "first"


def test_nan_stays_in_its_own_group():
    ds = example(layers=2)
    ds.D2[0, 0] = np.nan
    merged = merge(ds, "layer")
    assert np.isnan(merged.D2.values[0, 0])
    assert np.isfinite(merged.D2.values[1]).all()


def test_empty_blocks_are_left_out():
    ds = example(steps=2)
    ds["weight"][1, 3:] = np.nan
    ds["D2_batch"][1, 3:] = np.nan
    merged = merge(ds, "layer")
    alone = merge(ds.isel(step=1, batch=slice(0, 3)), "layer")
    np.testing.assert_allclose(merged.D2_se.values[1], alone.D2_se.values)


@pytest.mark.parametrize(
    ("by", "words"),
    [
        ("layr", "did you mean 'layer'"),
        (9, "from 1 to 4"),
        (0, "from 1 to 4"),
        ({"a": ["layer0.weigh"]}, "did you mean 'layer0.weight'"),
        ({"a": ["layer0.weight"], "b": ["layer0.weight"]}, "named twice"),
        ({"layer1.bias": ["layer0.weight"]}, "not merged"),
        ({"a": []}, "list of old groups"),
        (1.5, "a number"),
    ],
)
def test_wrong_arguments_are_explained(by, words):
    with pytest.raises(ArgumentError, match=words):
        merge(example(), by)
