"""benchmarks/coverage.py: its bookkeeping against arithmetic, and a small version of what it measures."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import xarray as xr
from torch import nn

import hoanalysis as ho

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("coverage_benchmark", ROOT / "benchmarks" / "coverage.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def small(n_batches: int, rows: int = 12) -> tuple[nn.Module, list]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, labels = torch.randn(n_batches * rows, 3).double(), torch.randint(0, 3, (n_batches * rows,))
    labels = torch.where(torch.rand(len(x)) < 0.6, x.argmax(1), labels)  # something to learn: the gradient is no noise
    return model, list(zip(x.split(rows), labels.split(rows), strict=True))


def test_coverage_is_that_of_normal_estimates(bench, monkeypatch) -> None:
    """Means of n normal numbers and their textbook errors: t intervals hold 95 %, errors of half the size 67 %."""
    rng, n = np.random.default_rng(0), 6
    samples = [rng.normal(3.0, 2.0, size=(n, 40)) for _ in range(400)]
    for factor, expected in ((1.0, 0.95), (0.5, 0.745)):  # P(|t_5| <= 2.571) and P(|t_5| <= 2.571 / 2)

        def estimates(x, factor=factor):
            if x is None:
                return {"mean": (np.full(40, 3.0), np.zeros(40), n)}
            return {"mean": (x.mean(0), factor * x.std(0, ddof=1) / np.sqrt(n), n)}

        monkeypatch.setattr(bench, "estimates", estimates)
        found = bench.coverage(iter([None, *samples]))
        np.testing.assert_allclose(found["t"].mean(), expected, atol=0.015)
        np.testing.assert_allclose(found["width"].median(), factor * 0.93, rtol=0.05)  # the median of chi_5 / sqrt(5)
        np.testing.assert_allclose(found["bias"].mean(), 0, atol=0.05)
    assert (found["normal"] <= found["t"]).all()


def test_a_repeat_with_u_fixed_is_a_pass_over_the_drawn_batches(bench) -> None:
    model, batches = small(10)
    draws = bench.draw(10, 3, 5)
    truth, *repeats = bench.fixed(model, batches, draws)
    whole = ho.summarize(ho.Problem(model, batches, F.cross_entropy), 2, diagonal=3, progress=False)
    total = sum(F.cross_entropy(model(x), y) for x, y in batches)
    gradient = torch.autograd.grad(total / 10, list(model.parameters()))
    u = dict(zip(dict(model.named_parameters()), gradient, strict=True))
    np.testing.assert_allclose(truth.D2, whole.D2, rtol=1e-9, atol=1e-14)
    for index, ds in zip(draws, repeats, strict=True):
        drawn = ho.Problem(model, [batches[i] for i in index], F.cross_entropy)
        alone = ho.summarize(drawn, 2, diagonal=3, direction=u, keep_batches=bench.BLOCKS, progress=False)
        for name in ("D1", "D1_se", "D2", "D2_se", "D3_diag", "D2_batch", "weight"):
            np.testing.assert_allclose(ds[name], alone[name], rtol=1e-8, atol=1e-13, err_msg=name)


def pooled(found: xr.Dataset, quantity: str) -> float:
    return float(found["t"].where(found["quantity"] == quantity, drop=True).mean())


def test_intervals_hold_what_they_promise_with_u_fixed(bench) -> None:
    model, batches = small(40, 6)
    found = bench.coverage(bench.fixed(model, batches, bench.draw(40, 60, 0)))
    for quantity in ("D1", "D2", "learning rates (ridge)"):
        assert 0.88 <= pooled(found, quantity) <= 0.995, quantity
    low, high = 1 / bench.TARGET["width"], bench.TARGET["width"]
    assert low < float(found["width"].where(found["quantity"] == "D2", drop=True).median()) < high


def test_where_u_is_the_gradient_conditional_intervals_are_too_narrow(bench) -> None:
    model, batches = small(14, 20)
    draws = bench.draw(len(batches), 30, 0)
    found = {e: bench.coverage(bench.gradient(model, batches, draws, e)) for e in ("unconditional", "conditional")}
    assert 0.88 <= pooled(found["unconditional"], "D1") <= 0.995
    assert 0.85 <= pooled(found["unconditional"], "D2") <= 0.995
    assert pooled(found["conditional"], "D1") < 0.8  # half as wide as it should be


def test_table_and_markdown(bench) -> None:
    n = 4
    rows = {
        "quantity": ["D1", "D1", "D2", "D2"], "t": [0.95, 0.93, 0.95, 0.7], "normal": [0.9] * n, "width": [1.0] * n,
        "width_of_middle": [1.0] * n, "bias": [0.0] * n, "part": ["fixed"] * n, "step": [0] * n,
    }  # fmt: skip
    table = bench.table(xr.Dataset({k: ("row", v) for k, v in rows.items()}))
    assert table["quantity"].tolist() == ["D1", "D2"]
    assert table["pooled"].tolist() == ["94.0%", "82.5%"]
    assert table["worst"].tolist() == ["93.0%", "70.0%"]
    assert table["met"].tolist() == ["yes", "no"]
    lines = bench.markdown(table).splitlines()
    assert lines[0].startswith("| part | step | quantity |")
    assert len(lines) == 4
