"""A notebook with checked parameters, executed in a kernel: the result, or the reason why there is none.

papermill translates the parameters, nbclient runs the cells. Whether a run is complete is read off the cells, since
papermill's own metadata marks runs as completed whose kernel died.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import datetime
import enum
import importlib.resources
import keyword
import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
from jupyter_client.kernelspec import NATIVE_KERNEL_NAME, KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from jupyter_core.utils import ensure_event_loop
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

from hoanalysis.errors import ReportError, listed, nearest
from hoanalysis.store.files import shown

NOTEBOOK = "report.ipynb"
CELL_TIMEOUT = 600.0  # seconds
PARAMETERS, INJECTED = "parameters", "injected-parameters"
MAX_ELEMENTS = 10_000  # of an array that becomes a line of code

_log = logging.getLogger("hoanalysis.reports.kernel")
_log.setLevel(logging.CRITICAL + 1)  # nbclient logs what it raises


class NotebookFailed(Exception):
    """A notebook that did not run to its end: the reason, and the notebook as far as it came."""

    def __init__(self, reason: str, notebook: nbformat.NotebookNode) -> None:
        super().__init__(reason)
        self.reason, self.notebook = reason, notebook


@dataclass(frozen=True)
class Prepared:
    """A notebook that is ready to be executed: kernel found, parameters checked and in their cell, no outputs."""

    path: Path
    node: nbformat.NotebookNode
    kernel: str

    def execute(self, folder: Path, timeout: float = CELL_TIMEOUT) -> nbformat.NotebookNode:
        """The executed notebook, run in ``folder``; a cell may take ``timeout`` seconds.

        Raises
        ------
        NotebookFailed
            On an exception in a cell, a timeout, a kernel that died or did not start, or a cell that was left out.
        KeyboardInterrupt
            On Ctrl-C; its ``__cause__`` is the `NotebookFailed`.
        """
        node = copy.deepcopy(self.node)
        client = _Client(node, kernel_name=self.kernel, timeout=timeout, record_timing=False, log=_log,
                         shutdown_kernel="immediate", resources={"metadata": {"path": str(folder)}})  # fmt: skip
        try:
            client.execute_cells()
        except KeyboardInterrupt as stop:
            raise stop from NotebookFailed(f"{client.place}: interrupted", node)
        except CellTimeoutError:
            raise NotebookFailed(f"{client.place}: timeout, no answer within {timeout:g} seconds", node) from None
        except DeadKernelError:
            raise NotebookFailed(f"{client.place}: the kernel died (killed, or out of memory?)", node) from None
        except CellExecutionError as error:
            raise NotebookFailed(f"{client.place}: {_one_line(error.ename, error.evalue)}", node) from None
        except Exception as error:  # a kernel that does not start has no exception of its own
            raise NotebookFailed(f"{client.place}: {_one_line(type(error).__name__, str(error))}", node) from None
        if reason := unfinished(node):
            raise NotebookFailed(reason, node)
        return node


def builtin_notebook() -> Path:
    """``report.ipynb``: inside the installed package, or in ``notebooks/`` of a checkout."""
    packaged = importlib.resources.files("hoanalysis") / "notebooks" / NOTEBOOK
    if packaged.is_file():
        return Path(str(packaged))
    return Path(__file__).resolve().parents[2] / "notebooks" / NOTEBOOK


def prepare(path: Path, given: Mapping[str, Any], automatic: Mapping[str, Any]) -> Prepared:
    """Read the notebook at ``path`` and put the parameters into it.

    ``given`` must be declared in the notebook's parameters cell. ``automatic`` is what this library knows; of it the
    notebook receives what it declares and ``given`` does not have.

    Raises
    ------
    ReportError
        If this is not a notebook, has no parameters cell or names a kernel that is not installed; if a parameter is
        unknown, cannot be a name, or has a value that a notebook cannot be given.
    """
    from papermill.translators import translate_parameters

    node = _read(path)
    kernel, language = _kernel(path, node)
    position = next((i for i, c in enumerate(node.cells) if PARAMETERS in _tags(c) and c.cell_type == "code"), None)
    if position is None:
        raise ReportError(
            "the notebook has no parameters cell",
            where=shown(path),
            do="tag the code cell that assigns them 'parameters' (JupyterLab: property inspector, cell tags); "
            "'dataset' there receives the netCDF of the study",
        )
    declared = _declared(path, node.cells[position], kernel, language)
    for name in given:
        _check_name(name, declared, path)
    values = {k: v for k, v in automatic.items() if k in declared} | {k: plain(k, v) for k, v in given.items()}
    filled = []
    if values:
        source = translate_parameters(kernel, language, values, "Parameters")
        filled = [nbformat.v4.new_code_cell(source, id=INJECTED, metadata={"tags": [INJECTED]})]
    after = [c for c in node.cells[position + 1 :] if INJECTED not in _tags(c)]  # of an earlier execution
    node.cells = node.cells[: position + 1] + filled + after
    return Prepared(path, node, kernel)


def _read(path: Path) -> nbformat.NotebookNode:
    """The notebook without outputs, without traces of other runs, with an id in each cell that depends on nothing."""
    if path.exists() and not path.is_file() and not path.is_dir():  # it would be read for ever
        raise ReportError("this is a pipe, a socket or a device, not a notebook", where=shown(path))
    try:
        node = nbformat.v4.upgrade(_with_ids(nbformat.reads(path.read_text(encoding="utf-8"), as_version=4)))
    except FileNotFoundError:
        raise ReportError("there is no such notebook", where=shown(path)) from None
    except OSError as error:
        raise ReportError(f"the notebook cannot be read: {error.strerror}", where=shown(path)) from None
    except Exception as error:  # nbformat raises what the JSON happens to break
        raise ReportError(
            f"this is not a notebook: {_one_line(type(error).__name__, str(error))}", where=shown(path)
        ) from None
    node.metadata.pop("papermill", None)
    for cell in node.cells:
        cell.metadata.pop("papermill", None)
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return node


def _with_ids(node: nbformat.NotebookNode) -> nbformat.NotebookNode:
    if (node.nbformat, node.nbformat_minor) < (4, 5):
        node.nbformat_minor = 5
        for i, cell in enumerate(node.cells):
            cell["id"] = f"cell-{i}"
    return node


def _tags(cell: nbformat.NotebookNode) -> list[str]:
    return cell.metadata.get("tags", [])


def _kernel(path: Path, node: nbformat.NotebookNode) -> tuple[str, str]:
    """Name and language of the notebook's kernel."""
    name = node.metadata.get("kernelspec", {}).get("name") or NATIVE_KERNEL_NAME
    specs = _specs(name)
    installed = specs.find_kernel_specs()
    if name not in installed:
        known = sorted({*KernelSpecManager().find_kernel_specs(), NATIVE_KERNEL_NAME})
        raise ReportError(
            f"the notebook's kernel {name!r} is not installed",
            where=shown(path),
            why=f"the kernels here are {listed(known)}",
            do="choose one of them in the notebook, or install that kernel",
        )
    return name, specs.get_kernel_spec(name).language.lower()


