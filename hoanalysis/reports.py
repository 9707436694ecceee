"""Reports: a study in; a self-contained page, the executed notebook and one netCDF per direction and partition out.

The numbers come from the store, the notebook only renders them: a second call computes nothing that is there already,
and a failing notebook loses no number. Every output appears by rename, whole or not at all.
"""

from __future__ import annotations

import contextlib
import datetime
import html
import importlib.resources
import keyword
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import xarray as xr

from hoanalysis.analysis.findings import findings
from hoanalysis.errors import HoError, ReportError, listed, nearest
from hoanalysis.store import Store, export
from hoanalysis.study import StudySpec

PAGE, NOTEBOOK, FAILED, STORE = "index.html", "report.ipynb", "report.failed.ipynb", "store"
CELL_TIMEOUT = 600  # seconds

Say = Callable[[str], None]


@dataclass
class Outcome:
    """What became of one study."""

    name: str
    folder: Path
    computed: int = 0
    units: int = 0
    dataset: Path | None = None
    error: HoError | None = None
    findings: list[str] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    @property
    def page(self) -> Path:
        return self.folder / PAGE


def report(
    studies: str | Path | Sequence[str | Path],
    out: str | Path,
    notebook: str | Path | None = None,
    parameters: Mapping[str, Any] | None = None,
    *,
    progress: bool = True,
    say: Say = print,
) -> Path:
    """Analyse studies and render their reports under ``out``; the path of the page to open.

    Parameters
    ----------
    studies
        One ``study.toml`` (or its folder), whose page is ``out/index.html``; or several, each in a folder of its
        name with an index in ``out``.
    notebook
        A notebook with a cell tagged ``parameters``, instead of the one that the study names or the built-in.
    parameters
        Values for that cell, over those of the study. ``dataset`` and ``log`` are given by this function.

    Raises
    ------
    StudyError, ReportError, HoError
        For a single study at once. Of several, the others go on and the index shows the failure; at the end one
        `ReportError` names those that failed.
    """
    given = [studies] if isinstance(studies, (str, Path)) else list(studies)
    if not given:
        raise ReportError("there is no study to report on", do="name at least one study.toml")
    out = Path(out)
    specs = [StudySpec.read(p) for p in given]
    names = [s.name for s in specs]
    if repeated := sorted({n for n in names if names.count(n) > 1}):
        raise ReportError(f"several studies are called {listed(repeated)}", do="put them in folders of different names")
    renders = [_Render(spec, notebook, parameters or {}) for spec in specs]
    _writable(out)
    if len(specs) == 1:
        outcome = _one(renders[0], Outcome(names[0], out), progress, say)
        if outcome.error is not None:
            raise outcome.error
        return outcome.page
    outcomes = [_one(r, Outcome(n, out / n), progress, say) for r, n in zip(renders, names, strict=True)]
    write_text(out / PAGE, index_page(outcomes))
    if failed := [o for o in outcomes if o.error is not None]:
        raise ReportError(
            f"{len(failed)} of {len(outcomes)} reports failed: {listed(o.name for o in failed)}",
            why="; ".join(f"{o.name}: {o.error.what}" for o in failed if o.error is not None),
            kept=f"the others, and {out / PAGE}",
        )
    return out / PAGE


def _one(render: _Render, outcome: Outcome, progress: bool, say: Say) -> Outcome:
    """Compute what is missing, export, execute, convert. An error ends this study, not the others."""
    try:
        datasets = compute(render.spec, outcome, progress, say)
        outcome.dataset = next(iter(datasets))
        ds = datasets[outcome.dataset]
        outcome.findings = findings(ds, render.spec.log())
        outcome.losses = np.atleast_1d(ds["loss"].values).tolist()
        say(f"{outcome.name}: executing {render.notebook.name}")
        executed = render.execute(outcome.folder, outcome.dataset)
        write_text(outcome.page, page(executed, outcome.name))
    except HoError as error:
        outcome.error = error
    return outcome


def compute(spec: StudySpec, outcome: Outcome, progress: bool = True, say: Say = print) -> dict[Path, xr.Dataset]:
    """Fill the store of a study and export its Datasets, one for each direction and partition."""
    from hoanalysis import units
    from hoanalysis.summaries import Settings, Work

    run, problem, _ = spec.run(), spec.problem(), spec.log()  # a log that cannot be read is named now, not at the end
    works = [Work(problem, Settings(**options)) for options in spec.settings()]
    for checkpoint in run:
        works[0].state(checkpoint)  # one that does not fit the model is named before anything is written
    outcome.folder.mkdir(parents=True, exist_ok=True)
    exported: dict[Path, xr.Dataset] = {}
    with Store.open(outcome.folder / STORE, mode="w") as store:
        for k, work in enumerate(works):
            plan = work.plan(work.steps(run), series=True)
            for line in store.register(work.name, plan):
                say(f"{outcome.name}: {line}")
            outcome.units += sum(len(step["units"]) for step in plan["steps"])
            outcome.computed += work.fill(store, run, plan, progress)
            ds = units.assemble(plan, store.read)
            name = "summaries.nc" if k == 0 else f"summaries-{work.name}.nc"
            exported[export(ds, outcome.folder / name)] = ds
    if outcome.computed:
        say(f"{outcome.name}: computed {outcome.computed} of {outcome.units} summaries")
    else:
        say(f"{outcome.name}: nothing to compute, all {outcome.units} summaries are in {outcome.folder / STORE}")
    return exported


