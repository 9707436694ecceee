"""What the cells of the report show in words: the tables, the momentum, the contents of the page."""

import nbformat
import numpy as np
import pandas as pd
import pytest
import xarray as xr

from hoanalysis import notebook as nb
from hoanalysis.analysis.example import example
from hoanalysis.analysis.findings import pm
from hoanalysis.analysis.prediction import prediction
from hoanalysis.analysis.verdict import break_of
from hoanalysis.reports.pages import page
from tests.analysis.trajectory import Cubic, series, train


@pytest.fixture(scope="module")
def broken():
    model = Cubic(third=0.05)
    points = train(model, 20, rates=0.02, momentum=0.0, change=(12, {"rates": 1.0}))
    return series(model, points, [*range(10), *range(50, 61)])


def test_steps_before_and_after_the_break_are_counted_apart(broken):
    steps = broken["to:next"]
    broke, told = break_of(steps), prediction(steps)
    frame = nb.within_table(steps, broke)
    assert frame.index.tolist() == ["order 1", "order 2", "order 3"]
    left, right = np.zeros(3, int), np.zeros(3, int)
    counts = [0, 0]
    for i, step in enumerate(steps.step.values):
        if told.steps.values[i] != 1 or not np.isfinite(told.measured.values[i]):
            continue
        miss = np.abs(told.unexplained.isel(step=i).values) <= 0.1 * abs(told.measured.values[i])
        counts[int(step >= broke.step)] += 1
        left, right = (left + miss, right) if step < broke.step else (left, right + miss)
    assert counts[0] > 0
    assert counts[1] > 0
    assert frame[f"before step {broke.step} : within 10 %".replace(" :", ":")].tolist() == [
        f"{n} of {counts[0]}" for n in left
    ]
    assert frame[f"from step {broke.step} on: within 10 %"].tolist() == [f"{n} of {counts[1]}" for n in right]
    whole = nb.within_table(steps, None)
    assert whole["all steps: within 10 %"].tolist() == [f"{n} of {sum(counts)}" for n in left + right]


def test_the_momentum_is_that_of_the_log_or_of_the_surest_chain(broken):
    rule = nb.rule_of(broken, None)
    assert rule is not None
    assert nb.rule_of({"to:next": broken["to:next"]}, None) is None
    told = xr.Dataset({"momentum": ("chain", [0.5, 0.9, np.nan]), "momentum_se": ("chain", [0.2, 0.01, 0.0])})
    assert nb.momentum_of(told, None) == (0.9, 0.01)
    assert nb.momentum_of(told.isel(chain=[2]), None) == (None, 0.0)
    assert nb.momentum_of(None, None) == (None, 0.0)
    log = pd.DataFrame({"step": [0], "momentum": [0.7]})
    assert nb.momentum_of(told, log)[0] is log


def test_pairs_and_errors_become_one_column_each():
    row = {"rank": 1, "group": "a", "group2": "b", "layer": "x", "layer2": "y", "value": 0.1234, "value_se": 0.01}
    told = nb.with_errors(nb.together(pd.DataFrame([{**row, "share": 0.5}])))
    assert told.columns.tolist() == ["groups", "rank", "value", "share"]
    assert told.iloc[0].tolist() == ["a × b", 1, "0.123 ± 0.010", 0.5]
    assert nb.together(pd.DataFrame({"group": ["a"], "group2": [""]}))["groups"].tolist() == ["a"]


def test_the_last_checkpoint_shown_of_a_broken_run_is_the_last_before_it_climbed(broken):
    ds, found = broken["gradient"], nb.autopsy_of(broken, None)
    ds = ds.assign_coords(n_batches=("step", np.full(ds.sizes["step"], 6)))
    broke = nb.break_in(ds, found)
    loss, labels = ds.loss.values, ds.step.values.tolist()
    at = labels.index(broke.step)
    assert labels[0] < broke.step < labels[-1]
    assert loss[at + 1] > loss[at]
    assert loss[-1] > loss[at]
    assert [one.step.item() for one in nb.ends(nb.until(ds, broke))] == [labels[0], broke.step]
    (told,) = nb.shown(ds, broke)
    assert f"show step {broke.step}, the last before the loss climbed" in told
    assert told.endswith(f"in place of the last of the run, step {labels[-1]}.")
    assert nb.break_in(ds, None).step == broke.step  # by the losses alone
    whole = nb.until(ds, None)
    assert [one.step.item() for one in nb.ends(whole)] == [labels[0], labels[-1]]
    assert nb.shown(ds, None) == []
    assert nb.until(None, broke) is None
    one = ds.isel(step=0)
    assert nb.until(one, broke) is one
    assert nb.shown(one, broke) == []


