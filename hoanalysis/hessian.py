"""The full Hessian of the loss over the data, through Hessian-vector products: its trace and its extreme eigenvalues.

    H = sum_b w_b H_b / sum_b w_b       shape (P, P), never formed; units loss / parameter^2

`ds.ho.spectrum()` is H compressed to the S directions U^s, so that its eigenvalues lie between `lowest` and `largest`.
Gradient descent of learning rate eta is unstable along an eigenvector whose eigenvalue exceeds 2/eta.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
from torch import Tensor
from tqdm.auto import tqdm

from hoanalysis.checkpoints import Checkpoint, Run, load_checkpoint
from hoanalysis.derivatives.primitives import primitive_operations
from hoanalysis.errors import ArgumentError, LossError, NumericsError
from hoanalysis.problem import Problem, State, full_precision, naming_batch

DENSE = 32  # parameters up to which H is formed: Lanczos has no advantage there
ENDS = ("lowest", "largest")
SECOND = "loss/parameter^2"

Array = np.ndarray


@full_precision()
def curvature(
    problem: Problem,
    *,
    checkpoint: Checkpoint | Run | str | Path | Mapping[str, Tensor] | None = None,
    dtype: str | torch.dtype | None = None,
    max_batches: int | None = None,
    include_frozen: bool = False,
    probes: int = 30,
    tolerance: float = 1e-3,
    max_products: int = 1000,
    seed: int = 0,
    progress: bool = True,
) -> xr.Dataset:
    """Trace, largest and lowest eigenvalue of the Hessian over the data, with their errors.

    Parameters
    ----------
    checkpoint
        Weights to put in the model's place, as for `summarize`; a `Run` gives a Dataset over ``step``.
    dtype
        Of the products, ``"float32"`` or ``"float64"``; None is the model's. Vectors and sums are float64.
    probes
        Hessian-vector products for the trace, a third each for the three parts of Hutch++ (Meyer, Musco, Musco and
        Woodruff 2020, algorithm 1): tr(Q'HQ) + (3/m) tr(G'(1-QQ')H(1-QQ')G), Q an orthonormal basis of H times random
        signs, G random signs.
    tolerance
        Of the eigenvalues, relative, for the implicitly restarted Lanczos method of ARPACK.
    max_products
        Where it has not converged after about this many products the eigenvalue is NaN, and ``status`` says so.

    Returns
    -------
    Dataset
        ``trace`` with ``trace_probe_se``, the error of the random probes; ``largest`` and ``lowest`` with
        ``<name>_residual`` = |Hv - lambda v| of the unit vector v, within which H has an eigenvalue for certain; and
        of each, ``<name>_se`` over the batches: n/(n-1) sum w_b^2 (x_b - x)^2 / (sum w_b)^2 under the root, with
        x_b = v'H_b v (to first order v may be held fixed), or the trace of H_b by the same probes. All in
        loss/parameter^2. ``parameters`` is P, ``products`` the number of Hessian-vector products over the data.

    Raises
    ------
    NumericsError
        Where the Hessian is not finite.
    """
    if isinstance(checkpoint, Run):
        given = {k: v for k, v in locals().items() if k not in ("problem", "checkpoint")}
        each = [curvature(problem, checkpoint=one, **given) for one in checkpoint]
        return xr.concat(
            each, xr.Variable("step", list(checkpoint.steps), {"long_name": "training step", "units": "1"})
        )
    if isinstance(dtype, str) and dtype not in ("float32", "float64"):
        raise ArgumentError(f"dtype must be 'float32' or 'float64', not {dtype!r}")
    if probes < 3 or max_products < 1 or not tolerance > 0:
        raise ArgumentError("curvature needs probes >= 3, max_products >= 1 and a tolerance above 0")
    loaded = load_checkpoint(checkpoint) if isinstance(checkpoint, (str, Path)) else checkpoint
    weights = None if loaded is None else problem.fitted(loaded)
    kind = {"float32": torch.float32, "float64": torch.float64}[dtype] if isinstance(dtype, str) else dtype
    state = problem.state(weights, dtype=kind, include_frozen=include_frozen)
    problem.check_deterministic(state)
    hessian = Hessian(problem, state, max_batches, lambda it: tqdm(it, "products", disable=not progress, leave=False))
    rng = np.random.default_rng(seed)
    found: dict[str, tuple[float, str, str]] = {}
    vectors, status = _eigenvectors(hessian, tolerance, max_products, rng)
    for name in ENDS:
        found |= _eigenvalue(hessian, name, vectors.get(name))
    found |= _trace(hessian, probes, rng)
    counts = {"parameters": hessian.size, "products": hessian.products, "n_batches": hessian.n_batches}
    data: dict[str, Any] = {k: ((), v, {"long_name": text, "units": unit}) for k, (v, text, unit) in found.items()}
    data |= {k: ((), n, {"long_name": f"number of {k.replace('n_', '')}", "units": "1"}) for k, n in counts.items()}
    data["status"] = ((), status, {"long_name": "advice on the eigenvalues", "units": ""})
    return xr.Dataset(data)


class Hessian:
    """Products of the Hessian over the data with float64 vectors of P numbers, parameters in order, row-major."""

    def __init__(
        self,
        problem: Problem,
        state: State,
        max_batches: int | None = None,
        progress: Callable[[Iterator], Iterable] = iter,
    ) -> None:
        self.problem, self.state, self.max_batches, self.progress = problem, state, max_batches, progress
        self.size = sum(p.numel() for p in state.parameters.values())
        self.products = 0
        self.n_batches = 0

    def __matmul__(self, vectors: Array) -> Array:
        """H V, shape (P, m)."""
        return self.product_and_quadratics(vectors)[0]

    def product_and_quadratics(self, vectors: Array) -> tuple[Array, Array, Array]:
        """H V (P, m), the quadratic forms v' H_b v of each batch (n, m), and the weights of the batches (n,)."""
        self.products += vectors.shape[1]
        total, quadratics, weights = np.zeros(vectors.shape), [], []
        for w, parts in self._batches(vectors):
            total += parts * (1.0 if self.problem.reduction == "sum" else w)
            quadratics.append((vectors * parts).sum(0) / (w if self.problem.reduction == "sum" else 1.0))
            weights.append(w)
        self.n_batches = len(weights)
        if not np.isfinite(total).all():
            raise NumericsError(
                "the Hessian is not finite", why="it overflowed, or a function has no second derivative at this point"
            )
        scale = 1.0 if self.problem.reduction == "sum" else 1 / sum(weights)
        return total * scale, np.array(quadratics), np.array(weights)

    def _batches(self, vectors: Array) -> Iterator[tuple[float, Array]]:
        """The weight of each batch, and its H_b V."""
        leaves = {n: p.detach().requires_grad_() for n, p in self.state.parameters.items()}
        columns = [self._split(v) for v in vectors.T]
        for index, raw in enumerate(self.progress(self.problem.batches(self.max_batches))):
            with naming_batch(index), primitive_operations():
                loss = self.problem.batch_value(leaves, self.state, self.problem.cast(raw, self.state.dtype))
            if not loss.requires_grad:
                raise LossError("the loss does not depend on any selected parameter")
            inputs = list(leaves.values())
            gradient = torch.autograd.grad(loss, inputs, create_graph=True, allow_unused=True)
            yield self.problem.size(raw), np.stack([self._joined(gradient, v, inputs) for v in columns], 1)

    def _joined(self, gradient: tuple[Tensor | None, ...], v: list[Tensor], inputs: list[Tensor]) -> Array:
        terms = [(g * t).sum() for g, t in zip(gradient, v, strict=True) if g is not None and g.requires_grad]
        if not terms:  # linear in the parameters
            return np.zeros(self.size)
        found = torch.autograd.grad(sum(terms[1:], terms[0]), inputs, retain_graph=True, allow_unused=True)
        flat = [torch.zeros_like(p) if h is None else h for h, p in zip(found, inputs, strict=True)]
        return np.concatenate([h.detach().double().cpu().numpy().ravel() for h in flat])

    def _split(self, vector: Array) -> list[Tensor]:
        parameters = list(self.state.parameters.values())
        cuts = np.cumsum([p.numel() for p in parameters])[:-1]
        pieces = np.split(vector, cuts)
        return [torch.as_tensor(v.copy()).to(p).reshape(p.shape) for v, p in zip(pieces, parameters, strict=True)]


