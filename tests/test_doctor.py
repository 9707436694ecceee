"""`hoanalysis doctor` on studies that are broken in one way each: real files, and the sentence that names the fault."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

import hoanalysis as ho
from hoanalysis import data
from hoanalysis.checkpoints import fit, open_run
from hoanalysis.cli import app
from hoanalysis.diagnosis import Diagnosis, Finding, batches
from hoanalysis.models import LeNet5

DATA = Path(__file__).parents[1] / "data"

FACTORIES = '''
import torch
import torch.nn.functional as F
from torch import nn

def layers(width=6, **inside):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, width), nn.Tanh(), *inside.values(), nn.Linear(width, 3))

def dropout():
    return layers(inside=nn.Dropout(0.5))

def batch_norm():
    return layers(inside=nn.BatchNorm1d(6))

class Logarithm(nn.Module):
    def forward(self, x):
        shifted = x - 5.0
        return torch.log(shifted)

def not_finite():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), Logarithm(), nn.Linear(6, 3))

class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * x

    @staticmethod
    def backward(ctx, g):
        return g

class Square(nn.Module):
    def forward(self, x):
        return Doubled.apply(x)

def wrong_backward():
    return layers(inside=Square())

class Rounded(nn.Module):
    def forward(self, x):
        return x + (torch.round(8 * x) / 8 - x).detach()

def straight_through():
    return layers(inside=Rounded())

class Op(nn.Module):
    def __init__(self, op):
        super().__init__()
        self.op = op

    def forward(self, x):
        return self.op(x)

def no_rule():
    return layers(inside=Op(torch.special.log_ndtr))

def not_captured():
    return layers(inside=Op(lambda x: x + torch.linalg.det(torch.eye(len(x)) + x @ x.T / 8)))

def not_finite_at_order_2():
    return layers(inside=Op(lambda x: x + torch.logcumsumexp(x, -1)))

class Groups(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.norm, self.out = nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3)
        self.shift = nn.Parameter(torch.tensor(0.3))
        self.idle, self.again = nn.Linear(2, 2), nn.Linear(4, 6)
        self.out.bias.requires_grad_(False)
        self.again.weight = self.up.weight

    def forward(self, x):
        return self.out(torch.tanh(self.norm(self.up(x) + self.again(x) + self.shift)))

class Inputs(nn.Module):
    """Casts its input to the dtype of its weights."""

    def __init__(self, dtype):
        super().__init__()
        self.inner = layers().to(dtype)

    def forward(self, x):
        return self.inner(x.to(self.inner[0].weight.dtype))

def half():
    return Inputs(torch.bfloat16)

def rectified():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    nn.init.zeros_(model[0].weight[:3]); nn.init.zeros_(model[0].bias[:3])
    return model

def samples(n=96):
    g = torch.Generator().manual_seed(1)
    return torch.randn(n, 4, generator=g), torch.randint(0, 3, (n,), generator=g)

def pairs(batch_size=8, flip=None):
    x, y = samples()
    if flip is not None:
        y = answers(x)
        y[flip] = (y[flip] + 1) % 3
    return [(x[i : i + batch_size], y[i : i + batch_size]) for i in range(0, len(x), batch_size)]

W = torch.tensor([[9.0, 0, 0, 0], [0, 9.0, 0, 0], [-9.0, -9.0, 0, 0]])

def answers(x):
    return (x @ W.T).argmax(1)

def sure():
    model = nn.Linear(4, 3)
    model.load_state_dict({"weight": 9 * W, "bias": torch.zeros(3)})
    return model

def shuffled(batch_size=8):
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*samples()), batch_size, shuffle=True)

def one_shot(batch_size=8):
    return iter(pairs(batch_size))

class Consumed:
    def __init__(self, batch_size=8):
        self.left = pairs(batch_size)

    def __iter__(self):
        while self.left:
            yield self.left.pop(0)
'''
STUDY = """
[model]
factory = "parts:{model}"
{mode}
[data]
factory = "parts:{data}"
args = {args}
batch_size = 8
[summaries]
order = 3
"""


def written(folder: Path, model="layers", data="pairs", args="{}", mode="", checkpoint=True) -> Path:
    """A study with a checkpoint of its own model; ``checkpoint`` may change its tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "parts.py").write_text(FACTORIES)
    (folder / "study.toml").write_text(STUDY.format(model=model, data=data, args=args, mode=mode))
    namespace: dict = {"__name__": "parts"}
    exec(compile(FACTORIES, "parts.py", "exec"), namespace)
    tensors = {n: p.clone() for n, p in namespace[model]().state_dict().items()}
    tensors.pop("again.weight", None)
    if callable(checkpoint):
        tensors = checkpoint(tensors)
    save_file(tensors, folder / "step_7.safetensors")
    return folder / "study.toml"


