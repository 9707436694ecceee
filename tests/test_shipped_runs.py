"""The shipped runs are what data/README.md says, by independent means."""

import csv
import importlib
import math
import os
import tomllib
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.testing import assert_close

from hoanalysis import data
from hoanalysis.checkpoints import fit, open_run

DATA = Path(__file__).parents[1] / "data"
RUNS = ("lenet5-mnist", "gpt-docs")


def study(name):
    return tomllib.loads((DATA / name / "study.toml").read_text(encoding="utf-8"))


def made(factory):
    module, _, attribute = factory.partition(":")
    return getattr(importlib.import_module(module), attribute)


def log(name):
    with (DATA / name / "log.csv").open(newline="") as stream:
        return {int(row["step"]): row for row in csv.DictReader(stream)}


def model_at(name, position):
    model = made(study(name)["model"]["factory"])(**study(name)["model"]["args"])
    checkpoint = open_run(DATA / name)[position]
    model.load_state_dict(fit(checkpoint, {n: p.shape for n, p in model.named_parameters()}))
    return model.eval(), checkpoint


needs_recorded_text = pytest.mark.skipif(
    data.text_sha256() != study("gpt-docs")["data"]["args"]["sha256"], reason="this Python carries another text"
)


@pytest.mark.parametrize("name", RUNS)
def test_the_log_has_a_row_for_every_checkpoint(name):
    run, rows = open_run(DATA / name), log(name)
    assert run.steps[0] == 0
    assert set(run.steps) <= set(rows)
    assert not run.duplicates()
    assert {"step", "epoch", "loss", "learning_rate", "test_loss", "test_accuracy"} == set(rows[0])


def test_lenet5_was_kept_every_epoch_and_is_right_on_95_percent():
    run = open_run(DATA / "lenet5-mnist")
    assert len(run) == 13
    assert [int(log("lenet5-mnist")[step]["epoch"]) for step in run.steps] == list(range(13))
    model, _ = model_at("lenet5-mnist", -1)
    test = data.mnist5k("test")
    with torch.no_grad():
        right = (model(test.x).argmax(1) == test.y).double().mean().item()
    assert right >= 0.95
    assert_close(right, float(log("lenet5-mnist")[run.steps[-1]]["test_accuracy"]), rtol=0, atol=0.002)


@pytest.mark.parametrize("name", ["lenet5-mnist", pytest.param("gpt-docs", marks=needs_recorded_text)])
@pytest.mark.parametrize("position", [0, -1])
def test_the_logged_losses_are_those_of_the_checkpoints(name, position):
    model, checkpoint = model_at(name, position)
    args = study(name)["data"]["args"] | {"split": "test"}
    batches = made(study(name)["data"]["factory"])(**args, batch_size=512)
    with torch.no_grad():
        losses = [-F.log_softmax(model(x), -1).gather(-1, y[..., None]).double().flatten() for x, y in batches]
    expected = float(log(name)[checkpoint.step]["test_loss"])
    assert_close(torch.cat(losses).mean().item(), expected, rtol=1e-4, atol=1e-5)


@needs_recorded_text
def test_the_gpt_learned_more_than_the_frequencies_of_characters():
    counts = Counter("".join(map(data.decode, data.text(context=64).y)))
    total = sum(counts.values())
    entropy = -sum(n / total * math.log(n / total) for n in counts.values())
    assert entropy == pytest.approx(3.1757, abs=1e-3)
    rows = log("gpt-docs")
    assert float(rows[max(rows)]["loss"]) < 0.5 * entropy
    assert float(rows[max(rows)]["test_loss"]) < 0.5 * entropy


def test_the_gpt_keeps_its_adamw_state():
    run = open_run(DATA / "gpt-docs")
    assert run[0].optimizer_state is None
    last = run[-1]
    raw = load_file(run.paths[-1])
    assert set(last.optimizer_state) == {"exp_avg", "exp_avg_sq", "step"}
    for name, tensor in last.state_dict.items():
        assert last.optimizer_state["exp_avg"][name].shape == tensor.shape
        assert_close(last.optimizer_state["exp_avg_sq"][name], raw[f"optimizer.exp_avg_sq.{name}"], rtol=0, atol=0)
        assert last.optimizer_state["step"][name].item() == run.steps[-1]


@pytest.mark.parametrize("name", RUNS)
def test_the_study_names_factories_that_work_together(name):
    spec = study(name)
    model = made(spec["model"]["factory"])(**spec["model"]["args"])
    batches = made(spec["data"]["factory"])(
        **(spec["data"]["args"] | {"sha256": None} if name == "gpt-docs" else spec["data"]["args"]),
        batch_size=spec["data"]["batch_size"],
        max_samples=spec["data"].get("max_samples"),
    )
    assert batches.n_samples == spec["data"].get("max_samples", 5000)
    x, y = next(iter(batches))
    assert made(spec["loss"]["factory"])(model(x), y).shape == ()
    assert list(DATA.joinpath(name).glob(spec["checkpoints"]["pattern"]))
    assert (DATA / name / spec["checkpoints"]["log"]).is_file()


def test_the_shipped_data_is_small():
    sizes = [os.path.getsize(p) for p in DATA.rglob("*") if p.is_file() and "cifar" not in str(p)]
    assert sum(sizes) < 12e6
