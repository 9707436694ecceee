"""The derivative engines: ``tangents`` in O(S) passes, ``nested`` as the paper's recursion and last resort."""