def _specs(name: str) -> KernelSpecManager:
    """Where a kernel is looked for: ``python3`` is this interpreter, whatever else is installed under that name."""
    return KernelSpecManager(kernel_dirs=[]) if name == NATIVE_KERNEL_NAME else KernelSpecManager()


def _declared(path: Path, cell: nbformat.NotebookNode, kernel: str, language: str) -> list[str]:
    from papermill.exceptions import PapermillException
    from papermill.translators import papermill_translators

    try:
        return [p.name for p in papermill_translators.find_translator(kernel, language).inspect(cell)]
    except (PapermillException, NotImplementedError):
        raise ReportError(
            f"the parameters of a notebook in {language!r} cannot be read", where=shown(path), do="use Python"
        ) from None


def _check_name(name: object, declared: Sequence[str], path: Path) -> None:
    if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name):
        raise ReportError(f"a parameter cannot be called {name!r}", do="use a Python identifier")
    if name not in declared:
        raise ReportError(
            f"the notebook has no parameter {name!r}",
            where=shown(path),
            do=nearest(name, declared) if declared else "assign it in the parameters cell",
        )


def plain(name: str, value: Any) -> Any:
    """A parameter as None, bool, int, float, str, or lists and tables of them: what papermill writes without loss.

    Paths and dates become text, tuples and small arrays lists, NumPy's numbers Python's. Everything else, which
    papermill would write as the text or the code that ``str`` makes of it, raises `ReportError`.
    """
    if isinstance(value, enum.Enum):
        value = value.value
    if isinstance(value, np.ndarray) and value.size <= MAX_ELEMENTS and value.dtype.kind in "biufUO":
        return plain(name, value.tolist())
    if isinstance(value, np.datetime64):
        value = np.datetime_as_string(value)
    if isinstance(value, np.generic) and not isinstance(value, np.timedelta64):  # whose item() may be a bare integer
        value = value.item()  # numpy's float64 is a float, and would be written as np.float64(..)
    if value is None or isinstance(value, bool):
        return value
    for kind in (int, float, str):
        if isinstance(value, kind) and not isinstance(value, np.generic):
            return kind.__str__(value) if kind is str else kind(value)  # a subclass may print as anything
    if isinstance(value, os.PathLike) and isinstance(os.fspath(value), str):
        return os.fspath(value)
    if isinstance(value, (datetime.datetime, datetime.date)):
        return value.isoformat()
    if isinstance(value, (list, tuple)):
        return [plain(name, v) for v in value]
    if isinstance(value, Mapping) and all(isinstance(k, str) for k in value):
        return {k: plain(name, v) for k, v in value.items()}
    raise ReportError(
        f"the parameter {name!r} is a {type(value).__name__}, which a notebook cannot be given",
        do="pass numbers, text, lists or tables with text as keys; the path of a file for what is larger",
    )


