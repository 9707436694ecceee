"""`hoanalysis init`: a study file that reads once its two lines are filled in, for whatever lies in the folder."""

import errno
import os
import tomllib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

from hoanalysis import models
from hoanalysis.cli import app
from hoanalysis.errors import CheckpointError, HoError, StudyError
from hoanalysis.new_study import write_study
from hoanalysis.study import StudySpec
from tests.conftest import write_study as small_study
from tests.reports.notebooks import notebook

WEIGHTS = {"w": torch.ones(2, 3)}


def folder_of(folder: Path, *names: str, weights: dict = WEIGHTS) -> Path:
    folder.mkdir(exist_ok=True)
    for name in names:
        if name.endswith(".safetensors"):
            save_file(weights, folder / name)
        elif name.endswith((".pt", ".ckpt", ".pth", ".bin")):
            torch.save(weights, folder / name)
        else:
            (folder / name).write_text("step,loss\n0,1.0\n")
    return folder


def filled(study: Path, model: str = "package:model", data: str = "package:data") -> StudySpec:
    """As a user would: the two empty factories, in order."""
    text = study.read_text()
    assert text.count('factory = ""') == 2
    study.write_text(
        text.replace('factory = ""', f'factory = "{model}"', 1).replace('factory = ""', f'factory = "{data}"', 1)
    )
    return StudySpec.read(study)


def test_a_run_of_checkpoints_from_init_to_report(tmp_path: Path) -> None:
    """End to end, and a study of one checkpoint beside it."""
    folder = small_study(tmp_path / "run", "factories_init").parent
    (folder / "study.toml").unlink()
    said = CliRunner().invoke(app, ["init", str(folder)])
    assert said.exit_code == 0, said.output
    assert said.output.splitlines() == [
        f"wrote {folder / 'study.toml'}: 3 checkpoints match 'step_*.safetensors', steps 0 to 20",
        "to fill in: [model] factory, [data] factory",
        f"then: hoanalysis report {folder / 'study.toml'} --out reports/run",
    ]
    unfilled = CliRunner().invoke(app, ["report", str(folder), "--out", str(tmp_path / "out")])
    assert unfilled.exit_code == 1
    assert "the factory of '[model]', '[data]' is not filled in" in unfilled.output
    spec = filled(folder / "study.toml", "factories_init:model", "factories_init:data")
    assert spec.checkpoints.model_dump() == {"folder": ".", "pattern": "step_*.safetensors", "log": "log.csv"}
    assert (spec.summaries.order, spec.summaries.diagonal) == (2, 3)
    assert [c.step for c in spec.run()] == [0, 10, 20]
    assert spec.problem() is not None
    one = CliRunner().invoke(app, ["init", str(folder / "step_10.safetensors"), "--to", str(tmp_path / "one.toml")])
    assert one.exit_code == 0, one.output
    assert "one checkpoint, step_10.safetensors" in one.output
    single = filled(tmp_path / "one.toml", "factories_init:model", "factories_init:data")
    assert [c.step for c in single.run()] == [10]
    (tmp_path / "factories_init.py").write_text((folder / "factories_init.py").read_text())
    plain = notebook(tmp_path / "n.ipynb", "print('a study of one')")
    command = ["report", str(tmp_path / "one.toml"), "--out", str(tmp_path / "out"), "--notebook", str(plain), "-q"]
    report = CliRunner().invoke(app, command)
    assert report.exit_code == 0, report.output
    assert "a study of one" in (tmp_path / "out" / "index.html").read_text()


def test_a_study_file_is_never_overwritten_without_force(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "run", "a1.safetensors", "a2.safetensors")
    (folder / "study.toml").write_text("mine")
    with pytest.raises(StudyError, match="there is a study file already") as caught:
        write_study(folder)
    assert "--force" in caught.value.do
    assert (folder / "study.toml").read_text() == "mine"
    write_study(folder, force=True)
    assert filled(folder / "study.toml").checkpoints.pattern == "a*.safetensors"
    assert sorted(p.name for p in folder.iterdir()) == ["a1.safetensors", "a2.safetensors", "study.toml"]


@pytest.mark.parametrize(
    ("names", "pattern", "steps"),
    [
        (["step_5.safetensors", "step_10.safetensors", "best.pt"], "step_*.safetensors", [5, 10]),
        (["epoch=1-step=50.ckpt", "epoch=2-step=100.ckpt", "last.ckpt"], "epoch=*-step=*.ckpt", [50, 100]),
        (["best.pt", "last.pt"], "*.pt", [0, 1]),
        (["model.safetensors"], "*.safetensors", [0]),
        (["m1.pt", "m2.pt", "o1.safetensors", "o2.safetensors"], "o*.safetensors", [1, 2]),
        (["[x]1.pt", "[x]2.pt", "a?1.pt"], "[[]x]*.pt", [1, 2]),
        (["1.pt", "2.pt"], "*.pt", [1, 2]),
    ],
)
def test_the_pattern_is_that_of_the_largest_series(tmp_path: Path, names, pattern: str, steps: list[int]) -> None:
    folder = folder_of(tmp_path / "run", *names)
    spec = filled(write_study(folder).path)
    assert spec.checkpoints.pattern == pattern
    assert list(spec.run().steps) == steps


def test_shards_are_found_by_their_index(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "run", "m-1-of-2.safetensors")
    save_file({"v": torch.ones(1)}, folder / "m-2-of-2.safetensors")
    (folder / "m.safetensors.index.json").write_text(
        '{"weight_map": {"w": "m-1-of-2.safetensors", "v": "m-2-of-2.safetensors"}}'
    )
    spec = filled(write_study(folder).path)
    assert [sorted(c.state_dict) for c in spec.run()] == [["v", "w"]]


