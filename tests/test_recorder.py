"""What a recorder writes while a model trains: whole files, the latest steps, the steps around a break."""

import csv
import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

import hoanalysis as ho
from hoanalysis import data, models
from hoanalysis.checkpoints import sniff


def loop(folder, steps, optimizer=None, model=None, losses=None, **options):
    """Trains and returns the model's tensors after each step, kept apart from the recorder."""
    torch.manual_seed(0)
    model = model or nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    optimizer = (optimizer or (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)))(model.parameters())
    kept = [{n: t.clone() for n, t in model.state_dict().items()}]
    with ho.Recorder(model, optimizer, folder, **options) as recorder:
        for i in range(steps):
            loss = F.cross_entropy(model(torch.randn(8, 3)), torch.randint(0, 2, (8,)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            recorder.step(loss if losses is None else losses[i])
            kept.append({n: t.clone() for n, t in model.state_dict().items()})
    return kept, optimizer, model


def test_checkpoints_hold_the_states_of_their_steps(tmp_path):
    kept, optimizer, model = loop(tmp_path, 23, every=5, ring=4)
    run = ho.open_run(tmp_path)
    assert run.steps == (0, 5, 10, 15, 20, 21, 22, 23)  # the latest four are consecutive
    for checkpoint in run:
        for name, expected in kept[checkpoint.step].items():
            torch.testing.assert_close(checkpoint.state_dict[name], expected, rtol=0, atol=0)
    last = load_file(run.paths[-1])  # the reader of the format's own project
    for name, p in model.named_parameters():
        buffer = last[f"optimizer.momentum_buffer.{name}"]
        torch.testing.assert_close(buffer, optimizer.state[p]["momentum_buffer"], rtol=0, atol=0)
    assert not list(tmp_path.glob("*.partial"))
    rows = list(csv.DictReader((tmp_path / "log.csv").read_text().splitlines()))
    assert [int(r["step"]) for r in rows] == list(range(24))
    assert {r["learning_rate"] for r in rows} == {"0.1"}
    assert rows[0]["loss"] == ""
    assert float(rows[7]["loss"]) > 0


def test_the_directions_of_the_optimizer_are_read_from_what_was_recorded(tmp_path):
    adam = lambda p: torch.optim.AdamW(p, lr=0.01, betas=(0.8, 0.95), eps=1e-6)  # noqa: E731
    _, optimizer, model = loop(tmp_path, 6, adam, every=100, ring=2)
    x, y = torch.randn(8, 3), torch.randint(0, 2, (8,))
    problem = ho.Problem(model.eval(), [(x, y)], F.cross_entropy)
    ds = ho.summarize(problem, 1, checkpoint=ho.open_run(tmp_path)[-1], direction="adam", progress=False)
    p = dict(model.named_parameters())["2.bias"]
    state = optimizer.state[p]
    m, v = state["exp_avg"] / (1 - 0.8**6), state["exp_avg_sq"] / (1 - 0.95**6)
    expected = (m / (v.sqrt() + 1e-6)).norm()
    assert ds.direction_norm.sel(group="2.bias").item() == pytest.approx(float(expected), rel=1e-5)


def test_the_steps_around_a_break_stay(tmp_path):
    losses = [1.0 + 0.01 * (i % 7) for i in range(60)]
    losses[41] = 2.5  # step 42, more than twice the largest before
    losses[42:46] = [3.0, 4.0, float("nan"), float("inf")]
    loop(tmp_path, 60, losses=losses, every=1000, ring=6)
    steps = ho.open_run(tmp_path).steps
    assert steps == (0, *range(36, 46), *range(55, 61))


def test_only_so_many_breaks_are_kept(tmp_path):
    losses = [1.0] * 100
    for i in (40, 60, 80):
        losses[i] = 9.0
    loop(tmp_path, 100, losses=losses, every=1000, ring=2, breaks=2)
    assert ho.open_run(tmp_path).steps == (0, 39, 40, 41, 42, 59, 60, 61, 62, 99, 100)


def test_without_losses_and_without_an_optimizer_the_ring_turns_all_the_same(tmp_path):
    model = nn.Linear(2, 2)
    recorder = ho.Recorder(model, None, tmp_path, every=4, ring=2)
    for _ in range(7):
        recorder.step()
    recorder.close()
    assert ho.open_run(tmp_path).steps == (0, 4, 6, 7)
    with pytest.raises(ho.errors.ArgumentError, match="is closed"):
        recorder.step()


def test_tensors_that_appear_later_are_recorded(tmp_path):
    model = nn.Linear(2, 2).double()
    model.register_buffer("seen", torch.zeros(3, dtype=torch.int32))
    with ho.Recorder(model, None, tmp_path, ring=3) as recorder:
        for step in range(1, 6):
            if step == 3:
                model.register_buffer("later", torch.full((5,), 7, dtype=torch.uint8))
            recorder.step(0.1)
    run = ho.open_run(tmp_path)
    assert run.steps == (0, 3, 4, 5)
    assert run[-1].state_dict["later"].tolist() == [7] * 5
    assert "later" not in run[0].state_dict


def test_a_folder_with_a_run_is_not_written_over(tmp_path):
    loop(tmp_path, 3)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(ho.errors.CheckpointError, match="holds the checkpoints of a run already, 4 of them"):
        ho.Recorder(nn.Linear(1, 1), None, tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize("wrong", [{"every": 0}, {"ring": 1.5}, {"breaks": -1}, {"start": True}])
def test_wrong_options_are_named(tmp_path, wrong):
    with pytest.raises(ho.errors.ArgumentError, match=f"{next(iter(wrong))} is a whole number"):
        ho.Recorder(nn.Linear(1, 1), None, tmp_path / "run", **wrong)
    assert not (tmp_path / "run").exists()


KILLED = """
import torch, hoanalysis as ho
from torch import nn
torch.manual_seed(0)
model = nn.Linear(300, 300)
recorder = ho.Recorder(model, None, {folder!r}, every=50, ring=8)
while True:
    with torch.no_grad():
        model.weight.fill_(recorder.count + 1)
        model.bias.fill_(recorder.count + 1)
    recorder.step(1.0)
"""


def test_a_process_that_is_killed_leaves_whole_files_of_its_latest_steps(tmp_path):
    """The weights of step n are all n, so that a file of two steps would show."""
    for attempt in range(5):
        folder = tmp_path / str(attempt)
        code = textwrap.dedent(KILLED).format(folder=str(folder))
        process = subprocess.Popen([sys.executable, "-c", code])
        until = time.monotonic() + 60
        while time.monotonic() < until and len(list(folder.glob("step_*.safetensors"))) < 12:
            time.sleep(0.01)
        time.sleep(0.013 * attempt)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        run = ho.open_run(folder)
        assert len(run) >= 11  # the slot that was being written may be torn
        latest = run.steps[-7:]
        assert latest == tuple(range(latest[0], latest[0] + 7))
        for checkpoint in run:
            if checkpoint.step:
                for tensor in checkpoint.state_dict.values():
                    torch.testing.assert_close(tensor, torch.full_like(tensor, checkpoint.step), rtol=0, atol=0)
        assert os.stat(folder / "log.csv").st_size > 0


def test_a_slot_that_is_torn_is_never_read_and_the_ring_is_taken_over(tmp_path):
    """A kill in the middle of a copy: the mark is in the file, and the tensors are of two steps."""
    model = nn.Linear(20, 20)
    recorder = ho.Recorder(model, None, tmp_path, every=100, ring=4)
    for _ in range(9):
        recorder.step(1.0)
    assert ho.open_run(tmp_path).steps == (0, 6, 7, 8, 9)
    torn = next(p for p in ho.open_run(tmp_path).paths if sniff.slot_step(p) == 7)

    class Killed(Exception):
        pass

    def move(*_):
        raise Killed

    run = ho.open_run(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hoanalysis.recorder._move", move)
        with pytest.raises(Killed):
            recorder.step(1.0)  # in the place of step 6
    assert ho.open_run(tmp_path).steps == (0, 7, 8, 9)
    with pytest.raises(ho.errors.CheckpointError):
        run[1]  # what was step 6 when the run was opened
    with pytest.raises(SafetensorError):
        load_file(run.paths[1])
    assert torn.exists()
    again = ho.Recorder(model, None, tmp_path, every=100, ring=4, start=8)
    assert ho.open_run(tmp_path).steps == (0, 7, 8)  # step 9 is trained again
    again.close()
    assert {p.name for p in tmp_path.glob("*.safetensors")} == {f"step_{s:08d}.safetensors" for s in (0, 7, 8)}


def test_a_run_that_is_read_while_its_ring_turns_is_told(tmp_path):
    model = nn.Linear(2, 2)
    recorder = ho.Recorder(model, None, tmp_path, every=100, ring=2)
    for _ in range(3):
        recorder.step(1.0)
    run = ho.open_run(tmp_path)
    assert run.steps == (0, 2, 3)
    recorder.step(1.0)
    for read in (lambda: run[1], lambda: run.sha256(1)):
        with pytest.raises(ho.errors.CheckpointError, match="step 2 was overwritten by the training that goes on"):
            read()
    assert run[2].step == 3


def test_numbers_of_any_length_fit_their_place(tmp_path):
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = [-2.2250738585072014e-308, float("nan"), float("-inf"), 1e300, 0.1 + 0.2]
    with ho.Recorder(model, optimizer, tmp_path, every=1) as recorder:
        for loss in losses:
            optimizer.param_groups[0]["lr"] = abs(loss) / 3
            recorder.step(loss)
    for checkpoint, loss in zip(list(ho.open_run(tmp_path))[1:], losses, strict=True):
        told = json.loads(checkpoint.metadata["training"])
        assert told["step"] == checkpoint.step
        assert repr(told["loss"]) == repr(loss)
        assert repr(told["learning_rate"]) == repr(abs(loss) / 3)
        assert told["optimizer"]["name"] == "SGD"


def test_a_real_divergence_is_recorded_and_its_post_mortem_names_the_step(tmp_path):
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = models.LeNet5(activation="tanh", width=0.5)
    train = data.mnist5k("train", batch_size=100)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    with ho.Recorder(model, optimizer, tmp_path, every=40, ring=8) as recorder:
        for step, (x, y) in enumerate([b for _ in range(3) for b in train][:100], start=1):
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            recorder.step(loss)
            if step == 90:
                optimizer.param_groups[0]["lr"] *= 20
    run = ho.open_run(tmp_path)
    assert {*range(89, 95)} <= set(run.steps)
    problem = ho.Problem(
        models.LeNet5(activation="tanh", width=0.5), data.mnist5k("train", 64).take(256), F.cross_entropy
    )
    around = run[run.steps.index(88) : run.steps.index(95) + 1]
    ds = ho.summarize_run(around, problem, 3, direction="to:next", keep_batches=4, measure=["along"], progress=False)
    told = str(ds.ho.autopsy(log=pd.read_csv(tmp_path / "log.csv")).verdict)
    print(told)
    assert "step 90" in told
