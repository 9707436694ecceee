"""One torch thread in every test process: the models are tiny, and the workers of `make test` share the cores."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import textwrap
from pathlib import Path

import pytest

FACTORIES = """
import torch
from torch import nn

def model(width=5, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 3))

def data(batch_size=8, max_samples=32):
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(max_samples, 4, generator=g), torch.randint(0, 3, (max_samples,), generator=g)
    return [(x[i : i + batch_size], y[i : i + batch_size]) for i in range(0, max_samples, batch_size)]
"""
STUDY = """
[model]
factory = "{module}:model"
[data]
factory = "{module}:data"
batch_size = 8
max_samples = 32
[loss]
factory = "torch.nn.functional:cross_entropy"
[checkpoints]
pattern = "*.safetensors"
log = "log.csv"
[summaries]
order = 2
diagonal = 3
keep_batches = 4
"""


def write_study(folder: Path, module: str, extra: str = "", steps: int = 3) -> Path:
    """A small study with real checkpoints in ``folder``; ``module`` names its file of factories."""
    from safetensors.torch import save_file
    from torch import nn

    folder.mkdir(parents=True)
    (folder / f"{module}.py").write_text(FACTORIES)
    namespace: dict = {}
    exec(FACTORIES, namespace)
    for step in range(steps):
        model: nn.Module = namespace["model"](seed=step)
        save_file(dict(model.state_dict()), folder / f"step_{10 * step}.safetensors")
    rows = "\n".join(f"{10 * s},{1.2 - 0.1 * s},0.1" for s in range(steps))
    (folder / "log.csv").write_text(f"step,loss,learning_rate\n{rows}\n")
    (folder / "study.toml").write_text(textwrap.dedent(STUDY.format(module=module)) + extra)
    return folder / "study.toml"


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """A study of three checkpoints of a small network, in a folder of its own."""
    return write_study(tmp_path / "small", f"factories_{tmp_path.name.replace('-', '_')}")
