"""Study files: what the shipped ones build, and what each kind of wrong one says."""

import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from hoanalysis import data, models
from hoanalysis.errors import CheckpointError, HoError, ModelError, StudyError
from hoanalysis.study import StudySpec

ROOT = Path(__file__).parents[1]
CIFAR = ROOT / "data" / "cifar-10-batches-bin"
SHIPPED = sorted((ROOT / "data").glob("*/study.toml"))

FACTORIES = """
import torch
from torch import nn
from hoanalysis.errors import DataError

def model(width=3):
    return nn.Linear(4, width)

def no_model():
    return {"a": 1}

def batches(n=6, batch_size=6, max_samples=None, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(n, 4, generator=g)[:max_samples], torch.randint(3, (n,), generator=g)[:max_samples]
    return list(zip(x.split(batch_size), y.split(batch_size)))

def empty():
    raise DataError("the folder is empty")

def broken():
    raise RuntimeError("no such device")

class Loss(nn.Module):
    def __init__(self, factor=1.0):
        super().__init__()
        self.factor = factor
    def forward(self, x, y):
        return self.factor * nn.functional.cross_entropy(x, y)

class Inner:
    model = staticmethod(model)

number = 3
"""

PLAIN = """
[model]
factory = "factories:model"
[data]
factory = "factories:batches"
"""


def write(folder: Path, text: str = PLAIN, factories: str = FACTORIES, name: str = "study.toml") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "factories.py").write_text(factories)
    (folder / name).write_text(textwrap.dedent(text))
    return folder / name


# ---- right files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.parent.name)
def test_the_shipped_studies_say_what_is_computed(path):
    study = StudySpec.read(path)
    assert study.name == path.parent.name
    assert study.folder == path.parent
    table = tomllib.loads(path.read_text())["summaries"]
    assert (study.curvature() is not None) == (table.pop("curvature", None) is not None)
    directions, partitions = table.pop("directions", ["gradient"]), table.pop("partitions", ["canonical"])
    pairs = [(d, p) for d in directions for p in partitions]
    options = study.settings()
    assert [(o["direction"], o["partition"]) for o in options] == pairs
    assert all({k: o[k] for k in table} == table for o in options)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.parent.name)
def test_the_shipped_studies_build(path):
    study = StudySpec.read(path)
    log = study.log()
    assert {"loss", "learning_rate"} <= set(log.columns)
    if not list(study.folder.glob("*.safetensors")):
        pytest.skip("of this run the summaries are shipped, and not the weights")
    run = study.run()
    assert set(run.steps) <= set(log["step"])
    if "cifar" in path.parent.name and not CIFAR.is_dir():
        pytest.skip("needs CIFAR-10")
    problem = study.problem()
    assert problem.state(problem.fitted(run[-1])).shapes() == problem.state().shapes()
    assert not problem.model.training


def test_the_shipped_lenet_is_what_its_file_says():
    path = ROOT / "data" / "lenet5-mnist" / "study.toml"
    table, problem = tomllib.loads(path.read_text())["data"], StudySpec.read(path).problem()
    assert isinstance(problem.model, models.LeNet5)
    assert problem.loss is F.cross_entropy
    limits = {k: table[k] for k in ("batch_size", "max_samples") if k in table}
    torch.testing.assert_close(list(problem.data), list(data.mnist5k(**table["args"], **limits)))


def test_defaults(tmp_path):
    study = StudySpec.read(write(tmp_path / "my run"))
    assert study.name == "my run"
    assert study.loss.factory == "torch.nn.functional:cross_entropy"
    assert (study.checkpoints.folder, study.checkpoints.pattern, study.checkpoints.log) == (".", "*.safetensors", None)
    assert study.log() is None
    (options,) = study.settings()
    assert (options["order"], options["diagonal"], options["keep_batches"], options["engine"]) == (2, None, 20, "auto")
    assert study.report.notebook is None


def test_a_folder_or_a_file_of_any_name(tmp_path):
    write(tmp_path / "run", name="other.toml")
    assert StudySpec.read(tmp_path / "run" / "other.toml").name == "other"
    write(tmp_path / "run")
    assert StudySpec.read(tmp_path / "run") == StudySpec.read(str(tmp_path / "run" / "study.toml"))


def test_relative_paths_stay_right_when_the_process_moves(tmp_path, monkeypatch):
    write(tmp_path / "run")
    save_file(nn.Linear(4, 3).state_dict(), tmp_path / "run" / "step_1.safetensors")
    monkeypatch.chdir(tmp_path)
    study = StudySpec.read("run")
    monkeypatch.chdir("/")
    assert len(study.run()) == 1
    assert study.problem().state().shapes() == {"weight": (3, 4), "bias": (3,)}


