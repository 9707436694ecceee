"""Every verb on every awkward Dataset, told apart from a crash by what must come out.

Each awkward Dataset is a plain one with something done to it that has a known effect on every answer: other labels
change the labels alone; a series of one step is its checkpoint; a checkpoint that is not computed leaves a gap and the
others as they are; a group without effect is not there; one group is a scalar formula; a missing entry is missed.
"""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray as xr

import hoanalysis  # noqa: F401, registers ds.ho
from hoanalysis.accessor import HoAccessor
from hoanalysis.analysis.example import example
from hoanalysis.analysis.merge import merge
from hoanalysis.errors import ArgumentError, HoError

from .analysis.test_steps import with_null_group


def later(ds: xr.Dataset) -> xr.Dataset:
    """Another run to compare with: the same blocks of the same batches, other numbers."""
    return ds.assign({n: ds[n] * 1.25 for n in map(str, ds.data_vars) if n.startswith("D")})


def plain(**kwargs: Any) -> xr.Dataset:
    return example(1, batches=4, **kwargs)


VERBS: dict[str, Callable[[xr.Dataset], Any]] = {
    "regularizer": lambda ds: ds.ho.regularizer(),
    "learning_rates": lambda ds: ds.ho.learning_rates(),
    "learning_rates ridge": lambda ds: ds.ho.learning_rates("ridge", 0.3),
    "learning_rates r": lambda ds: ds.ho.learning_rates("r", 0.3),
    "learning_rates cubic": lambda ds: ds.ho.learning_rates("cubic"),
    "taylor_step": lambda ds: ds.ho.taylor_step(),
    "inverse": lambda ds: ds.ho.inverse(),
    "inverse cubic": lambda ds: ds.ho.inverse("cubic"),
    "scale_free": lambda ds: ds.ho.scale_free(),
    "blocks": lambda ds: ds.ho.blocks("inverse"),
    "merge": lambda ds: ds.ho.merge("layer"),
    "suggest_partition": lambda ds: ds.ho.suggest_partition(1),
    "taylor": lambda ds: ds.ho.taylor(-0.1),
    "taylor_terms": lambda ds: ds.ho.taylor_terms(-0.1),
    "interactions": lambda ds: ds.ho.interactions(),
    "triples": lambda ds: ds.ho.triples(distinct=False),
    "shares": lambda ds: ds.ho.shares(),
    "shares inverse": lambda ds: ds.ho.shares("inverse"),
    "spectrum": lambda ds: ds.ho.spectrum(),
    "curvature": lambda ds: ds.ho.curvature(),
    "flatness": lambda ds: along_weights(ds).ho.flatness(),
    "saliency": lambda ds: along_weights(ds).ho.saliency(),
    "reinitialization": lambda ds: ds.assign_attrs(direction="to:init").ho.reinitialization(),
    "laplace": lambda ds: along_weights(ds).ho.laplace(),
    "compare": lambda ds: ds.ho.compare(later(ds)),
    "differences": lambda ds: ds.ho.differences(later(ds)),
    "unsettled": lambda ds: ds.ho.unsettled(),
    "null_groups": lambda ds: ds.ho.null_groups(),
    "findings": lambda ds: ds.ho.findings(),
}
#: Verbs about the steps between checkpoints, which need directions of their own: tests of their modules.
ELSEWHERE = {"prediction", "path", "autopsy", "update_rule"}


def along_weights(ds: xr.Dataset) -> xr.Dataset:
    return ds.assign_attrs(direction="weights")


def test_every_verb_is_here():
    public = {name for name in vars(HoAccessor) if not name.startswith("_")} - {"plot"}
    assert public - ELSEWHERE == {name.split()[0] for name in VERBS}


