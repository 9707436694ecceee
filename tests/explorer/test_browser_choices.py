"""A real JupyterLab in a real browser: play, comparison, rules, slices, masks, cells; a kernel that is gone."""

import os

import numpy as np
import pytest

from hoanalysis.analysis.example import example
from hoanalysis.store import export
from tests.conftest import write_study
from tests.explorer.lab import (
    CHROMIUM,
    answered,
    executed,
    kernels,
    opened,
    picture,
    restart,
    run_again,
    run_code,
    sentence_with,
    serve,
    shows,
    tells,
    written,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(
        not CHROMIUM and not os.environ.get("HOANALYSIS_REQUIRE_BROWSER"), reason="needs a Chromium browser on the PATH"
    ),
]
HELD = """
import time
from pathlib import Path
import numpy as np
import torch.nn.functional as F
import hoanalysis as ho
from hoanalysis.errors import HoError
from hoanalysis.study import StudySpec

store, go = {store!r}, Path({go!r})

def begun():
    try:
        return bool(np.isfinite(ho.open_store(store).loss).any())
    except HoError:
        return False

class Held(list):
    # the batches after the first checkpoint are held back until they may go
    def __iter__(self):
        for batch in super().__iter__():
            while not go.exists() and begun():
                time.sleep(0.1)
            yield batch

spec = StudySpec.read({study!r})
problem = ho.Problem(spec.problem().model, Held(spec.problem().data), loss=F.cross_entropy)
ho.explore(problem, spec.run(), 2, store=store, keep_batches=4)
"""
CHOICES = """
import json
from pathlib import Path
import hoanalysis as ho
ds, other = map(ho.open_dataset, {paths!r})
saved = Path({saved!r})
"""
EXPLORER = """
state = json.loads(saved.read_text()) if saved.exists() else {'scale': 'linear'}
explorer = ho.explore(ds, others={'seed 1': other}, state=state)
explorer
"""


@pytest.fixture(scope="module")
def ds():
    """All checkpoints are known to be of the same data, so that their differences are paired."""
    return example(layers=3, size=3, steps=4).assign_attrs(provenance='{"data": "that of all checkpoints"}')


@pytest.fixture(scope="module")
def other():
    return example(1, layers=3, size=3, steps=4)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("lab")


@pytest.fixture(scope="module")
def address(root, ds, other):
    assert CHROMIUM, "HOANALYSIS_REQUIRE_BROWSER is set, and there is no Chromium"
    paths = [str(export(one, root / f"{name}.nc")) for name, one in (("one", ds), ("seed", other))]
    written(root, "choices.ipynb", CHOICES.format(paths=paths, saved=str(root / "state.json")), EXPLORER)
    study = write_study(root / "small", "factories_in_the_browser")
    held = HELD.format(study=str(study), store=str(root / "store"), go=str(root / "go"))
    written(root, "filling.ipynb", held)
    with serve(root, example(layers=1, steps=2)) as (address, _):
        yield address.replace("explore.ipynb", "choices.ipynb")


@pytest.fixture(scope="module")
def page(address):
    with opened(address) as page:
        sentence_with(page, "Step 30")
        yield page


def select(page, label, option):
    page.get_by_label(label, exact=True).select_option(option)


def error(blocks, weight):
    """The standard error of a weighted mean over blocks: n/(n-1) sum w^2 (x - mean)^2 / (sum w)^2."""
    w = weight[:, None, None]
    mean, n = (w * blocks).sum(0) / w.sum(), len(weight)
    return np.sqrt(n / (n - 1) * (w**2 * (blocks - mean) ** 2).sum(0) / w.sum() ** 2)


def means(ds, step):
    """D2 of each kept block at a step."""
    one = ds.sel(step=step)
    return one.D2_batch.values / one.weight.values[:, None, None]


def told(matrix, errors, names):
    """The strongest pair as the sentence has it."""
    size = np.abs(np.triu(np.asarray(matrix), 1))
    i, j = np.unravel_index(size.argmax(), size.shape)
    return f"{names[i]} × {names[j]}: {matrix[i, j]:.4g} ± {errors[i, j]:.2g}"


def test_play_goes_through_the_checkpoints_and_ends_at_the_last(page, ds):
    play = page.locator(".ho-live .widget-play button").first
    play.click()  # from the last it starts over
    sentence_with(page, "Step 0:")
    sentence_with(page, "Step 30:")
    shows(page, ds.sel(step=30).D2.values)


def test_the_cells_of_the_picture_tell_their_values(page, ds):
    last, names = ds.sel(step=30), ds.group.values.tolist()
    for i, j in ((0, 0), (1, 4), (4, 1), (5, 5)):
        value, se = last.D2.values[i, j], last.D2_se.values[i, j]
        expected = f"{names[i]} × {names[j]}: {value:.4g} ± {se:.2g} [loss]"
        tells(page, i, j, expected + ", within 2 standard errors of 0" * bool(abs(value) < 2 * se))
    page.mouse.down()
    page.mouse.up()  # a click keeps it
    page.mouse.move(5, 5)
    kept = page.evaluate(
        "[document.activeElement.getAttribute('t'), getComputedStyle(document.activeElement, '::after').display]"
    )
    assert kept[0].startswith(f"{names[5]} × {names[5]}: ")
    assert kept[1] == "block"


