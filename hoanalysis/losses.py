"""What a batch's loss is a mean over: the denominators of torch's own losses, as functions of the batch's target.

The weighted mean over batches  L = sum_b w_b l_b / sum_b w_b  is the loss over the data only if w_b is the denominator
that the batch's mean was divided by: samples, elements, unmasked tokens, or summed class weights. A silent count of
rows would be wrong for the last three.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Size = Callable[[Any], float]


def denominator(loss: Callable) -> Size | None:
    """``size((x, y))`` for a torch loss (function, ``functools.partial`` of one, or module); None for any other."""
    function, options = _unwrap(loss)
    if options.get("reduction", "mean") not in ("mean", "batchmean"):
        return None
    if options.get("size_average") is not None or options.get("reduce") is not None:
        return None  # torch's deprecated ways to say reduction
    if function in _DIVIDED_BY_WEIGHT and options.get("weight") is not None:
        return None
    if function in _BY_CLASS:
        return lambda batch: _class_weight_sum(batch[1], options)
    if function in _BY_ELEMENT:
        return lambda batch: float(batch[1].numel())
    if function is F.kl_div:
        by_row = options.get("reduction") == "batchmean"
        return lambda batch: float(len(batch[1]) if by_row else batch[1].numel())
    return None


_BY_CLASS = (F.cross_entropy, F.nll_loss)
_BY_ELEMENT = (
    F.mse_loss,
    F.l1_loss,
    F.smooth_l1_loss,
    F.huber_loss,
    F.binary_cross_entropy,
    F.binary_cross_entropy_with_logits,
    F.poisson_nll_loss,
    F.soft_margin_loss,
)
_DIVIDED_BY_WEIGHT = (F.mse_loss, F.l1_loss, F.huber_loss)  # a mean by weights, where the others divide by elements
_MODULES: dict[type, Callable] = {
    nn.CrossEntropyLoss: F.cross_entropy,
    nn.NLLLoss: F.nll_loss,
    nn.MSELoss: F.mse_loss,
    nn.L1Loss: F.l1_loss,
    nn.SmoothL1Loss: F.smooth_l1_loss,
    nn.HuberLoss: F.huber_loss,
    nn.BCELoss: F.binary_cross_entropy,
    nn.BCEWithLogitsLoss: F.binary_cross_entropy_with_logits,
    nn.PoissonNLLLoss: F.poisson_nll_loss,
    nn.SoftMarginLoss: F.soft_margin_loss,
    nn.KLDivLoss: F.kl_div,
}


def _unwrap(loss: Callable) -> tuple[Callable, dict[str, Any]]:
    """The torch function behind a loss, and the options that were bound to it."""
    if isinstance(loss, functools.partial):
        function, options = _unwrap(loss.func)
        return function, {**options, **loss.keywords}
    if (of_module := _MODULES.get(type(loss))) is not None:
        names = ("weight", "ignore_index", "reduction", "label_smoothing")
        return of_module, {n: getattr(loss, n) for n in names if hasattr(loss, n)}
    return loss, {}


def _class_weight_sum(target: Tensor, options: dict[str, Any]) -> float:
    """What cross_entropy and nll_loss divide by: rows, unmasked targets, or the sum of their class weights.

    Probabilities as targets (a floating dtype) are divided by the number of targets whatever the weights.
    """
    if target.is_floating_point():
        return float(target.numel() / target.shape[1 if target.dim() > 1 else 0])
    kept = target[target != options.get("ignore_index", -100)]
    weight = options.get("weight")
    return float(kept.numel()) if weight is None else float(weight.to(torch.float64)[kept].sum())
