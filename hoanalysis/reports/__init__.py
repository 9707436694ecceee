"""Reports: a study in; a self-contained page, the executed notebook and one netCDF per direction and partition out.

run        studies one after the other: compute, export, execute, convert; what became of each
execute    a notebook with checked parameters, in a kernel, and why it failed where it did
pages      an executed notebook as a page, and the index of several
output     files that appear whole or not at all

The numbers come from the store, the notebook only renders them: a second call computes nothing that is there already,
and a failing notebook loses no number.
"""

from hoanalysis.reports.run import Outcome, compute, report

__all__ = ["Outcome", "compute", "report"]
