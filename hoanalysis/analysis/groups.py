"""Which groups have an effect at all, and the scale of each: what every solve with H-bar starts from.

A group without effect (a key-projection bias under softmax, a bias before a norm) has a direction that is rounding
noise, and makes H-bar singular. Measured on such groups, in float32 and float64: |D1_s|/|U^s| is below 3 eps of the
gradient's norm, and |D2_ss|/|U^s|^2 below eps of the largest. `TOLERANCE` leaves a factor of ten.
"""

from dataclasses import dataclass

import numpy as np
import xarray as xr

from hoanalysis.analysis.arrays import Array, Tensors, labelled, over_checkpoints, require, tensors

TOLERANCE = 32  # units of rounding (eps of the dtype that computed the summaries)
_EPS = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}


def rounding(ds: xr.Dataset) -> float:
    """The unit of rounding of the dtype that computed the summaries."""
    return eps_of(ds.attrs.get("dtype", ""))


def eps_of(dtype: object) -> float:
    """The unit of rounding of a dtype by its name, as torch and numpy write it; of float64 for one that is unknown."""
    return _EPS.get(str(dtype).removeprefix("torch."), _EPS["float64"])


@dataclass(frozen=True)
class System:
    """The groups of one checkpoint: ``used`` ones have an effect and a scale; the masks have shape (S,).

    ``scale_s = sqrt|D2_ss|`` equilibrates: C = H_st / (scale_s scale_t) has a diagonal of 1 and -1, and does not change
    when a group is rescaled.
    """

    null: Array
    flat: Array
    missing: Array
    scale: Array

    @property
    def used(self) -> Array:
        return ~(self.null | self.flat | self.missing)

    def scale_in(self, d2: Array) -> Array:
        """The scales by the diagonal of another D2, such as one without a block of batches, over the used groups."""
        size = np.sqrt(np.abs(np.diagonal(d2)))
        return np.where(size > 0, size, self.scale)[self.used]

    def equilibrated(self, t: Tensors) -> tuple[Array, Array]:
        """C, shape (n, n), and the equilibrated D1, shape (n,), over the n used groups."""
        use, scale = self.used, self.scale[self.used]
        return t["D2"][np.ix_(use, use)] / np.outer(scale, scale), t["D1"][use] / scale

    def spread(self, values: Array) -> Array:
        """Values (n, ..) over the used groups put back among all groups, NaN elsewhere."""
        out = np.full((len(self.used),) * values.ndim, np.nan)
        out[np.ix_(*[self.used] * values.ndim)] = values
        return out


def system(one: xr.Dataset) -> System:
    """The `System` of one checkpoint: null, flat and missing groups, and the scales of the others."""
    t = tensors(one, ["D1", "D2"])
    norm = np.asarray(one["direction_norm"].values, float) if "direction_norm" in one.coords else np.ones(len(t["D1"]))
    return system_of(t, norm, rounding(one))


def system_of(t: Tensors, norm: Array, eps: float) -> System:
    """The `System` of D1 (S,) and D2 (S, S) along a direction with the norms |U^s| (S,), known to ``eps``."""
    diagonal = np.diagonal(t["D2"])
    missing = ~(np.isfinite(t["D1"]) & np.isfinite(diagonal))
    tolerance = min(TOLERANCE * eps, 1e-2)
    null = ~missing & _without_effect(t["D1"], t["D2"], norm, tolerance)
    scale = _scales(np.where(np.isfinite(t["D2"]), t["D2"], 0.0), ~(missing | null))
    return System(null, ~(missing | null) & (scale == 0), missing, scale)


def _without_effect(d1: Array, d2: Array, norm: Array, tolerance: float) -> Array:
    """The slope along U^s/|U^s| and its whole row of D2 are rounding noise beside those of the other groups.

    The diagonal alone does not tell: a factor of a product whose other factor is 0 acts with it, and not alone.
    """
    unit = np.where(norm > 0, norm, 1.0)
    slope, size = np.abs(d1) / unit, np.abs(d2) / np.outer(unit, unit)
    row = np.nanmax(np.where(np.isfinite(size), size, 0.0), axis=1, initial=0.0)
    curvature = np.where(np.isfinite(np.diagonal(size)), row, np.nan)
    small_slope = slope <= tolerance * np.sqrt(np.nansum(slope**2))
    small_curvature = curvature <= tolerance * np.nanmax(curvature, initial=0.0)
    return (small_slope & small_curvature) | (norm == 0)


def _scales(d2: Array, candidates: Array) -> Array:
    """sqrt|D2_ss|; where that is 0, max_t |D2_st| / sqrt|D2_tt|, which scales in the same way; 0 for a flat group."""
    scale = np.sqrt(np.abs(np.diagonal(d2)))
    partners = candidates & (scale > 0)
    for s in np.flatnonzero(candidates & (scale == 0)):
        scale[s] = np.max(np.abs(d2[s, partners]) / scale[partners], initial=0.0)
    return scale


def null_groups(ds: xr.Dataset) -> xr.DataArray:
    """Whether each group is null, shape (S,): |D1_s|/|U^s| <= k eps |(D1_t/|U^t|)_t| and, for every t,
    |D2_st|/|U^s||U^t| <= k eps max_rt |D2_rt|/|U^r||U^t|, with k = 32 and eps of the dtype of the computation."""
    require(ds, "D1", "D2")
    null = over_checkpoints(ds, lambda one: system(one).null)
    return labelled(ds, null, ("group",), "null_groups", "group without effect on the loss", "")
