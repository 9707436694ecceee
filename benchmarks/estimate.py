"""Predicted against measured, for the shipped studies: python benchmarks/estimate.py

Each study is estimated in one process and computed in another, into an empty store; the measured time is that of
`hoanalysis.reports.compute` (after the imports), the measured memory the highest resident size of that process (VmHWM).
Studies whose checkpoints are not shipped are named and left out. With ``--out NAME`` the table is written to NAME.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

DATA = Path(__file__).parents[1] / "data"


def predicted(study: str) -> dict[str, float]:
    """What `hoanalysis.estimate` says."""
    from hoanalysis.budget import estimate

    start = time.perf_counter()
    found = estimate(study)
    return {"seconds": found.seconds, "bytes": found.bytes, "disk": found.disk, "took": time.perf_counter() - start}


def measured(study: str) -> dict[str, float]:
    """The study itself, into an empty store."""
    from hoanalysis import summaries  # noqa: F401 - so that the imports are not timed
    from hoanalysis.budget import high_water
    from hoanalysis.reports import Outcome, compute
    from hoanalysis.study import StudySpec

    with tempfile.TemporaryDirectory() as folder:
        spec = StudySpec.read(study)
        outcome = Outcome(spec.name, Path(folder))
        start = time.perf_counter()
        compute(spec, outcome, progress=False, say=lambda _: None)
        if outcome.error is not None:
            raise outcome.error
        took = time.perf_counter() - start
        units = sum(p.stat().st_size for p in (outcome.folder / "store").rglob("*") if p.is_file())
    return {"seconds": took, "bytes": high_water(), "disk": units}


def in_process(what: str, study: str) -> dict[str, float] | str:
    """Run one of the two in a process of its own; what it said last where it failed."""
    done = subprocess.run([sys.executable, __file__, "--what", what, "--study", study], capture_output=True, text=True)
    if done.returncode:
        return done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit code {done.returncode}"
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", nargs="+", default=sorted(str(p) for p in DATA.glob("*/study*.toml")))
    parser.add_argument("--out", type=Path, help="NAME of NAME.md")
    parser.add_argument("--what", choices=("predicted", "measured"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.what:
        print(json.dumps(globals()[args.what](args.study[0])))
        return
    lines = ["| study | | predicted | measured | ratio |", "|---|---|---|---|---|"]
    for study in args.study:
        found = [in_process(what, study) for what in ("predicted", "measured")]
        name = Path(study).parent.name
        if any(isinstance(x, str) for x in found):
            print(f"{name}: {next(x for x in found if isinstance(x, str))[:200]}", flush=True)
            continue
        ours, real = found
        for key, unit, scale in (("seconds", "s", 1.0), ("bytes", "MiB", 2.0**20), ("disk", "MiB", 2.0**20)):
            a, b = ours[key] / scale, real[key] / scale  # type: ignore[index]
            what = {"seconds": "time", "bytes": "peak memory"}.get(key, key)
            lines.append(f"| {name} | {what} | {a:.3g} {unit} | {b:.3g} {unit} | {a / b:.2f} |")
            print(lines[-1], flush=True)
    print("\n".join(lines))
    if args.out:
        args.out.with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
