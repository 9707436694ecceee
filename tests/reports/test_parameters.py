"""Notebooks and their parameters: checked before anything is computed, given without loss."""

import ast
import datetime
import enum
import math
from collections import OrderedDict
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from papermill.translators import translate_parameters

import hoanalysis as ho
from hoanalysis.errors import ReportError
from hoanalysis.reports import execute
from hoanalysis.reports.execute import plain, prepare
from tests.reports.notebooks import notebook


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"y": 1}, "has no parameter 'y'"),
        ({"dataste": 1}, "did you mean 'dataset'"),
        ({"not a name": 1}, "cannot be called 'not a name'"),
        ({"lambda": 1}, "cannot be called 'lambda'"),
        ({"x\nimport os": 1}, r"cannot be called 'x\\nimport os'"),
        ({"x = 1; y": 1}, "cannot be called"),
        ({"": 1}, "cannot be called ''"),
        ({3: 1}, "cannot be called 3"),
    ],
)
def test_R1_names_are_checked_before_anything_is_computed(study: Path, tmp_path: Path, parameters, words) -> None:
    mine = notebook(tmp_path / "n.ipynb", "print(x)")
    with pytest.raises(ReportError, match=words):
        ho.report(study, tmp_path / "out", mine, parameters, progress=False)
    assert not (tmp_path / "out").exists()


class Level(enum.IntEnum):
    HIGH = 3


class Colour(enum.StrEnum):
    RED = "red"


class Loud(str):
    def __str__(self) -> str:
        return "__import__('os').abort()"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.float64(0.1), 0.1),
        (np.float32(0.1), float(np.float32(0.1))),
        (np.int64(2), 2),
        (np.bool_(True), True),
        (np.str_("a"), "a"),
        (np.datetime64("2024-05-01T12:00"), "2024-05-01T12:00"),
        (np.array([[1.5, 2], [3, np.inf]]), [[1.5, 2.0], [3.0, np.inf]]),
        (Path("x/y"), "x/y"),
        ((1, (np.int8(2), None)), [1, [2, None]]),
        (datetime.date(2024, 5, 1), "2024-05-01"),
        (datetime.datetime(2024, 5, 1, tzinfo=datetime.UTC), "2024-05-01T00:00:00+00:00"),
        (OrderedDict(k={"n": None}), {"k": {"n": None}}),
        (Level.HIGH, 3),
        (Colour.RED, "red"),
        (Loud("quiet"), "quiet"),
        (10**30, 10**30),
    ],
    ids=repr,
)
def test_R2_values_are_converted_without_loss(value: Any, expected: Any) -> None:
    made = plain("x", value)
    assert made == expected
    assert type(made) is type(expected)
    assert type(made) in (bool, int, float, str, list, dict, type(None))


@pytest.mark.parametrize(
    "value",
    [object(), 1j, np.complex128(1j), b"x", {1, 2}, {1: 2}, [object()], {"a": {"b": b""}}, np.timedelta64(1, "ns"),
     datetime.timedelta(1), datetime.time(1), np.zeros(10_001), np.array([1j]), np.longdouble(1), range(3), print],
    ids=lambda v: type(v).__name__,
)  # fmt: skip
def test_R2_what_papermill_would_turn_into_text_or_code_is_refused(study: Path, tmp_path: Path, value: Any) -> None:
    mine = notebook(tmp_path / "n.ipynb", "print(x)")
    with pytest.raises(ReportError, match=r"the parameter 'x' is a .*, which a notebook cannot be given"):
        ho.report(study, tmp_path / "out", mine, {"x": value}, progress=False)
    assert not (tmp_path / "out").exists()


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters()), inner, max_size=3),
    max_leaves=6,
)


@given(VALUES)
def test_R2_a_value_arrives_as_it_was_given(value: Any) -> None:
    """Read back as a literal: papermill's line holds no code, whatever the text says."""
    source = translate_parameters("python3", "python", {"x": plain("x", value)}, "Parameters")
    (assignment,) = ast.parse(source).body
    assert isinstance(assignment, ast.Assign)
    for call in ast.walk(assignment.value):  # float('nan') and its like
        assert not isinstance(call, ast.Call) or ast.unparse(call) in ("float('nan')", "float('inf')", "float('-inf')")
    made = eval(ast.unparse(assignment.value), {"__builtins__": {}, "float": float})
    assert same(made, value), (made, value)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, float) and math.isnan(a):
        return isinstance(b, float) and math.isnan(b)
    return a == b and type(a) is type(b)


