"""Unconditional errors: what a change of the weight of a block does to everything, by differences of the real thing."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import xarray as xr
from safetensors.torch import save_file
from torch import nn
from torch.func import functional_call

import hoanalysis as ho
from hoanalysis import schema, summaries
from hoanalysis.analysis.errorbars import error_over_blocks
from hoanalysis.errors import ArgumentError
from hoanalysis.study import StudySpec
from tests import cases, oracles

SIZES = (5, 3, 7, 4, 6, 2)


def make_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double()


def make_batches(seed: int = 1, sizes=SIZES) -> list:
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(n, 4, generator=g).double(), torch.randint(0, 3, (n,), generator=g)) for n in sizes]


def total(m: nn.Module, batch) -> torch.Tensor:
    return F.cross_entropy(m(batch[0]), batch[1], reduction="sum")


def problem_of(model: nn.Module, batches: list, reduction: str = "mean") -> ho.Problem:
    if reduction == "mean":
        return ho.Problem(model, batches, F.cross_entropy)
    return ho.Problem(model, batches, batch_loss=total, batch_size=lambda b: len(b[1]), reduction="sum")


def summarize(problem: ho.Problem, order: int = 2, **options) -> xr.Dataset:
    options = {"errors": "unconditional", "keep_batches": 6, "progress": False, "self_check": False, **options}
    return ho.summarize(problem, order, **options)


def recomputed(model: nn.Module, batches: list, emphasis: np.ndarray, order: int, reduction: str) -> list[np.ndarray]:
    """D^(1) .. D^(order) along the gradient, both over batches that count ``emphasis`` times, the total weight kept."""
    weights = torch.as_tensor(emphasis * np.array([len(y) for _, y in batches]))
    scale = sum(len(y) for _, y in batches) if reduction == "sum" else 1.0

    def loss_of(parameters) -> torch.Tensor:
        losses = [F.cross_entropy(functional_call(model, dict(parameters), (x,)), y) for x, y in batches]
        return scale * (weights * torch.stack(losses)).sum() / weights.sum()

    theta = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    u = dict(zip(theta, torch.autograd.grad(loss_of(theta), list(theta.values())), strict=True))
    theta = {n: p.detach() for n, p in theta.items()}
    f = oracles.along_groups(loss_of, theta, u, [[n] for n in theta])
    return [t.numpy() for t in oracles.by_forward_mode(f, len(theta), order)]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("keep", [6, 2])
def test_blocks_hold_the_response_to_their_weight(reduction: str, keep: int) -> None:
    """d D^(d) / d(weight of block k), with u recomputed, by central differences of the recomputed tensors."""
    model, batches = make_model(), make_batches()
    ds = summarize(problem_of(model, batches, reduction), 3, keep_batches=keep)
    n, h = ds.sizes["batch"], 1e-4
    assert n == {6: 6, 2: 2}[keep]
    block = np.arange(6) // (4 if keep == 2 else 1)
    for k in range(n):
        up, down = (recomputed(model, batches, 1 + s * h * (block == k), 3, reduction) for s in (1, -1))
        for d in (1, 2, 3):
            response = (up[d - 1] - down[d - 1]) / (2 * h)
            held = ds[f"D{d}_batch"].values[k] - float(ds.weight[k]) * ds[f"D{d}"].values
            np.testing.assert_allclose(held / float(ds.weight.sum()), response, rtol=1e-6, atol=1e-8)


def gradient_of(problem: ho.Problem) -> dict[str, torch.Tensor]:
    total = sum(problem.size(b) * problem.batch_value(dict(problem.model.named_parameters()), problem.state(), b)
                for b in problem.data)  # fmt: skip
    names, parameters = zip(*problem.model.named_parameters(), strict=True)
    found = torch.autograd.grad(total / sum(map(problem.size, problem.data)), parameters)
    return dict(zip(names, found, strict=True))


def small_gpt() -> ho.Problem:
    torch.manual_seed(0)
    model = ho.models.GPT(vocab_size=7, context=5, n_layer=1, n_head=2, width=6).double()
    tokens = torch.randint(0, 7, (9, 6))
    batches = [(t[:, :-1], t[:, 1:]) for t in tokens.split([4, 2, 3])]
    return ho.Problem(model, batches, ho.models.cross_entropy_tokens)


def normed() -> ho.Problem:
    case = cases.layer_norm()
    x, y = case.batch
    return ho.Problem(case.model, list(zip(x.split([3, 5]), y.split([3, 5]), strict=True)), case.loss)


@pytest.mark.parametrize("make", [small_gpt, normed])
def test_with_norms_and_attention_it_is_the_polynomial_in_u(make) -> None:
    """D2 is quadratic in u: a half of D2(u + delta) - D2(u - delta) is the influence, by passes along both."""
    problem = make()
    ds = summarize(problem, 2)
    plain = summarize(problem, 2, errors="conditional")
    u = gradient_of(problem)
    for k, batch in enumerate(problem.data):
        alone = gradient_of(ho.Problem(problem.model, [batch], problem.loss))
        moved = [
            summarize(problem, 2, direction={n: u[n] + sign * (alone[n] - u[n]) for n in u}, keep_batches=0,
                      errors="conditional")
            for sign in (1, -1)
        ]  # fmt: skip
        for name in ("D1", "D2"):
            influence = (moved[0][name] - moved[1][name]) / 2
            held = (ds[f"{name}_batch"][k] - plain[f"{name}_batch"][k]) / ds.weight[k]
            np.testing.assert_allclose(held, influence, rtol=1e-8, atol=1e-10 * float(abs(ds[name]).max()))


@pytest.mark.parametrize("order", [1, 2])
def test_the_diagonal_alone_is_that_of_the_full_tensor(order: int) -> None:
    model, batches = make_model(), make_batches()
    full = summarize(problem_of(model, batches), 3)
    alone = summarize(problem_of(model, batches), order, diagonal=3)
    np.testing.assert_allclose(alone.D3_diag_batch, np.einsum("ksss->ks", full.D3_batch.values), rtol=1e-10)
    np.testing.assert_allclose(alone.D3_diag_se, np.einsum("sss->s", full.D3_se.values), rtol=1e-10)
    np.testing.assert_allclose(alone[f"D{order}_batch"], full[f"D{order}_batch"], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_values_are_the_same_and_errors_are_those_of_the_blocks(reduction: str) -> None:
    model, batches = make_model(), make_batches()
    ds = summarize(problem_of(model, batches, reduction))
    plain = summarize(problem_of(model, batches, reduction), errors="conditional")
    for name in ("loss", "D1", "D2", "loss_se"):
        np.testing.assert_array_equal(ds[name], plain[name])
    for name in ("D1", "D2"):
        again = error_over_blocks(ds[f"{name}_batch"], ds.weight)
        np.testing.assert_allclose(ds[f"{name}_se"], again, rtol=1e-10)
        np.testing.assert_allclose(ds[f"{name}_batch"].sum("batch"), plain[f"{name}_batch"].sum("batch"), rtol=1e-10)
    np.testing.assert_allclose(ds.D1_se, 2 * plain.D1_se, rtol=1e-10)  # D1 = |g|^2: exactly twice


@pytest.mark.parametrize("memory", ["2GiB", 20_000])
def test_parts_of_tensors_and_chunks_add_up(memory) -> None:
    model, batches = make_model(), make_batches(sizes=(40, 50, 60, 40))
    whole = summarize(problem_of(model, batches), keep_batches=4)
    split = ho.Partition.split(model, {"0.weight": (0, 3), "2.weight": (1, 3)})
    fine = summarize(problem_of(model, batches), keep_batches=4, partition=split, memory=memory, engine="tangents")
    assert ("chunks" in str(fine.engine_detail.item())) == (memory == 20_000)
    own = [label.split("[")[0] for label in schema.labels(fine)]
    names = schema.labels(whole)
    assert set(own) == set(names)
    assert len(own) == 8
    member = np.array([[o == n for o in own] for n in names], dtype=float)
    np.testing.assert_allclose(np.einsum("as,ks->ka", member, fine.D1_batch), whole.D1_batch, rtol=1e-9)
    merged = np.einsum("as,bt,kst->kab", member, member, fine.D2_batch)
    np.testing.assert_allclose(merged, whole.D2_batch, rtol=1e-9, atol=1e-12)


def test_attributes_say_which_errors_they_are(tmp_path) -> None:
    problem = problem_of(make_model(), make_batches())
    for errors, direction, told, conditional in (
        ("unconditional", "gradient", "unconditional: with what", False),
        ("conditional", "gradient", "conditional on the direction", True),
        ("unconditional", "weights", "conditional on the direction", True),
    ):
        ds = summarize(problem, direction=direction, errors=errors, measure=("along",))
        assert ds.attrs["standard_errors"].startswith(told)
        assert json.loads(ds.attrs["provenance"])["standard_errors"] == ds.attrs["standard_errors"]
        assert ("conditional_on" in ds.D2_se.attrs) == conditional
        assert ds.change_along_se.attrs["conditional_on"] == "the direction u"
        assert "conditional_on" not in ds.loss_se.attrs


def test_in_a_run_and_its_store(tmp_path) -> None:
    for step in (0, 1):
        save_file(dict(make_model(step).state_dict()), tmp_path / f"m_{step}.safetensors")
    run, problem = ho.open_run(tmp_path), problem_of(make_model(), make_batches())
    options = {"diagonal": 3, "keep_batches": 4, "errors": "unconditional", "progress": False}
    ds = ho.summarize_run(run, problem, 2, **options)
    stored = ho.summarize_run(run, problem, 2, store=tmp_path / "store", **options)
    for other in (stored, ho.open_store(tmp_path / "store")):
        xr.testing.assert_identical(other.drop_attrs(), ds.drop_attrs())
    assert ds.attrs["standard_errors"] == ho.open_store(tmp_path / "store").attrs["standard_errors"]
    assert not [v for v in ds.variables if "influence" in str(v)]
    for i in (0, 1):
        one = summarize(problem, diagonal=3, keep_batches=4, checkpoint=run[i])
        np.testing.assert_array_equal(ds.D2_se.isel(step=i), one.D2_se)


def test_derived_errors_carry_the_influence() -> None:
    """The same jackknife, over other blocks: larger errors of what depends on the size of u."""
    problem = problem_of(make_model(), make_batches())
    ds, plain = summarize(problem), summarize(problem, errors="conditional")
    a, b = (d.ho.merge("layer") for d in (ds, plain))
    np.testing.assert_allclose(a.D1_se, 2 * b.D1_se, rtol=1e-10)
    assert not np.allclose(ds.ho.learning_rates("ridge").learning_rates_se,
                           plain.ho.learning_rates("ridge").learning_rates_se)  # fmt: skip


def test_units_keep_their_keys_where_nothing_is_asked_for() -> None:
    problem = problem_of(make_model(), make_batches())

    def key(**options) -> dict:
        return summaries.Work(problem, summaries.Settings(keep_batches=4, **options)).key("sha", [])

    assert key(errors="unconditional", direction="weights") == key(direction="weights")
    assert "errors" not in key()
    assert key(errors="unconditional") == {**key(), "errors": "unconditional"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"errors": "both"}, "errors are 'conditional' or 'unconditional'"),
        ({"keep_batches": 0}, "keep_batches=20"),
        ({"tolerance": 0.1}, "a tolerance stops by errors that are conditional"),
    ],
)
def test_wrong_arguments_are_named(options: dict, words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        summarize(problem_of(make_model(), make_batches()), **options)


def test_in_a_study(study) -> None:
    study.write_text(study.read_text() + 'errors = "unconditional"\n')
    spec = StudySpec.read(study)
    ds = ho.summarize_run(spec.run()[:1], spec.problem(), **spec.settings()[0], progress=False)
    assert ds.attrs["standard_errors"].startswith("unconditional")
