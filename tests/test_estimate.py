"""The estimate of what a study costs: against what it then costs, and against counts by hand."""

import math
import re
import shutil
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from typer.testing import CliRunner

import hoanalysis as ho
from hoanalysis import budget as module
from hoanalysis.budget import bytes_of, estimate, seconds_of
from hoanalysis.cli import app
from hoanalysis.derivatives import engines
from hoanalysis.errors import ArgumentError
from hoanalysis.store import Store
from hoanalysis.study import StudySpec

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture
def problem() -> ho.Problem:
    torch.manual_seed(0)
    model = nn.Sequential(*[m for _ in range(6) for m in (nn.Linear(128, 128), nn.Tanh())], nn.Linear(128, 10))
    batches = [(torch.randn(256, 128), torch.randint(0, 10, (256,))) for _ in range(12)]
    return ho.Problem(model, batches, F.cross_entropy)


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """Three checkpoints of a shipped run, over a quarter of its images."""
    source = DATA / "lenet5-mnist"
    for path in sorted(source.glob("*.safetensors"))[:3]:
        shutil.copy(path, tmp_path)
    shutil.copy(source / "log.csv", tmp_path)
    text = (source / "study.toml").read_text().replace("batch_size = 128", "batch_size = 128\nmax_samples = 1024")
    (tmp_path / "study.toml").write_text(text)
    return tmp_path / "study.toml"


def test_time_of_a_problem(problem: ho.Problem) -> None:
    """Loose: other processes may share this machine. The full table is that of benchmarks/estimate.py."""
    ratios = []
    for _ in range(3):
        said = estimate(problem, order=3)
        problem.cache.pop("direction", None)
        start = time.perf_counter()
        ho.summarize(problem, 3, progress=False)
        ratios.append(said.seconds / (time.perf_counter() - start))
    assert 1 / 4 < sorted(ratios)[1] < 4


def test_counts(problem: ho.Problem) -> None:
    found = estimate(problem, order=2, diagonal=3, partition="layer")
    (line,) = found.lines
    assert (line.groups, line.checkpoints, line.done, line.batches) == (7, 1, 0, 12)
    assert line.engine == "tangents"
    assert line.timed
    assert found.bytes > 2**20
    assert set(line.errors) == {"D1", "D2"}