def test_R6_a_missing_kernel_is_told_with_those_that_are_there(study: Path, tmp_path: Path) -> None:
    mine = notebook(tmp_path / "n.ipynb", "print(x)", kernel="no-such-kernel")
    with pytest.raises(ReportError, match="kernel 'no-such-kernel' is not installed") as caught:
        ho.report(study, tmp_path / "out", mine, progress=False)
    assert "'python3'" in caught.value.why
    assert not (tmp_path / "out").exists()


def test_a_notebook_without_a_kernel_runs_in_this_interpreter(tmp_path: Path, monkeypatch) -> None:
    """Even where another Python is installed under the name python3."""
    elsewhere = tmp_path / "jupyter" / "kernels" / "python3"
    elsewhere.mkdir(parents=True)
    (elsewhere / "kernel.json").write_text('{"argv": ["/nowhere/python"], "display_name": "P", "language": "python"}')
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    mine = notebook(tmp_path / "n.ipynb", "import sys; print(sys.prefix)", kernel=None)
    executed = prepare(mine, {}, {}).execute(tmp_path)
    import sys

    assert executed.cells[1].outputs[0].text.strip() == sys.prefix


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "this is not a notebook"),
        ("{}", "this is not a notebook"),
        ("[1]", "this is not a notebook"),
        ('{"cells": 3, "nbformat": 4, "nbformat_minor": 5, "metadata": {}}', "this is not a notebook"),
        (b"\xff\xfe", "this is not a notebook"),
        ("folder", "the notebook cannot be read"),
    ],
)
def test_what_is_no_notebook_is_told(tmp_path: Path, content, words: str) -> None:
    path = tmp_path / "n.ipynb"
    path.mkdir() if content == "folder" else path.write_bytes(
        content if isinstance(content, bytes) else content.encode()
    )
    with pytest.raises(ReportError, match=words):
        prepare(path, {}, {})


def test_a_notebook_needs_a_parameters_cell(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="has no parameters cell") as caught:
        prepare(notebook(tmp_path / "n.ipynb", "print(1)", parameters=None), {}, {"dataset": "d.nc"})
    assert "'dataset'" in caught.value.do
    mine = notebook(tmp_path / "n.ipynb", "print(1)", parameters="# nothing")
    assert len(prepare(mine, {}, {"dataset": "d.nc"}).node.cells) == 2
    with pytest.raises(ReportError, match="has no parameter 'x'"):
        prepare(mine, {"x": 1}, {})


def test_what_another_execution_left_does_not_count(tmp_path: Path) -> None:
    """Parameters, outputs and marks of papermill in the file are those of another day."""
    path = notebook(tmp_path / "n.ipynb", "print(x)")
    old = nbformat.read(path, as_version=4)
    injected = nbformat.v4.new_code_cell("x = 'old'", metadata={"tags": ["injected-parameters"]}, id="old")
    old.cells.insert(1, injected)
    for cell in old.cells:
        cell.execution_count, cell.outputs = 7, [nbformat.v4.new_output("stream", text="old")]
        cell.metadata["papermill"] = {"status": "completed", "exception": False}
    old.metadata["papermill"] = {"exception": None, "parameters": {"x": "old"}}
    nbformat.write(old, path)
    made = prepare(path, {"x": 2}, {"dataset": "d.nc", "log": "l.csv"}).node
    assert [c.source for c in made.cells] == [
        'dataset = ""\nx = 1',
        '# Parameters\ndataset = "d.nc"\nx = 2\n',
        "print(x)",
    ]
    assert [(c.execution_count, c.outputs) for c in made.cells] == [(None, [])] * 3
    assert "papermill" not in str(made)
    assert execute.unfinished(made) == "cell 0 was not executed"


def test_notebooks_of_older_formats_get_ids_that_do_not_change(tmp_path: Path) -> None:
    path = notebook(tmp_path / "n.ipynb", "print(x)")
    old = nbformat.read(path, as_version=4)
    old.nbformat_minor = 4
    for cell in old.cells:
        del cell["id"]
    path.write_text(nbformat.writes(old))
    made = [prepare(path, {"x": 2}, {}).node for _ in range(2)]
    assert made[0] == made[1]
    assert [c.id for c in made[0].cells] == ["cell-0", "injected-parameters", "cell-1"]
