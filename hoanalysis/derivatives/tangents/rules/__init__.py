"""The rules: one per op. Importing this package fills the registry."""

from hoanalysis.derivatives.tangents.rules import linear, local, product, scalar  # noqa: F401  (they register rules)
from hoanalysis.derivatives.tangents.rules.base import Local, Stack, Stacks, rule, rule_for

__all__ = ["Local", "Stack", "Stacks", "rule", "rule_for"]
