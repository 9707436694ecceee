"""Suggested partitions against systems merged and solved anew, and against every partition of a few groups."""

import itertools

import numpy as np
import pytest
import xarray as xr

from hoanalysis.analysis.coarsen import kept_share, suggest_partition
from hoanalysis.analysis.example import example
from hoanalysis.analysis.merge import merge
from hoanalysis.errors import ArgumentError, SchemaError

from .test_steps import with_null_group


def gain(h, g, groups):
    """g'H^-1 g / 2 of the system with one rate per group, from its definition."""
    onto = np.array([[float(i in group) for group in groups] for i in range(len(g))])
    return np.linalg.solve(onto.T @ h @ onto, onto.T @ g) @ onto.T @ g / 2


def greedy(h, g, n):
    groups = [[i] for i in range(len(g))]
    while len(groups) > n:
        options = []
        for a, b in itertools.combinations(range(len(groups)), 2):
            rest = [group for i, group in enumerate(groups) if i not in (a, b)]
            options.append((gain(h, g, [*rest, groups[a] + groups[b]]), [*rest, groups[a] + groups[b]]))
        groups = max(options, key=lambda option: option[0])[1]
    return {tuple(sorted(group)) for group in groups}


def partitions(items):
    if not items:
        yield []
        return
    first, *rest = items
    for smaller in partitions(rest):
        yield [[first], *smaller]
        for i, group in enumerate(smaller):
            yield [*smaller[:i], [first, *group], *smaller[i + 1 :]]


def indices(ds, suggestion):
    labels = ds.group.values.tolist()
    return {tuple(labels.index(old) for old in members) for members in suggestion.values()}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("n", [1, 3, 6])
def test_it_is_the_greedy_merging_by_brute_force(seed, n):
    ds = example(seed, layers=4, order=2)
    h, g = ds.D2.values, ds.D1.values
    found = suggest_partition(ds, n)
    assert indices(ds, found) == greedy(h, g, n)
    whole = gain(h, g, [[i] for i in range(8)])
    np.testing.assert_allclose(found.kept, gain(h, g, indices(ds, found)) / whole, rtol=1e-9)
    assert found.path.groups.tolist() == list(range(8, n - 1, -1))
    for row in found.path.itertuples():
        np.testing.assert_allclose(row.kept, gain(h, g, greedy(h, g, row.groups)) / whole, rtol=1e-9)
    assert found.epsilon == 0
    assert found.status.startswith("ok")


@pytest.mark.parametrize("seed", range(3))
def test_no_partition_of_a_few_groups_is_better_by_much(seed):
    ds = example(seed, layers=3, order=2)
    h, g = ds.D2.values, ds.D1.values
    whole = gain(h, g, [[i] for i in range(6)])
    for n in range(1, 7):
        best = max(gain(h, g, groups) for groups in partitions(list(range(6))) if len(groups) == n) / whole
        kept = suggest_partition(ds, n).kept
        assert kept <= best + 1e-12
        assert kept >= 0.9 * best
        if n in (1, 5, 6):  # one merge, none, or all: greedy is exact
            np.testing.assert_allclose(kept, best, rtol=1e-9)


def test_merge_takes_it_and_gains_what_it_says():
    ds = example(3, layers=3)
    found = suggest_partition(ds, 3)
    merged = merge(ds, found)
    assert merged.group.values.tolist() == list(found)
    shares = [one.D1.values @ np.linalg.solve(one.D2.values, one.D1.values) for one in (merged, ds)]
    np.testing.assert_allclose(found.kept, shares[0] / shares[1], rtol=1e-9)
    w, total, n, squares = ds.weight.values, ds.weight.values.sum(), ds.sizes["batch"], 0.0
    for b in range(n):
        keep = np.arange(n) != b
        g, h, g2, h2 = (one[f"D{d}_batch"].values[keep].sum(0) / w[keep].sum() for one in (merged, ds) for d in (1, 2))
        share = (g @ np.linalg.solve(h, g)) / (g2 @ np.linalg.solve(h2, g2))
        squares = squares + ((total - w[b]) / total * (share - found.kept)) ** 2
    np.testing.assert_allclose(found.kept_se, np.sqrt(n / (n - 1) * squares), rtol=1e-6)
    assert np.isnan(suggest_partition(ds.drop_vars("D2_batch"), 3).kept_se)


def test_what_a_given_partition_keeps():
    ds = example(3, layers=3, order=2)
    h, g = ds.D2.values, ds.D1.values
    whole = gain(h, g, [[i] for i in range(6)])
    for by, groups in [("layer", [[0, 1], [2, 3], [4, 5]]), ("kind", [[0, 2, 4], [1, 3, 5]]), (1, [list(range(6))])]:
        np.testing.assert_allclose(kept_share(ds, by)[0], gain(h, g, groups) / whole, rtol=1e-9)
    np.testing.assert_allclose(kept_share(ds, suggest_partition(ds, 2))[0], suggest_partition(ds, 2).kept, rtol=1e-12)


def test_a_torch_partition_takes_it_too():
    torch = pytest.importorskip("torch")
    from hoanalysis.partitions import Partition

    model = torch.nn.Sequential(torch.nn.Linear(3, 1), torch.nn.Linear(1, 1))
    partition = Partition.canonical(model)
    ds = example().assign_coords({dim: list(partition.labels) for dim in ("group", "group2", "group3")})
    found = suggest_partition(ds, 2)
    assert list(partition.merge(found).labels) == merge(ds, found).group.values.tolist()


