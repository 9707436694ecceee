"""Every entry that the explorer names has the value and the error that the Dataset holds for it."""

import re
from itertools import combinations_with_replacement

import numpy as np
import pytest
from numpy.testing import assert_allclose

import hoanalysis as ho
from hoanalysis.analysis.example import example
from hoanalysis.explorer import words
from hoanalysis.explorer.session import entry_name

STEP = 30


@pytest.fixture(scope="module")
def ds():
    return example(layers=3, size=3, steps=4)


def stored(ds, entry, step=STEP):
    """Value and error of an entry of D^(d) in the Dataset, d its number of labels."""
    at = dict(zip(("group", "group2", "group3"), entry, strict=False)) | {"step": step}
    name = f"D{len(entry)}"
    return ds[name].sel(at).item(), ds[f"{name}_se"].sel(at).item()


def entries_of(ds, u):
    """All pairs of groups with u, in the order of the groups."""
    return [(*pair, u) for pair in combinations_with_replacement(ds.group.values.tolist(), 2)]


def test_every_selected_entry_of_the_third_order_has_its_value_and_error(ds):
    for u in ds.group.values.tolist():
        entries = entries_of(ds, u)
        explorer = ho.explore(ds, state={"order": 3, "slices": [u], "entries": [list(e) for e in entries]})
        found = explorer.table()
        expected = np.array([stored(ds, e) for e in entries])
        assert found["entry"].tolist() == [entry_name(e) for e in entries]
        assert_allclose(found["value"], expected[:, 0], rtol=1e-12)
        assert_allclose(found["standard error"], expected[:, 1], rtol=1e-9)
        assert_allclose(found["value / error"], np.abs(expected[:, 0]) / expected[:, 1], rtol=1e-9)


def test_the_strongest_of_a_slice_and_those_that_are_offered_have_theirs(ds):
    for u in ds.group.values.tolist():
        explorer = ho.explore(ds, state={"order": 3, "slices": [u]})
        entries = entries_of(ds, u)
        expected = {entry_name(e): stored(ds, e) for e in entries}
        found = explorer.table(top=len(entries))
        assert sorted(found["entry"]) == sorted(expected)
        assert_allclose(found["value"], [expected[n][0] for n in found["entry"]], rtol=1e-12)
        assert_allclose(found["standard error"], [expected[n][1] for n in found["entry"]], rtol=1e-9)
        offered = words.choices(explorer.view)
        assert sorted(entry for _, entry in offered) == sorted(entries)
        for text, entry in offered:
            assert text == f"{entry_name(entry)}: {words.number(*expected[entry_name(entry)])}"
        strongest = max((e for e in entries if e[0] != e[1]), key=lambda e: abs(stored(ds, e)[0]))
        said = re.search(r"The strongest entry is (.*?)\. ", explorer.sentence).group(1)
        assert said == f"{entry_name(strongest)}: {words.number(*stored(ds, strongest))}"


def test_an_entry_is_found_whatever_the_order_of_its_labels_and_offered_once(ds):
    a, b = "layer0.bias", "layer2.weight"
    explorer = ho.explore(ds, state={"entries": [[b, a]]})
    assert_allclose(explorer.table().loc[0, ["value", "standard error"]].astype(float), stored(ds, (a, b)))
    offered = [entry for _, entry in words.choices(explorer.view)]
    assert [e for e in offered if set(e) == {a, b}] == [(b, a)]
    assert len(offered) == 21


@pytest.mark.parametrize(
    ("state", "entry"),
    [
        ({"block": "BB"}, ("layer0.weight", "layer1.bias")),
        ({"block": "WB"}, ("layer1.bias", "layer1.weight")),
        ({"order": 3, "slices": ["layer0.bias"]}, ("layer1.weight", "layer1.weight", "layer2.bias")),
        ({"order": 3, "slices": ["layer0.bias"], "block": "BB"}, ("layer1.weight", "layer0.weight", "layer0.bias")),
        ({"mask": True}, ("layer1.weight", "layer1.weight")),
    ],
)
def test_an_entry_outside_what_is_shown_keeps_its_value(ds, state, entry):
    explorer = ho.explore(ds, state={**state, "entries": [list(entry)]})
    row = explorer.table().iloc[0]
    assert row["entry"] == entry_name(entry)
    assert_allclose([row["value"], row["standard error"]], stored(ds, entry), rtol=1e-9)
    assert (f"{entry_name(entry)}: {words.number(*stored(ds, entry))}", entry) in words.choices(explorer.view)


def test_an_entry_that_a_difference_does_not_have_is_said_to_be_absent(ds):
    other = ds.ho.merge({"first": ["layer0.weight"]})
    entry = ["layer0.weight", "layer1.bias"]
    explorer = ho.explore(ds, others={"other": other}, state={"compare_run": "other", "entries": [entry]})
    row = explorer.table().iloc[0]
    assert row["entry"] == "layer0.weight × layer1.bias (not in this view)"
    assert np.isnan(row["value"])
    assert words.choices(explorer.view)[0][0] == "layer0.weight × layer1.bias (not in this view): not a number"


@pytest.mark.parametrize("factor", [1.0, 2.0, 3.0])
def test_the_count_of_unsettled_entries_is_that_of_two_standard_errors(ds, factor):
    """Errors made longer: one, two and three of them then give other counts, and so do picture and sentence."""
    one = ds.sel(step=10)
    long = factor * 8 * one.D2_se
    given = one.assign(D2_se=long)
    upper = np.triu_indices(6)
    counts = [int((np.abs(one.D2) < k * long).values[upper].sum()) for k in (1, 2, 3)]
    assert len(set(counts)) == 3, counts
    explorer = ho.explore(given)
    assert f"{counts[1]} of 21 entries are within 2 standard errors of zero." in explorer.sentence
    hidden = ho.explore(given, state={"mask": True}).view.shown.values
    assert np.array_equal(hidden != 0, ~(np.abs(one.D2) < 2 * long).values)