def of(diagnosis: Diagnosis, severity: str) -> list[Finding]:
    return list(diagnosis[severity])


def only(diagnosis: Diagnosis, severity: str) -> Finding:
    found = of(diagnosis, severity)
    assert len(found) == 1, str(diagnosis)
    return found[0]


def test_a_sound_study_has_nothing_but_one_line_for_each_thing_looked_at(tmp_path: Path) -> None:
    told = ho.doctor(written(tmp_path))
    assert {f.severity for f in told} == {"ok"}, str(told)
    assert {f.topic for f in told} >= {
        "study", "environment", "model", "data", "checkpoints", "forward", "self-check", "capture", "slopes", "batches"
    }  # fmt: skip
    lines = str(told).splitlines()
    assert len(lines) == len(told) + 2
    assert lines[-1] == "no problems found"
    assert "product: linear 2" in told.text(verbose=True)


def test_active_dropout(tmp_path: Path) -> None:
    told = ho.doctor(written(tmp_path, "dropout", mode='mode = "train"'))
    error = only(told, "error")
    assert error.what == "dropout is active in '2'"
    assert error.do == "mode = 'eval' in [model]"
    assert {"self-check", "slopes", "batches"} <= {f.topic for f in told["ok"]}  # the rest was looked at without it


def test_batch_norm_in_train_mode(tmp_path: Path) -> None:
    told = ho.doctor(written(tmp_path, "batch_norm", mode='mode = "train"'))
    assert not told.wrong
    warning = only(told, "warning")
    assert "statistics of the batch: '2' in train mode" in warning.what
    assert "null" not in str(told)
    assert [f.what for f in told["note"]] == ["1 of 6 groups have no effect on these samples: '0.bias'"] or not told[
        "note"
    ]


def test_a_shuffled_loader(tmp_path: Path) -> None:
    error = only(ho.doctor(written(tmp_path, data="shuffled")), "error")
    assert error.topic == "data"
    assert "12 of 12 differ" in error.what
    assert "RandomSampler" in error.why
    assert "shuffle=False" in error.do


@pytest.mark.parametrize(
    ("factory", "what"),
    [
        ("one_shot", "the data is a one-shot iterator"),
        ("Consumed", "the first pass over the data gave 12 batches, the second one none"),
    ],
)
def test_a_loader_for_one_pass(tmp_path: Path, factory: str, what: str) -> None:
    told = ho.doctor(written(tmp_path, data=factory))
    assert only(told, "error").what == what
    assert {"self-check", "slopes", "batches"} <= {f.topic for f in told["ok"]}


def test_a_checkpoint_of_another_shape(tmp_path: Path) -> None:
    wider = lambda t: {**t, "0.weight": torch.zeros(9, 4)}  # noqa: E731
    told = ho.doctor(written(tmp_path, checkpoint=wider))
    error = only(told, "error")
    assert error.topic == "checkpoints"
    assert "shape of '0.weight' is (9, 4) in the checkpoint and (6, 4) in the model" in error.what
    assert "step_7.safetensors" in error.where
    assert "at the weights that the model is built with" in only(told, "note").what


def test_a_checkpoint_of_other_names(tmp_path: Path) -> None:
    renamed = lambda t: {("body" + n[1:] if n[0] == "0" else n): v for n, v in t.items()}  # noqa: E731
    error = only(ho.doctor(written(tmp_path, checkpoint=renamed)), "error")
    assert "2 names are missing and 2 are unexpected" in error.what
    assert "'0.weight'" in error.why
    assert "'body.weight'" in error.why


def test_where_values_first_stop_being_finite(tmp_path: Path) -> None:
    error = only(ho.doctor(written(tmp_path, "not_finite")), "error")
    assert error.what == "the loss is nan: values are first NaN in the output of log in '2' (Logarithm)"
    line = 1 + FACTORIES.splitlines().index("        return torch.log(shifted)")
    assert re.search(rf"parts\.py, line {line}, in forward", error.where)


def test_weights_that_are_not_finite_are_named_and_hide_nothing(tmp_path: Path) -> None:
    def spoilt(tensors):
        tensors["0.weight"][1, 2] = torch.nan
        return tensors

    study = written(tmp_path, "dropout", "shuffled", mode='mode = "train"', checkpoint=spoilt)
    told = ho.doctor(study)
    assert {(f.topic, f.what) for f in told["error"]} == {
        ("model", "dropout is active in '2'"),
        ("data", "a second pass over the data gives other batches: 12 of 12 differ"),
        ("checkpoints", "1 tensors of the checkpoint hold NaN or infinite values"),
    }
    assert "0.weight: 1 of 24" in " ".join(f.why for f in told["checkpoints"])
    save_file(
        {n: t.nan_to_num() for n, t in load_file(tmp_path / "step_7.safetensors").items()},
        tmp_path / "step_3.safetensors",
    )
    gap = only(ho.doctor(written(tmp_path, "dropout", checkpoint=spoilt)), "warning")  # the others are computed
    assert "this one is a gap" in gap.do


