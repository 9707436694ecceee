"""Files of weights -> `Checkpoint`; a folder of them -> `Run`. Knows no model class, and loads torch only with weights.

What a file is, is read from its content, never from its suffix. Files of torch are read with ``weights_only=True``,
without an opt-out and without a fallback; what a file declares is checked before memory is taken for it.
"""

from hoanalysis.checkpoints.fit import fit, fit_optimizer_state
from hoanalysis.checkpoints.load import Checkpoint, load_checkpoint
from hoanalysis.checkpoints.run import Run, open_run

__all__ = ["Checkpoint", "Run", "fit", "fit_optimizer_state", "load_checkpoint", "open_run"]
