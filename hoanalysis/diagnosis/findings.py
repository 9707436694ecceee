"""What was found, as plain data: one `Finding` each, printed on a console, shown in a notebook, or written as JSON."""

from __future__ import annotations

import html
import json
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, overload

from hoanalysis.errors import HoError

Severity = Literal["ok", "note", "warning", "error"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note", "ok")
WIDTH = 110
_COLOURS = {"error": "#b3261e", "warning": "#8a5a00", "note": "#3b5f8a", "ok": "#2e6b34"}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes
    ----------
    severity
        ``error``: the numbers would be wrong, or there would be none. ``warning``: they would be right, and may not be
        what was meant. ``note``: worth knowing. ``ok``: looked at, nothing to say.
    topic
        What was looked at: study, model, data, checkpoints, forward, kinks, capture, self-check, slopes, groups,
        batches, environment.
    what, where, why, do
        One sentence; the file, parameter, batch or line; the reason; the remedy.
    """

    severity: Severity
    topic: str
    what: str
    where: str = ""
    why: str = ""
    do: str = ""

    @classmethod
    def of(cls, topic: str, error: HoError, severity: Severity = "error") -> Finding:
        """What an error says."""
        return cls(severity, topic, error.what, error.where, error.why, error.do)

    def __str__(self) -> str:
        return self.text()

    def text(self, verbose: bool = False) -> str:
        """For a console: one line where all is well, unless ``verbose``."""
        head = f"{self.severity:<8} {self.topic:<12} "
        if self.severity == "ok" and not verbose:
            return head + self.what
        indent = " " * len(head)
        lines = _wrapped(self.what, head, indent)
        for label in ("where", "why", "do"):
            if text := getattr(self, label):
                lines += _wrapped(text, f"{indent}{label}: ", indent + "  ")
        return "\n".join(lines)


def _wrapped(text: str, first: str, rest: str) -> list[str]:
    return textwrap.wrap(
        " ".join(text.split()), WIDTH, initial_indent=first, subsequent_indent=rest, break_long_words=False,
        break_on_hyphens=False,
    ) or [first.rstrip()]  # fmt: skip


class Diagnosis(Sequence[Finding]):
    """All findings, in the order in which things were looked at.

    >>> found = Diagnosis("a study", [Finding("ok", "model", "MLP"), Finding("warning", "data", "only 2 batches")])
    >>> found.wrong, len(found), [f.what for f in found["warning"]]
    (False, 2, ['only 2 batches'])
    >>> print(found)
    a study
    ok       model        MLP
    warning  data         only 2 batches
    1 warning, no errors
    """

    def __init__(self, subject: str, findings: Sequence[Finding]) -> None:
        self.subject, self.findings = subject, tuple(findings)

    @property
    def wrong(self) -> bool:
        """Whether numbers would be wrong, or could not be had."""
        return any(f.severity == "error" for f in self.findings)

    def __len__(self) -> int:
        return len(self.findings)

    def __iter__(self) -> Iterator[Finding]:
        return iter(self.findings)

    @overload
    def __getitem__(self, key: int) -> Finding: ...
    @overload
    def __getitem__(self, key: slice | str) -> Sequence[Finding]: ...
    def __getitem__(self, key: int | slice | str) -> Finding | Sequence[Finding]:
        """By position, or all of a severity or topic."""
        if isinstance(key, str):
            return tuple(f for f in self.findings if key in (f.severity, f.topic))
        return self.findings[key]

    @property
    def summary(self) -> str:
        """How many findings of each severity."""
        counts = {s: len(self[s]) for s in SEVERITIES}
        if not counts["error"] and not counts["warning"]:
            return "no problems found"
        told = [f"{n} {s}{'s' * (n > 1)}" for s in ("error", "warning") if (n := counts[s])]
        return ", ".join(told) + ("" if counts["error"] else ", no errors")

    def __str__(self) -> str:
        return self.text()

    def text(self, verbose: bool = False) -> str:
        """For a console; ``verbose`` tells of what is well in full, such as the rule of each op."""
        return "\n".join([self.subject, *(f.text(verbose) for f in self.findings), self.summary])

    __repr__ = __str__

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"subject": self.subject, "wrong": self.wrong, "findings": [asdict(f) for f in self.findings]}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def _repr_html_(self) -> str:
        """The same in a notebook: names are the user's and are escaped."""
        rows = "".join(
            f'<tr><td style="color:{_COLOURS[f.severity]};font-weight:600">{f.severity}</td>'
            f'<td>{html.escape(f.topic)}</td><td style="text-align:left">{_cell(f)}</td></tr>'
            for f in self.findings
        )
        return (
            f"<div><b>{html.escape(self.subject)}</b>: {html.escape(self.summary)}"
            f'<table style="text-align:left">{rows}</table></div>'
        )


def _cell(finding: Finding) -> str:
    parts = [html.escape(finding.what)]
    parts += [f"<i>{k}:</i> {html.escape(text)}" for k in ("where", "why", "do") if (text := getattr(finding, k))]
    return "<br>".join(parts)
