"""The rows of docs/bad-inputs.md and the tests that show them; ``python -m tests.bad_inputs`` writes the last column.

A test belongs to a row by ``@pytest.mark.row("C4")``, or by its name: ``test_S4_..``. The marks are read from source:
the table is the same whatever is selected to run.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "docs" / "bad-inputs.md"
ROW = re.compile(r"^\| ([A-Z]\d+) \|(.*)\|([^|]*)\|([^|]*)\|$", re.MULTILINE)
#: The rows that there must be: checkpoints, models and losses, partitions, directions, data, numerics.
EXPECTED = {f"{group}{i}" for group, n in dict(C=20, M=13, P=6, D=5, A=10, N=6).items() for i in range(1, n + 1)}
UNTESTED = "not tested: "  # stands in a row that has a reason instead of a test


def marked() -> dict[str, list[str]]:
    """Row -> the tests that show it, as ``file::test``."""
    found: dict[str, list[str]] = {}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(function, ast.FunctionDef) and function.name.startswith("test_"):
                for row in dict.fromkeys(_rows(function)):
                    found.setdefault(row, []).append(f"{path.relative_to(ROOT / 'tests')}::{function.name}")
    return found


def _rows(function: ast.FunctionDef) -> Iterator[str]:
    if named := re.match(r"test_([A-Z]\d+)_", function.name):
        yield named[1]
    for decorator in function.decorator_list:
        if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "pytest.mark.row":
            yield from (str(ast.literal_eval(a)) for a in decorator.args)


def rows() -> dict[str, str]:
    """Row -> what the page says that a user gets."""
    return {m[1]: m[3].strip() for m in ROW.finditer(TABLE.read_text(encoding="utf-8"))}


def written() -> str:
    """The page with its last column as the marks have it."""
    tests = marked()
    return ROW.sub(
        lambda m: f"| {m[1]} |{m[2]}|{m[3]}| {'<br>'.join(f'`{t}`' for t in tests.get(m[1], []))} |",
        TABLE.read_text(encoding="utf-8"),
    )


if __name__ == "__main__":
    TABLE.write_text(written(), encoding="utf-8")
