"""The full Hessian in a study: computed once, kept in the store, in every Dataset, and drawn in the report."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import hoanalysis as ho
from hoanalysis.errors import HoError, StudyError
from hoanalysis.study import StudySpec
from tests.conftest import write_study
from tests.reports.notebooks import text_of

TABLE = 'directions = ["gradient", "weights"]\n[summaries.curvature]\nprobes = 90\ntolerance = 1e-8\n'


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hessian")
    study = write_study(folder / "run", "factories_hessians", TABLE)
    said: list[str] = []
    return study, ho.report(study, folder / "out", progress=False, say=said.append), said


def dense(problem, state):
    """By torch.func over all batches at once, as float64."""
    names, shapes = zip(*((n, p.shape) for n, p in problem.model.named_parameters()), strict=True)
    x, y = (torch.cat(parts) for parts in zip(*problem.batches(), strict=True))

    def loss(flat):
        pieces = dict(zip(names, flat.split([s.numel() for s in shapes]), strict=True))
        given = {n: v.reshape(s) for (n, v), s in zip(pieces.items(), shapes, strict=True)}
        return torch.nn.functional.cross_entropy(torch.func.functional_call(problem.model, given, (x,)), y)

    return torch.func.hessian(loss)(torch.cat([state[n].ravel() for n in names])).double().numpy()


def test_every_dataset_holds_the_extremes_and_the_trace_of_each_checkpoint(made):
    study, page, _ = made
    spec = StudySpec.read(study)
    problem, run = spec.problem(), spec.run()
    for file in ("summaries.nc", "summaries-weights-canonical.nc"):
        ds = ho.open_dataset(page.parent / file)
        for i, checkpoint in enumerate(run):
            values = np.linalg.eigvalsh(dense(problem, checkpoint.state_dict))
            np.testing.assert_allclose(ds.hessian_largest[i], values[-1], rtol=1e-4)
            np.testing.assert_allclose(ds.hessian_lowest[i], values[0], rtol=1e-4)
            np.testing.assert_allclose(ds.hessian_trace[i], values.sum(), rtol=0.2)
        assert ds.hessian_status.values.tolist() == ["ok"] * 3
        assert ds.hessian_largest.attrs["units"] == "loss/parameter^2"
        assert "_se" not in ds.ho.plot.curvature().get_title()


def test_a_second_report_computes_nothing_and_the_page_shows_it(made):
    study, page, said = made
    assert any("computed the curvature of 3 checkpoints" in line for line in said)
    again: list[str] = []
    ho.report(study, page.parent, progress=False, say=again.append)
    assert not any("curvature" in line for line in again)
    assert "edge of stability" in text_of(page.read_text())


def test_a_checkpoint_without_a_hessian_is_a_gap(tmp_path):
    study = write_study(tmp_path / "run", "factories_hessians_gap", TABLE)
    broken = {n: t * np.nan for n, t in ho.load_checkpoint(study.parent / "step_10.safetensors").state_dict.items()}
    save_file(broken, study.parent / "step_10.safetensors")
    with pytest.raises(HoError):
        ho.report(study, tmp_path / "out", progress=False)
    ds = ho.open_dataset(tmp_path / "out" / "summaries.nc")
    np.testing.assert_array_equal(np.isnan(ds.hessian_largest), [False, True, False])
    assert ds.hessian_status.values[1].startswith("not computed: ")


def test_a_study_that_asks_for_none_holds_none(study, tmp_path):
    page = ho.report(study, tmp_path / "out", progress=False)
    assert not any(str(n).startswith("hessian_") for n in ho.open_dataset(tmp_path / "out" / "summaries.nc").data_vars)
    assert "edge of stability" not in text_of(page.read_text())


def test_wrong_options_are_named(tmp_path):
    study = write_study(tmp_path / "run", "factories_hessians_wrong", "[summaries.curvature]\nprobe = 3\n")
    with pytest.raises(StudyError, match="probe"):
        StudySpec.read(study)
