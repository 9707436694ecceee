"""Post-mortems of training runs through exact summaries of higher-order derivatives.

Importing this package needs no torch; what needs it is loaded on first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

from hoanalysis import _early as _early  # first: it answers Ctrl-C during the imports that follow
from hoanalysis import accessor as accessor  # registers ds.ho
from hoanalysis import errors as errors
from hoanalysis._version import __version__ as __version__

if TYPE_CHECKING:
    from hoanalysis import analysis as analysis
    from hoanalysis import data as data
    from hoanalysis import models as models
    from hoanalysis import optim as optim
    from hoanalysis import plots as plots
    from hoanalysis.budget import estimate as estimate
    from hoanalysis.checkpoints import load_checkpoint as load_checkpoint
    from hoanalysis.checkpoints import open_run as open_run
    from hoanalysis.diagnosis import doctor as doctor
    from hoanalysis.explorer import explore as explore
    from hoanalysis.hessian import curvature as curvature
    from hoanalysis.partitions import Partition as Partition
    from hoanalysis.problem import Problem as Problem
    from hoanalysis.recorder import Recorder as Recorder
    from hoanalysis.reports import report as report
    from hoanalysis.store import open_dataset as open_dataset
    from hoanalysis.store import open_store as open_store
    from hoanalysis.summaries import summarize as summarize
    from hoanalysis.summaries import summarize_run as summarize_run
    from hoanalysis.summaries import taylor_terms as taylor_terms

_WHERE = {
    "Partition": "partitions",
    "Problem": "problem",
    "Recorder": "recorder",
    "curvature": "hessian",
    "doctor": "diagnosis",
    "estimate": "budget",
    "explore": "explorer",
    "load_checkpoint": "checkpoints",
    "open_dataset": "store",
    "open_run": "checkpoints",
    "open_store": "store",
    "report": "reports",
    "summarize": "summaries",
    "summarize_run": "summaries",
    "taylor_terms": "summaries",
}
_MODULES = ("analysis", "data", "models", "optim", "plots")

__all__ = [
    "Partition",
    "Problem",
    "Recorder",
    "__version__",
    "analysis",
    "curvature",
    "data",
    "doctor",
    "errors",
    "estimate",
    "explore",
    "load_checkpoint",
    "models",
    "open_dataset",
    "open_run",
    "open_store",
    "optim",
    "plots",
    "report",
    "summarize",
    "summarize_run",
    "taylor_terms",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"hoanalysis.{name}")
    if name in _WHERE:
        return getattr(importlib.import_module(f"hoanalysis.{_WHERE[name]}"), name)
    raise AttributeError(f"module 'hoanalysis' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