def test_arguments_reach_the_factories(tmp_path):
    text = """
        [model]
        factory = "factories:Inner.model"
        args = { width = 5 }
        mode = "train"
        [data]
        factory = "factories:batches"
        args = { n = 20, seed = 3 }
        batch_size = 4
        max_samples = 10
        [loss]
        factory = "factories:Loss"
        args = { factor = 2.5 }
        [summaries]
        directions = ["gradient", "weights"]
        partitions = ["layer", "kind"]
        tolerance = 1
    """
    study = StudySpec.read(write(tmp_path / "run", text))
    problem = study.problem()
    assert problem.model.training
    assert problem.model.out_features == 5
    assert [len(y) for _, y in problem.data] == [4, 4, 2]
    x, y = problem.first_batch()
    state = problem.state()
    value = problem.batch_value(state.parameters, state, (x, y))
    torch.testing.assert_close(value, 2.5 * F.cross_entropy(problem.model(x), y).detach())
    pairs = [(o["direction"], o["partition"]) for o in study.settings()]
    assert pairs == [("gradient", "layer"), ("gradient", "kind"), ("weights", "layer"), ("weights", "kind")]
    assert all(o["tolerance"] == 1 for o in study.settings())


def test_a_loss_function_with_arguments(tmp_path):
    text = PLAIN + '[loss]\nfactory = "torch.nn.functional:cross_entropy"\nargs = { ignore_index = 0 }\n'
    problem = StudySpec.read(write(tmp_path / "run", text)).problem()
    x, y = problem.first_batch()
    assert problem.size((x, y)) == int((y != 0).sum()) < len(y)


def test_two_studies_with_modules_of_one_name_get_each_their_own(tmp_path):
    first = StudySpec.read(write(tmp_path / "first"))
    second = StudySpec.read(write(tmp_path / "second", factories=FACTORIES.replace("width=3", "width=7")))
    for _ in range(2):
        assert first.problem().model.out_features == 3
        assert second.problem().model.out_features == 7
    path = list(sys.path)
    assert first.problem().model.out_features == 3
    assert sys.path == path


def test_packages_beside_the_studies_are_told_apart_with_their_modules(tmp_path):
    for width in (3, 7):
        write(tmp_path / str(width), factory("model", "kit.nets:model"))
        (tmp_path / str(width) / "kit").mkdir()
        (tmp_path / str(width) / "kit" / "__init__.py").touch()
        (tmp_path / str(width) / "kit" / "nets.py").write_text(FACTORIES.replace("width=3", f"width={width}"))
    for width in (3, 7, 3):
        assert StudySpec.read(tmp_path / str(width)).problem().model.out_features == width


def test_modules_of_other_packages_are_never_forgotten(tmp_path):
    write(tmp_path / "first")
    for name in ("first", "second"):
        write(tmp_path / name)
        (tmp_path / name / "torch.py").write_text("raise RuntimeError('not this one')\n")
        StudySpec.read(tmp_path / name).problem()
    assert sys.modules["torch"] is torch