def _eigenvectors(
    hessian: Hessian, tolerance: float, max_products: int, rng: np.random.Generator
) -> tuple[dict[str, Array], str]:
    """The unit eigenvectors of the lowest and the largest eigenvalue as far as they converged, and a status."""
    size = hessian.size
    if size <= DENSE:
        dense = hessian @ np.eye(size)
        return dict(zip(ENDS, np.linalg.eigh((dense + dense.T) / 2)[1][:, [0, -1]].T, strict=True)), "ok"
    operator = LinearOperator((size, size), matvec=lambda v: (hessian @ v.reshape(-1, 1))[:, 0], dtype=np.float64)
    start, krylov = rng.normal(size=size), 20
    restarts = max(1, max_products // krylov)
    try:
        found = eigsh(operator, 2, which="BE", tol=tolerance, ncv=krylov, maxiter=restarts, v0=start)
    except ArpackNoConvergence as short:
        inside = start @ (hessian @ start[:, None])[:, 0] / (start @ start)  # no eigenvalue above it is the lowest
        pairs = zip(short.eigenvalues, short.eigenvectors.T, strict=True)
        there = {ENDS[int(value > inside)]: vector for value, vector in pairs}
        missing = " and ".join(name for name in ENDS if name not in there)
        return there, f"{missing} not converged to {tolerance:g} after {restarts} restarts: raise max_products"
    return dict(zip(ENDS, found[1][:, np.argsort(found[0])].T, strict=True)), "ok"


def _eigenvalue(hessian: Hessian, name: str, vector: Array | None) -> dict[str, tuple[float, str, str]]:
    value = residual = error = float("nan")
    if vector is not None:
        product, quadratics, weights = hessian.product_and_quadratics(vector[:, None])
        value = float(vector @ product[:, 0])
        residual = float(np.linalg.norm(product[:, 0] - value * vector))
        error = _over_batches(quadratics[:, 0], weights, hessian.problem.reduction)
    title = f"{name} eigenvalue of the Hessian"
    return {
        name: (value, title, SECOND),
        f"{name}_se": (error, f"standard error over batches of the {title}", SECOND),
        f"{name}_residual": (residual, f"residual of the {title}", SECOND),
    }


def _trace(hessian: Hessian, probes: int, rng: np.random.Generator) -> dict[str, tuple[float, str, str]]:
    """Hutch++; exact where the probes span all parameters."""
    m = min(probes // 3, hessian.size)
    basis = np.linalg.qr(hessian @ rng.choice([-1.0, 1.0], (hessian.size, m)))[0]
    if m == hessian.size:
        basis = np.eye(m)  # also where H is singular
    signs = rng.choice([-1.0, 1.0], (hessian.size, m))
    rest = signs - basis @ (basis.T @ signs)
    if m == hessian.size:
        rest = np.zeros((m, 1))
    _, quadratics, weights = hessian.product_and_quadratics(np.concatenate([basis, rest], 1))
    scale = weights.sum() if hessian.problem.reduction == "sum" else 1.0
    inside, outside = quadratics[:, :m].sum(1), quadratics[:, m:]
    whole = scale * np.average(outside, axis=0, weights=weights)
    each = inside + outside.mean(1)
    title = "trace of the Hessian"
    return {
        "trace": (scale * float(np.average(each, weights=weights)), title, SECOND),
        "trace_se": (
            _over_batches(each, weights, hessian.problem.reduction),
            f"standard error over batches of the {title}",
            SECOND,
        ),
        "trace_probe_se": (
            float(whole.std(ddof=1) / np.sqrt(len(whole))) if len(whole) > 1 else 0.0 if m == hessian.size else np.nan,
            f"standard error over random probes of the {title}",
            SECOND,
        ),
    }


def _over_batches(values: Array, weights: Array, reduction: str) -> float:
    n = len(values)
    if n < 2:
        return float("nan")
    mean = np.average(values, weights=weights)
    se = np.sqrt(n / (n - 1) * (weights**2 * (values - mean) ** 2).sum()) / weights.sum()
    return float(se * (weights.sum() if reduction == "sum" else 1.0))