@pytest.mark.parametrize(
    ("model", "culprit"), [("wrong_backward", "Doubled"), ("straight_through", "detached or rounded")]
)
def test_a_backward_that_is_not_the_slope_of_the_loss(tmp_path: Path, model: str, culprit: str) -> None:
    """Both engines take the backward at its word, so the self-check cannot see it."""
    told = ho.doctor(written(tmp_path, model))
    error = only(told, "error")
    assert error.topic == "slopes"
    assert "'0.weight', '0.bias'" in error.what
    assert "'3." not in error.what  # the layer behind it is right
    assert culprit in error.why
    assert {f.topic for f in told["ok"]} >= {"self-check"}


def test_an_op_without_a_rule(tmp_path: Path) -> None:
    told = ho.doctor(written(tmp_path, "no_rule"))
    assert not told.wrong
    assert only(told, "note").what == "only the generic rule: special_log_ndtr 1"
    assert "1 by the generic rule" in told["capture"][0].what


def test_a_call_that_is_not_captured_and_why(tmp_path: Path) -> None:
    told = ho.doctor(written(tmp_path, "not_captured"))
    assert not told.wrong
    warning = only(told, "warning")
    assert "the engine nested computes it" in warning.what
    assert "_linalg_det" in warning.why


def test_an_op_of_which_torch_has_no_finite_second_derivative(tmp_path: Path) -> None:
    error = only(ho.doctor(written(tmp_path, "not_finite_at_order_2")), "error")
    assert error.topic == "self-check"
    assert "nested differentiation gives numbers that are not finite" in error.what


def test_a_label_outlier_in_one_batch(tmp_path: Path) -> None:
    told = ho.doctor(written(tmp_path, "sure", args="{ flip = 43 }"))
    assert not told.wrong
    found = of(told, "warning")
    assert {f.topic for f in found} == {"batches"}
    for finding in found:  # of the loss, and of D1
        assert "batch 5 (" in finding.what
        assert "largest loss: 43 (loss" in finding.where
    assert {f.what.split()[0] for f in found} == {"loss", "D1"}


def test_unused_frozen_tied_and_null_groups(tmp_path: Path) -> None:
    told = ho.doctor(written(tmp_path, "Groups"))
    assert not told.wrong
    notes = " | ".join(f.what for f in told["note"])
    assert "1 parameter is frozen and left out: 'out.bias'" in notes
    assert "'up.weight' is also 'again.weight'" in notes
    assert "1 of 9 groups have no effect on these samples: 'shift'" in notes
    warning = only(told, "warning")
    assert warning.what == "the loss does not use 2 of 9 tensors: 'idle.weight', 'idle.bias'"


def test_half_precision(tmp_path: Path) -> None:
    told = ho.doctor(written(tmp_path, "half"))
    assert not told.wrong
    warning = only(told, "warning")
    assert "4 parameters are in half precision, cast to float32" in warning.what
    assert "noise" in warning.why


def test_kinks_that_a_change_of_the_weights_leaves(tmp_path: Path) -> None:
    """Three of six units are exactly 0 on every sample."""
    warning = only(ho.doctor(written(tmp_path, "rectified")), "warning")
    assert warning.topic == "kinks"
    assert warning.what.startswith("24 of 48 values of relu in '1' (ReLU)")


def test_ties_of_a_constant_background_are_no_kinks() -> None:
    """Equal patches stay equal whatever the weights: the derivative of their maximum is what it is."""
    torch.manual_seed(0)
    x = torch.zeros(4, 1, 32, 32)
    x[:, :, 10:20, 10:20] = torch.randn(4, 1, 10, 10)
    problem = ho.Problem(LeNet5(activation="tanh"), [(x, torch.arange(4))], F.cross_entropy)
    told = ho.doctor(problem, 1)
    assert [f.severity for f in told["kinks"]] == ["ok"]


# ---- the rule of outliers ---------------------------------------------------------------------------------------


def test_normal_values_have_no_outliers_and_a_far_one_is_found() -> None:
    rng = np.random.default_rng(0)
    wrong = sum(len(batches.outliers(rng.normal(2.0, 0.3, 40), [64] * 40)) for _ in range(500))
    assert wrong == 0
    for _ in range(50):
        x = rng.normal(2.0, 0.3, 40)
        x[17] += 6.0
        assert batches.outliers(x, [64] * 40).tolist() == [17]
    assert not len(batches.outliers([1, 1, 1, 9], [1] * 4))  # too few


