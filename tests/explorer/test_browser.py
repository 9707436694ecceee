"""A real JupyterLab in a real browser: what a click changes, picture and sentence, to the right numbers.

Skipped where there is no Chromium, unless ``HOANALYSIS_REQUIRE_BROWSER`` says that there has to be one.
"""

import io
import os
import time
from pathlib import Path

import nbformat
import numpy as np
import pytest
from PIL import Image

import hoanalysis as ho
from hoanalysis.analysis.example import example
from tests.explorer.lab import CHROMIUM, end_kernels, executed, opened, picture, sentence_with, serve, shows

REQUIRED = bool(os.environ.get("HOANALYSIS_REQUIRE_BROWSER"))
pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not CHROMIUM and not REQUIRED, reason="needs a Chromium browser on the PATH"),
]


@pytest.fixture(scope="module")
def ds():
    told = {"n_batches": 8, "sha256": "0" * 64, "engine": "tangents", "self_check": 0.0}
    made = example(layers=3, size=3, steps=4)
    return made.drop_vars(list(told), errors="ignore").assign_coords({n: ("step", [v] * 4) for n, v in told.items()})


@pytest.fixture(scope="module")
def lab(tmp_path_factory, ds):
    assert CHROMIUM, "HOANALYSIS_REQUIRE_BROWSER is set, and there is no Chromium"
    with serve(tmp_path_factory.mktemp("lab"), ds) as found:
        yield found


@pytest.fixture(scope="module")
def page(lab):
    with opened(lab[0]) as page:
        sentence_with(page, "Step 30")
        yield page


def strongest(matrix, errors, names) -> str:
    """The strongest pair in words, found here by other means."""
    size = np.abs(np.asarray(matrix, float)) * (1 - np.eye(len(names)))
    i, j = sorted(np.unravel_index(size.argmax(), size.shape))
    return f"{names[i]} × {names[j]}: {float(matrix[i, j]):.4g} ± {float(errors[i, j]):.2g}"


def test_every_control_changes_picture_and_sentence_to_the_right_values(page, ds):
    page.get_by_label("colours", exact=True).select_option("linear")
    names = ds.group.values.tolist()
    last = ds.sel(step=30)
    sentence_with(page, "Step 30", strongest(last.D2.values, last.D2_se.values, names))
    shows(page, last.D2.values)

    handle = page.locator(".ho-live .noUi-handle").first
    handle.focus()
    for step in (20, 10):
        handle.press("ArrowLeft")
        one = ds.sel(step=step)
        sentence_with(page, f"Step {step}", strongest(one.D2.values, one.D2_se.values, names))
        shows(page, one.D2.values)

    one = ds.sel(step=10)
    page.get_by_role("button", name="3", exact=True).click()
    told = sentence_with(page, "D3, slice of")
    at = names.index(told.split("slice of ")[1].split(" [")[0])
    assert strongest(one.D3.values[:, :, at], one.D3_se.values[:, :, at], names).split(":")[1] in told
    shows(page, one.D3.values[:, :, at])

    page.get_by_role("button", name="2", exact=True).click()
    page.get_by_label("groups", exact=True).select_option("by layer")
    layers = np.kron(np.eye(3), np.ones((1, 2)))
    sums = layers @ one.D2.values @ layers.T
    sentence_with(page, "3 groups, by layer", f"{np.abs(sums - np.diag(np.diag(sums))).max():.4g}")
    shows(page, sums)

    page.get_by_label("groups", exact=True).select_option("as stored")
    page.get_by_label("block", exact=True).select_option("WB")
    block = one.D2.values[::2, 1::2]
    sentence_with(page, "block WB", "of 9 entries")
    shows(page, block)

    page.get_by_label("block", exact=True).select_option("all")
    page.get_by_label("show", exact=True).select_option("inverse")
    inverse = np.linalg.inv(one.D2.values)
    sentence_with(page, "inverse of the pseudo-Hessian", f"{np.abs(np.triu(inverse, 1)).max():.4g}")
    shows(page, inverse)
    page.locator(".ho-live .lm-TabBar-tab", has_text="Taylor").click()
    page.get_by_role("button", name="Export").click()
    page.wait_for_selector(".ho-code")
    figure = eval(page.inner_text(".ho-code"), {"ho": ho})
    assert len(figure.axes) >= 4
    if shots := os.environ.get("HOANALYSIS_SCREENSHOTS"):
        page.screenshot(path=str(Path(shots) / "explorer.png"))


LIVE = ["pseudo-Hessian", "D3, slice of", "inverse of the pseudo-Hessian", "scale-free", "minus this run, step 0"]