def test_a_slice_of_the_third_order_by_its_index(page, ds):
    last, names = ds.sel(step=30), ds.group.values.tolist()
    page.get_by_role("button", name="3", exact=True).click()
    for at in (2, 5):
        select(page, "index 3", names[at])
        part, errors = last.D3.values[:, :, at], last.D3_se.values[:, :, at]
        said = sentence_with(page, f"D3, slice of {names[at]}")
        assert told(part, errors, [*names]).replace(":", f" × {names[at]}:") in said
        shows(page, part)
        cell = f"{names[1]} × {names[3]} × {names[at]}: {part[1, 3]:.4g} ± {errors[1, 3]:.2g} [loss]"
        tells(page, 1, 3, cell + ", within 2 standard errors of 0" * bool(abs(part[1, 3]) < 2 * errors[1, 3]))
    page.get_by_role("button", name="2", exact=True).click()
    sentence_with(page, "pseudo-Hessian")


def test_rules_and_their_strength_change_the_inverse(page, ds):
    last, names = ds.sel(step=30), ds.group.values.tolist()
    select(page, "show", "inverse")
    for rule, epsilon in (("ridge", 1.0), ("ridge", 0.3), ("r", 0.3)):
        select(page, "regularization", rule)
        page.get_by_label("epsilon", exact=True).fill(str(epsilon))
        page.keyboard.press("Enter")
        h, d3 = last.D2.values, last.D3.values
        size = np.sqrt(np.abs(np.diag(h)))
        added = np.diag(size**2) if rule == "ridge" else np.diag(np.abs(np.einsum("sss->s", d3)) ** (2 / 3))
        inverse = np.linalg.inv(h + epsilon * added)
        i, j = np.unravel_index(np.abs(np.triu(inverse, 1)).argmax(), h.shape)
        sentence_with(
            page, f"with {rule} regularization ({epsilon:g})", f"{names[i]} × {names[j]}: {inverse[i, j]:.4g} ±"
        )
        shows(page, inverse)
    select(page, "regularization", "none")
    select(page, "show", "H-bar")
    sentence_with(page, "30: pseudo-Hessian")


def test_a_checkpoint_and_a_run_are_subtracted(page, ds, other):
    names, w = ds.group.values.tolist(), ds.sel(step=30).weight.values
    for run, steps in (("this run", (20, 0)), ("seed 1", (30, 10))):
        select(page, "minus", run)
        for k, step in enumerate(steps):
            if k or run != "this run":  # of this run it begins with the checkpoint before
                select(page, "at step", str(step))
            of = ds if run == "this run" else other
            change = ds.sel(step=30).D2.values - of.sel(step=step).D2.values
            if of is ds:
                se = error(means(ds, 30) - means(ds, step), w)
            else:
                se = np.hypot(ds.sel(step=30).D2_se.values, other.sel(step=step).D2_se.values)
            sentence_with(page, f"minus {run}, step {step}", told(change, se, names))
            shows(page, change)
    select(page, "minus", "nothing")
    sentence_with(page, "30: pseudo-Hessian")


def test_a_pattern_merges_the_groups_that_it_matches(page, ds):
    select(page, "groups", "by pattern")
    page.get_by_label("pattern", exact=True).fill("body=layer[01].*")
    page.keyboard.press("Enter")
    onto = np.array([[1, 1, 1, 1, 0, 0], [0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 0, 1]], float)
    merged = onto @ ds.sel(step=30).D2.values @ onto.T
    se = error(onto @ means(ds, 30) @ onto.T, ds.sel(step=30).weight.values)
    sentence_with(page, "3 groups, by the pattern", told(merged, se, ["body", "layer2.weight", "layer2.bias"]))
    shows(page, merged)
    page.get_by_label("pattern", exact=True).fill("zzz*")
    page.keyboard.press("Enter")
    page.wait_for_selector(".ho-message >> text=matches no group")
    page.get_by_label("pattern", exact=True).fill("body=layer[01].*")
    page.keyboard.press("Enter")
    page.wait_for_selector(".ho-message", state="detached")
    select(page, "groups", "as stored")
    sentence_with(page, "6 groups, as stored")


def test_colours_that_are_shared_and_what_is_not_told_from_zero(page, ds):
    last, top = ds.sel(step=30), np.abs(ds.D2.values).max()
    assert top > 1.05 * np.abs(last.D2.values).max()  # else nothing is tested
    page.get_by_label("the same at every checkpoint").check()
    shows(page, last.D2.values, top=top)
    page.get_by_label("the same at every checkpoint").uncheck()
    shows(page, last.D2.values)
    doubtful = np.abs(last.D2.values) < 2 * last.D2_se.values
    assert 0 < doubtful.sum() < doubtful.size
    page.get_by_label("hide what is within 2 errors of 0").check()
    sentence_with(page, f"{np.triu(doubtful).sum()} of 21 entries are within 2 standard errors of zero, and hidden")
    shows(page, np.where(doubtful, 0.0, last.D2.values))
    page.get_by_label("hide what is within 2 errors of 0").uncheck()
    shows(page, last.D2.values)