def test_what_does_not_matter_to_the_mean_is_no_outlier() -> None:
    x = [1e-5, 2e-5, 3e-5, 1e-5, 2e-5, 1e-3, 1e-5, 2e-5, 3e-5, 2.0]
    assert batches.outliers(x, [8] * 10).tolist() == [9]


def test_a_short_last_batch_may_be_farther() -> None:
    x = [1.0, 1.1, 0.9, 1.05, 0.95, 1.0, 1.1, 0.9, 1.0, 2.2]
    assert batches.outliers(x, [64] * 10).tolist() == [9]
    assert not len(batches.outliers(x, [64] * 9 + [8]))


# ---- what users call --------------------------------------------------------------------------------------------


def call(*arguments: object):
    return CliRunner().invoke(app, ["doctor", *map(str, arguments)])


def test_exit_codes_and_json(tmp_path: Path) -> None:
    sound = call(written(tmp_path / "sound"))
    assert sound.exit_code == 0, sound.output
    assert sound.output.splitlines()[-1] == "no problems found"
    broken = call(written(tmp_path / "broken", data="shuffled"), "--json")
    assert broken.exit_code == 1
    told = json.loads(broken.stdout)
    assert told["wrong"] is True
    assert [f["topic"] for f in told["findings"] if f["severity"] == "error"] == ["data"]
    assert set(told["findings"][0]) == {"severity", "topic", "what", "where", "why", "do"}


def test_parts_that_cannot_be_built_hide_no_others(tmp_path: Path) -> None:
    study = written(tmp_path, data="shuffled")
    study.write_text(study.read_text().replace("parts:layers", "parts:layer") + '[loss]\nfactory = "nowhere:loss"\n')
    told = ho.doctor(study)
    assert [f.topic for f in told["error"]] == ["model", "loss", "data"]
    assert "did you mean 'layers'" in told["error"][0].do
    assert call(tmp_path / "absent.toml").exit_code == 1


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    study = written(tmp_path)
    before = sorted(p.name for p in tmp_path.rglob("*") if "__pycache__" not in p.parts)
    ho.doctor(study)
    assert sorted(p.name for p in tmp_path.rglob("*") if "__pycache__" not in p.parts) == before
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 3)).eval()
    problem = ho.Problem(model, [(torch.randn(8, 4), torch.randint(0, 3, (8,))) for _ in range(3)], F.cross_entropy)
    model.train()
    kept = {n: t.clone() for n, t in model.state_dict().items()}
    random = torch.get_rng_state()
    assert ho.doctor(problem).wrong
    assert all(m.training for m in model.modules())
    assert torch.equal(random, torch.get_rng_state())
    for n, t in model.state_dict().items():
        torch.testing.assert_close(t, kept[n], rtol=0, atol=0)
    assert all(p.grad is None for p in model.parameters())


def test_names_of_the_users_are_escaped_in_a_notebook() -> None:
    page = Diagnosis("<b>", [Finding("error", "model", "<script>alert(1)</script>", do='"><img>')])._repr_html_()
    assert "<script>" not in page
    assert "<img>" not in page
    assert "&lt;script&gt;" in page


# ---- the shipped studies ----------------------------------------------------------------------------------------

SHIPPED = sorted(p.relative_to(DATA).as_posix() for p in DATA.glob("*/*.toml"))


def available(name: str) -> bool:
    """Whether its checkpoints and images are here: of some runs only the summaries are shipped."""
    folder = (DATA / name).parent
    cifar = "cifar10" in (DATA / name).read_text() and not (DATA / "cifar-10-batches-bin" / "data_batch_1.bin").exists()
    return any(folder.glob("*.safetensors")) and not cifar


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_studies_are_sound(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not available(name):
        pytest.skip("its checkpoints or images are not part of the repository")
    if "vgg11" in name:
        pytest.skip("a minute each: `hoanalysis doctor data/vgg11-cifar10` on the command line")
    monkeypatch.chdir(DATA.parent)  # their data are given from here
    told = ho.doctor(DATA / name, seconds=5)
    assert not told.wrong, str(told)
    if name != "lenet5-mnist/study.toml":
        assert not of(told, "warning"), str(told)
        return
    warning = only(told, "warning")  # true: an image that the network was not trained on, and is sure and wrong about
    model = LeNet5()
    run = open_run(DATA / "lenet5-mnist")
    model.load_state_dict(fit(run[-1], {n: p.shape for n, p in model.named_parameters()}))
    everything = data.mnist5k("all")
    with torch.no_grad():
        each = F.cross_entropy(model(everything.x), everything.y, reduction="none")
    assert int(each.argmax()) == 4578
    assert f"4578 (loss {float(each.max()):.4g})" in warning.where