# ---- executing the notebook -------------------------------------------------------------------------------------


class _Render:
    """A notebook with checked parameters, ready to be executed in a folder."""

    def __init__(self, spec: StudySpec, notebook: str | Path | None, parameters: Mapping[str, Any]) -> None:
        self.spec = spec
        named = spec.folder / spec.report.notebook if spec.report.notebook else builtin_notebook()
        self.notebook = Path(notebook) if notebook is not None else named
        if not self.notebook.is_file():
            raise ReportError("there is no such notebook", where=str(self.notebook))
        declared = declared_parameters(self.notebook)
        given = {**spec.report.parameters, **parameters}
        for name in given:
            if not name.isidentifier() or keyword.iskeyword(name):
                raise ReportError(f"a parameter cannot be called {name!r}", do="use a Python identifier")
            if name not in declared:
                raise ReportError(
                    f"the notebook has no parameter {name!r}", where=str(self.notebook), do=nearest(name, declared)
                )
        self.parameters = {k: plain(k, v) for k, v in given.items()}
        self.declared = declared

    def execute(self, folder: Path, dataset: Path) -> nbformat.NotebookNode:
        """Execute in ``folder``; the result is ``report.ipynb`` there, or ``report.failed.ipynb`` with the reason."""
        import papermill

        automatic = {"dataset": dataset.name, "title": self.spec.name, "study": self.spec.name}
        if self.spec.log() is not None:
            log = self.spec.folder / self.spec.checkpoints.folder / str(self.spec.checkpoints.log)
            automatic["log"] = os.path.relpath(log, folder)
        parameters = {k: v for k, v in automatic.items() if k in self.declared} | self.parameters
        temporary, reason = folder / f".executing-{os.getpid()}.ipynb", ""
        logging.getLogger("papermill").setLevel(logging.ERROR)  # its log repeats the traceback that the notebook has
        try:
            papermill.execute_notebook(
                str(self.notebook), str(temporary), parameters, cwd=str(folder), progress_bar=False,
                log_output=False, kernel_name="python3", execution_timeout=CELL_TIMEOUT,
                extra_arguments=["--IPKernelApp.log_level=ERROR"],
            )  # fmt: skip
            reason = unfinished(nbformat.read(temporary, as_version=4))
        except KeyboardInterrupt:
            _keep_failed(temporary, folder, "interrupted")
            raise
        except Exception as error:  # papermill, nbclient and the kernel each have their own
            reason = _first_line(error)
        if reason:
            _keep_failed(temporary, folder, reason)
            raise ReportError(
                f"the notebook failed: {reason}",
                where=str(self.notebook),
                do=f"open {folder / FAILED}",
                kept=f"every summary, in {folder / STORE}",
            )
        executed = nbformat.read(temporary, as_version=4)
        executed.metadata.pop("papermill", None)  # it holds the paths of this machine
        for cell in executed.cells:
            cell.metadata.pop("papermill", None)
        write_text(folder / NOTEBOOK, nbformat.writes(executed))
        temporary.unlink()
        with contextlib.suppress(FileNotFoundError):
            (folder / FAILED).unlink()
        return executed


def builtin_notebook() -> Path:
    """``report.ipynb``: inside the installed package, or in ``notebooks/`` of a checkout."""
    packaged = importlib.resources.files("hoanalysis") / "notebooks" / NOTEBOOK
    if packaged.is_file():
        return Path(str(packaged))
    return Path(__file__).resolve().parent.parent / "notebooks" / NOTEBOOK


def declared_parameters(notebook: Path) -> list[str]:
    """The names in the notebook's cell tagged ``parameters``."""
    import papermill

    try:
        return list(papermill.inspect_notebook(str(notebook)))
    except Exception as error:
        raise ReportError(f"this is not a notebook: {_first_line(error)}", where=str(notebook)) from None


def plain(name: str, value: Any) -> Any:
    """A parameter as the JSON-like value that papermill writes without loss; `ReportError` where there is none."""
    if isinstance(value, np.generic):
        return value.item()  # before the next line: numpy's float64 is a float, and would be written as np.float64(..)
    if isinstance(value, (bool, int, float, str, type(None))):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, (datetime.datetime, datetime.date)):
        return value.isoformat()
    if isinstance(value, (list, tuple)):
        return [plain(name, v) for v in value]
    if isinstance(value, Mapping) and all(isinstance(k, str) for k in value):
        return {k: plain(name, v) for k, v in value.items()}
    raise ReportError(
        f"the parameter {name!r} is a {type(value).__name__}, which a notebook cannot be given",
        do="pass numbers, text, lists or tables of them",
    )


