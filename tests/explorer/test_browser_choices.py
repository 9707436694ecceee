"""A real JupyterLab in a real browser: play, comparison, rules, slices, masks, cells; a kernel that is gone."""

import os

import numpy as np
import pytest

from hoanalysis.analysis.example import example
from hoanalysis.store import export
from tests.conftest import write_study
from tests.explorer.lab import (
    CHROMIUM,
    executed,
    kernels,
    menu,
    opened,
    picture,
    pointed_at,
    sentence_with,
    serve,
    shows,
    written,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(
        not CHROMIUM and not os.environ.get("HOANALYSIS_REQUIRE_BROWSER"), reason="needs a Chromium browser on the PATH"
    ),
]
SLOW = """
import time
import torch.nn.functional as F
import hoanalysis as ho
from hoanalysis.study import StudySpec

class Slow(list):
    def __iter__(self):
        for batch in super().__iter__():
            time.sleep({seconds})
            yield batch

spec = StudySpec.read({study!r})
problem = ho.Problem(spec.problem().model, Slow(spec.problem().data), loss=F.cross_entropy)
ho.explore(problem, spec.run(), 2, store={store!r}, keep_batches=4)
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
    written(
        root,
        "choices.ipynb",
        f"import hoanalysis as ho\nds, other = map(ho.open_dataset, {paths!r})",
        "ho.explore(ds, others={'seed 1': other}, state={'scale': 'linear'})",
    )
    study = write_study(root / "small", "factories_in_the_browser")
    written(root, "filling.ipynb", SLOW.format(seconds=0.25, study=str(study), store=str(root / "store")))
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
        assert pointed_at(page, i, j) == expected + ", within 2 standard errors of 0" * bool(abs(value) < 2 * se)
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
        assert pointed_at(page, 1, 3).startswith(
            f"{names[1]} × {names[3]} × {names[at]}: {part[1, 3]:.4g} ± {errors[1, 3]:.2g}"
        )
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
        stop = filling.get_by_role("button", name="Stop")
        filling.wait_for_selector("text=/[12] of 3 checkpoints, computing/")
        stop.click()
        filling.wait_for_selector("text=/[12] of 3 checkpoints, stopped/")
        done = open_store(root / "store")
        known = [s for s in (0, 10, 20) if np.isfinite(done.loss.sel(step=s))]
        assert len(known) in (1, 2)
        select(filling, "colours", "linear")
        step = int(filling.inner_text(".ho-sentence").split("Step ")[1].split(":")[0])
        assert step in known  # the last that was there when it was first looked for, which stays
        shows(filling, done.D2.sel(step=step).values)
        assert filling.locator(".ho-live .ho-message").count() == 0
        filling.get_by_role("button", name="Go on").click()
        filling.wait_for_selector("text=3 of 3 checkpoints, complete")
        assert np.isfinite(open_store(root / "store").D2.values).all()
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
    """Of a restart from elsewhere JupyterLab does not tell its widgets, but silence does; of its own it does so."""
    before = int(page.get_attribute(".ho-live .ho-pulse", "data-beat"))
    page.wait_for_function(f"+document.querySelector('.ho-live .ho-pulse').dataset.beat > {before}")
    assert marked(page) == [False, False]
    shown, said = picture(page), page.inner_text(".ho-sentence")
    kernels(address, "/restart", "POST")
    page.wait_for_function(
        "getComputedStyle(document.querySelector('.ho-live .ho-pulse'), '::before').fontSize != '0px'"
    )
    assert marked(page) == [False, True]
    assert (picture(page), page.inner_text(".ho-sentence")) == (shown, said)  # the last view stays
    menu(page, "Kernel", "kernelmenu:restart")
    page.locator(".jp-Dialog .jp-mod-accept").first.click()
    page.wait_for_selector(".ho-live.jupyter-widgets-disconnected")
    assert marked(page) == [True, False]
