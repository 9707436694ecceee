"""Who looks at a notebook: somebody who can move a slider, or nobody. Without ipywidgets, as reports need none."""

from __future__ import annotations

import sys


def live() -> bool:
    """Whether somebody can move a slider: a kernel whose frontend could answer a question. Papermill's could not."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    kernel = getattr(shell, "kernel", None)
    if kernel is None:
        return False
    try:
        return bool(kernel.get_parent("shell")["content"].get("allow_stdin"))
    except (KeyError, TypeError, AttributeError):
        return False