def test_what_takes_long_is_scaled_by_operations(problem: ho.Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    timed = estimate(problem, order=3).lines[0]
    monkeypatch.setattr(module, "PATIENCE", 0.0)
    scaled = estimate(problem, order=3).lines[0]
    assert timed.timed
    assert not scaled.timed
    assert 1 / 8 < scaled.seconds / timed.seconds < 8


def test_errors_are_those_of_the_whole_data(problem: ho.Problem) -> None:
    """Independent samples: the pilot's error over sqrt(batches) is the error that the whole pass finds."""
    said = estimate(problem, order=2).lines[0].errors
    pilot = module.Pilot(problem, None)
    work = module.Work(problem, module.Settings(order=2))
    u = pilot.at(work)[1]
    ds = ho.summarize(problem, 2, direction=u, progress=False)
    size = abs(ds.D2)
    matters = size >= 0.1 * size.max()
    real = float((ds.D2_se / size).where(matters).max())
    assert 1 / 3 < said["D2"] / real < 3


def test_units_that_are_there_are_done(study: Path, tmp_path: Path) -> None:
    spec = StudySpec.read(study)
    store = tmp_path / "store"
    before = estimate(study, store=store)
    assert before.lines[0].done == 0
    options = {**spec.settings()[0], "memory": "2GiB"}
    ho.summarize_run(spec.run()[:2], spec.problem(), options.pop("order"), store=store, progress=False, **options)
    after = estimate(study, store=store)
    assert (after.lines[0].done, after.lines[0].checkpoints) == (2, 3)
    assert after.lines[0].disk == pytest.approx(before.lines[0].disk / 3)
    real = sum(p.stat().st_size for p in store.rglob("*") if p.is_file())
    assert before.lines[0].disk * 2 / 3 == pytest.approx(real, rel=0.1)


def test_reading_the_study_and_writing_units_count(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data are read once, and a unit is written and read for each checkpoint: on a clock that runs for nothing else."""
    clock = [0.0]

    def slow(owner: type, name: str, seconds: float) -> None:
        real = getattr(owner, name)

        def wrapper(*args, **options):
            clock[0] += seconds
            return real(*args, **options)

        monkeypatch.setattr(owner, name, wrapper)

    monkeypatch.setattr(module, "perf_counter", lambda: clock[0])
    slow(StudySpec, "batches", 1000)
    slow(Store, "publish", 100)
    slow(Store, "read", 10)
    found = estimate(study)
    assert (found.beside, found.lines[0].seconds) == (1000, 3 * (100 + 10))


def test_a_budget_of_time(problem: ho.Problem) -> None:
    now = estimate(problem, order=3)
    found = estimate(problem, order=3, time=now.seconds * 0.6)
    assert found.changes
    fewer = [c for c in found.changes if c.what.startswith("max_samples")]
    if fewer:
        n = int(re.search(r"\d+", fewer[0].what)[0]) // 256
        factor = float(re.search(r"grow by ([0-9.]+)", fewer[0].loses)[1])
        assert factor == pytest.approx(max(1.0, math.sqrt(12 / n)), abs=0.051)  # two digits are printed
    assert any("diagonal = 3" in c.what for c in found.changes)
    fits = [c.fits for c in found.changes]
    assert fits == sorted(fits, reverse=True)


def test_what_fits_needs_no_change(problem: ho.Problem) -> None:
    assert estimate(problem, time="10h", memory="1TiB").changes == ()


def test_the_command(study: Path) -> None:
    result = CliRunner().invoke(app, ["estimate", str(study), "--time", "1s", "--memory", "16GiB"])
    assert result.exit_code == 0, result.output
    assert "3 of 3 checkpoints to compute, 8 batches" in result.output
    assert "diagonal = 3" in result.output
    refused = CliRunner().invoke(app, ["estimate", str(study), "--time", "soon"])
    assert refused.exit_code == 1
    assert "'soon' is not a time" in refused.output


def test_budgets() -> None:
    assert seconds_of("2h") == 7200
    assert bytes_of("4GiB") == 4 * 2**30
    for bad in ("", "-3s", "0", "10 parsecs"):
        with pytest.raises(ArgumentError, match="is not a time"):
            seconds_of(bad)


def test_options_belong_to_a_problem(study: Path) -> None:
    with pytest.raises(ArgumentError, match="options belong to a Problem"):
        estimate(study, order=2)


def test_nested_is_counted_by_its_passes(problem: ho.Problem) -> None:
    (line,) = estimate(problem, order=2, engine="nested", partition="kind", self_check=False).lines
    assert line.engine == "nested"
    assert line.passes == engines.nested.predicted_gradients(2, module.Request(2))


def test_a_small_gpt2_is_exact() -> None:
    """The model of benchmarks/gpt2_size.py in small, against nested reverse mode."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=2, n_embd=16, n_head=2, vocab_size=61, n_positions=24, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, use_cache=False, attn_implementation="eager", bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).eval()
    tokens = torch.randint(0, 61, (1, 24))
    problem = ho.Problem(
        model,
        [{"input_ids": tokens, "labels": tokens}],
        # not the model's own loss, which casts the logits to float32
        batch_loss=lambda m, b: F.cross_entropy(m(b["input_ids"]).logits[0, :-1], b["labels"][0, 1:]),
        batch_size=lambda b: b["labels"][:, 1:].numel(),
    )
    options = {"diagonal": 3, "partition": "layer", "dtype": "float64", "self_check": False, "progress": False}
    ours = ho.summarize(problem, 2, engine="tangents", **options)
    theirs = ho.summarize(problem, 2, engine="nested", **options)
    for name in ("loss", "D1", "D2", "D3_diag"):
        a, b = (torch.as_tensor(ds[name].values) for ds in (ours, theirs))
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10 * float(b.abs().max()))