# ---- running ----------------------------------------------------------------------------------------------------


class _Client(NotebookClient):
    """nbclient, cell by cell, with Ctrl-C left to Python.

    nbclient's own ``execute`` catches the signal, kills the kernel and waits for its answer.
    """

    place = "before the first cell"

    def create_kernel_manager(self) -> AsyncKernelManager:
        self.km = AsyncKernelManager(kernel_name=self.kernel_name, kernel_spec_manager=_specs(self.kernel_name))
        if self.km.ipykernel:  # it warns of its sockets and of Ctrl-C, on the terminal of this process
            self.extra_arguments = ["--IPKernelApp.log_level=ERROR"]
        return self.km

    def execute_cells(self) -> None:
        self.reset_execution_trackers()
        try:
            with self.setup_kernel():
                try:
                    for position, cell in enumerate(self.nb.cells):
                        if cell.cell_type == "code":
                            self.place = f"In [{self.code_cells_executed + 1}]"
                        self.execute_cell(cell, position, execution_count=self.code_cells_executed + 1)
                    self.set_widgets_metadata()
                finally:
                    _cancel_pending()
        except KeyboardInterrupt:  # while the kernel started, it is not in setup_kernel's hands yet
            with contextlib.suppress(Exception):
                _cancel_pending()
                if self.km is not None and self.km.has_kernel:
                    self._cleanup_kernel()
            raise


def _cancel_pending() -> None:
    """What still waits for the kernel would outlive it, and complain."""
    with contextlib.suppress(RuntimeError):
        asyncio.get_running_loop()
        return  # the caller's own loop: its tasks are not ours
    loop = ensure_event_loop()
    pending = asyncio.all_tasks(loop)
    for task in pending:
        task.cancel()
    if pending:
        loop.run_until_complete(asyncio.gather(*pending, return_exceptions=True))


def unfinished(notebook: nbformat.NotebookNode) -> str:
    """Why an executed notebook is not complete, or an empty string."""
    for position, cell in enumerate(notebook.cells):
        if cell.cell_type != "code" or not cell.source.strip() or "skip-execution" in _tags(cell):
            continue
        if cell.execution_count is None:
            return f"cell {position} was not executed"
        for output in cell.outputs:
            if output.output_type == "error" and "raises-exception" not in _tags(cell):
                return f"In [{cell.execution_count}]: {_one_line(output.ename, output.evalue)}"
    return ""


_ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


def _one_line(name: str, text: str) -> str:
    lines = _ANSI.sub("", str(text)).strip().splitlines()
    return f"{name}: {lines[0]}" if lines else name


def failed_copy(failure: NotebookFailed) -> nbformat.NotebookNode:
    """The notebook as far as it came, with the reason on top."""
    node = copy.deepcopy(failure.notebook)
    # an indented block is literal in Markdown, whatever the reason quotes
    text = f"**This report failed.**\n\n    {failure.reason}"
    node.cells.insert(0, nbformat.v4.new_markdown_cell(text, id="failure"))
    return node