def unfinished(notebook: nbformat.NotebookNode) -> str:
    """Why an executed notebook is not complete, or an empty string.

    papermill's own metadata marks runs as completed whose kernel died, so the cells themselves are looked at.
    """
    for position, cell in enumerate(notebook.cells):
        if cell.cell_type != "code" or not cell.source.strip():
            continue
        for output in cell.outputs:
            if output.output_type == "error":
                return f"cell {position}: {output.ename}: {output.evalue}"
        if cell.execution_count is None:
            return f"cell {position} was not executed"
    return ""


def _keep_failed(temporary: Path, folder: Path, reason: str) -> None:
    """The notebook as far as it came, with the reason on top; the last good page and notebook stay as they were."""
    if not temporary.exists():
        return
    failed = nbformat.read(temporary, as_version=4)
    failed.cells.insert(0, nbformat.v4.new_markdown_cell(f"**This report failed.** {html.escape(reason)}"))
    write_text(folder / FAILED, nbformat.writes(failed))
    temporary.unlink()


def _first_line(error: BaseException) -> str:
    ename, evalue = getattr(error, "ename", None), getattr(error, "evalue", None)
    if ename:
        return f"cell {getattr(error, 'cell_index', '?')}: {ename}: {str(evalue).splitlines()[0] if evalue else ''}"
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"


# ---- pages ------------------------------------------------------------------------------------------------------

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 72rem; margin: 2rem auto; padding: 0 1.5rem; }
h1, h2, h3 { line-height: 1.2; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ddd; padding-bottom: .3rem; }
img { max-width: 100%; height: auto; } pre { overflow-x: auto; background: #f6f6f6; padding: .6rem; }
table { border-collapse: collapse; font-size: 14px; } td, th { padding: .25rem .7rem; border-bottom: 1px solid #e5e5e5;
text-align: right; } th { background: #fafafa; } a { color: #1a4f8b; } .anchor-link { display: none; }
.card { border: 1px solid #ddd; border-radius: 6px; padding: 1rem 1.2rem; margin: 1rem 0; }
.failed { border-color: #b40426; background: #fdf0f0; } svg { vertical-align: middle; }
"""
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{style}</style></head>
<body>
{body}
</body></html>
"""


def page(executed: nbformat.NotebookNode, title: str) -> str:
    """A self-contained page: the notebook's text and pictures, no code, no script, nothing from elsewhere."""
    from nbconvert import HTMLExporter

    exporter = HTMLExporter(template_name="basic", exclude_input=True, exclude_input_prompt=True,
                            exclude_output_prompt=True, embed_images=True)  # fmt: skip
    body, _ = exporter.from_notebook_node(executed)
    return _PAGE.format(policy=_POLICY, title=html.escape(title), style=_STYLE, body=body)


def index_page(outcomes: Sequence[Outcome]) -> str:
    """One card a study: a sparkline of the loss and the first findings, or in red what went wrong."""
    cards = []
    for o in outcomes:
        name = html.escape(o.name)
        if o.error is not None:
            cards.append(f'<div class="card failed"><h2>{name}</h2><pre>{html.escape(str(o.error))}</pre></div>')
            continue
        lines = "".join(f"<li>{html.escape(line)}</li>" for line in o.findings[:4])
        link = f"{html.escape(o.name, quote=True)}/{PAGE}"
        cards.append(
            f'<div class="card"><h2><a href="{link}">{name}</a> {sparkline(o.losses)}</h2><ul>{lines}</ul></div>'
        )
    return _PAGE.format(policy=_POLICY, title="Reports", style=_STYLE, body="<h1>Reports</h1>\n" + "\n".join(cards))


def sparkline(values: Sequence[float], width: int = 120, height: int = 24) -> str:
    """A small curve as inline SVG; gaps where values are missing."""
    v = np.asarray(values, dtype=float)
    finite = np.isfinite(v)
    if finite.sum() < 2:
        return ""
    low, span = v[finite].min(), np.ptp(v[finite]) or 1.0
    x, y = np.linspace(1, width - 1, len(v)), height - 2 - (v - low) / span * (height - 4)
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x[finite], y[finite], strict=True))
    curve = f'<polyline points="{points}" fill="none" stroke="#1a4f8b"/>'
    return f'<svg width="{width}" height="{height}" role="img" aria-label="loss">{curve}</svg>'


# ---- files ------------------------------------------------------------------------------------------------------


def write_text(path: Path, text: str) -> None:
    """The whole file or nothing: temp, fsync, rename."""
    with _replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as e:
        raise ReportError(f"the file cannot be written: {e.strerror}", where=str(path)) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _writable(folder: Path) -> None:
    parent = folder
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise ReportError(f"{parent} is a file, not a folder", where=str(folder), do="choose another --out")
    if not os.access(parent, os.W_OK):
        raise ReportError("the output folder cannot be written", where=str(folder), do="choose another --out")
