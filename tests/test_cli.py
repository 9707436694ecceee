"""The command line as its users see it: exit codes, sentences on stderr, nothing half-written."""

import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import save_file
from torch import zeros
from typer.testing import CliRunner

from hoanalysis import __version__
from hoanalysis.cli import app
from hoanalysis.store import Store
from tests.reports.notebooks import notebook


def call(*arguments: object):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_help_and_version() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "hoanalysis.cli", "--help"], capture_output=True, text=True, check=True
    )
    for command in ("init", "report", "summarize", "show", "diff", "unlock"):
        assert command in result.stdout
    assert call("--version").output.strip() == __version__


def test_report_says_where_it_is(study: Path, tmp_path: Path) -> None:
    plain = notebook(tmp_path / "n.ipynb", "print('x is', x)")
    result = call("report", study, "--out", tmp_path / "out", "--notebook", plain, "-p", "x=41.5", "--quiet")
    assert result.exit_code == 0, result.output
    assert result.output.splitlines()[-1] == f"report: {tmp_path / 'out' / 'index.html'}"
    assert "x is 41.5" in (tmp_path / "out" / "index.html").read_text()


def test_summarize_and_show(study: Path, tmp_path: Path) -> None:
    result = call("summarize", study, "--out", tmp_path / "out", "--quiet")
    assert result.exit_code == 0, result.output
    for path in (tmp_path / "out" / "summaries.nc", tmp_path / "out" / "store"):
        shown = call("show", path)
        assert shown.exit_code == 0, shown.output
        assert "D3_diag" in shown.output
        assert "loss went from" in shown.output


