"""Stored results are opened, analysed and plotted where importing torch raises."""

import subprocess
import sys
from pathlib import Path

import pytest

import hoanalysis as ho
from tests.test_summaries import make_problem

SCRIPT = """
import sys
sys.modules["torch"] = None  # from here on `import torch` raises ImportError
import matplotlib
matplotlib.use("agg")
import hoanalysis as ho

ds = ho.open_dataset(sys.argv[1])
for one in (ds, ds.ho.merge("layer"), ds.ho.merge(2)):
    step = -1.0 * one.ho.learning_rates().learning_rates.fillna(0)
    arguments = {"merge": ("kind",), "taylor": (step,), "taylor_terms": (step,), "suggest_partition": (1,)}
    arguments |= {"compare": (one,), "differences": (one,)}
    for verb in sys.argv[2].split(","):
        getattr(one.ho, verb)(*arguments.get(verb, ()))
    for name in (n for n in dir(one.ho.plot) if n[0] != "_"):
        getattr(one.ho.plot, name)()
for regularization in (None, "ridge", "r", "cubic"):
    ds.ho.learning_rates(regularization, epsilon=0.5)
print("done", sum(n[0] != "_" for n in dir(ds.ho.plot)))
"""


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> Path:
    from hoanalysis.store import export

    ds = ho.summarize(make_problem(), 3, direction="weights", keep_batches=4, progress=False)
    return export(ds, tmp_path_factory.mktemp("stored") / "summaries.nc")


def test_every_verb_and_every_plot(stored: Path) -> None:
    ds = ho.open_dataset(stored)
    own = {"prediction", "path", "autopsy", "update_rule", "reinitialization"}  # directions: tests of their modules
    verbs = [v for v in dir(ds.ho) if v.islower() and not v.startswith("_") and v not in {"plot", *own}]
    assert {"regularizer", "learning_rates", "inverse", "merge", "blocks", "taylor", "interactions", "spectrum"} <= set(
        verbs
    )
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", SCRIPT, str(stored), ",".join(verbs)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("done")
    assert int(result.stdout.split()[1]) >= 8
