"""Predicted against measured, for the shipped studies.

    python benchmarks/estimate.py                                     # whole
    python benchmarks/estimate.py --checkpoints 2 --samples 512       # shortened, where a study takes too long

Each study is estimated in one process and computed in another, into an empty store; the measured time is that of
`hoanalysis.reports.compute` (after the imports), the measured memory the highest resident size of that process (VmHWM).
Where the checkpoints of a study are not shipped, two with the model's initial weights stand for them. With ``--out
NAME`` the table is written to NAME.md.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

DATA = Path(__file__).parents[1] / "data"
STAND_INS = 2


def shortened(study: str, folder: Path, checkpoints: int | None, samples: int | None) -> Any:
    """The study in a folder of its own: its first checkpoints and samples, or initial weights for the former."""
    from safetensors.torch import save_file

    from hoanalysis.study import StudySpec

    spec = StudySpec.read(study)
    shipped = sorted((spec.folder / spec.checkpoints.folder).glob(spec.checkpoints.pattern))
    for path in shipped[:checkpoints]:
        shutil.copy(path, folder)
    if not shipped:
        for step in range(checkpoints or STAND_INS):
            save_file(spec.network().state_dict(), folder / f"step_{step:05d}.safetensors")
    data = spec.data
    if samples is not None:
        cut = {"max_samples": min(samples, data.max_samples or samples)}
        if data.direction_samples is not None:
            cut["direction_samples"] = min(samples, data.direction_samples)
        data = data.model_copy(update=cut)
    where = spec.checkpoints.model_copy(update={"folder": str(folder), "pattern": "*.safetensors", "log": None})
    return spec.model_copy(update={"data": data, "checkpoints": where})


def predicted(spec: Any) -> dict[str, Any]:
    """What `hoanalysis.estimate` says."""
    from hoanalysis.budget import estimate

    start = time.perf_counter()
    found = estimate(spec)
    took, timed = time.perf_counter() - start, all(line.timed for line in found.lines)
    return {"seconds": found.seconds, "bytes": found.bytes, "disk": found.disk, "took": took, "timed": timed}


def measured(spec: Any) -> dict[str, Any]:
    """The study itself, into an empty store."""
    from hoanalysis import summaries  # noqa: F401 - so that the imports are not timed
    from hoanalysis.budget import high_water
    from hoanalysis.reports import Outcome, compute

    with tempfile.TemporaryDirectory() as folder:
        outcome = Outcome(spec.name, Path(folder))
        start = time.perf_counter()
        compute(spec, outcome, progress=False, say=lambda _: None)
        if outcome.error is not None:
            raise outcome.error
        took = time.perf_counter() - start
        units = sum(p.stat().st_size for p in (outcome.folder / "store").rglob("*") if p.is_file())
    return {"seconds": took, "bytes": high_water(), "disk": units, "checkpoints": len(spec.run())}


def in_process(what: str, study: str, given: list[str]) -> dict[str, Any] | str:
    """Run one of the two in a process of its own; what it said last where it failed."""
    command = [sys.executable, __file__, "--what", what, "--study", study, *given]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit code {done.returncode}"
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    studies = sorted(str(p) for name in ("study", "third") for p in DATA.glob(f"*/{name}.toml"))
    parser.add_argument("--study", nargs="+", default=studies)
    parser.add_argument("--checkpoints", type=int, help="no more than so many of each study")
    parser.add_argument("--samples", type=int, help="no more than so many, also for the direction")
    parser.add_argument("--out", type=Path, help="NAME of NAME.md")
    parser.add_argument("--what", choices=("predicted", "measured"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.what:
        with tempfile.TemporaryDirectory() as folder:
            spec = shortened(args.study[0], Path(folder), args.checkpoints, args.samples)
            print(json.dumps(globals()[args.what](spec)))
        return
    given = [f"--{k}={v}" for k, v in (("checkpoints", args.checkpoints), ("samples", args.samples)) if v is not None]
    lines = ["| study | | predicted | measured | ratio |", "|---|---|---|---|---|"]
    for study in args.study:
        found = [in_process(what, study, given) for what in ("predicted", "measured")]
        name = Path(study).parent.name + ("" if Path(study).stem == "study" else f", {Path(study).stem}")
        if any(isinstance(x, str) for x in found):
            print(f"{name}: {next(x for x in found if isinstance(x, str))[:200]}", flush=True)
            continue
        ours, real = found
        name += f", {real['checkpoints']} checkpoints" + ("" if ours["timed"] else ", scaled")  # type: ignore[index]
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
