"""A real JupyterLab in a real browser: what a click changes, picture and sentence, to the right numbers.

Skipped where there is no Chromium, unless ``HOANALYSIS_REQUIRE_BROWSER`` says that there has to be one.
"""

import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import matplotlib
import nbformat
import numpy as np
import pytest
from matplotlib.colors import Normalize
from PIL import Image

import hoanalysis as ho
from hoanalysis.analysis.example import example
from hoanalysis.store import export
from tests.explorer.test_views import colours

ROOT = Path(__file__).parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
REQUIRED = bool(os.environ.get("HOANALYSIS_REQUIRE_BROWSER"))
PATIENCE = 120_000  # ms
pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not CHROMIUM and not REQUIRED, reason="needs a Chromium browser on the PATH"),
]


@pytest.fixture(scope="module")
def ds():
    told = {"n_batches": 8, "sha256": "0" * 64, "engine": "tangents", "self_check": 0.0}
    made = example(layers=3, size=3, steps=4)
    return made.drop_vars(list(told), errors="ignore").assign_coords({n: ("step", [v] * 4) for n, v in told.items()})


def about(root: Path, name: str, parameters: str) -> None:
    """A notebook of ours with other parameters."""
    notebook = nbformat.read(ROOT / "notebooks" / name, as_version=4)
    (cell,) = (c for c in notebook.cells if "parameters" in c.metadata.get("tags", []))
    cell.source = parameters
    nbformat.write(notebook, root / name)


@contextmanager
def serve(root: Path, ds):
    """A JupyterLab with a token of its own: the address of explore.ipynb with the path of ``ds``, and its file.

    Beside it is report.ipynb on the same Dataset.
    """
    path = export(ds, root / "run.nc")
    about(root, "explore.ipynb", f"path = {str(path)!r}\nstore = None")
    about(root, "report.ipynb", f"dataset = {str(path)!r}\nothers, log, title = {{}}, None, 'example'")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    settings = root / "settings" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    (settings / "notification.jupyterlab-settings").write_text(json.dumps({"fetchNews": "false"}))
    settings = root / "settings" / "@jupyterlab" / "notebook-extension"
    settings.mkdir()  # all cells at once: a test reads what is scrolled away too
    (settings / "tracker.jupyterlab-settings").write_text(json.dumps({"windowingMode": "none"}))
    own = {n: str(root / n.lower()) for n in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR")}
    own |= {"JUPYTERLAB_SETTINGS_DIR": str(root / "settings"), "JUPYTERLAB_WORKSPACES_DIR": str(root / "workspaces")}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}",
               "--ServerApp.port_retries=0", "--IdentityProvider.token=secret",
               f"--ServerApp.root_dir={root}"]  # fmt: skip
    with (root / "log").open("w") as log:
        server = subprocess.Popen(command, env={**os.environ, **own}, stdout=log, stderr=subprocess.STDOUT)
    try:
        address = f"http://127.0.0.1:{port}"
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{address}/api?token=secret", timeout=5).close()
                break
            except OSError:
                assert server.poll() is None, (root / "log").read_text()
                time.sleep(0.2)
        yield f"{address}/lab/tree/explore.ipynb?token=secret", root / "explore.ipynb"
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture(scope="module")
def lab(tmp_path_factory, ds):
    assert CHROMIUM, "HOANALYSIS_REQUIRE_BROWSER is set, and there is no Chromium"
    with serve(tmp_path_factory.mktemp("lab"), ds) as found:
        yield found