def numbers(result: Any) -> dict[str, np.ndarray]:
    """All that a verb computed, by name: not the coordinates that it was given."""
    if isinstance(result, xr.Dataset | xr.DataArray):
        ds = result if isinstance(result, xr.Dataset) else result.to_dataset(name="value")
        own = [n for n in map(str, ds.variables) if n in ds.data_vars or n.endswith("_se")]
        return {n: np.asarray(ds[n].values) for n in own if ds[n].dtype.kind in "fiub"}
    if isinstance(result, pd.DataFrame):
        return {str(c): result[c].to_numpy() for c in result if result[c].dtype.kind in "fiub"}
    if hasattr(result, "path"):
        return {"kept": np.array([result.kept, result.kept_se, result.epsilon]), **numbers(result.path)}
    if isinstance(result, Mapping):
        return {f"{k} {n}": v for k, one in result.items() for n, v in numbers(one).items()}
    return {}


def words(result: Any) -> list[str]:
    """All texts of a result: labels, advice, sentences."""
    if isinstance(result, xr.Dataset | xr.DataArray):
        ds = result if isinstance(result, xr.Dataset) else result.to_dataset(name="value")
        return [str(w) for v in ds.variables.values() if v.dtype.kind not in "fiub" for w in np.ravel(v.values)]
    if isinstance(result, pd.DataFrame):
        return [str(w) for c in result if result[c].dtype.kind not in "fiub" for w in result[c]]
    if hasattr(result, "path"):
        return [*result, *(m for members in result.values() for m in members), result.status, *words(result.path)]
    if isinstance(result, Mapping):
        return [w for k, one in result.items() for w in (k, *words(one))]
    return [str(w) for w in result]


def same(found: Any, expected: Any, **tolerances: float) -> None:
    a, b = numbers(found), numbers(expected)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_allclose(a[name], b[name], **{"rtol": 1e-9, "atol": 1e-12, **tolerances}, err_msg=name)


STRANGE = ['<img src=x onerror="alert(1)">', "\u6f22\u5b57 \u00e9\u202e", "a.b/c[0] {{x}} $y$", "\\n'it\u2019s'\n"]


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("steps", [None, 2])
def test_labels_are_data(verb, steps):
    ds = plain(steps=steps)
    labels = ds.group.values.tolist()
    other = ds.assign_coords({dim: STRANGE for dim in ("group", "group2", "group3")})
    found, expected = VERBS[verb](other), VERBS[verb](ds)
    same(found, expected)
    before = words(expected)
    for label, strange in zip(labels, STRANGE, strict=True):
        before = [text.replace(repr(label), repr(strange)).replace(label, strange) for text in before]
    assert sorted(words(found)) == sorted(before)
    if verb not in ("taylor", "taylor_terms", "merge", "spectrum", "shares", "shares inverse", "curvature", "findings"):
        assert any(label in text for label in STRANGE for text in words(found))


@pytest.mark.parametrize("verb", VERBS)
def test_a_series_of_one_step_is_its_checkpoint(verb):
    ds = plain(steps=1)
    found, expected = VERBS[verb](ds), VERBS[verb](ds.isel(step=0))
    a, b = numbers(found), numbers(expected)
    b.pop("step", None)
    for name in b:
        np.testing.assert_allclose(np.squeeze(a[name]), np.squeeze(b[name]), rtol=1e-12, err_msg=name)
    if verb == "findings":
        assert found == expected
    if "status" in getattr(found, "data_vars", ()):
        assert found.status.values.tolist() == [expected.status.item()]


def with_a_gap() -> xr.Dataset:
    ds = plain(steps=3)
    for name in map(str, ds.data_vars):
        if "step" in ds[name].dims:
            ds[name][1] = np.nan
    norm = ds.direction_norm.values.copy()
    norm[1] = np.nan
    return ds.assign_coords(direction_norm=(("step", "group"), norm))