@pytest.mark.parametrize(
    ("tables", "log"),
    [
        ({"log.csv": "step,loss,learning_rate\n"}, "log.csv"),
        ({"a.csv": "epoch,acc\n", "b.csv": "step,loss\n", "c.csv": "step,loss\n"}, "b.csv"),
        ({"a.csv": "epoch,acc\n"}, None),
        ({"a.csv": ""}, None),
        ({"a.csv": b"\xff\xfe\x00"}, None),
        ({}, None),
    ],
)
def test_the_log_is_the_table_with_step_and_loss(tmp_path: Path, tables: dict, log: str | None) -> None:
    folder = folder_of(tmp_path / "run", "a1.safetensors")
    for name, text in tables.items():
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    path = write_study(folder).path
    assert filled(path).checkpoints.log == log
    if "a.csv" in tables and tables["a.csv"] == "epoch,acc\n":
        assert "a.csv lacks step and loss" in path.read_text()


@pytest.mark.parametrize(
    ("model", "hint"),
    [
        (models.LeNet5(), "LeNet5"),
        (models.VGG11Prime(width=0.02), "VGG11Prime"),
        (models.MLP([4, 3, 2]), "MLP"),
        (models.GPT(16, 8, 1, 2, 4), "GPT"),
        (nn.Linear(2, 2), None),
    ],
    ids=lambda m: type(m).__name__ if isinstance(m, nn.Module) else "",
)
def test_the_tensors_are_named_and_a_model_of_ours_is_recognised(tmp_path: Path, model, hint: str | None) -> None:
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    path = write_study(folder_of(tmp_path / "run", "a1.pt", weights=weights)).path
    text = path.read_text()
    name, tensor = next(iter(weights.items()))
    assert f"#   {name}  {' x '.join(map(str, tensor.shape))}\n" in text
    assert (f"hoanalysis.models:{hint}," in text) == (hint is not None)
    assert filled(path).model.factory == "package:model"  # it is a hint: the user knows


def test_names_cannot_leave_their_comment_or_their_string(tmp_path: Path) -> None:
    evil = 'x\nfactory = "os:system"\n["'
    folder = folder_of(tmp_path / "run", 'a"\n\\1.safetensors', 'a"\n\\2.safetensors', weights={evil: torch.ones(1)})
    (folder / 'l"\n.csv').write_text("step,loss\n")
    (folder / "left\n.pt").write_bytes(b"x")
    spec = filled(write_study(folder).path)
    assert len(spec.run()) == 2
    assert spec.checkpoints.log == 'l"\n.csv'
    assert spec.model.factory == "package:model"


@pytest.mark.skipif(os.name != "posix", reason="names of bytes are POSIX's")
def test_names_that_are_not_utf8_match(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "run")
    for i in (1, 2):
        save_file(WEIGHTS, os.fsdecode(bytes(folder) + b"/caf\xe9%d.safetensors" % i))
    spec = filled(write_study(folder).path)
    assert list(spec.run().steps) == [1, 2]


def test_a_folder_without_checkpoints_says_what_it_has(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "run", "notes.txt")
    with pytest.raises(CheckpointError, match="the folder holds no checkpoint") as caught:
        write_study(folder)
    assert caught.value.why == "it has 'notes.txt'"
    folder_of(folder / "inner", "a1.safetensors")
    with pytest.raises(CheckpointError, match="one of its folders that do: 'inner'"):
        write_study(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="it is empty"):
        write_study(tmp_path / "empty")
    with pytest.raises(CheckpointError, match="there is no such file"):
        write_study(tmp_path / "rnu")
    assert not list(tmp_path.rglob("study.toml"))


def test_a_first_checkpoint_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "run", "a2.safetensors")
    (folder / "a1.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"the file is empty(.|\n)*a1\.safetensors"):
        write_study(folder)
    assert not (folder / "study.toml").exists()


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("operation", ["write", "fsync"])
def test_a_full_disk_is_a_sentence_and_leaves_nothing(tmp_path: Path, monkeypatch, operation: str, force: bool) -> None:
    folder = folder_of(tmp_path / "run", "a1.safetensors")

    def full(*args) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, operation, full)
    with pytest.raises(StudyError, match="cannot write the study file: the disk is full"):
        write_study(folder, force=force)
    assert [p.name for p in folder.iterdir()] == ["a1.safetensors"]


def test_a_folder_that_cannot_be_written_is_a_sentence(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "run", "a1.safetensors")
    with pytest.raises(StudyError, match="cannot write the study file") as caught:
        write_study(folder, tmp_path / "nowhere" / "s.toml")
    assert "--to" in caught.value.do
    result = CliRunner().invoke(app, ["init", str(folder), "--to", "/proc/study.toml"])
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit | HoError)


def test_each_default_in_a_comment_is_the_default(tmp_path: Path) -> None:
    """Lines that show defaults, read as TOML, change nothing."""
    path = write_study(folder_of(tmp_path / "run", "a1.safetensors")).path
    plain = filled(path)
    shown = ("mode", "directions", "partitions", "keep_batches", "memory")
    lines = [
        line[2:] if line.startswith(tuple(f"# {k} = " for k in shown)) else line
        for line in path.read_text().splitlines()
    ]
    assert sum(line.startswith(shown) for line in lines) == len(shown)
    path.write_text("\n".join(lines))
    assert StudySpec.read(path) == plain
    tomllib.loads(path.read_text())