def test_summarize_into_a_file_is_a_sentence(study: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    result = call("summarize", study, "--out", tmp_path / "out", "--quiet")
    assert result.exit_code == 1
    assert "is a file, not a folder" in result.output
    assert "choose another --out" in result.output
    assert (tmp_path / "out").read_text() == "mine"


def test_a_damaged_unit_is_told_in_a_sentence(study: Path, tmp_path: Path) -> None:
    arguments = [sys.executable, "-m", "hoanalysis.cli", "summarize", str(study), "--out", str(tmp_path / "out"), "-q"]
    subprocess.run(arguments, capture_output=True, check=True)
    file = next(p for p in (tmp_path / "out" / "store" / "units").iterdir() if b'"summary"' in p.read_bytes()[:2000])
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    again = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert again.stderr.startswith("warning: ")
    assert "StoreWarning" not in again.stderr
    assert "computed 1 of 3" in again.stdout


def test_show_of_a_store_with_several_studies(study: Path, tmp_path: Path) -> None:
    study.write_text(study.read_text() + 'directions = ["gradient", "weights"]\n')
    assert call("summarize", study, "--out", tmp_path / "out", "--quiet").exit_code == 0
    store = tmp_path / "out" / "store"
    both = call("show", store)
    assert both.exit_code == 0, both.output
    assert [line for line in both.output.splitlines() if line.endswith("-canonical:")] == [
        "gradient-canonical:", "weights-canonical:",
    ]  # fmt: skip
    one = call("show", store, "--name", "weights-canonical")
    assert "gradient-canonical" not in one.output
    assert "loss went from" in one.output
    wrong = call("show", store, "--name", "weight")
    assert wrong.exit_code == 1
    assert "weights-canonical" in wrong.output
    assert call("show", tmp_path / "out" / "summaries.nc", "--name", "weights").exit_code == 1


def stored(path: Path, seed: int, **kwargs) -> Path:
    from hoanalysis.analysis.example import example
    from hoanalysis.store import export

    return export(example(seed, **kwargs), path)


def test_python_m_is_the_command() -> None:
    command = [sys.executable, "-m", "hoanalysis", "--version"]
    told = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (told.returncode, told.stdout, told.stderr) == (0, call("--version").output, "")


def test_diff_tells_and_writes_the_differences(tmp_path: Path) -> None:
    import pandas as pd
    import xarray as xr

    from hoanalysis.analysis.compare import compare, differences
    from hoanalysis.store import open_dataset

    a, b = stored(tmp_path / "a.nc", 1, steps=3), stored(tmp_path / "b.nc", 2, steps=3, layers=3)
    expected = compare(open_dataset(a), open_dataset(b), step=(0, "last"))
    result = call("diff", a, b, "--step", "0:last", "--out", tmp_path / "d.csv", "--top", 2)
    assert result.exit_code == 0, result.output
    assert "only b has 'layer2.weight', 'layer2.bias'" in result.output
    assert "errors: independent" in result.output
    assert "\n- errors too small: u is the gradient of the data" in result.output
    assert "by chance." not in result.output
    first = differences(expected)[lambda f: f["quantity"] == "D2"].iloc[0]
    table = next(
        part for part in result.output.split("\n\n") if "\n" in part and part.splitlines()[1].split()[0] == "D2"
    )
    assert table.splitlines()[1].split()[:3] == ["D2", first.group, first.group2]
    assert float(table.splitlines()[1].split()[-1]) == pytest.approx(first.significance, rel=1e-3)
    assert len(table.splitlines()) == 3
    written = pd.read_csv(tmp_path / "d.csv", keep_default_na=False, na_values={"significance": [""], "se": [""]})
    pd.testing.assert_frame_equal(written, differences(expected), check_exact=False, rtol=1e-12)
    result = call("diff", a, b, "--out", tmp_path / "d.nc", "--top", 0)
    assert result.output.splitlines()[-1] == f"wrote {tmp_path / 'd.nc'}"
    with xr.open_dataset(tmp_path / "d.nc", engine="h5netcdf") as again:
        xr.testing.assert_allclose(again.load(), compare(open_dataset(a), open_dataset(b)))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.nc", "b.nc", "d.csv", "d.nc"]


def test_diff_of_the_studies_of_two_stores(study: Path, tmp_path: Path) -> None:
    study.write_text(study.read_text() + 'directions = ["gradient", "weights"]\n')
    assert call("summarize", study, "--out", tmp_path / "out", "--quiet").exit_code == 0
    store = tmp_path / "out" / "store"
    same = call("diff", store, store, "--name", "weights-canonical", "--step", "0:20")
    assert same.exit_code == 0, same.output
    assert "errors: paired by block" in same.output
    unnamed = call("diff", store, store)
    assert unnamed.exit_code == 1
    assert "'gradient-canonical', 'weights-canonical'" in unnamed.output
    crossed = call("diff", store, tmp_path / "out" / "summaries.nc", "--name", "weights-canonical")
    assert crossed.exit_code == 1
    assert "along different directions: 'weights' and 'gradient'" in crossed.output


def test_labels_cannot_command_the_terminal(tmp_path: Path) -> None:
    from hoanalysis.analysis.example import example
    from hoanalysis.store import export

    strange = ["\x1b[31mred", "a\nb", "<b>\u202e", "\u6f22"]
    paths = []
    for seed in (1, 2):
        ds = example(seed).assign_coords(dict.fromkeys(("group", "group2", "group3"), strange))
        paths.append(export(ds, tmp_path / f"{seed}.nc"))
    result = call("diff", *paths, "--top", 20)
    assert result.exit_code == 0, result.output
    assert "\x1b" not in result.output
    assert "\u202e" not in result.output
    assert "\u25a1[31mred" in result.output
    assert "a\u25a1b" in result.output
    assert "\u6f22" in result.output


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["a.nc", "c.nc"], ["there is no Dataset here", "c.nc", "a.nc"]),
        (["a.nc", "text.nc"], ["text.nc", "not a netCDF file"]),
        (["a.nc", "one.nc"], ["a holds 2 checkpoints", "give step="]),
        (["a.nc", "one.nc", "--step", "7"], ["a has no checkpoint at step 7", "'0', '10'"]),
        (["a.nc", "one.nc", "--step", "x"], ["--step 'x'", "whole number"]),
        (["a.nc", "one.nc", "--step", "0:1:2"], ["names 3 steps"]),
        (["a.nc", "weights.nc"], ["different directions: 'gradient' and 'weights'"]),
        (["a.nc", "layers.nc"], ["no group has the same label", "merge"]),
        (["a.nc", "a.nc", "--name", "x"], ["neither is a store"]),
        (["a.nc", "a.nc", "--out", "d.txt"], ["'.txt' says no format", ".csv"]),
        (["a.nc", "a.nc", "--out", "gone/d.csv"], ["folder of --out is not there"]),
        (["a.nc", "a.nc", "--out", "a.nc"], ["one of the two that are compared", "nothing was written"]),
        (["a.nc", "a.nc", "--out", "folder.csv"], ["--out is a folder"]),
    ],
)
def test_diff_explains_what_it_cannot_do(tmp_path: Path, monkeypatch, options: list[str], words: list[str]) -> None:
    from hoanalysis.analysis.example import example
    from hoanalysis.analysis.merge import merge
    from hoanalysis.store import export

    monkeypatch.chdir(tmp_path)
    before = stored(tmp_path / "a.nc", 1, steps=2).read_bytes()
    stored(tmp_path / "one.nc", 1)
    export(example(1, steps=2).assign_attrs(direction="weights"), tmp_path / "weights.nc")
    export(merge(example(1, steps=2), "layer"), tmp_path / "layers.nc")
    (tmp_path / "text.nc").write_text("hello")
    (tmp_path / "folder.csv").mkdir()
    names = sorted(p.name for p in tmp_path.iterdir())
    result = call("diff", *options)
    assert result.exit_code == 1, result.output
    for word in words:
        assert word in result.output, result.output
    assert "Traceback" not in result.output
    assert sorted(p.name for p in tmp_path.iterdir()) == names
    assert (tmp_path / "a.nc").read_bytes() == before