@pytest.mark.parametrize("verb", VERBS)
def test_a_checkpoint_that_is_not_computed_is_a_gap(verb):
    ds = with_a_gap()
    if verb == "findings":
        (first, *_) = ds.ho.findings()
        assert "1 of 3 checkpoints are not computed: steps '10'" in first
        return
    found, alone = VERBS[verb](ds), VERBS[verb](ds.isel(step=[0, 2]))
    if verb in ("interactions", "triples", "unsettled", "suggest_partition"):
        same(found, alone)
        return
    if verb == "differences":
        known = found[found.significance.notna()].reset_index(drop=True)
        same(known, alone[alone.significance.notna()].reset_index(drop=True))
        assert not (found.step == 10)[found.difference.notna()].any()
        return
    parts = found if isinstance(found, dict) else {"": found}
    rest = alone if isinstance(alone, dict) else {"": alone}
    for key, one in parts.items():
        same(one.isel(step=[0, 2]), rest[key])
        gap = numbers(one.isel(step=1))
        if verb == "null_groups":
            assert not gap["value"].any()
            continue
        counts = {"negative", "negative_clear", "scale_invariant", "critical"}
        assert all(np.isnan(v).all() for name, v in gap.items() if name not in counts), gap
    if "status" in getattr(found, "data_vars", ()):
        text = str(found.status.values[1])
        assert "not computed" in text or "no standard errors to judge" in text


NULL = {
    "regularizer", "learning_rates", "learning_rates ridge", "learning_rates r", "learning_rates cubic", "taylor_step",
    "inverse", "inverse cubic", "scale_free", "shares", "shares inverse", "curvature", "spectrum", "flatness",
    "saliency",
}  # fmt: skip


def a_null_group() -> xr.Dataset:
    """layer0.bias has a direction of rounding noise, at every order and in every block."""
    ds = plain()
    c = np.array([1.0, 1e-20, 1.0, 1.0])
    for d in (1, 2, 3):
        for name in (f"D{d}", f"D{d}_se", f"D{d}_batch"):
            values = ds[name].values
            for axis in range(values.ndim - d, values.ndim):
                values = values * c.reshape([-1 if i == axis else 1 for i in range(values.ndim)])
            ds[name] = ds[name].copy(data=values)
    return ds


@pytest.mark.parametrize("verb", sorted(NULL))
def test_a_group_without_effect_is_not_there(verb):
    ds, keep = a_null_group(), [0, 2, 3]
    without = ds.isel({dim: keep for dim in ("group", "group2", "group3")})
    found, expected = VERBS[verb](ds), VERBS[verb](without)
    if verb == "spectrum":
        np.testing.assert_allclose(found.values[:3], expected.values, rtol=1e-9)
        assert np.isnan(found.values[3])
        return
    dims = {dim: keep for dim in found.dims if str(dim).startswith("group")}
    same(found.isel(dims), expected)
    assert ds.ho.null_groups().values.tolist() == [False, True, False, False]
    if "status" in getattr(found, "data_vars", ()) and verb not in ("curvature",):
        assert "'layer0.bias'" in found.status.item()
    if verb.startswith("learning_rates"):
        assert np.isnan(found.learning_rates.values[1])


def test_a_group_without_effect_is_left_out_of_rankings():
    ds = a_null_group()
    for frame in (ds.ho.interactions(), ds.ho.triples(distinct=False), ds.ho.unsettled()):
        groups = {g for c in frame if str(c).startswith("group") for g in frame[c]}
        assert "layer0.bias" not in groups
    assert {tuple(m) for m in ds.ho.suggest_partition(3).values()} >= {("layer0.weight", "layer0.bias")}
    assert any("'layer0.bias' have no effect" in sentence for sentence in ds.ho.findings())


