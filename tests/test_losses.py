"""Denominators against torch itself: the mean that torch gives, times the denominator, is the sum that torch gives."""

import functools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hoanalysis.losses import denominator

CLASSES = 4
LEADING = {"2-d": (7,), "spatial": (3, 2, 5)}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def scores(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Logits with the classes along axis 1."""
    return torch.randn((shape[0], CLASSES, *shape[1:]), generator=generator(seed), dtype=torch.float64)


def indices(shape: tuple[int, ...], seed: int, masked: int | None = None) -> torch.Tensor:
    y = torch.randint(CLASSES, shape, generator=generator(seed))
    if masked is not None:
        y[torch.rand(shape, generator=generator(seed + 1)) < 0.4] = masked
        y.view(-1)[:2] = torch.tensor([1, masked])  # something counts and something does not
    return y


def check(mean, total, x, y, kind: str = "mean") -> None:
    """``mean`` and ``total`` are the same loss with reduction="mean" and "sum"."""
    size = denominator(mean)
    assert size is not None
    torch.testing.assert_close(mean(x, y) * size((x, y)), total(x, y), rtol=1e-12, atol=1e-12)


def forms(function, module, **options):
    """The same loss as a partial, as a partial of a partial, and as a module; each with its mean and its sum."""
    outer = functools.partial(functools.partial(function, **options))
    return [
        (outer, functools.partial(function, reduction="sum", **options)),
        (functools.partial(function, reduction="mean", **options), functools.partial(outer, reduction="sum")),
        (module(**options), module(reduction="sum", **options)),
    ]


WEIGHTS = torch.tensor([0.3, 2.0, 1.1, 0.7], dtype=torch.float64)


@pytest.mark.parametrize("shape", LEADING.values(), ids=LEADING)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ignore_index": 2},
        {"ignore_index": -1},
        {"weight": WEIGHTS},
        {"weight": WEIGHTS, "ignore_index": 2},
        {"weight": WEIGHTS, "ignore_index": -1, "label_smoothing": 0.1},
        {"label_smoothing": 0.2},
    ],
    ids=str,
)
def test_cross_entropy_of_class_indices(options, shape):
    y = indices(shape, 3, options.get("ignore_index"))
    for mean, total in forms(F.cross_entropy, nn.CrossEntropyLoss, **options):
        check(mean, total, scores(shape, 0), y)


@pytest.mark.parametrize("shape", LEADING.values(), ids=LEADING)
@pytest.mark.parametrize("options", [{}, {"weight": WEIGHTS}, {"label_smoothing": 0.3, "weight": WEIGHTS}], ids=str)
def test_cross_entropy_of_probabilities(options, shape):
    y = scores(shape, 5).softmax(1)
    for mean, total in forms(F.cross_entropy, nn.CrossEntropyLoss, **options):
        check(mean, total, scores(shape, 0), y)


def test_the_default_mask_of_torch_counts_as_a_mask():
    y = indices((9,), 2, -100)
    check(F.cross_entropy, functools.partial(F.cross_entropy, reduction="sum"), scores((9,), 1), y)
    assert denominator(F.cross_entropy)((None, y)) == int((y >= 0).sum()) < 9


def test_a_single_sample_without_a_batch_axis():
    x = torch.randn(CLASSES, generator=generator(0), dtype=torch.float64)
    for y in (torch.tensor(2), x.softmax(0)):
        check(F.cross_entropy, functools.partial(F.cross_entropy, reduction="sum"), x, y)


@pytest.mark.parametrize("shape", LEADING.values(), ids=LEADING)
@pytest.mark.parametrize("options", [{}, {"ignore_index": 1}, {"weight": WEIGHTS, "ignore_index": 1}], ids=str)
def test_nll(options, shape):
    y = indices(shape, 8, options.get("ignore_index"))
    for mean, total in forms(F.nll_loss, nn.NLLLoss, **options):
        check(mean, total, scores(shape, 0).log_softmax(1), y)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.sampled_from([*range(CLASSES), -7]), min_size=2, max_size=12).filter(lambda y: max(y) >= 0),
    st.booleans(),
    st.floats(0, 0.9),
)
def test_cross_entropy_of_any_targets(y, weighted, smoothing):
    options = {"ignore_index": -7, "label_smoothing": smoothing} | ({"weight": WEIGHTS} if weighted else {})
    for mean, total in forms(F.cross_entropy, nn.CrossEntropyLoss, **options):
        check(mean, total, scores((len(y),), 4), torch.tensor(y))


BY_ELEMENT = {
    "mse": (F.mse_loss, nn.MSELoss, {}),
    "l1": (F.l1_loss, nn.L1Loss, {}),
    "smooth l1": (F.smooth_l1_loss, nn.SmoothL1Loss, {"beta": 0.4}),
    "huber": (F.huber_loss, nn.HuberLoss, {"delta": 0.4}),
    "bce": (F.binary_cross_entropy, nn.BCELoss, {}),
    "bce weighted": (F.binary_cross_entropy, nn.BCELoss, {"weight": torch.tensor([1.0, 3.0], dtype=torch.float64)}),
    "bce logits": (F.binary_cross_entropy_with_logits, nn.BCEWithLogitsLoss, {}),
    "bce logits weighted": (
        F.binary_cross_entropy_with_logits,
        nn.BCEWithLogitsLoss,
        {"pos_weight": torch.tensor([2.0, 0.5], dtype=torch.float64)},
    ),
    "poisson": (F.poisson_nll_loss, nn.PoissonNLLLoss, {"log_input": True}),
    "soft margin": (F.soft_margin_loss, nn.SoftMarginLoss, {}),
    "kl": (F.kl_div, nn.KLDivLoss, {"log_target": False}),
}


@pytest.mark.parametrize("name", BY_ELEMENT)
@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides:UserWarning")
def test_losses_by_element(name):
    function, module, options = BY_ELEMENT[name]
    x = torch.rand((5, 3, 2), generator=generator(1), dtype=torch.float64)
    y = torch.rand((5, 3, 2), generator=generator(2), dtype=torch.float64)
    plain = [(function, functools.partial(function, reduction="sum"))] if not options else []
    for mean, total in [*plain, *forms(function, module, **options)]:
        check(mean, total, x, y)


def test_kl_div_by_rows():
    x = scores((6, 2), 1).log_softmax(1)
    y = scores((6, 2), 2).softmax(1)
    total = functools.partial(F.kl_div, reduction="sum")
    check(functools.partial(F.kl_div, reduction="batchmean"), total, x, y)
    check(nn.KLDivLoss(reduction="batchmean"), total, x, y)


class Doubled(nn.CrossEntropyLoss):
    def forward(self, x, y):
        return 2 * super().forward(x, y)


@pytest.mark.parametrize(
    "loss",
    [
        lambda x, y: F.cross_entropy(x, y),
        Doubled(),
        nn.MultiMarginLoss(),
        F.ctc_loss,
        functools.partial(F.cross_entropy, reduction="sum"),
        functools.partial(F.mse_loss, reduction="none"),
        nn.MSELoss(reduction="sum"),
        functools.partial(F.mse_loss, size_average=False),
        functools.partial(F.mse_loss, weight=torch.ones(2)),  # torch divides by the sum of these weights
        functools.partial(F.l1_loss, weight=torch.ones(2)),
        functools.partial(F.huber_loss, weight=torch.ones(2)),
    ],
)
def test_what_is_not_known_to_be_a_mean_of_torch_is_none(loss):
    assert denominator(loss) is None