def test_a_second_writer_is_told_how_to_go_on(study: Path, tmp_path: Path) -> None:
    arguments = ["summarize", str(study), "--out", str(tmp_path / "my out"), "-q"]
    with Store.open(tmp_path / "my out" / "store", mode="w"):
        command = [sys.executable, "-m", "hoanalysis.cli", *arguments]
        second = subprocess.run(command, capture_output=True, text=True, check=False)
    assert second.returncode == 1
    assert "Traceback" not in second.stderr
    assert f"to go on: hoanalysis summarize {study} --out '{tmp_path}/my out' -q" in second.stderr
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0


def break_key(study: Path) -> None:
    study.write_text(study.read_text().replace("order = 2", "oder = 2"))


def break_model(study: Path) -> None:
    study.write_text(study.read_text().replace(":model", ":modle"))


def break_every_fit(study: Path) -> None:
    for path in study.parent.glob("*.safetensors"):
        save_file({"0.weight": zeros(5, 4), "extra": zeros(1)}, path)


def break_log(study: Path) -> None:
    (study.parent / "log.csv").unlink()


def break_pattern(study: Path) -> None:
    study.write_text(study.read_text().replace("*.safetensors", "*.ckpt"))


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (break_key, ["unknown key 'oder' in [summaries]", "did you mean 'order'"]),
        (break_model, ["has no 'modle'", "did you mean 'model'"]),
        (break_every_fit, ["none of the 3 checkpoints", "step_0.safetensors", "'extra'", "'0.bias'"]),
        (break_log, ["no such training log", "log.csv"]),
        (break_pattern, ["'*.ckpt'"]),
        (Path.unlink, ["no such study file", "study.toml"]),
    ],
)
def test_each_fault_is_a_sentence_and_nothing_is_written(study: Path, tmp_path: Path, broken, words: list[str]) -> None:
    broken(study)
    result = call("report", study, "--out", tmp_path / "out", "--quiet")
    assert result.exit_code == 1
    for word in words:
        assert word in result.output, result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["missing", "text", "folder"])
def test_show_of_something_else(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "thing"
    if kind == "text":
        path.write_text("hello")
    if kind == "folder":
        path.mkdir()
    result = call("show", path)
    assert result.exit_code == 1
    assert "thing" in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("41.5", 41.5), ("3", 3), ("true", True), ("[1, 'a']", [1, "a"]), ("{k = 1}", {"k": 1}), ("'3'", "3"),
        ("fc1.weight", "fc1.weight"), ("", ""), ("1, 2", "1, 2"), ("5 # five", "5 # five"), ("a=b", "a=b"),
        ("2024-05-01", "2024-05-01"), ("07:30:00", "07:30:00"), ("1]\ny = [2", "1]\ny = [2"), ("nan", float("nan")),
        ("None", None), ("'None'", "None"),
    ],
)  # fmt: skip
def test_values_of_parameters(text: str, value) -> None:
    from hoanalysis.cli import _parameters

    made = _parameters([f"x={text}"])["x"]
    assert repr(made) == repr(value)


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        (["x"], "given as name=value, not 'x'"),
        (["x=1", "x=2"], "'x' is given twice"),
        (["y=1"], "has no parameter 'y'"),
        (["x y=1"], "cannot be called 'x y'"),
    ],
)
def test_parameters_that_cannot_be_given(study: Path, tmp_path: Path, parameters: list[str], words: str) -> None:
    plain = notebook(tmp_path / "n.ipynb", "print(x)")
    options = [o for p in parameters for o in ("-p", p)]
    result = call("report", study, "--out", tmp_path / "out", "--notebook", plain, *options)
    assert result.exit_code == 1
    assert words in result.output
    assert not (tmp_path / "out").exists()
