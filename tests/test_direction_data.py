"""u from one set of batches, the derivatives over others: ``Problem(direction_data=...)``, ``direction_samples``."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import hoanalysis as ho
from hoanalysis.errors import ArgumentError, DataError
from hoanalysis.study import StudySpec


def batches(n, seed, size=5):
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(n, 4, generator=g, dtype=torch.float64), torch.randint(0, 3, (n,), generator=g)
    return [(x[i : i + size], y[i : i + size]) for i in range(0, n, size)]


def model():
    torch.manual_seed(0)
    return ho.models.MLP((4, 5, 3)).double()


FEW, MANY = batches(12, seed=1), batches(43, seed=2)


def oracle():
    """f(eta) = L_few(theta + sum eta_s U^s), U the gradient over all samples of MANY, differentiated by torch.func."""
    net = model()
    theta = {n: p.detach() for n, p in net.named_parameters()}

    def loss(parameters, data):
        x, y = (torch.cat(parts) for parts in zip(*data, strict=True))
        return F.cross_entropy(torch.func.functional_call(net, parameters, (x,)), y)

    u = torch.func.grad(loss)(theta, MANY)

    def f(eta):
        return loss({n: p + e * u[n] for e, (n, p) in zip(eta, theta.items(), strict=True)}, FEW)

    return u, [d(f)(torch.zeros(len(theta), dtype=torch.float64)) for d in (torch.func.grad, torch.func.hessian)]


@pytest.mark.parametrize("engine", ["tangents", "nested"])
def test_u_is_the_gradient_over_the_other_batches(engine):
    u, (d1, d2) = oracle()
    problem = ho.Problem(model(), FEW, F.cross_entropy, direction_data=MANY)
    ds = ho.summarize(problem, 2, engine=engine, max_batches=3, progress=False)
    np.testing.assert_allclose(ds.D1.values, d1, rtol=1e-12)
    np.testing.assert_allclose(ds.D2.values, d2, rtol=1e-10)
    np.testing.assert_allclose(ds.direction_norm.values, [t.norm() for t in u.values()], rtol=1e-12)
    assert ds.attrs["n_samples"] == 12
    assert not ds.attrs["standard_errors"].startswith("unconditional")


def test_the_batches_behind_u_are_part_of_what_a_unit_is_known_by(tmp_path):
    save_file(model().state_dict(), tmp_path / "step_0.safetensors")
    run = ho.open_run(tmp_path)
    norms, store = [], tmp_path / "store"
    for data in (None, MANY, batches(43, seed=3)):
        problem = ho.Problem(model(), FEW, F.cross_entropy, direction_data=data)
        norms += [ho.summarize_run(run, problem, 1, store=store, progress=False).direction_norm.values for _ in "ab"]
    for first, again in zip(norms[::2], norms[1::2], strict=True):
        np.testing.assert_array_equal(first, again)
    assert len({n.tobytes() for n in norms}) == 3
    assert len(list((store / "units").iterdir())) == 6  # three summaries, three directions


def test_what_direction_data_cannot_be():
    problem = ho.Problem(model(), FEW, F.cross_entropy, direction_data=MANY)
    with pytest.raises(ArgumentError, match="data of its own"):
        ho.summarize(problem, 2, errors="unconditional", keep_batches=2, progress=False)
    with pytest.raises(DataError, match="one-shot"):
        ho.Problem(model(), FEW, F.cross_entropy, direction_data=iter(MANY))


def test_a_study_says_over_how_many_samples_u_is_taken(tmp_path):
    (tmp_path / "study.toml").write_text(
        """
        [model]
        factory = "hoanalysis.models:LeNet5"
        [data]
        factory = "hoanalysis.data:mnist5k"
        batch_size = 16
        max_samples = 32
        direction_samples = 80
        """
    )
    problem = StudySpec.read(tmp_path).problem()
    assert sum(len(y) for _, y in problem.data) == 32
    assert sum(len(y) for _, y in problem.direction_data) == 80
