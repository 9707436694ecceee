"""A real JupyterLab in a real browser for tests and benchmarks: a server, a page, and what is read off it."""

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
from matplotlib.colors import Normalize
from PIL import Image

from hoanalysis.store import export
from tests.explorer.test_views import colours

ROOT = Path(__file__).parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PATIENCE = 240_000  # ms; a condition that is met ends the wait, and a machine may be busy


def about(root: Path, name: str, parameters: str) -> None:
    """A notebook of ours with other parameters."""
    notebook = nbformat.read(ROOT / "notebooks" / name, as_version=4)
    (cell,) = (c for c in notebook.cells if "parameters" in c.metadata.get("tags", []))
    cell.source = parameters
    nbformat.write(notebook, root / name)


def written(root: Path, name: str, *sources: str) -> None:
    """A notebook of these cells."""
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}  # else JupyterLab asks
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), root / name)


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
        for _ in range(1200):
            try:
                urllib.request.urlopen(f"{address}/api?token=secret", timeout=5).close()
                break
            except OSError:
                assert server.poll() is None, (root / "log").read_text()
                time.sleep(0.2)
        yield f"{address}/lab/tree/explore.ipynb?token=secret", root / "explore.ipynb"
    finally:
        server.terminate()
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:  # its kernels end with it
            server.kill()
            server.wait()


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


def move_times(address: str, moves: int, order: int = 2) -> list[float]:
    """Seconds from the key that moves the slider until picture and sentence are new; for benchmarks/explorer.py."""
    both = "() => [document.querySelector('.ho-sentence')?.innerText, document.querySelector('.ho-live img')?.src]"
    with opened(address) as page:
        sentence_with(page, "Step")
        page.get_by_role("button", name=str(order), exact=True).click()
        sentence_with(page, {2: "pseudo-Hessian"}.get(order, f"D{order}"))
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


def menu(page, title, command):
    page.locator(".lm-MenuBar-itemLabel", has_text=title).first.click()
    page.locator(f'.lm-Menu-item[data-command="{command}"]').click()


def run_all(page):
    """Run all cells; again where JupyterLab was asked before its kernel was connected, which it then forgets."""
    from playwright.sync_api import TimeoutError

    code = "() => /[0-9*]/.test(document.querySelector('.jp-CodeCell .jp-InputPrompt').innerText)"
    for _ in range(10):
        page.wait_for_selector("text=| Idle")
        if page.evaluate(code):
            return  # it was only late; what runs twice would write one store from two kernels
        menu(page, "Run", "runmenu:run-all")
        try:
            page.wait_for_function(code, timeout=20_000)
            return
        except TimeoutError:
            answered(page)


def answered(page):
    """Whatever JupyterLab asks or tells in a dialog is accepted."""
    while page.locator(".jp-Dialog .jp-mod-accept").count():
        page.locator(".jp-Dialog .jp-mod-accept").first.click()


def restart(page):
    """Restart the kernel from JupyterLab's menu; returns once the widgets were told."""
    menu(page, "Kernel", "kernelmenu:restart")
    page.locator(".jp-Dialog .jp-mod-accept").first.click()
    page.wait_for_selector(".ho-live.jupyter-widgets-disconnected")


def run_again(page):
    """Run all cells once more; returns when another explorer has replaced the first.

    Asked again where it was asked while the kernel was restarting, which JupyterLab then forgets.
    """
    from playwright.sync_api import TimeoutError

    page.evaluate("document.querySelectorAll('.ho-live').forEach(e => e.setAttribute('data-old', ''))")
    new = ".ho-live:not([data-old]) .ho-sentence"
    for _ in range(10):
        page.wait_for_selector("text=| Idle")
        if page.locator(new).count():
            break
        menu(page, "Run", "runmenu:run-all")
        try:
            page.wait_for_selector(new, state="attached", timeout=20_000)
            break
        except TimeoutError:
            answered(page)
    page.wait_for_function("document.querySelectorAll('.ho-live[data-old]').length === 0")


def run_code(page, source: str):
    """Add a cell below all others and run it."""
    page.locator(".jp-Notebook .jp-Cell").last.locator(".jp-InputPrompt").click()
    page.keyboard.press("Escape")
    page.keyboard.press("b")
    page.keyboard.press("Enter")
    page.keyboard.insert_text(source)
    page.keyboard.press("Shift+Enter")


def sentence_with(page, *words) -> str:
    from playwright.sync_api import TimeoutError

    wanted = json.dumps(list(words))
    try:
        page.wait_for_function(
            f"{wanted}.every(w => document.querySelector('.ho-sentence')?.innerText.includes(w))", timeout=PATIENCE
        )
    except TimeoutError:
        raise AssertionError(f"{wanted} is not in {page.inner_text('.ho-sentence')!r}") from None
    return page.inner_text(".ho-sentence")


def picture(page, explorer: int = 0) -> bytes:
    """The bytes of the matrix that the browser shows, in one of the explorers of the page."""
    code = """async (i) => {
        const image = document.querySelectorAll('.ho-live')[i].querySelector('img');
        return Array.from(new Uint8Array(await (await fetch(image.src)).arrayBuffer())); }"""
    return bytes(page.evaluate(code, explorer))


def shows(page, values, explorer: int = 0, top: float | None = None):
    """The picture shows these numbers, by the colours of its cells (a linear scale, up to ``top`` in size)."""
    top = np.abs(values).max() if top is None else top
    expected = matplotlib.colormaps["RdBu_r"](Normalize(-top, top)(values))[..., :3] * 255
    end = time.monotonic() + PATIENCE / 1000
    while True:
        seen = colours(picture(page, explorer))
        if seen.shape == expected.shape and np.abs(seen - expected).max() <= 2:
            return
        assert time.monotonic() < end, (seen.shape, expected.shape)
        time.sleep(0.2)


def tells(page, row: int, column: int, *expected: str):
    """The picture says one of these where the mouse is at the middle of a cell, found by the pixels of the image alone.

    Its cells follow a new picture a moment later: looked at again until they say it.
    """
    end = time.monotonic() + PATIENCE / 1000
    while (told := _pointed_at(page, row, column)) not in expected:
        assert time.monotonic() < end, (told, expected)
        page.mouse.move(5, 5)
        time.sleep(0.2)


def _pointed_at(page, row: int, column: int) -> str:
    picture_of = page.locator(".ho-live img").first
    picture_of.scroll_into_view_if_needed()
    box, image = picture_of.bounding_box(), Image.open(io.BytesIO(picture(page)))
    left, top, right, bottom, rows, columns = (float(x) for x in image.text["Cells"].split())
    x, y = left + (column + 0.5) * (right - left) / columns, top + (row + 0.5) * (bottom - top) / rows
    page.mouse.move(box["x"] + x * box["width"] / image.width, box["y"] + y * box["height"] / image.height)
    told = page.evaluate("""() => {
        const cell = document.querySelector('.ho-cells i:hover');
        if (!cell || !(parseFloat(getComputedStyle(cell, '::after').height) > 10)) return '';
        return cell.getAttribute('t'); }""")
    return str(told)


def kernels(address: str, action: str, method: str) -> None:
    """Ask the server, as another client of it would, for something to happen to every kernel."""
    base, head = address.split("/lab")[0], {"Authorization": "token secret"}
    with urllib.request.urlopen(urllib.request.Request(f"{base}/api/kernels", headers=head)) as answer:
        found = json.load(answer)
    for kernel in found:
        url = f"{base}/api/kernels/{kernel['id']}{action}"
        urllib.request.urlopen(urllib.request.Request(url, headers=head, method=method)).close()


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
