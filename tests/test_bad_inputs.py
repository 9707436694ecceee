"""Every row of docs/bad-inputs.md has a test, or a reason why not; and the rows that no other file's tests show."""

import functools
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from typer.testing import CliRunner

import hoanalysis as ho
from hoanalysis import cli, summaries
from hoanalysis.errors import CheckpointError, DataError, HoError, LossError, ModelError
from hoanalysis.store import export
from hoanalysis.study import StudySpec
from tests import bad_inputs


def test_every_row_has_a_test_or_a_reason() -> None:
    rows, tests = bad_inputs.rows(), bad_inputs.marked()
    assert set(rows) >= bad_inputs.EXPECTED, bad_inputs.EXPECTED - set(rows)
    without = [r for r, says in rows.items() if r not in tests and bad_inputs.UNTESTED not in says]
    assert without == [], f"rows without a test or a reason: {without}"
    unknown = {r: t for r, t in tests.items() if r not in rows and r[0] in "CMPDAN"}
    assert unknown == {}, f"tests of rows that the page does not have: {unknown}"
    assert len([r for r in bad_inputs.EXPECTED if r in tests]) >= 58


def test_the_table_is_the_one_that_the_marks_give() -> None:
    assert bad_inputs.TABLE.read_text(encoding="utf-8") == bad_inputs.written(), "run: python -m tests.bad_inputs"


# ---- helpers ----------------------------------------------------------------------------------------------------

X = [(torch.randn(4, 4, generator=torch.Generator().manual_seed(i)), torch.arange(4) % 3) for i in range(3)]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def summarize(model: nn.Module, data=X, loss=F.cross_entropy, order: int = 2, **options):
    return ho.summarize(ho.Problem(model, data, loss=loss), order, progress=False, **options)


def refused(kind: type[HoError], call, *words: str) -> None:
    with pytest.raises(kind) as caught:
        call()
    for word in words:
        assert word in str(caught.value), str(caught.value)


def called(*args: object):
    return CliRunner().invoke(cli.app, [str(a) for a in args])


def no_traceback(result) -> None:
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert "Traceback" not in result.output
    assert "not foreseen" not in result.output, result.output


# ---- a bad checkpoint among good ones ---------------------------------------------------------------------------


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def page(path: Path) -> None:
    path.write_bytes(b"<!doctype html><html>404</html>")


def unfit(path: Path) -> None:
    save_file({"0.weight": torch.zeros(5, 4), "extra": torch.zeros(1)}, path)


def nan(path: Path) -> None:
    weights = load_file(path)
    weights["0.bias"][1] = float("nan")
    save_file(weights, path)


def integers(path: Path) -> None:
    save_file({n: t.to(torch.int32) for n, t in load_file(path).items()}, path)


def complex_numbers(path: Path) -> None:
    save_file({n: t.to(torch.complex64) for n, t in load_file(path).items()}, path)


def dangling(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.parent / "gone")


BROKEN = {
    "truncated": (truncate, ["truncated", "bytes found"]),
    "empty": (empty, ["empty (0 bytes)"]),
    "web page": (page, ["web page"]),
    "another model": (unfit, ["'extra'", "'0.bias'"]),
    "not finite": (nan, ["0.bias: 1 of 5"]),
    "integers": (integers, ["torch.int32", "0.bias: "]),
    "complex": (complex_numbers, ["torch.complex64", "0.bias: "]),
    "dangling link": (dangling, ["link to a file that is not there"]),
}


@pytest.mark.parametrize("how", BROKEN)
@pytest.mark.row("C1", "C2", "C3", "C4", "C14", "C16", "C17")
def test_one_broken_checkpoint_is_one_failure_and_the_others_are_computed(study: Path, tmp_path: Path, how) -> None:
    broken, words = BROKEN[how]
    whole = called("summarize", study, "--out", tmp_path / "whole", "-q")
    assert whole.exit_code == 0, whole.output
    broken(study.parent / "step_10.safetensors")
    result = called("summarize", study, "--out", tmp_path / "out", "-q")
    no_traceback(result)
    assert result.exit_code == 1
    for word in (*words, "step_10.safetensors", "2 of 3 summaries"):
        assert word in result.output, result.output
    ds, good = (ho.open_dataset(tmp_path / d / "summaries.nc") for d in ("out", "whole"))
    assert ds.coverage.values.tolist() == [1, 0, 1]
    np.testing.assert_array_equal(ds.D2.values[[0, 2]], good.D2.values[[0, 2]])
    assert np.isnan(ds.D2.values[1]).all()


