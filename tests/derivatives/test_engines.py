"""Which engine runs, in which chunks, and what is said about it; both engines on both shipped runs."""

import ctypes
import gc
import os
import re
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hoanalysis as ho
from hoanalysis.derivatives import engines
from hoanalysis.derivatives.common import Request
from hoanalysis.derivatives.tangents import Program
from hoanalysis.errors import ModelError
from hoanalysis.models import VGG11Prime
from hoanalysis.study import StudySpec
from tests import oracles

DATA = Path(__file__).parents[2] / "data"
QUIET = {"progress": False, "self_check": False}


#: What takes hours runs in full where this is set; the suite takes a part of it.
LONG = bool(os.environ.get("HOANALYSIS_LONG_TESTS"))


@pytest.mark.parametrize(
    ("name", "rows", "length", "every", "order"),
    [
        ("lenet5-mnist", 50 if LONG else 4, None, 1 if LONG else 4, 3),
        ("gpt-docs", 8 if LONG else 2, 64 if LONG else 16, 1, 2),
        ("gpt-docs", 2, 64 if LONG else 8, 3 if LONG else 7, 3),  # nested needs 465 backward passes a batch
    ],
)
def test_both_engines_give_the_same_dataset_on_the_shipped_runs(
    name: str, rows: int, length: int | None, every: int, order: int
) -> None:
    spec = StudySpec.read(DATA / name)
    shipped = spec.problem()
    x, y = shipped.first_batch()
    if length is not None:
        x, y = x[:, :length], y[:, :length]
    problem = ho.Problem(shipped.model, [(x[i : i + rows], y[i : i + rows]) for i in (0, rows)], shipped.loss)
    both = [
        ho.summarize_run(spec.run()[::every], problem, order, dtype="float64", engine=e, keep_batches=2, progress=False)
        for e in ("tangents", "nested")
    ]
    assert [set(ds.engine.values) for ds in both] == [{"tangents"}, {"nested"}]
    assert both[0].sizes == both[1].sizes
    assert both[0].sizes["step"] == len(spec.run()[::every]) >= 2
    for variable in both[0].data_vars:
        a, b = (ds[variable].values for ds in both)
        np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-11 * np.abs(b).max(), err_msg=str(variable))


class Detached(nn.Module):
    """A product whose factor is cut off: the loss alone would not show that a capture lost it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.outer(x) * torch.sigmoid(self.inner(x)).detach()


class Swish(torch.autograd.Function):
    """x sigmoid(x), with a backward of its own that is differentiable again."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(x)
        return g * (s + x * s * (1 - s))


class WithSwish(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 3), nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(Swish.apply(self.first(x)))


@pytest.mark.parametrize("make", [Detached, WithSwish])
def test_whatever_engine_auto_takes_the_numbers_are_right_and_the_reason_is_said(make) -> None:
    torch.manual_seed(0)
    model = make().double()
    x, y = torch.randn(6, 4).double(), torch.randint(0, 3, (6,))
    u = oracles.random_like(dict(model.named_parameters()), 4)
    problem = ho.Problem(model, [(x, y)], F.cross_entropy)
    auto = ho.summarize(problem, 3, direction=u, progress=False)
    nested = ho.summarize(problem, 3, direction=u, engine="nested", progress=False)
    for name in ("D1", "D2", "D3"):
        np.testing.assert_allclose(auto[name], nested[name], rtol=1e-9, atol=1e-13)
    assert (auto.engine.item() == "tangents") != bool(
        re.search("nested instead of tangents", auto.engine_detail.item())
    )


