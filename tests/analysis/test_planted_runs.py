"""Real training runs by torch's own SGD, each with one fault planted in it, and healthy ones: what the verdict says.

A small tanh network on MNIST images of 8 x 8 pixels; six single steps are kept at the start of each of three epochs.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

import hoanalysis as ho
from hoanalysis import data
from hoanalysis.analysis.autopsy import Autopsy, autopsy

RATE, BATCH, EPOCH, EPOCHS, KEPT, FAULT = 0.1, 40, 25, 3, 6, 1  # the fault begins with this epoch
NAMES = ["0.weight", "0.bias", "2.weight", "2.bias"]


@cache
def images() -> tuple[torch.Tensor, torch.Tensor]:
    whole = data.mnist5k("train", batch_size=1000, max_samples=EPOCH * BATCH)
    return F.avg_pool2d(whole.x, 4).flatten(1), whole.y


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 20), nn.Tanh(), nn.Linear(20, 10))


def train(folder: Path, plant: Callable[[dict[str, dict]], None], labels: bool = False, seed: int = 0) -> None:
    """``plant`` changes the settings of the optimizer's groups, by parameter; ``labels`` shuffles the labels."""
    model, (x, y), step = network(seed), images(), 0
    groups = [{"params": [p], "name": n} for n, p in model.named_parameters()]
    optimizer = torch.optim.SGD(groups, lr=RATE, momentum=0.9, weight_decay=5e-4)
    random = torch.Generator().manual_seed(seed)
    for epoch in range(EPOCHS):
        if epoch == FAULT:
            plant({g["name"]: g for g in optimizer.param_groups})
            y = y[torch.randperm(len(y), generator=random)] if labels else y
        for index in torch.randperm(len(x), generator=random).split(BATCH):
            if step % EPOCH <= KEPT:
                save_file(dict(model.state_dict()), folder / f"m_{step:04d}.safetensors")
            optimizer.zero_grad()
            F.cross_entropy(model(x[index]), y[index]).backward()
            optimizer.step()
            step += 1
    save_file(dict(model.state_dict()), folder / f"m_{step:04d}.safetensors")


def looked_into(plant: Callable[[dict[str, dict]], None], **how) -> Autopsy:
    x, y = images()
    problem = ho.Problem(network(0), data.Batches(x, y, 125), F.cross_entropy)
    options = {"keep_batches": 8, "self_check": False, "progress": False}
    with TemporaryDirectory() as folder:
        train(Path(folder), plant, **how)
        run = ho.open_run(folder)
        steps = ho.summarize_run(run, problem, 2, direction="to:next", measure="path", **options)
        gradient, weights = (ho.summarize_run(run, problem, 1, direction=d, **options) for d in ("gradient", "weights"))
    return autopsy(steps, gradient=gradient, weights=weights, log=pd.DataFrame({"step": [0], "learning_rate": [RATE]}))


def alarms(found: Autopsy) -> list[tuple]:
    told = found.suspects[found.suspects["alarm"]]
    return list(zip(told["kind"], told["groups"], strict=True))


def everywhere(**settings) -> Callable[[dict[str, dict]], None]:
    return lambda groups: [g.update(settings) for g in groups.values()] and None


def of(name: str, rate: float) -> Callable[[dict[str, dict]], None]:
    return lambda groups: groups[name].update(lr=rate)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_healthy_run_has_no_alarm(seed):
    found = looked_into(everywhere(), seed=seed)
    assert alarms(found) == []
    assert found.verdict == ["No step broke the run, and its steps show no fault."]


@pytest.mark.parametrize(
    ("plant", "expected"),
    [
        (of("2.weight", 30 * RATE), ("learning rate", ("2.weight",))),
        (of("0.weight", 0.0), ("does not move", ("0.weight",))),
        (everywhere(momentum=1.05), ("momentum", ())),
        (everywhere(weight_decay=0.5), ("weight decay", ())),
    ],
    ids=["rate", "still", "momentum", "decay"],
)
def test_a_fault_of_the_optimizer_is_named_first(plant, expected):
    found = looked_into(plant)
    assert alarms(found)[:1] == [expected]
    assert "data" not in dict(alarms(found))


def test_shuffled_labels_are_blamed_on_the_data_and_on_no_learning_rate():
    found = looked_into(everywhere(), labels=True)
    assert [kind for kind, _ in alarms(found)] == ["data"]
    assert found.broke.step in range(EPOCH * FAULT, EPOCH * FAULT + 3)
    assert "No learning rate is to blame." in found.verdict[-1]