@pytest.mark.row("C4")
def test_a_broken_checkpoint_is_a_warning_where_there_is_no_store(study: Path) -> None:
    spec = StudySpec.read(study)
    truncate(study.parent / "step_0.safetensors")
    with pytest.warns(UserWarning, match="step 0 is NaN: the file is truncated"):
        ds = ho.summarize_run(spec.run(), spec.problem(), 1, progress=False)
    assert ds.coverage.values.tolist() == [0, 1, 1]
    for path in study.parent.glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="3 of 3 checkpoints failed"):
        ho.summarize_run(spec.run(), spec.problem(), 1, progress=False)


@pytest.mark.row("C5")
def test_a_bit_that_flips_in_a_safetensors_file_is_told_and_mixes_nothing(study: Path, tmp_path: Path) -> None:
    """The format has no checksum; the store knows the digest."""
    assert called("summarize", study, "--out", tmp_path, "-q").exit_code == 0
    before = ho.open_dataset(tmp_path / "summaries.nc")
    path = study.parent / "step_10.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    result = called("summarize", study, "--out", tmp_path, "-q")
    assert result.exit_code == 0
    assert f"study.checkpoints.10: '{before.sha256.values[1]}' -> " in result.output
    after = ho.open_dataset(tmp_path / "summaries.nc")
    assert after.sha256.values[1] != before.sha256.values[1]
    np.testing.assert_array_equal(after.D1.values[[0, 2]], before.D1.values[[0, 2]])
    content[-5] ^= 1
    path.write_bytes(content)
    assert called("summarize", study, "--out", tmp_path, "-q").exit_code == 0
    np.testing.assert_array_equal(ho.open_dataset(tmp_path / "summaries.nc").D1.values, before.D1.values)


@pytest.mark.parametrize("direction", ["gradient", "to:next"])
@pytest.mark.parametrize("moment", ["before", "during", "and back"])
@pytest.mark.row("C19")
def test_a_checkpoint_that_is_replaced_never_gives_its_numbers(study, tmp_path, monkeypatch, direction, moment) -> None:
    """Replaced between the plan and the reading, while its unit is computed, and replaced and put back."""
    spec = StudySpec.read(study)
    run, problem = spec.run(), spec.problem()
    replaced = run.paths[1]
    content, other = replaced.read_bytes(), run.paths[2].read_bytes()
    real = summaries.Work.unit_or_gap
    if moment != "during":
        read = type(run).__getitem__

        def reading(self, index):
            if index == 1:
                replaced.write_bytes(other)
                try:
                    return read(self, index)
                finally:
                    if moment == "and back":
                        replaced.write_bytes(content)
            return read(self, index)

        monkeypatch.setattr(type(run), "__getitem__", reading)
    else:

        def unit(self, checkpoint, *args, **kwargs):
            made = real(self, checkpoint, *args, **kwargs)
            if checkpoint.step == 10:
                replaced.write_bytes(other)
            return made

        monkeypatch.setattr(summaries.Work, "unit_or_gap", unit)
    with pytest.raises(CheckpointError, match="was replaced while its summaries were computed"):
        ho.summarize_run(run, problem, 1, direction=direction, store=tmp_path / "store", progress=False)
    monkeypatch.undo()
    replaced.write_bytes(content)
    again = ho.summarize_run(run, problem, 1, direction=direction, store=tmp_path / "store", progress=False)
    direct = ho.summarize_run(run, problem, 1, direction=direction, progress=False)
    np.testing.assert_array_equal(again.D1.values, direct.D1.values)


@pytest.mark.row("C19")
def test_a_file_that_is_written_to_while_it_is_read(tmp_path: Path, monkeypatch) -> None:
    from hoanalysis.checkpoints import load

    path = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(4)}, path)
    real = load._load_open

    def slow(*args):
        made = real(*args)
        with path.open("r+b") as file:
            file.write(file.read())
        os.utime(path, ns=(1, 1))
        return made

    monkeypatch.setattr(load, "_load_open", slow)
    refused(CheckpointError, lambda: ho.load_checkpoint(path), "written to while it was read", "a.safetensors")


# ---- models and losses ------------------------------------------------------------------------------------------


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        h = torch.exp(self.first(x))
        h += 1
        return self.second(h)


class Raising(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 3)

    def forward(self, x):
        raise RuntimeError("no such branch")


class TensorHook(InPlace):
    def forward(self, x):
        h = torch.tanh(self.first(x))
        h.register_hook(lambda g: 2 * g)
        return self.second(h)


