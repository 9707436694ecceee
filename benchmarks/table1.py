"""Table 1 of the paper, measured: size, time and memory of derivatives of order 1 to 4.

    python benchmarks/table1.py --out data/paper-figures/table1.nc

| method   | what                                                        | entries |
|----------|-------------------------------------------------------------|---------|
| full     | the full derivative of order d, by torch.func               | P^d     |
| Taylor   | d^k/dt^k L(theta + t u), k = 1..d: `ho.taylor_terms`         | 1       |
| tangents | D^(1) .. D^(d), by the engine of docs/engine.md             | S^d     |
| nested   | the same by nested reverse mode, the paper's method         | S^d     |

The model is a tanh MLP on 32 random samples. The sweep "P" grows the width at three layers (S = 6), the sweep "S" the
number of layers at about 50,000 parameters. Time is the median CPU time of warm calls on one thread, memory the highest
rise of the process's memory in its first call. What would take too long or too much memory is left out: full
derivatives of more than 2^24 entries, and whatever the smaller model of the sweep predicts to take longer than
``--patience``.
"""

import argparse
import itertools
from collections.abc import Callable
from pathlib import Path

import measuring
import numpy as np
import torch
import torch.nn.functional as F
import xarray as xr
from torch.func import functional_call, grad, jacfwd

import hoanalysis as ho

METHODS = ("full", "Taylor", "tangents", "nested")
ORDERS = (1, 2, 3, 4)
SAMPLES, INPUTS, CLASSES = 32, 4, 3
#: Hidden widths of the networks of each sweep.
SWEEPS: dict[str, list[list[int]]] = {
    "P": [[w] * 2 for w in (2, 3, 4, 8, 16, 32, 64, 128, 256, 512)],
    "S": [[w] * (layers - 1) for layers, w in ((3, 224), (5, 129), (9, 85), (17, 58))],
}
MOST_ENTRIES = 2**24


def network(hidden: list[int]) -> torch.nn.Module:
    torch.manual_seed(0)
    return ho.models.MLP((INPUTS, *hidden, CLASSES))


def call_of(method: str, order: int, hidden: list[int]) -> Callable[[], object]:
    """The call to be measured, with the direction, the gradient, known."""
    model = network(hidden)
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(SAMPLES, INPUTS, generator=g), torch.randint(0, CLASSES, (SAMPLES,), generator=g)
    problem = ho.Problem(model, [(x, y)], F.cross_entropy)
    parameters = dict(model.named_parameters())
    u = dict(zip(parameters, torch.autograd.grad(F.cross_entropy(model(x), y), parameters.values()), strict=True))
    if method == "Taylor":
        return lambda: ho.taylor_terms(problem, order, direction=u, progress=False)
    if method != "full":
        return lambda: ho.summarize(
            problem, order, direction=u, engine=method, self_check=False, memory="8GiB", progress=False
        )
    sizes = [p.numel() for p in parameters.values()]

    def loss(flat: torch.Tensor) -> torch.Tensor:
        pieces = zip(parameters.items(), flat.split(sizes), strict=True)
        return F.cross_entropy(functional_call(model, {n: v.view(p.shape) for (n, p), v in pieces}, (x,)), y)

    derivative = grad(loss)
    for _ in range(order - 1):
        derivative = jacfwd(derivative)
    theta = torch.cat([p.detach().flatten() for p in parameters.values()])
    return lambda: derivative(theta)


def one(method: str, order: int, hidden: list[int]) -> tuple[float, float]:
    """CPU seconds of a warm call and bytes of the first."""
    torch.set_num_threads(1)
    call_of(method, order, SWEEPS["P"][0])()  # what is loaded once is not the model's
    call = call_of(method, order, hidden)
    held = measuring.peak_bytes(call)
    return measuring.repeated(call), held


def expected(method: str, order: int, ratio_s: float, ratio_p: float, before: float) -> float:
    """Seconds of the next model of a sweep, if the cost grows as the paper's table says."""
    growth = {"full": ratio_p ** (order - 1), "nested": ratio_s ** (order - 1)}.get(
        method, ratio_s ** max(1, order - 2)
    )
    return before * growth * (1 if method == "full" else max(ratio_p, 1.0))


def measure(sweep: str, patience: float) -> xr.Dataset:
    networks = SWEEPS[sweep]
    size = np.array([sum(p.numel() for p in network(h).parameters()) for h in networks], dtype=float)
    groups = np.array([2.0 * (len(h) + 1) for h in networks])
    shape = (len(networks), len(METHODS), len(ORDERS))
    seconds, held = np.full(shape, np.nan), np.full(shape, np.nan)
    for (j, method), (k, order) in itertools.product(enumerate(METHODS), enumerate(ORDERS)):
        for i, hidden in enumerate(networks):
            if method == "full" and size[i] ** order > MOST_ENTRIES:
                break
            if (
                i
                and expected(method, order, groups[i] / groups[i - 1], size[i] / size[i - 1], seconds[i - 1, j, k])
                > patience
            ):
                break
            seconds[i, j, k], held[i, j, k] = measuring.in_own_process(one, method, order, hidden)
            print(f"{sweep} P={size[i]:.0f} S={groups[i]:.0f} {method} {order}: "
                  f"{seconds[i, j, k]:.4g} s, {held[i, j, k] / 2**20:.4g} MiB", flush=True)  # fmt: skip
    entries = [
        [[{"full": p**d, "Taylor": 1.0}.get(m, s**d) for d in ORDERS] for m in METHODS]
        for p, s in zip(size, groups, strict=True)
    ]
    dims = (f"network_{sweep}", "method", "order")
    return xr.Dataset(
        {
            f"seconds_{sweep}": (dims, seconds, {"long_name": "CPU time of a warm call", "units": "s"}),
            f"bytes_{sweep}": (dims, held, {"long_name": "highest rise of memory, first call", "units": "B"}),
            f"entries_{sweep}": (dims, np.array(entries), {"long_name": "entries of the derivative", "units": "1"}),
        },
        {
            "method": list(METHODS),
            "order": list(ORDERS),
            f"P_{sweep}": (dims[0], size),
            f"S_{sweep}": (dims[0], groups),
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patience", type=float, default=30.0, help="CPU seconds of one call that is still waited for")
    parser.add_argument("--out", type=Path, default=Path("data/paper-figures/table1.nc"))
    given = parser.parse_args()
    ds = xr.merge([measure(sweep, given.patience) for sweep in SWEEPS])
    ds.attrs = {"torch_version": str(torch.__version__), "torch_threads": 1, "samples": SAMPLES}
    given.out.parent.mkdir(parents=True, exist_ok=True)
    ds.to_netcdf(given.out, engine="h5netcdf")


if __name__ == "__main__":
    main()