@contextmanager
def opened(address: str):
    """The page of the notebook in a browser, with all its cells running."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield executed(browser, address)
        browser.close()


def executed(browser, address: str):
    """A new page of the browser with the notebook, once its first explorer is there."""
    page = browser.new_page(viewport={"width": 1500, "height": 1500})
    page.set_default_timeout(PATIENCE)
    page.goto(address)
    page.wait_for_selector(".jp-Notebook .jp-Cell")
    run_all(page)
    page.wait_for_selector(".ho-live .ho-sentence", state="attached")
    return page


def move_times(address: str, moves: int) -> list[float]:
    """Seconds from the key that moves the slider until picture and sentence are new; for benchmarks/explorer.py."""
    both = "() => [document.querySelector('.ho-sentence')?.innerText, document.querySelector('.ho-live img')?.src]"
    with opened(address) as page:
        sentence_with(page, "Step")
        page.wait_for_timeout(4000)
        found = []
        handle = page.locator(".ho-live .noUi-handle").first
        handle.focus()
        for _ in range(moves):
            before, start = json.dumps(page.evaluate(both)), time.perf_counter()
            handle.press("ArrowLeft")
            page.wait_for_function(f"{before}.every((old, i) => ({both})()[i] !== old)", polling="raf")
            found.append(time.perf_counter() - start)
            page.wait_for_timeout(300)
        return found


@pytest.fixture(scope="module")
def page(lab):
    with opened(lab[0]) as page:
        sentence_with(page, "Step 30")
        yield page


def menu(page, title, command):
    page.locator(".lm-MenuBar-itemLabel", has_text=title).first.click()
    page.locator(f'.lm-Menu-item[data-command="{command}"]').click()


def run_all(page):
    """Run all cells; again where JupyterLab was asked before its kernel was connected, which it then forgets."""
    from playwright.sync_api import TimeoutError

    for _ in range(10):
        page.wait_for_selector("text=| Idle")
        menu(page, "Run", "runmenu:run-all")
        try:
            code = "() => /[0-9*]/.test(document.querySelector('.jp-CodeCell .jp-InputPrompt').innerText)"
            page.wait_for_function(code, timeout=10_000)
            return
        except TimeoutError:
            while page.locator(".jp-Dialog .jp-mod-accept").count():
                page.locator(".jp-Dialog .jp-mod-accept").first.click()


def sentence_with(page, *words) -> str:
    wanted = json.dumps(list(words))
    page.wait_for_function(
        f"{wanted}.every(w => document.querySelector('.ho-sentence')?.innerText.includes(w))", timeout=PATIENCE
    )
    return page.inner_text(".ho-sentence")


def picture(page, explorer: int = 0) -> bytes:
    """The bytes of the matrix that the browser shows, in one of the explorers of the page."""
    code = """async (i) => {
        const image = document.querySelectorAll('.ho-live')[i].querySelector('img');
        return Array.from(new Uint8Array(await (await fetch(image.src)).arrayBuffer())); }"""
    return bytes(page.evaluate(code, explorer))


def shows(page, values, explorer: int = 0):
    """The picture shows these numbers, by the colours of its cells (a linear scale)."""
    top = np.abs(values).max()
    expected = matplotlib.colormaps["RdBu_r"](Normalize(-top, top)(values))[..., :3] * 255
    end = time.monotonic() + 60
    while True:
        seen = colours(picture(page, explorer))
        if seen.shape == expected.shape and np.abs(seen - expected).max() <= 2:
            return
        assert time.monotonic() < end, (seen.shape, expected.shape)
        time.sleep(0.2)


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
        shows(report, np.linalg.inv(ds.D2.values[-1]), explorer=2)
        inverse.locator(".noUi-handle").focus()
        inverse.locator(".noUi-handle").press("ArrowLeft")
        report.wait_for_function(
            "document.querySelectorAll('.ho-live .ho-sentence')[2].textContent.includes('Step 20: inverse')"
        )
        shows(report, np.linalg.inv(ds.D2.values[-2]), explorer=2)
        assert report.locator(".ho-live .ho-sentence").first.text_content() == said[0]
        behind = report.locator(".jp-OutputArea-child:has(.ho-live) + .jp-OutputArea-child:has(.jp-RenderedImage)")
        assert behind.evaluate_all("all => all.map(e => getComputedStyle(e).display)") == ["none"] * len(LIVE)
        assert report.locator("[data-mime-type='application/vnd.jupyter.error']").all_text_contents() == []
        if shots := os.environ.get("HOANALYSIS_SCREENSHOTS"):
            inverse.screenshot(path=str(Path(shots) / "report.png"))
    finally:
        report.close()


def end_kernels(address: str) -> None:
    """End every session of the server, and its kernel with it."""
    parts = urlsplit(address)
    sessions = f"{parts.scheme}://{parts.netloc}/api/sessions"
    head = {"Authorization": f"token {parse_qs(parts.query)['token'][0]}"}
    with urllib.request.urlopen(urllib.request.Request(sessions, headers=head)) as answer:
        found = json.load(answer)
    for session in found:
        urllib.request.urlopen(
            urllib.request.Request(f"{sessions}/{session['id']}", headers=head, method="DELETE")
        ).close()


def test_the_saved_notebook_shows_the_last_view_without_widgets(page, lab):
    """Hidden behind the live explorer; seen once the kernel and its widgets are gone, and in nbconvert's page."""
    static = page.locator(".jp-OutputArea-child:has(.ho-live) + .jp-OutputArea-child .jp-RenderedImage")
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
