"""The engine `tangents`: D1, D2 and the full D3 in O(S) passes, exactly, over a captured graph of one batch's loss."""

from hoanalysis.derivatives.tangents.costs import Cost
from hoanalysis.derivatives.tangents.graph import NotFinite, OtherBranch, TangentsUnsupported
from hoanalysis.derivatives.tangents.program import Program, capture, capture_key

__all__ = ["Cost", "NotFinite", "OtherBranch", "Program", "TangentsUnsupported", "capture", "capture_key"]