def test_the_report_is_live_in_jupyterlab(page, lab, ds):
    """Its main sections are explorers of their own; a slider in one moves that one alone, to the right numbers."""
    address = lab[0].replace("/lab/tree/explore.ipynb", "/lab/workspaces/report/tree/report.ipynb")
    report = executed(page.context.browser, address)  # a workspace of its own: the other holds explore.ipynb open
    try:
        report.wait_for_function(f"document.querySelectorAll('.ho-live .ho-sentence').length === {len(LIVE)}")
        report.wait_for_selector("text=| Idle")
        said = report.locator(".ho-live .ho-sentence").all_text_contents()  # JupyterLab hides what is scrolled away
        assert all(words in text for words, text in zip(LIVE, said, strict=True)), said
        pictures = [picture(report, i) for i in range(len(LIVE))]
        assert len(set(pictures)) == len(pictures)
        inverse = report.locator(".ho-live").nth(2)
        inverse.scroll_into_view_if_needed()
        inverse.get_by_label("colours", exact=True).select_option("linear")
        shows(report, np.linalg.inv(ds.D2.values[0]), explorer=2)  # the loss of these data climbs after step 0
        inverse.locator(".noUi-handle").focus()
        inverse.locator(".noUi-handle").press("ArrowRight")
        report.wait_for_function(
            "document.querySelectorAll('.ho-live .ho-sentence')[2].textContent.includes('Step 10: inverse')"
        )
        shows(report, np.linalg.inv(ds.D2.values[1]), explorer=2)
        assert report.locator(".ho-live .ho-sentence").first.text_content() == said[0]
        behind = report.locator(".jp-OutputArea-child:has(.ho-live) + .jp-OutputArea-child:has(.jp-RenderedImage)")
        assert behind.evaluate_all("all => all.map(e => getComputedStyle(e).display)") == ["none"] * len(LIVE)
        assert report.locator("[data-mime-type='application/vnd.jupyter.error']").all_text_contents() == []
        if shots := os.environ.get("HOANALYSIS_SCREENSHOTS"):
            inverse.screenshot(path=str(Path(shots) / "report.png"))
    finally:
        report.close()


def test_the_saved_notebook_shows_the_last_view_without_widgets(page, lab):
    """Hidden behind the live explorer; seen once the kernel and its widgets are gone, and in nbconvert's page."""
    static = page.locator(".jp-OutputArea-child:has(.ho-live) + .jp-OutputArea-child .jp-RenderedImage")
    static.wait_for(state="attached")  # while the page is busy JupyterLab takes outputs out and puts them back
    assert static.count() == 1
    assert not static.is_visible()
    said = page.inner_text(".ho-sentence").split(". ")[0]
    end = time.monotonic() + 90
    while True:
        page.keyboard.press("Escape")
        page.keyboard.press("Control+s")
        time.sleep(1.0)
        cells = nbformat.read(lab[1], as_version=4).cells
        outputs = [o for c in cells for o in c.get("outputs", []) if "image/png" in o.get("data", {})]
        if outputs and said in outputs[0]["data"]["text/plain"]:
            break
        assert time.monotonic() < end, [o["data"]["text/plain"] for o in outputs]
    assert outputs[0]["metadata"]["image/png"]["alt"] == outputs[0]["data"]["text/plain"]
    saved = nbformat.read(lab[1], as_version=4)
    assert "widgets" not in saved.metadata

    from nbconvert import HTMLExporter

    html, _ = HTMLExporter().from_notebook_node(saved)
    assert html.count("<img") == 1
    assert "VBox(" not in html
    assert "widget-view" not in html

    page.goto("about:blank")
    end_kernels(lab[0])  # a kernel that still runs gives its widgets back to a page that is opened again
    page.goto(lab[0] + "&reset")
    page.wait_for_selector(".jp-RenderedImage")
    assert page.locator(".jp-RenderedImage").is_visible()
    assert page.locator(".ho-live").count() in (0, 1)


def test_an_untrusted_notebook_shows_the_picture(page, lab):
    """Outputs that another user saved are not trusted: no widget, no script, and yet the figure."""
    other = lab[1].with_name("untrusted.ipynb")
    notebook = nbformat.read(lab[1], as_version=4)
    notebook.metadata["signature"] = ""
    notebook.cells[0].source += "\n\nchanged elsewhere"
    for cell in notebook.cells:
        cell.metadata.pop("trusted", None)
        for output in cell.get("outputs", []):
            output.setdefault("metadata", {})["elsewhere"] = 1
    nbformat.write(notebook, other)
    page.goto(lab[0].replace("explore.ipynb", "untrusted.ipynb") + "&reset")
    page.wait_for_selector(".jp-RenderedImage img")
    assert page.locator(".jp-RenderedImage").first.is_visible()
    image = Image.open(io.BytesIO(bytes(page.evaluate(
        "async () => Array.from(new Uint8Array(await (await fetch("
        "document.querySelector('.jp-RenderedImage img').src)).arrayBuffer()))"
    ))))  # fmt: skip
    assert image.width > 600
