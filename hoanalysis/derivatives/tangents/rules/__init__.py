"""The rules: one per op. Importing this package fills the registry."""

from hoanalysis.derivatives.tangents.rules import linear, normalize, product, scalar, softmax  # noqa: F401
from hoanalysis.derivatives.tangents.rules.base import Local, Stack, Stacks, rule, rule_for

__all__ = ["Local", "Stack", "Stacks", "rule", "rule_for"]
