"""Products by rows: convolution and matrix product are one, and what is larger than float32 sums in D^(d)."""

import platform

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import hoanalysis as ho
from hoanalysis.derivatives.tangents import kernels

X86 = platform.machine() in ("x86_64", "AMD64")


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.fixture
def convolutions(monkeypatch) -> list[tuple[int, ...]]:
    """The shapes of the rows that were taken as convolutions."""
    seen: list[tuple[int, ...]] = []
    convolved = kernels._convolved

    def spy(rows, w):
        seen.append(tuple(rows.shape))
        return convolved(rows, w)

    monkeypatch.setattr(kernels, "_convolved", spy)
    return seen


def operands(dtype: torch.dtype = torch.float32) -> list[tuple[torch.Tensor, torch.Tensor]]:
    a, w = random(6, 500, 48, dtype=dtype), random(64, 48, seed=1, dtype=dtype)
    strided = random(48, 6, 500, seed=2, dtype=dtype).permute(1, 2, 0)
    return [(a, w), (strided, w), (a[:, ::2], random(48, 64, seed=3, dtype=dtype).mT), (a[:1, :1], w), (a, w[:1])]


@pytest.mark.parametrize("worth", [1, 2**60], ids=["convolution", "product"])
@pytest.mark.parametrize("longest", [2**20, 7], ids=["whole", "parts"])
def test_rows_times_a_matrix(monkeypatch, convolutions, worth, longest):
    monkeypatch.setattr(kernels, "WORTH", worth)
    monkeypatch.setattr(kernels, "LONGEST", longest)
    monkeypatch.setattr(kernels, "PIECE", 64 * longest)
    for a, w in operands():
        expected = a.double() @ w.double().T
        out, total = random(*expected.shape, seed=4), random(*expected.shape, seed=4)
        kernels.by_rows_into(a, w, out)
        kernels.by_rows_onto(a, w, total)
        for found in (kernels.by_rows(a, w), out, total - random(*expected.shape, seed=4)):
            assert found.is_contiguous()
            torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=2e-5)
    assert bool(convolutions) == (X86 and worth == 1)
    assert all(len(shape) == 2 and shape[0] <= longest for shape in convolutions)


def test_float64_and_a_switched_off_onednn_take_the_product(monkeypatch, convolutions):
    monkeypatch.setattr(kernels, "WORTH", 1)
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", True)  # puts it back afterwards
    for a, w in operands(torch.float64):
        torch.testing.assert_close(kernels.by_rows(a, w), torch.einsum("...k,ok->...o", a, w), rtol=1e-12, atol=1e-12)
    torch.backends.mkldnn.enabled = False
    kernels.by_rows(*operands()[0])
    assert not convolutions


@pytest.mark.skipif(not X86, reason="elsewhere torch.mm is taken")
def test_summaries_in_float32_agree_with_those_in_float64(convolutions):
    """The exactness tests are in float64, which takes the other branch."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(160, 160), nn.Tanh(), nn.Linear(160, 160), nn.Tanh(), nn.Linear(160, 5))
    data = [(random(500, 160), torch.arange(500) % 5)]

    def summary(dtype: str):
        problem = ho.Problem(model, data, F.cross_entropy)
        return ho.summarize(problem, 3, engine="tangents", dtype=dtype, self_check=False, progress=False)

    single = summary("float32")
    assert len(convolutions) > 4
    convolutions.clear()
    double = summary("float64")
    assert not convolutions
    for d in ("D1", "D2", "D3"):
        largest = float(abs(double[d]).max())
        torch.testing.assert_close(
            torch.tensor(single[d].values), torch.tensor(double[d].values), rtol=1e-5, atol=1e-5 * largest
        )