@cache
def one_group() -> dict[str, tuple[Any, Any]]:
    """What each verb says about one group, and the same from its scalars."""
    ds = merge(plain(), 1)
    g, h, t = float(ds.D1.values[0]), float(ds.D2.values[0, 0]), float(ds.D3.values[0, 0, 0])
    norm, r = float(ds.direction_norm.values[0]), abs(t) ** (2 / 3)
    sigma = (np.sqrt(h**2 + 2 * np.sqrt(r) * r * abs(g)) - h) / (
        2 * r
    )  # of (h + s r) eta = g with s = sqrt(r) |eta| / 2
    weights, along, rate = along_weights(ds).ho, ds.ho, g / h
    rows = along.differences(later(ds)).set_index("quantity")
    return {
        "regularizer": (along.regularizer().values, r),
        "learning_rates": (along.learning_rates().learning_rates.values, rate),
        "learning_rates ridge": (along.learning_rates("ridge", 0.3).learning_rates.values, g / (h + 0.3 * abs(h))),
        "learning_rates r": (along.learning_rates("r", 0.3).learning_rates.values, g / (h + 0.3 * r)),
        "learning_rates cubic": (along.learning_rates("cubic").learning_rates.values, g / (h + sigma * r)),
        "taylor_step": (along.taylor_step(share=1.0).learning_rates.values, (h - np.sqrt(h**2 - 2 * g * t)) / t),
        "inverse": (along.inverse().values, 1 / h),
        "inverse cubic": (along.inverse("cubic").values, 1 / (h + sigma * r)),
        "scale_free": (along.scale_free().values, np.sign(h)),
        "blocks": (next(iter(along.blocks("inverse").values())).values, 1 / h),
        "merge": (along.merge("layer").D3.values, t),
        "suggest_partition": (along.suggest_partition(1).kept, 1.0),
        "taylor": (along.taylor(-rate).values, -g * rate + h * rate**2 / 2 - t * rate**3 / 6),
        "taylor_terms": (along.taylor_terms(-rate).values, [-g * rate, h * rate**2 / 2, -t * rate**3 / 6]),
        "interactions": (len(along.interactions()), 0),
        "triples": (along.triples(distinct=False).scale_free, t / abs(h) ** 1.5),
        "shares": ([along.shares()[n].item() for n in ("off_diagonal", "off_block")], 0.0),
        "shares inverse": ([along.shares("inverse")[n].item() for n in ("off_diagonal", "off_block_raw")], 0.0),
        "spectrum": (along.spectrum().values, h / norm**2),
        "curvature": ([along.curvature()[n].item() for n in ("largest", "smallest")], h / norm**2),
        "flatness": ([weights.flatness()[n].item() for n in ("sharpness", "total", "joint", "largest")], h),
        "saliency": ([weights.saliency()[n].item() for n in ("obd", "obs")], g + h / 2),
        "reinitialization": (
            ds.assign_attrs(direction="to:init").ho.reinitialization().predicted.values,
            np.array([[g], [g + h / 2], [g + h / 2 + t / 6]]).ravel(),
        ),
        "laplace": (weights.laplace().covariance.values, 1 / (128 * h + norm**2)),
        "compare": (along.compare(later(ds)).D2.values, 0.25 * h),
        "differences": (rows.difference[["D1", "D2", "D3"]], np.array([g, h, t]) / 4),
        "unsettled": (len(along.unsettled()), 0),
        "null_groups": (along.null_groups().values, False),
    }  # fmt: skip


@pytest.mark.parametrize("verb", VERBS)
def test_one_group_is_a_scalar(verb):
    ds = merge(plain(), 1)
    if verb == "findings":
        assert ds.ho.findings()[0].startswith("The loss is ")
        assert not any("interact most" in sentence for sentence in ds.ho.findings())
        return
    found, expected = one_group()[verb]
    np.testing.assert_allclose(np.ravel(found), np.broadcast_to(expected, np.ravel(found).shape), rtol=1e-9)
    single = merge(plain(steps=2), 1).isel(step=[0])
    assert VERBS[verb](single) is not None


def a_missing_entry() -> xr.Dataset:
    ds = plain()
    ds.D2[0, 1] = ds.D2[1, 0] = np.nan
    return ds


ALL_NAN = {
    "learning_rates": ("learning_rates", "missing entries"),
    "learning_rates ridge": ("learning_rates", "missing entries"),
    "learning_rates r": ("learning_rates", "missing entries"),
    "learning_rates cubic": ("learning_rates", "missing entries"),
    "taylor_step": ("learning_rates", "missing entries"),
    "inverse": (None, ""),
    "spectrum": (None, ""),
    "taylor": (None, ""),
    "curvature": ("condition", "entries of D2 are missing"),
    "laplace": ("covariance", "entries of D2 are missing"),
    "flatness": ("total", ""),
}