def backward_inside(model, batch):
    loss = F.cross_entropy(model(batch[0]), batch[1])
    loss.backward()
    return loss


@pytest.mark.row("M10")
def test_what_breaks_the_backward_pass_is_named_with_its_place() -> None:
    here = Path(__file__).name
    refused(
        ModelError, lambda: summarize(InPlace()), "inplace operation", "h = torch.exp(", here, "in forward", "h + 1"
    )
    refused(ModelError, lambda: summarize(nn.Sequential(Raising())), "'0' (Raising)", "no such branch", "batch 0", here)
    refused(ModelError, lambda: summarize(TensorHook()), "TensorHook", "remove the hook")
    hooked = net()
    handle = hooked[2].register_full_backward_hook(lambda *_: None)
    refused(ModelError, lambda: summarize(hooked), "backward hooks", "'2'", "handle.remove()")
    handle.remove()
    assert np.isfinite(summarize(hooked).D2).all()
    problem = ho.Problem(net(), X, batch_loss=backward_inside, batch_size=lambda b: 4)
    refused(
        LossError, lambda: ho.summarize(problem, 1, progress=False), "leave .backward() out", "backward_inside", here
    )
    wide = [(torch.randn(4, 3), y) for _, y in X]
    refused(ModelError, lambda: summarize(net(), wide), "'0' (Linear)", "batch 0")
    late = [X[0], (X[1][0][:, :3], X[1][1])]
    refused(ModelError, lambda: summarize(net(), late), "'0' (Linear)", "batch 1")
    refused(LossError, lambda: summarize(net(), [(x, y.float()) for x, y in X]), "the loss raised", "batch 0")
    sized = functools.partial(ho.Problem, net(), X, batch_loss=lambda m, b: F.cross_entropy(m(b[0]), b[1]))
    refused(DataError, lambda: ho.summarize(sized(batch_size=lambda b: 1 / 0), 1, progress=False), "ZeroDivisionError")


@pytest.mark.row("M11")
def test_parameters_that_are_not_ready_are_listed() -> None:
    mixed = net()
    mixed[2] = mixed[2].double()
    refused(
        ModelError, lambda: summarize(mixed), "torch.float32 on cpu: '0.weight'", "torch.float64 on cpu: '2.weight'"
    )
    assert np.isfinite(summarize(mixed, dtype="float64").D1).all()
    meta = net()
    meta[0] = nn.Linear(4, 5, device="meta")
    refused(ModelError, lambda: summarize(meta), "meta", "'0.weight', '0.bias'")
    with warnings.catch_warnings(action="ignore"):
        lazy = nn.Sequential(nn.LazyLinear(5), nn.Linear(5, 3))
    refused(ModelError, lambda: summarize(lazy), "'0.weight'", "call the model once")


@pytest.mark.row("M5")
def test_a_compiled_submodule_is_the_module_inside() -> None:
    compiled = net()
    compiled[0] = torch.compile(compiled[0], backend="eager")
    a, b = summarize(compiled, dtype="float64"), summarize(net(), dtype="float64")
    np.testing.assert_allclose(a.D2.values, b.D2.values, rtol=1e-12)


# ---- data -------------------------------------------------------------------------------------------------------


@pytest.mark.row("A3")
def test_data_that_were_changed_in_place_are_noticed() -> None:
    data = [(x.clone(), y) for x, y in X]
    problem = ho.Problem(net(), data, loss=F.cross_entropy)
    ho.summarize(problem, 1, progress=False)
    data[2][0].mul_(3)
    refused(DataError, lambda: ho.summarize(problem, 1, progress=False), "batch 2", "make a new Problem")
    assert np.isfinite(summarize(net(), data).D1).all()


@pytest.mark.row("A4")
def test_samples_are_counted_here() -> None:
    samples = TensorDataset(torch.cat([x for x, _ in X]), torch.cat([y for _, y in X]))
    assert summarize(net(), DataLoader(samples, batch_size=5)).attrs["n_samples"] == 12
    assert summarize(net(), DataLoader(samples, batch_size=5, drop_last=True)).attrs["n_samples"] == 10


@pytest.mark.row("A5")
@pytest.mark.parametrize("direction", ["gradient", "weights"])
def test_inputs_that_are_not_finite_are_named_by_batch_and_sample(direction: str) -> None:
    data = [(x.clone(), y) for x, y in X]
    data[1][0][2, 1] = float("inf")
    refused(DataError, lambda: summarize(net(), data, direction=direction), "batch 1", "samples [2]")


