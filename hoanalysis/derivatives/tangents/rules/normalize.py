"""The core of every norm as one node: y = c r, with r = (mean(c^2) + eps)^-1/2 and c = x - mean(x), or x for RMSNorm.

layer_norm, group_norm, instance_norm, rms_norm and batch_norm in training mode are reshapes, this, a product and a sum.
Per row of n entries, with a~ the (centred) tangent, alpha_a = <c, a~>/n and A_ab = <a~, b~>/n:

    r_a   = -r^3 alpha_a
    r_ab  = 3 r^5 alpha_a alpha_b - r^3 A_ab
    r_abc = -15 r^7 alpha_a alpha_b alpha_c + 3 r^5 (A_ab alpha_c + A_ac alpha_b + A_bc alpha_a)
    y_a = a~ r + c r_a,    y_ab = a~ r_b + b~ r_a + c r_ab,    y_abc = a~ r_bc + b~ r_ac + c~ r_ab + c r_abc

so that all of D3 follows from the inner products of each row: S^2 times the activations, not S^3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hoanalysis.derivatives.tangents.groups import Sums, add_rows, blocks, take, weighted_gram
from hoanalysis.derivatives.tangents.rules.base import Key, Local, Stack, Stacks, rule


def normalize(x: Tensor, axes: int, eps: float, center: bool) -> Tensor:
    """x scaled to unit variance (``center``) or unit mean square over its last ``axes`` axes."""
    rows = x.flatten(-axes)
    rows = rows - rows.mean(-1, keepdim=True) if center else rows
    return (rows * (rows.square().mean(-1, keepdim=True) + eps).rsqrt()).view(x.shape)


@rule(normalize)
class Normalize(Local):
    """`normalize` at one batch, seen as M rows of n entries."""

    kind = "normalization"

    def __init__(self, op: Callable, args: tuple, kwargs: dict[str, Any], keys: tuple, order: int) -> None:
        x, axes, eps, self.center = args
        self.shape = x.shape
        c = x.reshape(*x.shape[: x.dim() - axes], -1).flatten(0, -2)
        self.n = c.shape[-1]
        self.c = self._centred(c)
        self.r = (self.c.square().mean(-1, keepdim=True) + eps).rsqrt()  # (M, 1)
        self.y = self.c * self.r
        self.value = self.y.view(x.shape)

    @classmethod
    def is_curved(cls, keys: frozenset) -> bool:
        return True

    def _centred(self, rows: Tensor) -> Tensor:
        return rows - rows.mean(-1, keepdim=True) if self.center else rows

    _kept: tuple[tuple[Tensor, str, Any], ...] = ()

    def _once(self, x: Tensor, name: str, compute: Callable[[], Any]) -> Any:
        """Something of a stack, kept until `release`: push, contraction and diagonal need the same."""
        for stack, kind, value in self._kept:
            if stack is x and kind == name:
                return value
        value = compute()
        self._kept += ((x, name, value),)
        return value

    def release(self) -> None:
        self._kept = ()

    def _tilde(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """r a~ as (k, M, n) and alpha as (k, M)."""
        return self._once(x, "tilde", lambda: self._read(x)[:2])

    def _read(self, x: Tensor, lam: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """r a~, alpha and, where ``lam`` is given, beta = <lam, a~>, of each tangent.

        <c, a~> = <c, a> and <lam, a~> = <lam~, a>, so that all inner products of a row are one matrix product.
        """
        X = self._rows(x)
        onto = [self.c / self.n] + [torch.full_like(self.c, 1 / self.n)] * self.center
        onto += [] if lam is None else [self._centred(lam)]
        products = torch.bmm(torch.stack(onto, 1), X.permute(1, 2, 0)).permute(1, 2, 0).contiguous()  # (2 or 3, k, M)
        T = (X - products[1][..., None]).mul_(self.r) if self.center else X * self.r
        return T, products[0], None if lam is None else products[-1]

    def _variances(self, x: Tensor) -> Tensor:
        """A_aa as (k, M)."""
        T, _ = self._tilde(x)
        r = self.r[:, 0]
        return self._once(x, "variances", lambda: torch.linalg.vector_norm(T, dim=-1).div_(r).square_() / self.n)

    def _rows(self, stack: Tensor) -> Tensor:
        """A stack as (k, M, n)."""
        return stack.reshape(len(stack), -1, self.n)

    def _dot(self, stack: Tensor, rows: Tensor) -> Tensor:
        """Inner products of each row: (k, M, n) with (M, n), or another stack, -> (k, M)."""
        return torch.cat([(stack[i] * (rows[i] if rows.dim() == 3 else rows)).sum(-1) for i in blocks(stack)])

    def push(self, key: Key, stack: Tensor) -> Tensor:
        T, alpha = self._tilde(stack)
        along = self.r[:, 0] * alpha  # <y, a~> / n
        return torch.addcmul(T, along[..., None], self.y * self.r, value=-1).view(len(stack), *self.shape)

    def pull(self, key: Key, stack: Tensor) -> Tensor:
        Y = self._rows(stack)
        along = (Y * self.y).mean(-1, keepdim=True)
        return self._centred((Y - along * self.y).mul_(self.r)).view(len(stack), *self.shape)

    def _scalars(self, lam: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """beta = <lam, a~> of shape (k, M); gamma = <lam, c> and r of shape (M,)."""
        lam = lam.reshape(-1, self.n)
        T, alpha, beta = self._once(x, "beta", lambda: self._read(x, lam))
        self._once(x, "tilde", lambda: (T, alpha))
        return beta, (lam * self.c).sum(-1), self.r[:, 0]

    def second(self, sums: Sums, lam: Tensor, tangents: Stacks) -> None:
        ((_, x),) = tangents.items()
        beta, gamma, r = self._scalars(lam, x.data)
        T, alpha = self._tilde(x.data)
        cross = (3 * gamma * r**5 / 2 * alpha - r**3 * beta) @ alpha.T
        weight = (-gamma * r / self.n)[:, None].expand_as(self.c).reshape(-1)
        sums.add2(x.groups, x.groups, weighted_gram(T.flatten(1), weight) + cross + cross.T)

    def third(self, sums: Sums, lam: Tensor, lamT: Stack | None, tangents: Stacks) -> None:
        ((_, x),) = tangents.items()
        beta, gamma, r = self._scalars(lam, x.data)
        T, alpha = self._tilde(x.data)
        k = len(T)
        by_row = T.transpose(0, 1)  # (M, k, n)
        gram = (by_row @ by_row.mT).permute(1, 2, 0).reshape(k * k, -1) / (self.n * r**2)  # (k k, M)
        # the three placements of  A_st Q_r + alpha_s alpha_t P_r, summed over rows
        Q, P = 3 * gamma * r**5 * alpha - r**3 * beta, 3 * r**5 * beta - 5 * gamma * r**7 * alpha
        groups = x.groups
        if lamT is not None:
            Y = self._rows(lamT.data)
            gammas = self._dot(Y, self.c)
            groups, Q = add_rows(lamT.groups, -(r**3) * gammas, x.groups, Q)
            groups, P = add_rows(lamT.groups, 3 * r**5 * gammas, x.groups, P)
            betas = (Y.transpose(0, 1) @ by_row.mT).permute(1, 2, 0)  # (K, k, M)
            six = betas.reshape(len(Y) * k, -1) @ (-(r**2) * alpha).T
            sums.add3_six((lamT.groups, x.groups, x.groups), six.view(len(Y), k, k))
        alphas = (alpha[:, None] * alpha).flatten(0, 1)
        sums.add3_pairs(x.groups, groups, (gram @ Q.T + alphas @ P.T).view(k, k, -1))

    def pull_second(self, key: Key, lam: Tensor, tangents: Stacks) -> Stack:
        x = tangents[key]
        beta, gamma, r = self._scalars(lam, x.data)
        T, alpha = self._tilde(x.data)
        on_c = (3 * gamma * r**5 * alpha - r**3 * beta) / self.n
        out = on_c[..., None] * self.c
        out += (-(r**3) * alpha)[..., None] * lam.reshape(-1, self.n)
        out -= (gamma * r**2 / self.n)[:, None] * T
        return Stack(x.groups, self._centred(out).view(len(T), *self.shape))

    def bend(self, tangents: Stacks) -> Stack:
        ((_, x),) = tangents.items()
        T, alpha = self._tilde(x.data)
        r = self.r[:, 0]
        twice = 3 * r**5 * alpha**2 - r**3 * self._variances(x.data)
        out = torch.mul((-2 * r**2 * alpha)[..., None], T).addcmul_(twice[..., None], self.c)
        return Stack(x.groups, out.view(len(T), *self.shape))

    def diagonal(self, sums: Sums, lam: Tensor, tangents: Stacks, bent: Stacks) -> None:
        ((_, x),) = tangents.items()
        beta, gamma, r = self._scalars(lam, x.data)
        T, alpha = self._tilde(x.data)
        A = self._variances(x.data)
        twice = 3 * r**5 * alpha**2 - r**3 * A
        thrice = -15 * r**7 * alpha**3 + 9 * r**5 * A * alpha
        sums.add_diagonal(x.groups, (3 * beta * twice + gamma * thrice).sum(1))
        for x2 in bent.values():
            beta2, _, _ = self._scalars(lam, x2.data)
            T2, alpha2 = self._tilde(x2.data)
            T1, alpha1, beta1 = (take(v, x.groups, x2.groups) for v in (T, alpha, beta))
            mixed = 3 * r**5 * alpha1 * alpha2 - r * self._dot(T1, T2) / self.n
            total = -(r**3) * (beta2 * alpha1 + beta1 * alpha2) + gamma * mixed
            sums.add_diagonal(x2.groups, 3 * total.sum(1))