@pytest.mark.parametrize("verb", ALL_NAN)
def test_what_a_missing_entry_leaves_unknown(verb):
    name, text = ALL_NAN[verb]
    found = VERBS[verb](a_missing_entry())
    assert np.isnan((found if name is None else found[name]).values).all()
    if text:
        assert text in found.status.item()


def test_what_a_missing_entry_leaves_known():
    ds, whole = a_missing_entry(), plain()
    free, expected = ds.ho.scale_free().values, whole.ho.scale_free().values.copy()
    expected[0, 1] = expected[1, 0] = np.nan
    np.testing.assert_allclose(free, expected)
    pairs, others = ds.ho.interactions(), whole.ho.interactions()
    gone = (others.group == "layer0.weight") & (others.group2 == "layer0.bias")
    assert pairs.group.tolist() == others[~gone].group.tolist()
    np.testing.assert_allclose(pairs.scale_free, others[~gone].scale_free)
    same(ds.ho.triples(), whole.ho.triples())
    same(ds.ho.regularizer(), whole.ho.regularizer())
    merged = ds.ho.merge("layer")
    assert np.isnan(merged.D2.values).tolist() == [[True, False], [False, False]]
    np.testing.assert_allclose(merged.D2.values[1], whole.ho.merge("layer").D2.values[1])
    obd, obs = (along_weights(ds).ho.saliency()[n].values for n in ("obd", "obs"))
    np.testing.assert_allclose(obd, along_weights(whole).ho.saliency().obd.values)
    assert np.isnan(obs).tolist() == [True, True, True, True]
    np.testing.assert_allclose(along_weights(ds).ho.flatness().sharpness.values, np.diag(whole.D2.values))
    change = ds.ho.compare(later(whole)).D2.values
    assert np.isnan(change).sum() == 2
    np.testing.assert_allclose(change[2:], 0.25 * whole.D2.values[2:])
    open_, others = (one.ho.unsettled()[lambda f: f.quantity != "learning_rates"] for one in (ds, whole))
    gone = (others.quantity == "D2") & (others.group == "layer0.weight") & (others.group2 == "layer0.bias")
    same(open_, others[~gone])
    assert ds.ho.findings()[0] == whole.ho.findings()[0]
    with pytest.raises(ArgumentError, match="not numbers"):
        ds.ho.suggest_partition(2)


def test_nothing_computed_is_said_by_a_suggestion():
    with pytest.raises(HoError, match="not computed"):
        VERBS["suggest_partition"](nothing())


def nothing() -> xr.Dataset:
    ds = plain(steps=2).map(lambda a: a * np.nan, keep_attrs=True)
    return ds.assign_coords(direction_norm=ds.direction_norm * np.nan)


@pytest.mark.parametrize("verb", [v for v in VERBS if v != "suggest_partition"])
def test_nothing_computed_is_said(verb):
    found = VERBS[verb](nothing())
    if verb == "findings":
        assert found == ["None of 2 checkpoints is computed yet."]
    elif verb == "null_groups":
        assert not found.values.any()
    elif isinstance(found, pd.DataFrame):
        assert found.empty or found.difference.isna().all()
    else:
        counts = {"negative", "negative_clear", "scale_invariant", "critical"}
        assert all(np.isnan(v).all() for name, v in numbers(found).items() if name not in counts)
    if "status" in getattr(found, "data_vars", ()) and verb != "compare":
        assert all("not computed" in text for text in found.status.values)


def test_the_null_group_of_the_steps_is_the_same_kind():
    """The two makers of null groups agree on what they make."""
    assert with_null_group().ho.null_groups().values.tolist() == a_null_group().ho.null_groups().values.tolist()
