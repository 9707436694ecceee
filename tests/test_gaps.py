"""Checkpoints of a run that have no such direction: gaps with a reason, and no failure where others have one."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import xarray as xr
from safetensors.torch import save_file
from torch import nn

import hoanalysis as ho
from hoanalysis import schema, summaries
from hoanalysis.errors import NoDirection
from hoanalysis.reports import Outcome, compute
from hoanalysis.study import StudySpec
from tests.conftest import write_study

LAST = "the last checkpoint of a run has no next one"


def make_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def make_problem() -> ho.Problem:
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(12, 4, generator=g).double(), torch.randint(0, 3, (12,), generator=g)
    return ho.Problem(make_model(), [(x[i : i + 4], y[i : i + 4]) for i in (0, 4, 8)], F.cross_entropy)


def save(folder: Path, step: int, model: nn.Module, optimizer=None, facts: dict | None = None) -> None:
    slots = {
        f"optimizer.{slot}.{n}": torch.as_tensor(value).clone()
        for n, p in model.named_parameters()
        for slot, value in (optimizer.state[p] if optimizer else {}).items()
    }
    metadata = {"training": json.dumps(facts)} if facts else None
    save_file({**model.state_dict(), **slots}, folder / f"m_{step}.safetensors", metadata)


@pytest.fixture
def run(tmp_path) -> ho.checkpoints.Run:
    """The first checkpoint without an optimizer's state, the others by Adam with settings of its own."""
    folder = tmp_path / "run"
    folder.mkdir()
    model, (x, y) = make_model(), make_problem().first_batch()
    save(folder, 0, model)
    settings = {"lr": 0.01, "betas": (0.7, 0.9), "eps": 1e-3}
    optimizer = torch.optim.Adam(model.parameters(), **settings)
    for step in (1, 2):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        save(folder, step, model, optimizer, {"optimizer": settings})
    return ho.open_run(folder)


GAPS = {"to:next": (2, LAST), "adam": (0, "'exp_avg', 'exp_avg_sq'"), "to:init": (0, "'to:init' is zero everywhere")}


@pytest.mark.parametrize("direction", GAPS)
@pytest.mark.parametrize("stored", [False, True])
def test_one_checkpoint_without_the_direction_is_a_gap(run, tmp_path, direction: str, stored: bool) -> None:
    position, reason = GAPS[direction]
    options = {"direction": direction, "keep_batches": 4, "measure": ("along", "removed"), "progress": False}
    problem = make_problem()
    ds = ho.summarize_run(run, problem, 2, store=tmp_path / "store" if stored else None, **options)
    schema.validate(ds)
    others = [i for i in range(3) if i != position]
    assert ds.coverage.values.tolist() == [float(i in others) for i in range(3)]
    assert ds.attrs["coverage"] == 1.0
    assert ds.n_batches.values.tolist() == [3 * (i in others) for i in range(3)]
    assert reason in ds.gap.values[position]
    assert [str(ds.gap.values[i]) for i in others] == ["", ""]
    for name in ("loss", "D2", "D2_se", "change_along", "loss_removed"):
        assert ds[name].isel(step=position).isnull().all(), name
        assert ds[name].isel(step=others).notnull().all(), name
    if direction == "to:next":
        for i in others:
            by_file = ho.summarize(
                problem, 2, direction=f"to:{run.paths[i + 1]}", checkpoint=run[i], progress=False, keep_batches=4
            )
            np.testing.assert_allclose(ds.D2.isel(step=i), by_file.D2, rtol=1e-12)
            assert str(ds.direction_detail.values[i]) == f"to_sha256: {run[i + 1].sha256}"
    if stored:
        xr.testing.assert_identical(ho.open_store(tmp_path / "store").drop_attrs(), ds.drop_attrs())
    ds.to_netcdf(tmp_path / "ds.nc", engine="h5netcdf")
    xr.testing.assert_equal(xr.load_dataset(tmp_path / "ds.nc", engine="h5netcdf"), ds)


def test_a_gap_is_not_tried_again(run, tmp_path, monkeypatch) -> None:
    options = {"direction": "adam", "store": tmp_path / "store", "progress": False}
    first = ho.summarize_run(run, make_problem(), 2, **options)
    monkeypatch.setattr(summaries.Work, "unit", lambda *a, **k: pytest.fail("computed again"))
    again = ho.summarize_run(run, make_problem(), 2, **options)
    xr.testing.assert_identical(first.drop_attrs(), again.drop_attrs())


def test_a_dataset_without_gaps_says_nothing_of_them(run) -> None:
    ds = ho.summarize_run(run, make_problem(), 1, direction="weights", progress=False)
    assert "gap" not in ds.coords
    assert ds.coverage.values.tolist() == [1, 1, 1]


@pytest.mark.parametrize("stored", [False, True])
def test_where_all_of_them_are_gaps_it_is_an_error(run, tmp_path, stored: bool) -> None:
    """Also the second time, when the store knows that they are."""
    store = tmp_path / "store" if stored else None
    for _ in range(2):
        with pytest.raises(NoDirection, match=r"(?s)'momentum_buffer'.*every checkpoint.*no optimizer state"):
            ho.summarize_run(run, make_problem(), 1, direction="momentum", store=store, progress=False)


