"""A real JupyterLab: play from the last checkpoint, and a kernel that is restarted under a live explorer (row W4)."""

import json
import urllib.request
from urllib.parse import parse_qs, urlsplit

from tests.explorer.test_browser import ds, lab, page  # noqa: F401

MARK = "() => getComputedStyle(document.querySelector('.ho-live'), '::before').content"


def restart(address: str) -> None:
    """Restart every kernel of the server."""
    parts = urlsplit(address)
    token = parse_qs(parts.query)["token"][0]
    kernels = f"{parts.scheme}://{parts.netloc}/api/kernels"
    head = {"Authorization": f"token {token}"}
    with urllib.request.urlopen(urllib.request.Request(kernels, headers=head)) as answer:
        found = json.load(answer)
    for kernel in found:
        again = urllib.request.Request(f"{kernels}/{kernel['id']}/restart", headers=head, method="POST")
        urllib.request.urlopen(again).close()


def test_play_starts_over_from_the_last_checkpoint_and_a_restarted_kernel_is_said(page, lab):  # noqa: F811
    assert page.inner_text(".ho-sentence").startswith("Step 30")
    page.locator(".ho-live .widget-play button").first.click()
    page.wait_for_function("document.querySelector('.ho-sentence').innerText.startsWith('Step 0:')")
    page.wait_for_function("document.querySelector('.ho-sentence').innerText.startsWith('Step 30')")
    assert "Disconnected" not in page.evaluate(MARK)
    restart(lab[0])
    page.wait_for_function(f"({MARK})().includes('Disconnected')")
