"""A small process that forks one child a fault: imports are paid once, and no thread of the tests is forked.

    python -m tests.store.faults        one JSON request a line in, one JSON answer a line out

The child runs the workload with one operation of ``os`` made to fail or to kill the process.
"""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hoanalysis.errors import StoreError
from hoanalysis.store import Store
from tests.store import workload

ROOT = Path(__file__).parents[2]


@dataclass
class Job:
    """One child: the workload in ``folder``, with a fault at the ``n``-th call of ``os.<op>``.

    ``action`` is "before" or "after" (SIGKILL around the call), the name of an errno (the call fails), or that with a
    plus sign (it and all later ones fail).
    """

    folder: str
    op: str = ""
    n: int = 0
    action: str = ""
    acks: str = ""
    stop: bool = False
    user: int = 0
    file_size: int = 0
    hold: bool = False
    units: int = workload.UNITS
    task: str = "run"


@dataclass
class End:
    """How a child ended: ``status`` as of waitpid, negative for a signal; ``error`` the text of a `StoreError`."""

    status: int
    error: str = ""
    acks: list[str] = field(default_factory=list)


def install(op: str, n: int, action: str) -> None:
    """Replace ``os.<op>`` by one that has the fault."""
    real: Callable[..., Any] = getattr(os, op)
    calls = 0

    def faulty(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        name = action.rstrip("+")
        hit = calls == n or (action.endswith("+") and calls > n)
        if hit and name == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        if hit and hasattr(errno, name):
            number = getattr(errno, name)
            raise OSError(number, os.strerror(number), str(args[0]) if args else None)
        try:
            return real(*args, **kwargs)
        finally:
            if hit and name == "after":
                os.kill(os.getpid(), signal.SIGKILL)

    setattr(os, op, faulty)


def _child(job: Job, out: int) -> None:
    """Runs in the fork; never returns."""
    status = 0
    write = os.write
    try:
        warnings.simplefilter("error")
        acks = os.open(job.acks, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600) if job.acks else -1
        if job.user:
            os.setresgid(job.user, job.user, job.user)
            os.setresuid(job.user, job.user, job.user)
        if job.file_size:
            resource.setrlimit(resource.RLIMIT_FSIZE, (job.file_size, job.file_size))
        if job.stop:
            os.kill(os.getpid(), signal.SIGSTOP)
        if job.op:
            install(job.op, job.n, job.action)
        _TASKS[job.task](job, lambda what: write(acks, f"ACK {what}\n".encode()) if acks >= 0 else 0)
    except StoreError as error:
        write(out, str(error).encode())
        status = 3
    except BaseException:
        write(out, traceback.format_exc().encode())
        status = 4
    os._exit(status)


def _run(job: Job, ack: Callable[[str], Any]) -> None:
    workload.run(Path(job.folder), ack, job.units)


def _read(job: Job, ack: Callable[[str], Any]) -> None:
    workload.check_acknowledged(Path(job.folder), ["plan", "direction", *map(str, range(workload.UNITS))])


def _hold(job: Job, ack: Callable[[str], Any]) -> None:
    with Store.open(job.folder, mode="w"):
        ack("held")
        signal.pause()


_TASKS = {"run": _run, "read": _read, "hold": _hold}


def _serve() -> None:
    with tempfile.TemporaryDirectory() as folder:  # imports everything that loads on first use
        workload.run(Path(folder) / "store")
        workload.reduced(Path(folder) / "store")
    for line in sys.stdin:
        job = Job(**json.loads(line))
        text_in, text_out = os.pipe()
        if not (pid := os.fork()):
            _child(job, text_out)
        os.close(text_out)
        print(json.dumps(pid), flush=True)
        with os.fdopen(text_in, "rb") as text:
            error = text.read().decode()
        sys.stdin.readline()  # until then a dead child is a zombie, and its process id nobody else's
        _, status = os.waitpid(pid, 0)
        print(json.dumps([os.waitstatus_to_exitcode(status), error]), flush=True)


class Server:
    """The process, from the side of the tests."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.store.faults"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            text=True,
        )
        self._child = 0

    def start(self, job: Job) -> int:
        """The process id of a child that is on its way; `end` must follow."""
        Path(job.acks or os.devnull).write_text("")
        self._end_the_last()
        self._job = job
        self._say(json.dumps(asdict(job)))
        self._child = json.loads(self._line())
        return self._child

    def end(self) -> End:
        self._say("")
        self._child = 0
        status, error = json.loads(self._line())
        assert status != 4, error  # anything but a StoreError is a fault of ours
        return End(status, error, acks_in(self._job.acks))

    def run(self, job: Job) -> End:
        self.start(job)
        return self.end()

    def _end_the_last(self) -> None:
        """Kill a child that a failed test did not wait for."""
        if self._child:
            os.kill(self._child, signal.SIGKILL)
            self.end()

    def close(self) -> None:
        self._end_the_last()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()
        self._process.wait()

    def _say(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()


def acks_in(path: str) -> list[str]:
    """What a child acknowledged in whole lines."""
    lines = Path(path).read_text().splitlines() if path else []
    return [line.removeprefix("ACK ") for line in lines]


if __name__ == "__main__":
    _serve()