def test_entries_that_are_not_told_from_0_say_so():
    frame = example(2, layers=3).ho.interactions()
    assert (frame.significance > 2).any()
    frame.loc[1, ["scale_free_se", "significance"]] = [frame.scale_free.abs()[1], 1.0]
    frame.loc[2, ["scale_free_se", "significance"]] = np.nan
    words = nb.ranked(frame)["|scale_free| / its standard error"].tolist()
    assert words[1:3] == ["1.0, not told from 0", ""]
    for word, entry, error in zip(words, frame.scale_free, frame.scale_free_se, strict=True):
        assert word.endswith("not told from 0") == (abs(entry) < 2 * error)


def test_numbers_of_the_update_rule_that_are_not_told_from_0_say_so():
    values = {"learning_rate": 0.05, "momentum": 0.9, "decay": 0.0}
    data = {n: ("chain", [v]) for n, v in values.items()} | {f"{n}_se": ("chain", [0.01]) for n in values}
    data |= {
        "learning_rates": (("chain", "group"), [[0.0, 0.1]]),
        "learning_rates_se": (("chain", "group"), [[0.0, 0.06]]),
    }
    coords = {"group": ["still", "b"], "first": ("chain", [0]), "last": ("chain", [5])}
    told = nb.rule_table(xr.Dataset(data, coords))["steps 0 to 5"].tolist()
    assert told == ["0.9 ± 0.01", "0 ± 0.01, not told from 0", "0.05 ± 0.01", "0 ± 0", "0.1 ± 0.06, not told from 0"]


def test_the_suggested_partition_has_as_many_groups_as_layers():
    ds = example(2, layers=3)
    frame = nb.suggested(ds)
    assert len(frame) == 3
    found = ds.ho.suggest_partition(3)
    assert frame.columns[0].startswith(f"3 groups keep {pm(found.kept, found.kept_se, percent=True)} of the gain")
    assert frame.iloc[:, 0].tolist() == [", ".join(members) for members in found.values()]


def test_what_the_verdict_says_is_in_bold():
    shown = nb.bullets(["a <b>", "c"], strong=["a <b>"]).data
    assert shown == "<ul><li><strong>a &lt;b&gt;</strong></li><li>c</li></ul>"


def test_a_page_links_to_its_sections_behind_the_first():
    cells = [nbformat.v4.new_markdown_cell(f"## Part {k} <b>x</b>\n\ntext {k}") for k in range(4)]
    made = page(nbformat.v4.new_notebook(cells=cells), "title")
    for k in range(1, 4):
        assert f'<a href="#section-{k}">Part {k}' in made
        assert f'<h2 id="section-{k}">' in made
    assert made.index("text 0") < made.index("<nav>") < made.index('id="section-1"')
    assert ">Part 1 <b>" not in made[: made.index("</nav>")]  # links are plain text
    assert "<nav>" not in page(nbformat.v4.new_notebook(cells=cells[:3]), "title")


def test_advice_is_a_line_for_each_sentence_with_its_step():
    series = xr.DataArray(["a: x.\nb: <y>.", "ok."], {"step": [0, 5]}, ["step"])
    shown = nb.advice(series.isel(step=i) for i in range(2)).data
    assert shown == "<ul><li>Step 0: a: x.</li><li>Step 0: b: &lt;y&gt;.</li><li>Step 5: ok.</li></ul>"
    assert nb.advice([xr.DataArray("ok.")]).data == "<ul><li>ok.</li></ul>"


def test_a_column_of_sentences_is_set_like_text():
    frame = pd.DataFrame({"n": [1], "said": ["word " * 20]})
    assert 'class="dataframe words"' in nb.table(frame).data
    assert "words" not in nb.table(frame.assign(said="short")).data
    assert "words" not in nb.table(frame[["said"]].assign(said="x" * 99)).data