@pytest.mark.row("A7")
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda x: x.to_sparse(), ["sparse_coo", "to_dense()"]),
        (lambda x: x.to_sparse_csr(), ["sparse_csr"]),
        (lambda x: torch.nested.nested_tensor(list(x)), ["nested", "to_padded_tensor"]),
        (lambda x: torch.nested.nested_tensor(list(x), layout=torch.jagged), ["nested"]),
        (lambda x: x.to("meta"), ["meta"]),
    ],
    ids=["coo", "csr", "nested", "jagged", "meta"],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning", "ignore:Sparse CSR:UserWarning")
def test_batches_of_tensors_that_are_not_dense_are_named(make, words: list[str]) -> None:
    data = [X[0], (make(X[1][0]), X[1][1])]
    refused(DataError, lambda: summarize(net(), data), "batch 1", *words)


class Samples(Dataset):
    def __init__(self, fault=None) -> None:
        self.fault = fault

    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int):
        if i == 5 and self.fault is not None:
            self.fault()
        return torch.ones(4) * i, 0


def die() -> None:
    os._exit(1)


def complain() -> None:
    raise ValueError("the image is broken")


@pytest.mark.row("A9")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_loader_that_fails_names_the_batch_and_the_way_out() -> None:
    refused(DataError, lambda: summarize(net(), DataLoader(Samples(complain), 4)), "broken", "batch 1", "in complain")
    data = DataLoader(Samples(complain), 4, num_workers=1)
    refused(DataError, lambda: summarize(net(), data), "ValueError: the image is broken", "num_workers=0")
    data = DataLoader(Samples(die), 4, num_workers=1)
    refused(DataError, lambda: summarize(net(), data), "exited unexpectedly", "num_workers=0")
    data = DataLoader(Samples(lambda: None), 4, num_workers=1, multiprocessing_context="spawn")
    refused(DataError, lambda: summarize(net(), data), "pickle", "num_workers=0")


# ---- the command line -------------------------------------------------------------------------------------------


def test_what_nobody_foresaw_is_a_sentence(study: Path, tmp_path: Path, monkeypatch) -> None:
    def broken(*_, **__):
        raise ZeroDivisionError("of ours")

    monkeypatch.setattr("hoanalysis.reports.run.compute", broken)
    monkeypatch.setattr("hoanalysis.reports.compute", broken)
    monkeypatch.delenv(cli.TRACEBACK, raising=False)
    result = called("summarize", study, "--out", tmp_path / "out")
    assert (result.exit_code, result.output.count("Traceback")) == (1, 0)
    assert "ZeroDivisionError: of ours" in result.output
    assert cli.TRACEBACK in result.output
    monkeypatch.setenv(cli.TRACEBACK, "1")
    assert isinstance(called("summarize", study, "--out", tmp_path / "out").exception, ZeroDivisionError)


@pytest.mark.parametrize("exit_code", ["", "3"])
def test_a_factory_that_ends_the_process_is_named(study: Path, tmp_path: Path, exit_code: str) -> None:
    (study.parent / "leaving.py").write_text(f"import sys\ndef model():\n    sys.exit({exit_code})\n")
    text = study.read_text()
    study.write_text(text.replace(text.split('"')[1], "leaving:model", 1))
    result = called("summarize", study, "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert "SystemExit" in result.output


def test_ctrl_c_before_a_command_has_begun_is_a_sentence() -> None:
    """The signal comes while the libraries are imported."""
    code = (
        "import sys, os, signal, builtins\n"
        "sys.argv = ['/bin/hoanalysis', '--version']\n"
        "real = builtins.__import__\n"
        "def late(name, *a, **k):\n"
        "    if name == 'xarray':\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "    return real(name, *a, **k)\n"
        "builtins.__import__ = late\n"
        "from hoanalysis.cli import main\n"
        "main()\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 130, ran.stderr
    assert ran.stderr == "interrupted; nothing was begun\n"


def test_a_device_is_never_replaced_by_a_file(study: Path, tmp_path: Path) -> None:
    """What is written is renamed into its place: a device node would be gone."""
    pipe = tmp_path / "pipe.nc"
    os.mkfifo(pipe)
    for arguments in (
        ["init", study.parent, "--to", pipe, "--force"],
        ["init", study.parent, "--to", tmp_path, "--force"],
    ):
        result = called(*arguments)
        no_traceback(result)
        assert result.exit_code == 1
        assert "a pipe or a device" in result.output, result.output
    refused(HoError, lambda: export(summarize(net(), order=1), pipe), "a pipe, a socket or a device")
    assert pipe.is_fifo()
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
