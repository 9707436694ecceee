"""A process that forks one child a call of the command line: imports are paid once, no thread of the tests is forked.

    python -m tests.reports.forks       one JSON request a line in, one JSON answer a line out

The child can be sent a signal after some seconds or once a file is there, or be killed just before the n-th call of one
of some functions of ``os``.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


@dataclass
class Call:
    """``arguments`` of the command line; ``signal`` goes to the child ``seconds`` after ``file`` is there.

    With ``operations`` no kernel runs and nothing is computed, the netCDF of an earlier call is taken, and SIGKILL
    comes before the ``n``-th of these calls.
    """

    arguments: list[str]
    signal: int = 0
    seconds: float = 0
    file: str = ""
    operations: tuple[str, ...] = ()
    n: int = 0


@dataclass
class End:
    status: int
    seconds: float
    output: str


def _child(call: Call, output: int) -> None:
    """Runs in the fork; never returns."""
    status = 2
    try:
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
        if call.operations:
            files_alone()
            _kill_at(call.operations, call.n)
        from hoanalysis.cli import app

        app(call.arguments)
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 0
    except BaseException as error:
        print(repr(error))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def files_alone() -> None:
    """Of a report, what is left without computing and without a kernel: the files that it writes."""
    from hoanalysis.reports import run
    from hoanalysis.store import export, open_dataset

    def compute(spec: Any, outcome: run.Outcome, *args: Any) -> dict[Path, Any]:
        outcome.present = outcome.units = 1
        file = outcome.folder / run.DATASET
        ds = open_dataset(file)
        return {export(ds, file): ds}

    run.compute = compute  # type: ignore[assignment]
    run.Prepared.execute = lambda self, folder, timeout=0: self.node  # type: ignore[method-assign]


def _kill_at(operations: tuple[str, ...], n: int) -> None:
    calls = 0

    def killing(real: Any) -> Any:
        def one(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == n:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return one

    for name in operations:
        setattr(os, name, killing(getattr(os, name)))


def _send(call: Call, pid: int) -> None:
    while call.file and not (os.path.exists(call.file) and os.path.getsize(call.file)):
        time.sleep(0.02)
    time.sleep(call.seconds)
    os.kill(pid, call.signal)


def _import_all() -> None:
    """What loads on first use, by using it; a kernel is not, it would leave threads."""
    import nbformat

    import hoanalysis.cli
    import hoanalysis.summaries
    from hoanalysis.reports.execute import builtin_notebook, prepare
    from hoanalysis.reports.pages import page
    from tests.conftest import write_study

    page(prepare(builtin_notebook(), {}, {}).node, "")
    nbformat.writes(nbformat.v4.new_notebook())
    with tempfile.TemporaryDirectory() as folder:
        study = write_study(Path(folder) / "study", "factories_of_the_forks", steps=1)
        hoanalysis.cli.app(["summarize", str(study), "--out", folder, "-q"], standalone_mode=False)


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    _import_all()
    for line in sys.stdin:
        call = Call(**json.loads(line))
        started = time.monotonic()
        with tempfile.TemporaryFile() as output:
            if not (pid := os.fork()):
                _child(call, output.fileno())
            if call.signal:
                _send(call, pid)
            _, status = os.waitpid(pid, 0)
            output.seek(0)
            said = output.read().decode()
        end = End(os.waitstatus_to_exitcode(status), time.monotonic() - started, said)
        print(json.dumps(asdict(end)), file=answers, flush=True)


class Forks:
    """The process, from the side of the tests."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tests.reports.forks"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, text=True)

    def __call__(self, *arguments: object, **options: Any) -> End:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        call = Call(list(map(str, arguments)), **options)
        self._process.stdin.write(json.dumps(asdict(call)) + "\n")
        self._process.stdin.flush()
        return End(**json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()
        self._process.wait()


if __name__ == "__main__":
    _serve()