def test_a_wrong_program_is_caught_and_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph whose D1 is wrong by 1 % must not get through; where tangents was asked for, that is an error."""
    right = Program.derivatives

    def wrong(self, *args):
        result = right(self, *args)
        result.tensors[1][0] *= 1.01
        return result

    monkeypatch.setattr(Program, "derivatives", wrong)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3))
    problem = ho.Problem(model, [(torch.randn(6, 4), torch.randint(0, 3, (6,)))], F.cross_entropy)
    ds = ho.summarize(problem, 2, direction="weights", progress=False)
    assert ds.engine.item() == "nested"
    assert "eager gradient" in ds.engine_detail.item()
    with pytest.raises(ModelError, match="cannot differentiate"):
        ho.summarize(problem, 2, direction="weights", engine="tangents", progress=False)


@pytest.mark.row("N2")
def test_a_self_check_that_fails_flags_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Program.derivatives

    def wrong(self, *args):
        result = right(self, *args)
        if 2 in result.tensors:
            result.tensors[2][0, 0] *= 1.2
        return result

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    batch = (torch.randn(6, 4).double(), torch.randint(0, 3, (6,)))
    good = ho.summarize(ho.Problem(model, [batch], F.cross_entropy), 2, direction="weights", progress=False)
    assert good.attrs["suspect"] == 0
    assert float(good.self_check) < 1e-12
    monkeypatch.setattr(Program, "derivatives", wrong)
    bad = ho.summarize(ho.Problem(model, [batch], F.cross_entropy), 2, direction="weights", progress=False)
    assert bad.attrs["suspect"] == 1
    assert float(bad.self_check) > 1e-3


@pytest.mark.parametrize("engine", ["tangents", "nested"])
def test_chunks_add_up_to_the_whole(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With masked targets, so that chunks weigh differently."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = torch.randn(50, 4).double(), torch.randint(0, 3, (50,))
    y[torch.rand(50) < 0.3] = -100
    u = oracles.random_like(dict(model.named_parameters()), 4)
    whole = ho.summarize(ho.Problem(model, [(x, y)], F.cross_entropy), 3, direction=u, engine=engine, **QUIET)
    sizes = []
    chunk = engines.Tangents.chunk if engine == "tangents" else engines.Nested.chunk

    def record(self, batch):
        sizes.append(len(batch[0]))
        return chunk(self, batch)

    def most(self, batch):
        return 12

    kind = engines.Tangents if engine == "tangents" else engines.Nested
    monkeypatch.setattr(kind, "chunk", record)
    monkeypatch.setattr(kind, "affordable", most)
    cut = ho.summarize(ho.Problem(model, [(x, y)], F.cross_entropy), 3, direction=u, engine=engine, **QUIET)
    assert sizes == [10] * 5
    for name in ("loss", "D1", "D2", "D3"):
        np.testing.assert_allclose(cut[name], whole[name], rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("words", ["not enough memory", "can't allocate memory: you tried to allocate 9 bytes"])
@pytest.mark.row("A10")
def test_out_of_memory_halves_the_chunk_and_says_so(monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = torch.randn(16, 4).double(), torch.randint(0, 3, (16,))
    u = oracles.random_like(dict(model.named_parameters()), 4)
    problem = ho.Problem(model, [(x, y)], F.cross_entropy)
    whole = ho.summarize(problem, 3, direction=u, engine="nested", **QUIET)
    chunk = engines.Nested.chunk

    def small_machine(self, batch):
        if len(batch[0]) > 5:
            raise RuntimeError(f"[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: {words}")
        return chunk(self, batch)

    monkeypatch.setattr(engines.Nested, "chunk", small_machine)
    ds = ho.summarize(problem, 3, direction=u, engine="nested", **QUIET)
    assert "went on with 4" in ds.engine_detail.item()
    np.testing.assert_allclose(ds.D3, whole.D3, rtol=1e-10, atol=1e-13)


def test_a_batch_coupled_loss_is_taken_whole() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = torch.randn(40, 4).double(), torch.randint(0, 3, (40,))
    problem = ho.Problem(model, [(x, y)], F.cross_entropy)
    assert not problem.splittable
    u = oracles.random_like(dict(model.named_parameters()), 4)
    tight = ho.summarize(problem, 3, direction=u, memory="1KiB", **QUIET)
    nested = ho.summarize(problem, 3, direction=u, engine="nested", **QUIET)
    np.testing.assert_allclose(tight.D3, nested.D3, rtol=1e-9, atol=1e-12)


def test_the_cheaper_engine_by_prediction_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    problem = ho.Problem(model, [(torch.randn(6, 4).double(), torch.randint(0, 3, (6,)))], F.cross_entropy)
    assert ho.summarize(problem, 3, direction="weights", **QUIET).engine.item() == "tangents"
    monkeypatch.setattr(engines.nested, "predicted_gradients", lambda groups, request: 0.5)
    cheap = ho.summarize(problem, 3, direction="weights", **QUIET)
    assert cheap.engine.item() == "nested"
    assert "nested is cheaper: 0.5 gradients" in cheap.engine_detail.item()


def test_predicted_passes_of_nested_are_those_that_it_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    problem = ho.Problem(model, [(torch.randn(6, 4).double(), torch.randint(0, 3, (6,)))], F.cross_entropy)
    state, count, row = problem.state(), [0], engines.nested.gradient_row

    def counted(*args):
        count[0] += 1
        return row(*args)

    monkeypatch.setattr(engines.nested, "gradient_row", counted)
    partition, u = ho.Partition.canonical(model), oracles.random_like(state.parameters, 1)
    for request in (Request(1), Request(2), Request(3), Request(2, 3), Request(1, 4), Request(4)):
        count[0] = 0
        engines.nested.derivatives(problem, state, u, partition, problem.first_batch(), request)
        assert engines.nested.predicted_gradients(4, request) == 2 * count[0]


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the resident memory from /proc")
@pytest.mark.parametrize("order", [2, 3])
def test_peak_memory_keeps_to_the_budget(order: int) -> None:
    """A VGG-11' of half width on 256 images: the peak above the start is at most the budget plus 20 %.

    In the long form the whole VGG-11' on 512 images, with a budget of 2 GiB.
    """
    torch.manual_seed(0)
    images, model = (512, VGG11Prime()) if LONG else (256, VGG11Prime(width=0.5))
    problem = ho.Problem(model, [(torch.randn(images, 3, 32, 32), torch.randint(0, 10, (images,)))], F.cross_entropy)
    u = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    few = [(torch.randn(4, 3, 32, 32), torch.randint(0, 10, (4,)))]
    ho.summarize(ho.Problem(model, few, F.cross_entropy), order, direction=u, **QUIET)  # loads code, once in a process
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before does not count as there
    budget, start, peak, done = 2**31 if LONG else 2**28, resident(), [0], threading.Event()

    def watch() -> None:
        while not done.is_set():
            peak[0] = max(peak[0], resident())
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        ds = ho.summarize(problem, order, direction=u, memory=budget, **QUIET)
    finally:
        done.set()
        watcher.join()
    print(f"\norder {order}: peak {(peak[0] - start) / budget:.3f} of the budget; {ds.engine_detail.item()}")
    assert "in chunks of at most" in ds.engine_detail.item()
    assert peak[0] - start <= 1.2 * budget
