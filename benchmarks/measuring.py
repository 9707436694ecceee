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


def exponents(ds: xr.Dataset, last: int = 4) -> pd.DataFrame:
    """How time, memory and size of benchmarks/table1.py grow: exponents of P and S over the ``last`` models computed.

    One row a method and order, one column a quantity and sweep, each ``exponent +- standard error`` in words.
    """
    rows = {}
    for method in ds.method.values:
        for order in ds.order.values:
            row = {}
            for sweep in ("P", "S"):
                x = ds[f"{sweep}_{sweep}"].values
                for quantity in ("entries", "seconds", "bytes"):
                    y = ds[f"{quantity}_{sweep}"].sel({"method": method, "order": order}).values
                    computed = np.isfinite(ds[f"seconds_{sweep}"].sel({"method": method, "order": order}).values) & (
                        y > 0
                    )
                    chosen = np.flatnonzero(computed)[-last:]
                    slope, error = exponent(x[chosen], y[chosen])
                    row[f"{quantity} ~ {sweep}"] = "-" if np.isnan(slope) else f"{slope:.2f} ± {error:.2f}"
            rows[str(method), int(order)] = row
    return pd.DataFrame(rows).T.rename_axis(["method", "order"])


def opened(path: str | Path) -> xr.Dataset:
    """A stored measurement, in memory."""
    with xr.open_dataset(path, engine="h5netcdf") as ds:
        return ds.load()
