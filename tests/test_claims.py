"""The statistics behind the claims against calculations of their own, and the rules of the verdicts."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from scipy import stats

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))


def module(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


claims, measuring = module("claims"), module("measuring")
LAYERS, BLOCKS = 6, 9


@pytest.fixture(scope="module")
def one():
    """Twelve groups in six layers, nine blocks of unequal weight; layer 0 and layer 5 hardly act with the others."""
    rng = np.random.default_rng(0)
    root = rng.normal(size=(BLOCKS, 12, 40))
    h = np.einsum("bik,bjk->bij", root, root) / 40 + 0.3
    scale = np.exp(rng.normal(size=12) * 3)  # the tensors' scales are far apart
    h *= np.outer(scale, scale)
    weight = rng.uniform(1, 2, size=BLOCKS)
    total = np.einsum("b,bij->ij", weight, h) / weight.sum()
    labels = [f"l{i}.{k}" for i in range(LAYERS) for k in ("weight", "bias")]
    pair = ("group", "group2")
    return xr.Dataset(
        {
            "loss": 1.0,
            "D1": ("group", scale),
            "D2": (pair, total),
            "D2_se": (pair, np.abs(total) * rng.choice([0.1, 0.9], size=(12, 12))),
            "D1_batch": (("batch", "group"), np.outer(weight, scale)),
            "D2_batch": (("batch", *pair), weight[:, None, None] * h),
            "weight": ("batch", weight),
        },
        {
            "group": labels,
            "group2": labels,
            "layer": ("group", [g.split(".")[0] for g in labels]),
            "kind": ("group", [g.split(".")[1] for g in labels]),
            "direction_norm": ("group", scale),
        },
    )


def free(h, matrix):
    a = np.linalg.inv(h) if matrix == "inverse" else h
    return [[abs(a[i, j]) / abs(a[i, i] * a[j, j]) ** 0.5 for j in range(12)] for i in range(12)]


def by_hand(h, se, statistic, matrix):
    """The statistics by loops over pairs of numbered groups; group g is in layer g // 2, even ones are weights."""
    c = free(h, matrix)
    pairs = [(i, j) for i in range(12) for j in range(12) if i // 2 != j // 2]
    if statistic == "off_block":
        return sum(c[i][j] for i, j in pairs) / sum(map(sum, c))
    if statistic == "off_block_ratio":
        return by_hand(h, se, "off_block", "inverse") / by_hand(h, se, "off_block", "H")
    if statistic == "density":
        upper = [(i, j) for i in range(12) for j in range(12) if i < j]
        return sum(c[i][j] >= 0.05 and abs(ORIGINAL[0][i, j]) > 2 * se[i, j] for i, j in upper) / len(upper)
    if statistic == "last_five":
        inside = [(i, j) for i, j in pairs if i // 2 >= 1 and j // 2 >= 1]
        outside = [p for p in pairs if p not in inside]
        return np.mean([c[i][j] for i, j in inside]) / np.mean([c[i][j] for i, j in outside])
    first = {"fifth_last_with_last": 2, "first_with_last": 0}[statistic]
    return c[first][10] / np.mean([c[i][j] for i, j in pairs])


ORIGINAL = []


@pytest.mark.parametrize("matrix", ["H", "inverse"])
@pytest.mark.parametrize("statistic", list(claims.STATISTICS))
def test_a_statistic_and_its_interval_by_hand(one, statistic, matrix):
    h, se = one.D2.values, one.D2_se.values
    ORIGINAL[:] = [h]
    value, error, half = claims.measured(one, statistic, matrix)
    np.testing.assert_allclose(value, by_hand(h, se, statistic, matrix), rtol=1e-10)
    sums, w = one.D2_batch.values, one.weight.values
    without = [by_hand((sums.sum(0) - s) / (w.sum() - v), se, statistic, matrix) for s, v in zip(sums, w, strict=True)]
    squares = sum(((w.sum() - v) / w.sum() * (x - value)) ** 2 for x, v in zip(without, w, strict=True))
    np.testing.assert_allclose(error, np.sqrt(BLOCKS / (BLOCKS - 1) * squares), rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(half, error * stats.t(BLOCKS - 1).interval(0.95)[1], rtol=1e-12)


def test_statistics_do_not_change_when_tensors_are_rescaled(one):
    c = np.exp(np.random.default_rng(5).normal(size=12))
    scaled = one.assign(
        D2=one.D2 * np.outer(c, c), D2_se=one.D2_se * np.outer(c, c), D2_batch=one.D2_batch * np.outer(c, c)
    )
    for statistic in claims.STATISTICS:
        for matrix in ("H", "inverse"):
            before, after = (claims.measured(x, statistic, matrix) for x in (one, scaled))
            np.testing.assert_allclose(after, before, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize(
    ("value", "half", "holds", "fails", "expected"),
    [
        (0.6, 0.0, 0.5, 0.25, "holds"),
        (0.6, 0.2, 0.5, 0.25, "in part"),
        (0.4, 0.0, 0.5, 0.25, "in part"),
        (0.2, 0.01, 0.5, 0.25, "does not"),
        (0.2, 0.06, 0.5, 0.25, "in part"),
        (0.5, 0.0, 0.5, 0.25, "holds"),
        (0.7, 0.01, 0.75, 1.0, "holds"),
        (0.9, 0.0, 0.75, 1.0, "in part"),
        (1.1, 0.0, 0.75, 1.0, "does not"),
        (1.1, 0.2, 0.75, 1.0, "in part"),
        (1e-9, float("nan"), 1e-6, 1e-3, "holds"),
        (float("nan"), 0.0, 0.5, 0.25, "not measured"),
    ],
)
def test_the_rule_of_a_verdict(value, half, holds, fails, expected):
    assert claims.verdict(value, half, holds, fails) == expected


def test_a_claim_holds_where_all_of_its_cases_do(one):
    listed, cases = claims.claims()
    assert len({c["name"] for c in listed}) == len(listed)
    runs = {
        name: xr.concat([one.assign_coords(step=400 * e) for e in epochs], "step", coords="different", compat="equals")
        for name, epochs in {"lenet5-cifar10": (1, 21), "vgg11-cifar10": (1, 6)}.items()
    }
    statistics = {c["statistic"] for c in listed if c["cases"] == ["property"]}
    properties = xr.Dataset({s: 1e-12 for s in statistics}, attrs={"repeats": 5})
    properties["cauchy"], properties["newton"] = 1e-4, 1.0
    rows = claims.table(runs, properties)
    assert len(rows) == sum(len(cases.get(n, [n])) for c in listed for n in c["cases"])
    for row in rows.itertuples():
        assert row.verdict == claims.verdict(row.value, row.half, row.holds, row.fails)
    summed = claims.summary(rows)
    assert summed.verdict[["cauchy", "newton", "invariance"]].tolist() == ["in part", "does not", "holds"]
    assert (summed[list(claims.VERDICTS)].sum(axis=1) == rows.groupby("name", sort=False).size()).all()
    only = claims.table(runs, substitute={"lenet5-cifar10": "lenet5-cifar10"})
    assert set(only.case) == {"lenet5-cifar10@1", "lenet5-cifar10@21"}
    assert claims.together(["holds", "does not"]) == "in part"


def test_an_exponent_and_its_error_are_those_of_a_regression():
    rng = np.random.default_rng(0)
    x = np.array([10.0, 20, 50, 100, 300])
    y = 3 * x**1.7 * np.exp(0.1 * rng.normal(size=5))
    slope, error = measuring.exponent(x, y)
    fit = stats.linregress(np.log(x), np.log(y))
    np.testing.assert_allclose([slope, error], [fit.slope, fit.stderr], rtol=1e-10)
    assert np.isnan(measuring.exponent(x[:2], y[:2])).all()
    with_gaps = measuring.exponent(np.append(x, 1e3), np.append(y, np.nan))
    np.testing.assert_allclose(with_gaps, [slope, error])