def test_what_is_computed_in_the_background_is_stopped_and_gone_on_with(page, address, root):
    from hoanalysis.store import open_store

    filling = executed(
        page.context.browser, address.replace("/lab/", "/lab/workspaces/filling/").replace("choices", "filling")
    )
    try:
        filling.wait_for_selector("text=1 of 3 checkpoints, computing")
        done = open_store(root / "store")
        (known,) = (s for s in (0, 10, 20) if np.isfinite(done.loss.sel(step=s)))
        select(filling, "colours", "linear")
        sentence_with(filling, f"Step {known}: pseudo-Hessian")
        shows(filling, done.D2.sel(step=known).values)
        filling.get_by_role("button", name="Stop").click()
        filling.wait_for_selector("text=1 of 3 checkpoints, stopping after this batch")
        (root / "go").touch()
        filling.wait_for_selector("text=1 of 3 checkpoints, stopped")
        assert np.isfinite(open_store(root / "store").loss).sum() == 1
        assert filling.locator(".ho-live .ho-message").count() == 0
        filling.get_by_role("button", name="Go on").click()
        filling.wait_for_selector("text=3 of 3 checkpoints, complete")
        assert np.isfinite(open_store(root / "store").D2.values).all()
        sentence_with(filling, f"Step {known}: pseudo-Hessian")  # what is looked at stays
    finally:
        filling.close()


def marked(page):
    """Whether each of the two lines that say "Disconnected" is seen: that of the widgets, and that of the silence."""
    return page.evaluate("""() => {
        const of = getComputedStyle(document.querySelector('.ho-live'), '::before');
        const silent = document.querySelector('.ho-live .ho-pulse');
        const told = getComputedStyle(silent, '::before');
        return [of.content.includes('Disconnected') && of.display != 'none',
                told.fontSize != '0px' && getComputedStyle(silent).display != 'none']; }""")


def test_a_kernel_that_is_gone_is_said(page, address):
    """Of a restart from elsewhere JupyterLab does not tell its widgets, but silence does; of its own it does so.

    A kernel that does not come up at once and is restarted once more by the server is of those that JupyterLab tells.
    """
    before = int(page.get_attribute(".ho-live .ho-pulse", "data-beat"))
    page.wait_for_function(f"+document.querySelector('.ho-live .ho-pulse').dataset.beat > {before}")
    assert marked(page) == [False, False]
    shown, said = picture(page), page.inner_text(".ho-sentence")
    kernels(address, "/restart", "POST")
    page.wait_for_function(
        "getComputedStyle(document.querySelector('.ho-live .ho-pulse'), '::before').fontSize != '0px'"
    )
    told = marked(page)
    assert sorted(told) == [False, True]  # one line
    assert told[1] or page.locator(".ho-live.jupyter-widgets-disconnected").count()
    assert (picture(page), page.inner_text(".ho-sentence")) == (shown, said)  # the last view stays
    answered(page)
    restart(page)
    assert marked(page) == [True, False]


def test_what_is_chosen_is_saved_and_restored_in_another_kernel(page, ds, root):
    """The cell run again is live again; a state that was saved gives the view and the values of the controls."""
    run_again(page)
    sentence_with(page, "Step 30: pseudo-Hessian")
    assert marked(page) == [False, False]
    page.get_by_role("button", name="3", exact=True).click()
    sentence_with(page, "D3, slice of")
    select(page, "groups", "by layer")
    sentence_with(page, "3 groups, by layer")
    select(page, "index 3", "layer1")
    sentence_with(page, "slice of layer1")
    handle = page.locator(".ho-live .noUi-handle").first
    handle.focus()
    handle.press("ArrowLeft")
    sentence_with(page, "Step 20: D3, slice of layer1")
    onto = np.kron(np.eye(3), np.ones((1, 2)))
    merged = np.einsum("as,bt,cu,stu->abc", onto, onto, onto, ds.D3.sel(step=20).values)[:, :, 1]
    shows(page, merged)
    page.locator(".ho-live .lm-TabBar-tab", has_text="Trajectories").click()
    said = page.inner_text(".ho-sentence")
    run_code(page, "saved.write_text(json.dumps(explorer.state)); print('saved', explorer.state['panel'])")
    page.wait_for_selector("text=saved trajectories")
    restart(page)
    run_again(page)
    assert sentence_with(page, "Step 20: D3, slice of layer1") == said
    shows(page, merged)
    assert page.locator(".ho-live .lm-TabBar-tab.lm-mod-current").inner_text() == "Trajectories"
    for label, value in (("groups", "by layer"), ("index 3", "layer1"), ("colours", "linear")):
        chosen = page.get_by_label(label, exact=True)
        assert chosen.evaluate("e => e.options[e.selectedIndex].text").replace("\xa0", " ") == value
    assert page.locator(".ho-live button.mod-active").first.inner_text() == "3"
    assert page.locator(".ho-live .widget-readout").first.inner_text() == "20"
