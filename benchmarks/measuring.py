"""CPU time and peak memory of a call, for the benchmarks that are stored: one thread, a process of its own for memory.

Times are CPU seconds of the process, not of the clock, so that other work on the machine adds little to them.
"""

import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def cpu_seconds(call: Callable[[], object]) -> float:
    """CPU time of one call."""
    start = time.process_time()
    call()
    return time.process_time() - start


def peak_bytes(call: Callable[[], object]) -> float:
    """By how much one call raises the memory that the process holds, at its highest. NaN where Linux cannot tell.

    Memory that was used before and given back to the allocator does not count again: measure in a fresh process, by
    `in_own_process`.
    """
    try:
        CLEAR.write_text("5")  # the high-water mark starts from what is held now
        before = _held("VmRSS")
    except OSError:
        call()
        return float("nan")
    call()
    return _held("VmHWM") - before


def _held(name: str) -> float:
    (line,) = [line for line in STATUS.read_text().splitlines() if line.startswith(name)]
    return 1024.0 * float(line.split()[1])


def in_own_process(function: Callable[..., Any], *args: Any) -> Any:
    """``function(*args)`` in a forked child; the parent must not have computed with torch before."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(function, args)


def repeated(call: Callable[[], object], seconds: float = 0.5, most: int = 7) -> float:
    """Median CPU time of several calls, at least one: until ``seconds`` have gone, ``most`` times at most."""
    times: list[float] = []
    while len(times) < most and sum(times) < seconds:
        times.append(cpu_seconds(call))
    return float(np.median(times))


def exponent(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """The slope of log y against log x by least squares, and its standard error; NaN with fewer than three points.

    >>> [round(v, 9) for v in exponent(np.array([1.0, 2, 4, 8]), np.array([3.0, 12, 48, 192]))]
    [2.0, 0.0]
    """
    known = np.isfinite(x) & np.isfinite(y) & (x > 0) & (y > 0)
    if known.sum() < 3:
        return float("nan"), float("nan")
    a, b = np.log(x[known]), np.log(y[known])
    away = a - a.mean()
    slope = float(away @ b / (away @ away))
    residual = b - b.mean() - slope * away
    return slope, float(np.sqrt(residual @ residual / (len(a) - 2) / (away @ away)))


#: Exponents of the paper's Table 1 and of docs/engine.md, by (quantity, sweep), at order d.
THEORY: dict[tuple[str, str], dict[str, Callable[[int], int]]] = {
    ("entries", "P"): {"full": lambda d: d, "Taylor": lambda d: 0, "tangents": lambda d: 0, "nested": lambda d: 0},
    ("entries", "S"): {"full": lambda d: 0, "Taylor": lambda d: 0, "tangents": lambda d: d, "nested": lambda d: d},
    ("seconds", "P"): {"full": lambda d: d, "Taylor": lambda d: 1, "tangents": lambda d: 1, "nested": lambda d: 1},
    ("seconds", "S"): {
        "full": lambda d: 0,
        "Taylor": lambda d: 0,
        "tangents": lambda d: max(d - 2, min(d - 1, 1)),
        "nested": lambda d: d - 1,
    },
    ("bytes", "P"): {"full": lambda d: d, "Taylor": lambda d: 1, "tangents": lambda d: 1, "nested": lambda d: 1},
}
NOISE = 2.0**20  # bytes: what the process held before serves a call again, up to about this much


def exponents(ds: xr.Dataset, last: int = 4) -> pd.DataFrame:
    """How time, memory and size of benchmarks/table1.py grow: exponents of P and S over the ``last`` models computed.

    One row a method and order, one column a quantity and sweep, each ``exponent +- standard error; last local exponent
    [theory]`` in words; a dash with fewer than ``last`` models, or with that many above the noise of the memory.
    """
    rows = {}
    for method in ds.method.values:
        for order in ds.order.values:
            row = {}
            for sweep in ("P", "S"):
                for quantity in ("entries", "seconds", "bytes"):
                    expected = THEORY.get((quantity, sweep), {}).get(str(method))
                    theory = f" [{expected(int(order))}]" if expected else ""
                    x, y = series(ds, quantity, sweep, str(method), int(order))
                    row[f"{quantity} ~ {sweep}"] = _grown(x[-last:], y[-last:], last) + theory
            rows[str(method), int(order)] = row
    return pd.DataFrame(rows).T.rename_axis(["method", "order"])


def _grown(x: np.ndarray, y: np.ndarray, least: int) -> str:
    if len(x) < least:
        return "-"
    slope, error = exponent(x, y)
    return f"{slope:.2f} ± {error:.2f}; {local(x, y):.2f}"


def series(ds: xr.Dataset, quantity: str, sweep: str, method: str, order: int) -> tuple[np.ndarray, np.ndarray]:
    """The sizes of a sweep and what was measured there, above the noise."""
    at = {"method": method, "order": order}
    x, y = ds[f"{sweep}_{sweep}"].values, ds[f"{quantity}_{sweep}"].sel(at).values
    computed = np.isfinite(ds[f"seconds_{sweep}"].sel(at).values) & (y > (NOISE if quantity == "bytes" else 0))
    return x[computed], y[computed]


def local(x: np.ndarray, y: np.ndarray) -> float:
    """The exponent between the last two sizes.

    >>> round(local(np.array([1.0, 2, 4]), np.array([9.0, 1, 8])), 9)
    3.0
    """
    return float(np.log(y[-1] / y[-2]) / np.log(x[-1] / x[-2]))


def away(ds: xr.Dataset, quantity: str, sweep: str, far: float = 0.25) -> tuple[list[str], list[str], int]:
    """The methods and orders of which the last local exponent is more than ``far`` below the theory, those of which it
    is as far above, and of how many there is an exponent."""
    below, above, of = [], [], 0
    for method in map(str, ds.method.values):
        for order in ds.order.values:
            x, y = series(ds, quantity, sweep, method, int(order))
            if len(x) < 4:
                continue
            of += 1
            difference = local(x, y) - THEORY[quantity, sweep][method](int(order))
            if abs(difference) > far:
                (below if difference < 0 else above).append(f"{method} {order}")
    return below, above, of


def compared(ds: xr.Dataset) -> list[str]:
    """Where the largest models are still away from the exponents of the theory, in sentences."""
    lines = []
    titles = {("seconds", "P"): "Time", ("seconds", "S"): "Time", ("bytes", "P"): "Memory"}
    for (quantity, sweep), of_what in titles.items():
        below, above, of = away(ds, quantity, sweep)
        parts = [
            f"{len(found)} {word} the theory ({', '.join(found)})"
            for found, word in ((below, "below"), (above, "above"))
            if found
        ]
        lines.append(
            f"{of_what} with {sweep}: of {of} last local exponents {' and '.join(parts) or 'none is far off'}."
        )
    return lines


def opened(path: str | Path) -> xr.Dataset:
    """A stored measurement, in memory."""
    with xr.open_dataset(path, engine="h5netcdf") as ds:
        return ds.load()
