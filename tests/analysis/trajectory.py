"""A training run whose every number is known: SGD on a cubic polynomial, and its summaries by the definition.

L_b(x) = c_b + a_b.x + x'Q_b x/2 + T_b[x,x,x]/6 for each block b of batches: summaries of order 3 say all of it.
"""

from dataclasses import dataclass, field

import numpy as np
import xarray as xr

from hoanalysis import schema

OWNER = np.repeat([0, 1, 2, 3], [4, 1, 3, 2])  # parameters of the four groups
NAMES = ["a.weight", "a.bias", "b.weight", "b.bias"]
LETTERS = "ijk"


@dataclass
class Cubic:
    """The blocks' coefficients, and their weights; ``curvature`` scales Q."""

    seed: int = 0
    blocks: int = 6
    spread: float = 0.3
    third: float = 0.05
    curvature: float = 1.0
    weight: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        rng, n, b = np.random.default_rng(self.seed), len(OWNER), self.blocks
        self.weight = rng.integers(8, 24, b).astype(float)
        root = rng.normal(size=(n, n))
        base = self.curvature * (root @ root.T / n + 0.5 * np.eye(n))
        noise = rng.normal(size=(b, n, n))
        self.c = 2 + 0.1 * rng.normal(size=b)
        self.a = rng.normal(size=n) + self.spread * rng.normal(size=(b, n))
        self.q = base + 0.1 * self.spread * (noise + noise.swapaxes(1, 2))
        t = rng.normal(size=(n, n, n)) + self.spread * rng.normal(size=(b, n, n, n))
        orders = [(0, 1, 2, 3), (0, 1, 3, 2), (0, 2, 1, 3), (0, 2, 3, 1), (0, 3, 1, 2), (0, 3, 2, 1)]
        self.t = self.third * sum(t.transpose(o) for o in orders) / 6

    @property
    def share(self) -> np.ndarray:
        return self.weight / self.weight.sum()

    def losses(self, x: np.ndarray) -> np.ndarray:
        """Of each block, (B,)."""
        return self.c + self.a @ x + (self.q @ x) @ x / 2 + np.einsum("bijk,i,j,k->b", self.t, x, x, x) / 6

    def loss(self, x: np.ndarray) -> float:
        return float(self.share @ self.losses(x))

    def derivatives(self, x: np.ndarray) -> list[np.ndarray]:
        """Gradient, Hessian and third derivative of each block."""
        tx = self.t @ x
        return [self.a + self.q @ x + tx @ x / 2, self.q + tx, self.t]

    def gradient(self, x: np.ndarray, block: int | None = None) -> np.ndarray:
        g = self.derivatives(x)[0]
        return self.share @ g if block is None else g[block]


def train(
    model: Cubic,
    steps: int,
    *,
    rates: list[float] | float = 0.05,
    momentum: float = 0.9,
    decay: float = 0.0,
    seed: int | None = None,
    data: Cubic | None = None,
    change: tuple[int, dict] | None = None,
) -> list[np.ndarray]:
    """The iterates of SGD with momentum; full-batch, or one random block a step from ``seed``. ``data`` is what it is
    trained on. ``change = (step, settings)``: from that step on with other settings."""
    rng = np.random.default_rng(seed)
    x, v = np.full(len(OWNER), 0.5), np.zeros(len(OWNER))
    told = {"rates": rates, "momentum": momentum, "decay": decay, "data": data or model}
    out = [x]
    for i in range(steps):
        if change is not None and i == change[0]:
            told |= change[1]
        block = None if seed is None else int(rng.integers(model.blocks))
        # the rate stands inside, so that a step is momentum times the last one whatever the rate was
        rate = np.broadcast_to(np.asarray(told["rates"], float), 4)[OWNER]
        v = told["momentum"] * v - rate * (told["data"].gradient(x, block) + told["decay"] * x)
        x = x + v
        out.append(x)
    return out


def summaries(
    model: Cubic, points: list[np.ndarray], direction: str, labels: list[int] | None = None, order: int = 3
) -> xr.Dataset:
    """The series of the points along ``to:next``, ``gradient`` or ``weights``, labelled by step."""
    labels = list(range(len(points))) if labels is None else labels
    rows = []
    for i, x in enumerate(points):
        u = {"gradient": model.gradient(x), "weights": -x}.get(direction)
        if direction == "to:next":
            u = points[i + 1] - x if i + 1 < len(points) else None
        rows.append(_one(model, x, u, order))
    ds = xr.concat(rows, schema.STEP, data_vars="all", coords="different", compat="equals", join="exact")
    attrs: dict = dict.fromkeys(schema.ATTRS, "") | {"schema_version": schema.SCHEMA_VERSION, "order": order}
    attrs |= {"direction": direction, "partition": "canonical", "dtype": "float64", "n_samples": 100}
    return ds.assign_coords(step=np.array(labels)).assign_attrs(attrs)


def _one(model: Cubic, x: np.ndarray, u: np.ndarray | None, order: int) -> xr.Dataset:
    """One checkpoint; all NaN where it has no direction."""
    groups = np.arange(4)
    cut = np.where(OWNER[:, None] == groups, 0.0 if u is None else u[:, None], 0.0)
    values: dict = {"loss": model.losses(x)}
    for d, full in enumerate(model.derivatives(x)[:order], 1):
        spec = f"b{LETTERS[:d]}," + ",".join(p + s for p, s in zip(LETTERS[:d], "stu", strict=False))
        values[f"D{d}"] = np.einsum(f"{spec}->b{'stu'[:d]}", full, *[cut] * d)
    data: dict = {"weight": ("batch", model.weight)}
    for name, v in values.items():
        dims = () if name == "loss" else schema.group_dims(int(name[1:]))
        w = model.weight.reshape(-1, *[1] * (v.ndim - 1))
        gone = np.nan if u is None else 1.0
        n, mean = len(w), np.tensordot(model.share, v, 1)
        se = np.sqrt(n / (n - 1) * (w**2 * (v - mean) ** 2).sum(0)) / w.sum()
        data |= {name: (dims, gone * mean), f"{name}_se": (dims, gone * se)}
        data[f"{name}_batch"] = (("batch", *dims), gone * w * v)
    coords: dict = {schema.group_dim(i): NAMES for i in range(3)}
    coords["layer"] = ("group", ["a", "a", "b", "b"])
    coords["numel"] = ("group", np.bincount(OWNER))
    coords["kind"] = ("group", ["weight", "bias"] * 2)
    sizes = np.sqrt(np.bincount(OWNER, x**2)) * (np.nan if u is None else 1.0)
    coords["parameter_norm"] = ("group", sizes)
    coords["direction_norm"] = ("group", np.linalg.norm(cut, axis=0) * (np.nan if u is None else 1.0))
    return xr.Dataset(data, coords)


def series(model: Cubic, points: list[np.ndarray], labels: list[int] | None = None) -> dict[str, xr.Dataset]:
    """The summaries along all three directions."""
    return {d: summaries(model, points, d, labels) for d in ("to:next", "gradient", "weights")}
