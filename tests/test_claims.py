"""The statistics behind the claims against calculations of their own, and the rules of the verdicts."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pandas as pd
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
@pytest.mark.parametrize("statistic", [s for s in claims.STATISTICS if s != "density"])
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


def jackknifed_pairs(one, matrix):
    """|C| of the pairs i < j and its jackknife error, by loops."""
    sums, w = one.D2_batch.values, one.weight.values
    pairs = [(i, j) for i in range(12) for j in range(12) if i < j]
    c = free(one.D2.values, matrix)
    without = [free((sums.sum(0) - s) / (w.sum() - v), matrix) for s, v in zip(sums, w, strict=True)]
    squares = [
        sum(((w.sum() - v) / w.sum() * (x[i][j] - c[i][j])) ** 2 for x, v in zip(without, w, strict=True))
        for i, j in pairs
    ]
    return pairs, [c[i][j] for i, j in pairs], [np.sqrt(BLOCKS / (BLOCKS - 1) * q) for q in squares]


@pytest.mark.parametrize("matrix", ["H", "inverse"])
def test_the_density_counts_pairs_and_says_how_many_of_them_are_undecided(one, matrix):
    ORIGINAL[:] = [one.D2.values]
    pairs, size, error = jackknifed_pairs(one, matrix)
    sure = [abs(one.D2.values[p]) > 2 * one.D2_se.values[p] for p in pairs]
    least = sum(s and c - 2 * e >= 0.05 for s, c, e in zip(sure, size, error, strict=True))
    most = sum(c + 2 * e >= 0.05 for c, e in zip(size, error, strict=True))
    dense = sum(s and c >= 0.05 for s, c in zip(sure, size, strict=True))
    assert claims.counted(one, matrix) == (66, dense, least, most)
    assert 0 < least < most < 67
    value, error, half = claims.measured(one, "density", matrix)
    assert value == pytest.approx(by_hand(one.D2.values, one.D2_se.values, "density", matrix))
    assert np.isnan(error)
    assert half == pytest.approx(max(dense - least, most - dense) / 66)
    assert np.isnan(claims.measured(one.drop_vars(["D2_batch"]), "density", matrix)[2])


@pytest.mark.parametrize("matrix", ["H", "inverse"])
def test_a_baseline_is_that_of_independent_random_matrices(one, matrix):
    equal, mean, low, high = claims.baselines(one, "off_block", matrix)
    assert equal == pytest.approx(1 - 6 * 4 / 144)
    made = stats.wishart(12, np.eye(12)).rvs(400, random_state=1)
    found = [by_hand(h, None, "off_block", matrix) for h in made]
    np.testing.assert_allclose(mean, np.mean(found), atol=5 * np.std(found) / 200**0.5)
    np.testing.assert_allclose([low, high], np.percentile(found, [2.5, 97.5]), atol=0.02)
    assert np.std(found) < 0.05
    dense = claims.baselines(one, "density", "H")
    assert dense[0] == 1
    assert dense[1] == pytest.approx(1 - 2 * _tail(12), abs=0.02)


def _tail(n):
    """P(0 < r < 0.05) of the correlation, about 0 without centring, of two independent normal n-vectors."""
    beta = stats.beta(0.5, (n - 1) / 2)
    return float(beta.cdf(0.05**2)) / 2


def test_the_least_eigenvalue_and_its_error(one):
    value, error = claims.least_eigenvalue(one)

    def least(h):
        d = np.sqrt(np.abs(np.diag(h)))
        return np.linalg.eigvalsh(h / np.outer(d, d))[0]

    assert value == pytest.approx(least(one.D2.values))
    sums, w = one.D2_batch.values, one.weight.values
    without = [least((sums.sum(0) - s) / (w.sum() - v)) for s, v in zip(sums, w, strict=True)]
    squares = sum(((w.sum() - v) / w.sum() * (x - value)) ** 2 for x, v in zip(without, w, strict=True))
    assert error == pytest.approx(np.sqrt(BLOCKS / (BLOCKS - 1) * squares))
    series = xr.concat([one.assign_coords(step=0), one.assign(D2=-one.D2).assign_coords(step=400)], "step")
    series["D2_batch"] = series.D2_batch * xr.DataArray([1.0, -1.0], dims="step")
    assert claims.indefinite(series) == [1]


@pytest.mark.parametrize(
    ("value", "half", "expected"),
    [
        (0.7, 0.1, "decided"),
        (0.55, 0.1, "not decided by the data"),
        (0.4, 0.2, "not decided by the data"),
        (0.39, 0.1, "'holds' is excluded"),
        (0.2, 0.1, "'holds' is excluded"),
        (0.1, 0.1, "decided"),
        (0.7, float("nan"), "value alone, no error"),
    ],
)
def test_in_part_says_whether_the_data_decide(value, half, expected):
    assert claims.decided(value, half, 0.5, 0.25) == expected
    assert claims.decided(-value, half, -0.5, -0.25) == expected


def test_a_verdict_that_moves_is_marked_with_how_often_it_stays():
    names = ["name", "place"]
    places = pd.DataFrame(
        {"holds": [2, 4, 3], "in part": [4, 0, 0], "does not": [0, 0, 0]},
        pd.MultiIndex.from_tuples([("a", "other epochs"), ("a", "tanh"), ("b", "tanh")], names=names),
    )
    assert claims.moves("a", "holds", places) == "other epochs 2 of 6, tanh 4 of 4"
    assert claims.moves("b", "holds", places) == ""
    assert claims.moves("c", "holds", places) == ""


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
    late = claims.post_hoc()
    assert len(rows) == sum(len(cases.get(n, [n])) for c in listed + late for n in c["cases"])
    assert rows["post hoc"].sum() == 4
    rules = {c["name"]: c for c in listed}
    for ours, rule in (("inverse-blocks-rough-lenet", "-rough-vgg"), ("inverse-blocks-better-vgg", "-better-lenet")):
        (found,), borrowed = [c for c in late if c["name"] == ours], rules[f"inverse-blocks{rule}"]
        assert all(found[k] == borrowed[k] for k in ("statistic", "matrix", "holds", "fails", "formula"))
        assert found["cases"] != borrowed["cases"]
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


def test_table_1_has_no_exponent_from_three_sizes_nor_of_noise():
    size = np.array([10.0, 20, 40, 80, 160])
    time = np.stack([size**2, np.where(size < 80, size, np.nan)], axis=1)[:, :, None]
    held = np.stack([size * 1e5, size * 2e4], axis=1)[:, :, None]  # 1 to 16 MB, and 0.2 to 3.2 MB
    dims = ("network_P", "method", "order")
    ds = xr.Dataset(
        {"seconds_P": (dims, time), "bytes_P": (dims, held), "entries_P": (dims, np.ones((5, 2, 1)))},
        {"method": ["full", "Taylor"], "order": [1], "P_P": ("network_P", size), "S_P": ("network_P", size)},
    )
    ds = xr.merge([ds, ds.rename({n: f"{str(n)[:-1]}S" for n in (*ds.data_vars, "P_P", "S_P", "network_P")})])
    found = measuring.exponents(ds)
    assert found.loc[("full", 1), "seconds ~ P"] == "2.00 ± 0.00; 2.00 [1]"
    assert found.loc[("Taylor", 1), "seconds ~ P"] == "- [1]"  # three sizes
    assert found.loc[("full", 1), "bytes ~ P"] == "1.00 ± 0.00; 1.00 [1]"
    assert found.loc[("Taylor", 1), "bytes ~ P"] == "- [1]"  # two above the noise, where anything was computed
    assert measuring.away(ds, "seconds", "P") == ([], ["full 1"], 1)
