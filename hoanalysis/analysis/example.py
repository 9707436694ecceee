"""Summaries known in closed form: a cubic polynomial loss over batches, as a Dataset for examples and tests."""

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from hoanalysis import schema
from hoanalysis.analysis.arrays import Array
from hoanalysis.analysis.errorbars import error_of_mean


def example(
    seed: int = 0, *, layers: int = 2, size: int = 3, batches: int = 8, steps: int | None = None, order: int = 3
) -> xr.Dataset:
    """The summaries of L_b(theta) = c_b + a_b.theta + theta'Q_b theta/2 + T_b[theta,theta,theta]/6 along its gradient.

    Each of ``layers`` has a weight of ``size`` parameters and a bias of one; the ``batches`` have unequal weights, and
    each is a kept block. D1 and D2 are full; of the third order, ``order=3`` keeps D3 and ``order=2`` its diagonal.

    >>> ds = example(layers=1)
    >>> ds.group.values.tolist()
    ['layer0.weight', 'layer0.bias']
    """
    rng = np.random.default_rng(seed)
    owner = np.repeat(np.arange(2 * layers), [size, 1] * layers)
    model = _Polynomial(rng, len(owner), batches)
    points = [rng.normal(size=len(owner)) * 0.3 for _ in range(steps or 1)]
    series = [_summaries(model, theta, owner, order) for theta in points]
    if steps is None:
        return series[0].assign_attrs(_attrs(order))
    joined = xr.concat(series, schema.STEP, data_vars="all", coords="different", compat="equals", join="exact")
    return joined.assign_coords(step=np.arange(steps) * 10).assign_attrs(_attrs(order))


class _Polynomial:
    """The coefficients of each batch, shapes (B,), (B, P), (B, P, P), (B, P, P, P), and the weights of the batches."""

    def __init__(self, rng: np.random.Generator, n: int, batches: int) -> None:
        self.weight = rng.integers(8, 24, batches).astype(float)
        self.c, self.a = 2 + 0.1 * rng.normal(size=batches), rng.normal(size=(batches, n)) + rng.normal(size=n)
        root = rng.normal(size=(n, n))
        self.q = root @ root.T / n + 0.5 * np.eye(n) + 0.1 * _symmetric(rng.normal(size=(batches, n, n)))
        self.t = 0.3 * _symmetric(rng.normal(size=(n, n, n))[None] + 0.2 * rng.normal(size=(batches, n, n, n)))

    def derivatives(self, x: Array) -> list[Array]:
        """Loss, gradient, Hessian and third derivative of each batch at ``x``."""
        tx = self.t @ x
        loss = self.c + self.a @ x + (self.q @ x @ x) / 2 + (tx @ x @ x) / 6
        return [loss, self.a + self.q @ x + tx @ x / 2, self.q + tx, self.t]


def _symmetric(values: Array) -> Array:
    """The mean over permutations of all axes but the first."""
    if values.ndim == 3:
        return (values + values.swapaxes(1, 2)) / 2
    orders = [(0, 1, 2, 3), (0, 1, 3, 2), (0, 2, 1, 3), (0, 2, 3, 1), (0, 3, 1, 2), (0, 3, 2, 1)]
    return sum((values.transpose(o) for o in orders), np.zeros_like(values)) / 6


def _summaries(model: _Polynomial, theta: Array, owner: NDArray[np.int64], order: int) -> xr.Dataset:
    share = model.weight / model.weight.sum()
    loss, *derivatives = model.derivatives(theta)
    gradient = share @ derivatives[0]
    u = np.where(owner[:, None] == np.arange(owner.max() + 1), gradient[:, None], 0.0)
    letters, error = "ijk", float(error_of_mean(loss, model.weight))
    variables: dict = {"loss": ((), float(share @ loss)), "loss_se": ((), error)}
    for d, full in enumerate(derivatives, 1):
        spec = f"b{letters[:d]}," + ",".join(f"{p}{s}" for p, s in zip(letters[:d], "stu", strict=False))
        values = np.einsum(f"{spec}->b{'stu'[:d]}", full, *[u] * d, optimize=True)
        name, dims = schema.derivative(d), schema.group_dims(d)
        if d > order:
            values, name, dims = np.einsum("bsss->bs", values), schema.diagonal(d), schema.group_dims(1)
        variables |= _variables(name, dims, values, model.weight)
    variables[schema.WEIGHT] = (
        (schema.BATCH,),
        model.weight,
        {"long_name": "sum of sample weights", "units": "samples"},
    )
    return xr.Dataset(variables, coords=_coords(owner, u, theta))


def _variables(name: str, dims: tuple[str, ...], values: Array, weight: Array) -> dict:
    share, w = weight / weight.sum(), weight.reshape(-1, *[1] * (values.ndim - 1))
    attrs = {"long_name": name, "units": "loss"}
    return {
        name: (dims, np.tensordot(share, values, 1), attrs),
        schema.error_of(name): (
            dims,
            error_of_mean(values, weight),
            {**attrs, "long_name": f"standard error of {name}"},
        ),
        schema.blocks_of(name): ((schema.BATCH, *dims), w * values, attrs),
    }


def _coords(owner: NDArray[np.int64], u: Array, theta: Array) -> dict:
    groups = np.arange(owner.max() + 1)
    names = [f"layer{g // 2}.{'bias' if g % 2 else 'weight'}" for g in groups]
    numel = [int((owner == g).sum()) for g in groups]
    parts: dict = {schema.group_dim(i): names for i in range(3)}
    parts["layer"] = ("group", [f"layer{g // 2}" for g in groups])
    parts["kind"] = ("group", [name.rsplit(".", 1)[1] for name in names])
    parts["numel"], parts["shape"] = ("group", numel), ("group", [f"({n},)" for n in numel])
    parts["aliases"] = ("group", [""] * len(names))
    parts["direction_norm"] = ("group", np.linalg.norm(u, axis=0))
    parts["parameter_norm"] = ("group", [float(np.linalg.norm(theta[owner == g])) for g in groups])
    return parts | {"self_check": 1e-15, "n_batches": 8, "engine": "closed form"}


def _attrs(order: int) -> dict:
    attrs: dict = dict.fromkeys(schema.ATTRS, "")
    return attrs | {
        "schema_version": schema.SCHEMA_VERSION,
        "order": order,
        "direction": "gradient",
        "partition": "canonical",
        "dtype": "float64",
        "n_samples": 128,
    }