def test_the_settings_of_adam_are_those_that_the_checkpoint_records(run) -> None:
    ds = ho.summarize_run(run, make_problem(), 1, direction="adam", progress=False)
    states = [c.state_dict for c in run]
    step = [
        np.linalg.norm((states[1][n] - states[2][n]) / 0.01) for n in schema.labels(ds)
    ]  # minus the last step, over lr
    np.testing.assert_allclose(ds.direction_norm.isel(step=2), step, rtol=1e-9)
    told = "betas: [0.7, 0.9]; betas_from: the checkpoint; eps: 0.001; eps_from: the checkpoint"
    assert ds.direction_detail.values.tolist() == ["", told, told]


def test_the_step_to_a_checkpoint_that_diverged_is_a_gap_too(tmp_path) -> None:
    for step, seed in ((0, 0), (1, 1), (2, 2)):
        model = make_model(seed)
        if step == 2:
            model[0].weight.data[1, 1] = float("nan")
        save(tmp_path, step, model)
    run = ho.open_run(tmp_path)
    with pytest.warns(UserWarning, match="step 2 is NaN: 1 tensors of the checkpoint hold NaN or infinite"):
        ds = ho.summarize_run(run, make_problem(), 1, direction="weights", progress=False)
    assert ds.coverage.values.tolist() == [1, 1, 0]
    ds = ho.summarize_run(run, make_problem(), 1, direction="to:next", progress=False)
    assert ds.coverage.values.tolist() == [1, 0, 0]
    assert ds.gap.values.tolist() == ["", "the checkpoint that the direction leads to is not finite", LAST]


def test_equal_checkpoints_have_their_own_next(tmp_path) -> None:
    """What was computed for the first must not be taken for the second, also where what lies between is there."""
    (tmp_path / "run").mkdir()
    for step, seed in ((0, 0), (1, 1), (2, 0), (3, 2)):
        save(tmp_path / "run", step, make_model(seed))
    run, options = ho.open_run(tmp_path / "run"), {"direction": "to:next", "progress": False}
    plain = ho.summarize_run(run, make_problem(), 1, **options)
    ho.summarize_run(run[1:3], make_problem(), 1, store=tmp_path / "store", **options)
    resumed = ho.summarize_run(run, make_problem(), 1, store=tmp_path / "store", **options)
    for ds in (plain, resumed):
        assert ds.coverage.values.tolist() == [1, 1, 1, 0]
        for i in (0, 1, 2):
            by_file = ho.summarize(
                make_problem(), 1, direction=f"to:{run.paths[i + 1]}", checkpoint=run[i], progress=False
            )
            np.testing.assert_allclose(ds.D1.isel(step=i), by_file.D1, rtol=1e-12)
    assert not np.allclose(plain.D1.values[0], plain.D1.values[2])


def test_a_file_to_go_to_lies_beside_the_run_and_its_content_counts(run, tmp_path, monkeypatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    options = {"direction": "to:m_2.safetensors", "store": tmp_path / "store", "progress": False}
    ds = ho.summarize_run(run, make_problem(), 1, **options)
    by_file = ho.summarize(
        make_problem(), 1, direction=f"to:{run.paths[2]}", checkpoint=run[0], progress=False, self_check=False
    )
    np.testing.assert_allclose(ds.D1.isel(step=0), by_file.D1, rtol=1e-12)
    assert ds.coverage.values.tolist() == [1, 1, 0]
    save(run.paths[2].parent, 2, make_model(9))
    other = ho.summarize_run(ho.open_run(run.paths[2].parent), make_problem(), 1, **options)
    assert not np.allclose(other.D1.isel(step=0), ds.D1.isel(step=0))


def test_a_study_with_gaps_is_whole(tmp_path) -> None:
    study = write_study(tmp_path / "one", "factories_gaps", 'directions = ["to:next", "to:init", "weights"]\n')
    spec = StudySpec.read(study)
    for computed in (7, 0):  # 2 + 2 + 3 of 3 checkpoints
        outcome = Outcome(spec.name, tmp_path / "out")
        datasets = compute(spec, outcome, progress=False, say=lambda _: None)
        assert outcome.error is None
        assert (outcome.computed, outcome.present, outcome.units) == (computed, 7, 7)
        assert [ds.attrs["coverage"] for ds in datasets.values()] == [1.0, 1.0, 1.0]


def test_a_study_of_nothing_but_gaps_is_an_error(tmp_path) -> None:
    study = write_study(tmp_path / "one", "factories_only_gaps", 'directions = ["weights", "momentum"]\n')
    spec = StudySpec.read(study)
    outcome = Outcome(spec.name, tmp_path / "out")
    compute(spec, outcome, progress=False, say=lambda _: None)
    assert isinstance(outcome.error, NoDirection)
    assert outcome.present == 3