def test_reading_a_study_imports_no_torch():
    script = (
        "import sys; from hoanalysis.study import StudySpec; "
        f"s = StudySpec.read({str(SHIPPED[0])!r}); s.log(); s.run(); s.settings(); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# ---- wrong files ------------------------------------------------------------------------------------------------

WRONG = {
    "unknown key": (
        PLAIN + '[summaries]\nparitions = ["layer"]\n',
        r"'paritions' in \[summaries\]: did you mean 'partitions'",
    ),
    "unknown table": (PLAIN + "[sumaries]\norder = 2\n", "'sumaries': did you mean 'summaries'"),
    "unknown key of no likeness": (
        PLAIN + "[checkpoints]\nzzz = 1\n",
        r"'zzz' in \[checkpoints\]: one of 'folder', 'pattern', 'log'",
    ),
    "the word path": ('path = "x"\n' + PLAIN, "unknown key 'path'"),
    "missing table": ('[model]\nfactory = "factories:model"\n', "missing key 'data'"),
    "missing key": ('[model]\n[data]\nfactory = "a:b"\n', r"missing key 'factory' in \[model\]"),
    "text for a number": (PLAIN + '[summaries]\norder = "2"\n', r"'order' in \[summaries\] is '2': .*integer"),
    "a flag for a number": (PLAIN + "[summaries]\norder = true\n", r"'order' in \[summaries\] is True: .*integer"),
    "a fraction for a count": (PLAIN + "[summaries]\norder = 2.5\n", r"'order' in \[summaries\] is 2.5: .*integer"),
    "too small": (PLAIN + "[summaries]\norder = 0\n", r"'order' in \[summaries\] is 0: .*greater than or equal to 1"),
    "a number for text": ("[model]\nfactory = 3\n[data]\nfactory = 'a:b'\n", r"'factory' in \[model\] is 3: .*string"),
    "a number for a table": ("model = 3\n[data]\nfactory = 'a:b'\n", "'model' is 3"),
    "text for a list": (
        PLAIN + '[summaries]\ndirections = "gradient"\n',
        r"'directions' in \[summaries\] is 'gradient': .*list",
    ),
    "nothing in a list": (PLAIN + "[summaries]\ndirections = []\n", r"'directions' in \[summaries\]"),
    "a number in a list": (
        PLAIN + '[summaries]\ndirections = ["gradient", 4]\n',
        r"summaries.directions.* is 4: .*string",
    ),
    "another choice": (
        PLAIN + '[summaries]\ndtype = "float16"\n',
        r"'dtype' in \[summaries\] is 'float16': .*'float32' or 'float64'",
    ),
    "another mode": (
        '[model]\nfactory = "a:b"\nmode = "eval()"\n[data]\nfactory = "a:b"\n',
        r"'mode' in \[model\].*'eval' or 'train'",
    ),
    "batch size": (
        '[model]\nfactory = "a:b"\n[data]\nfactory = "a:b"\nbatch_size = 0\n',
        r"'batch_size' in \[data\] is 0",
    ),
    "no TOML": ('[model]\nfactory = "a:b"\norder 3\n', "not valid TOML.*line 3"),
    "twice": (PLAIN + "[model]\n", "not valid TOML.*line 6"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_files_name_the_key_and_the_file(tmp_path, case):
    text, words = WRONG[case]
    with pytest.raises(StudyError, match=words) as caught:
        StudySpec.read(write(tmp_path / "run", text))
    assert str(tmp_path / "run" / "study.toml") in caught.value.where


def test_files_that_are_not_there(tmp_path):
    write(tmp_path / "run", name="sutdy.toml")
    for path in (tmp_path / "run" / "study.toml", tmp_path / "run"):
        with pytest.raises(StudyError, match=r"(?s)no such study file.*has 'factories\.py', 'sutdy\.toml'"):
            StudySpec.read(path)
    with pytest.raises(StudyError, match=r"(?s)no such study file.*has 'run'"):
        StudySpec.read(tmp_path / "rum" / "deeper" / "study.toml")
    (tmp_path / "empty").mkdir()
    with pytest.raises(StudyError, match=r"(?s)no such study file.*is empty"):
        StudySpec.read(tmp_path / "empty")


def test_a_missing_relative_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("nothing/study.toml", "study.toml", "a/b/c"):
        with pytest.raises(StudyError, match="no such study file"):
            StudySpec.read(path)


def test_files_that_cannot_be_read(tmp_path):
    binary = write(tmp_path / "run")
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(StudyError, match="not UTF-8 text"):
        StudySpec.read(binary)
    with pytest.raises(StudyError, match="cannot be read"):
        StudySpec.read(binary / "study.toml")


def factory(table: str, name: str, extra: str = "") -> str:
    parts = {"model": 'factory = "factories:model"', "data": 'factory = "factories:batches"'}
    parts = {t: p for t, p in parts.items() if t != table} | {table: f'factory = "{name}"\n{extra}'}
    return "\n".join(f"[{t}]\n{p}" for t, p in parts.items()) + "\n"


BROKEN = {
    "no colon": (
        "model",
        "factories.model",
        "",
        r"\[model\] factory 'factories\.model' is not of the form 'package\.module:name'",
    ),
    "no name": ("model", "factories:", "", "not of the form"),
    "no module": (
        "data",
        "no_such_module_here:x",
        "",
        r"\[data\] .*importing 'no_such_module_here' raised ModuleNotFoundError(?s:.*)beside the study file",
    ),
    "module without a name": ("data", ":x", "", r"\[data\] factory ':x'"),
    "relative module": ("data", ".factories:x", "", r"\[data\] factory '\.factories:x'"),
    "misspelt name": ("model", "factories:modle", "", r"'factories' has no 'modle'(?s:.*)did you mean 'model'"),
    "misspelt part": ("model", "factories:Inner.modle", "", r"has no 'Inner\.modle'(?s:.*)did you mean 'model'"),
    "part of a number": ("model", "factories:number.modle", "", r"has no 'number\.modle'"),
    "not callable": (
        "model",
        "factories:number",
        "",
        r"\[model\] factory 'factories:number' is a int, which cannot be called",
    ),
    "loss not callable": ("loss", "factories:number", "args = { a = 1 }", r"\[loss\] .*cannot be called"),
    "raises": (
        "data",
        "factories:broken",
        "",
        r"\[data\] factory 'factories:broken' raised RuntimeError: no such device",
    ),
    "wrong argument": (
        "model",
        "factories:model",
        "args = { widht = 2 }",
        r"(?s)raised TypeError: .*'widht'.*called with \{'widht': 2\}.*model\(width=3\)",
    ),
    "no signature": ("model", "builtins:int", "args = { a = 2 }", r"\[model\] factory 'builtins:int' raised TypeError"),
    "no module of torch": (
        "model",
        "factories:no_model",
        "",
        r"\[model\] factory 'factories:no_model' gave a dict, not a torch\.nn\.Module",
    ),
    "our own error": ("data", "factories:empty", "", "the folder is empty"),
    "wrong argument of a loss": ("loss", "factories:Loss", "args = { facto = 2 }", r"(?s)\[loss\] .*'facto'.*factor"),
}


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.row("M1")
def test_broken_factories(tmp_path, case):
    table, name, extra, words = BROKEN[case]
    study = StudySpec.read(write(tmp_path / "run", factory(table, name, extra)))
    path = list(sys.path)
    with pytest.raises(HoError, match=words) as caught:
        study.problem()
    if case != "our own error":
        assert isinstance(caught.value, StudyError)
        assert str(study.path) in caught.value.where
    assert sys.path == path


@pytest.mark.row("M1")
def test_a_module_that_fails_to_import(tmp_path):
    study = StudySpec.read(write(tmp_path / "run", factories="import torch\n1 / 0\n"))
    with pytest.raises(StudyError, match=r"importing 'factories' raised ZeroDivisionError"):
        study.problem()


def test_errors_of_the_problem_pass_through(tmp_path):
    text = factory("model", "torch.nn:Dropout", "args = { p = 0.5 }\nmode = 'train'")
    with pytest.raises(ModelError, match="dropout"):
        StudySpec.read(write(tmp_path / "run", text)).problem()


def test_checkpoints_that_are_not_there(tmp_path):
    study = StudySpec.read(write(tmp_path / "run"))
    with pytest.raises(CheckpointError, match=r"no file matches the pattern '\*\.safetensors'"):
        study.run()
    study = StudySpec.read(write(tmp_path / "run", PLAIN + '[checkpoints]\nfolder = "weights"\n'))
    with pytest.raises(CheckpointError, match="no such folder"):
        study.run()


LOG = PLAIN + '[checkpoints]\nlog = "log.csv"\n'


def test_logs(tmp_path):
    study = StudySpec.read(write(tmp_path / "run", LOG))
    with pytest.raises(StudyError, match=r"(?s)no such training log.*log\.csv.*has 'factories\.py', 'study\.toml'"):
        study.log()
    file = tmp_path / "run" / "log.csv"
    file.write_text("step,loss\n0,2.5\n10,1.5\n")
    assert study.log()["loss"].tolist() == [2.5, 1.5]
    file.write_text("epoch,loss,learning rate\n0,1,2\n")
    with pytest.raises(
        StudyError, match=r"(?s)lacks the columns 'step'.*log\.csv.*it has 'epoch', 'loss', 'learning rate'"
    ):
        study.log()
    file.write_text("")
    with pytest.raises(StudyError, match="not a CSV table"):
        study.log()
    file.write_bytes(b"step,loss\n\xff,\xfe\n")
    with pytest.raises(StudyError, match="not a CSV table"):
        study.log()
    file.unlink()
    file.mkdir()
    with pytest.raises(StudyError, match="not a CSV table"):
        study.log()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('directions = ["zzz"]', "no direction named 'zzz'"),
        ('directions = ["gradiant"]', "did you mean 'gradient'"),
        ('directions = ["gradient", "weights", "gradient"]', "names 'gradient' more than once"),
        ('partitions = ["layer", "layer"]', "names 'layer' more than once"),
    ],
)
def test_directions_and_partitions_are_checked_before_anything_is_computed(tmp_path, line, words):
    path = write(tmp_path / "s", PLAIN + f"[summaries]\n{line}\n")
    with pytest.raises(StudyError, match=words) as caught:
        StudySpec.read(path).settings()
    assert str(path) in caught.value.where