def test_many_groups_do_not_drift():
    rng, size = np.random.default_rng(0), 150
    root = rng.normal(size=(size, size))
    h, g = root @ root.T / size + 0.01 * np.eye(size), rng.normal(size=size)
    names = [f"g{i}" for i in range(size)]
    ds = xr.Dataset({"D1": ("group", g), "D2": (("group", "group2"), h)}, coords={"group": names, "group2": names})
    found = suggest_partition(ds, 20)
    np.testing.assert_allclose(found.path.kept.iloc[-1], found.kept, rtol=1e-9)
    np.testing.assert_allclose(
        found.kept, gain(h, g, indices(ds, found)) / gain(h, g, [[i] for i in range(size)]), rtol=1e-8
    )


def test_one_partition_serves_a_series():
    ds = example(2, layers=3, steps=3, order=2)
    found = suggest_partition(ds, 5)
    shares = {}
    for pair in itertools.combinations(range(6), 2):
        groups = [list(pair), *([i] for i in range(6) if i not in pair)]
        kept = []
        for k in range(3):
            h, g = ds.D2.values[k], ds.D1.values[k]
            kept.append(gain(h, g, groups) / gain(h, g, [[i] for i in range(6)]))
        shares[pair] = np.mean(kept)
    best = max(shares, key=shares.get)
    assert best in indices(ds, found)
    np.testing.assert_allclose(found.kept, shares[best], rtol=1e-9)
    for name in ("D1", "D2"):
        ds[name][1] = np.nan
    alone = suggest_partition(ds.isel(step=[0, 2]), 3)
    assert suggest_partition(ds, 3) == alone


def test_groups_with_equal_rates_cost_nothing():
    h = np.array([[2.0, 0.3, 0.1], [0.3, 1.0, 0.2], [0.1, 0.2, 3.0]])
    ds = xr.Dataset(
        {"D1": ("group", h @ [0.5, 0.7, 0.5]), "D2": (("group", "group2"), h)},
        coords={"group": list("abc"), "group2": list("abc")},
    )
    found = suggest_partition(ds, 2)
    assert dict(found) == {"a + c": ["a", "c"], "b": ["b"]}
    np.testing.assert_allclose(found.kept, 1, rtol=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_within_a_coordinate(seed):
    ds = example(seed, layers=4, order=2)
    for n in range(2, 8):
        found = suggest_partition(ds, n, within="kind")
        assert len(found) == n
        assert all(len({m.rsplit(".", 1)[1] for m in members}) == 1 for members in found.values())
    with pytest.raises(ArgumentError, match="no two of the 2 groups left"):
        suggest_partition(ds, 1, within="kind")
    with pytest.raises(ArgumentError, match="did you mean 'kind'"):
        suggest_partition(ds, 2, within="kinds")


def test_null_groups_join_their_layer_and_others_stay_alone():
    ds = with_null_group()
    found = suggest_partition(ds, 2)
    (members,) = [m for m in found.values() if "layer0.bias" in m]
    assert "layer0.weight" in members
    assert "null groups: 'layer0.bias'" in found.status
    keep = [0, 2, 3]
    h, g = ds.D2.values[np.ix_(keep, keep)], ds.D1.values[keep]
    best = max(gain(h, g, p) for p in partitions([0, 1, 2]) if len(p) == 2) / gain(h, g, [[0], [1], [2]])
    np.testing.assert_allclose(found.kept, best, rtol=1e-9)
    assert len(suggest_partition(ds, 4)) == 3
    flat = example(order=2)
    flat.D2[1, :] = flat.D2[:, 1] = 0.0
    found = suggest_partition(flat, 2)
    assert found["layer0.bias"] == ["layer0.bias"]
    assert "alone: 'layer0.bias'" in found.status
    with pytest.raises(ArgumentError, match="from 2 to 4"):
        suggest_partition(flat, 1)


def test_an_indefinite_matrix_is_repaired_and_said():
    ds = example(1, layers=3, order=2)
    ds.D2[0, 0] = -1.0
    found = suggest_partition(ds, 3)
    size = np.sqrt(np.abs(np.diag(ds.D2.values)))
    lowest = np.linalg.eigvalsh(ds.D2.values / np.outer(size, size))[0]
    np.testing.assert_allclose(found.epsilon, -2 * lowest, rtol=1e-12)
    assert "indefinite" in found.status
    h = ds.D2.values + found.epsilon * np.diag(size**2)
    assert indices(ds, found) == greedy(h, ds.D1.values, 3)
    given = suggest_partition(ds, 3, epsilon=5.0)
    assert given.epsilon == 5
    assert "indefinite" not in given.status


def test_names_stay_apart():
    labels = ["a", "b", "a + b", "c"]
    rates = [1.0, 1.0, 5.0, 9.0]
    h = np.diag([1.0, 2.0, 3.0, 4.0])
    ds = xr.Dataset(
        {"D1": ("group", h @ rates), "D2": (("group", "group2"), h)}, coords={"group": labels, "group2": labels}
    )
    found = suggest_partition(ds, 3)
    assert dict(found) == {"a + b (merged)": ["a", "b"], "a + b": ["a + b"], "c": ["c"]}
    assert "a + 3 more" in suggest_partition(ds, 1)


def test_arguments():
    ds = example(order=2)
    for n in (0, 5, 2.5, True):
        with pytest.raises(ArgumentError, match="from 1 to 4"):
            suggest_partition(ds, n)
    with pytest.raises(SchemaError, match="needs D2"):
        suggest_partition(ds.drop_vars("D2"), 2)
    with pytest.raises(ArgumentError, match="not computed"):
        suggest_partition(ds.map(lambda a: a * np.nan), 2)
    ds.D2[0, 1] = ds.D2[1, 0] = np.nan
    with pytest.raises(ArgumentError, match="not numbers"):
        suggest_partition(ds, 2)
    assert dict(suggest_partition(example(layers=1, order=2), 2)) == {
        "layer0.weight": ["layer0.weight"],
        "layer0.bias": ["layer0.bias"],
    }
