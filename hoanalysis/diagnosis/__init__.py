"""Before paying for summaries: will model, data, loss and checkpoints give numbers that are right?

examine      the order of the checks, and that none hides another
subject      what is examined, from a study or a `Problem`
model        modes, dtypes, hooks, frozen and tied parameters
loader       whether every pass over the data gives the same batches; outlying batches and samples
files        whether each file fits the model
watch        a forward pass op by op: where values stop being finite, and kinks
derivatives  one small batch at every order: capture, self-check, measured slopes, groups without effect
findings     `Finding` and `Diagnosis`, plain data: nothing of torch
"""

from hoanalysis.diagnosis.examine import doctor
from hoanalysis.diagnosis.findings import Diagnosis, Finding

__all__ = ["Diagnosis", "Finding", "doctor"]
