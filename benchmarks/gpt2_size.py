"""D2 and the diagonal of D3 of a model of GPT-2-small's size: time and memory, and how they grow with layers and S.

    python benchmarks/gpt2_size.py                                    # all rows
    python benchmarks/gpt2_size.py --layers 2 --rows cost.jsonl       # some; rows that the file has are not run again
    python benchmarks/gpt2_size.py --rows cost.jsonl --seconds 300    # more, begun within so many seconds

The model is `transformers.GPT2LMHeadModel` from a configuration: width 768, 12 heads, vocabulary 50,257, random weights
(124 million parameters with 12 layers), no dropout, eager attention; the batch one sequence of 256 random tokens, the
loss its own cross-entropy of the next token. Each row is measured in a process of its own, and its memory the highest
resident size of that process (VmHWM). Its time is that of a call of `ho.summarize` along a given gradient, without
self-check, after the capture of the graph, and in units of one gradient: the median of three before the call and three
after it. The first call of a process also compares the graph with eager PyTorch; calls that take less than `AGAIN` are
made once more, and the second, which does not, is told beside. In another process `ho.estimate` says
what the row will take. With ``--what counted`` rows are not run: their operations are counted on the graph, and their
time and memory extrapolated from a row of fewer layers.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

LAYERS = (2, 6, 12)
LENGTH = 256
PARTITIONS = ("kind", "block", "layer")  # block: one group a transformer block, and one each for what is around them
QUANTITIES = {"D2": (2, None), "D2 + diag D3": (2, 3)}
AGAIN = 60.0
DONE = {"measured": "seconds", "predicted": "predicted_seconds", "counted": "flops"}  # and what a row has after it


def subject(layers: int, partition: str, quantity: str, memory: str) -> tuple[Any, Callable, dict[str, Any]]:
    """The problem, a call of one gradient, and the order and options of the row."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    import hoanalysis as ho

    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=layers, n_positions=1024, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
        attn_implementation="eager",
    )  # fmt: skip
    model = GPT2LMHeadModel(config).eval()
    tokens = torch.randint(0, config.vocab_size, (1, LENGTH))
    problem = ho.Problem(model, [{"input_ids": tokens, "labels": tokens}], batch_loss=_loss, batch_size=_terms)
    parameters = list(model.parameters())

    def gradient() -> dict[str, Any]:
        found = torch.autograd.grad(_loss(model, problem.first_batch()), parameters)
        return dict(zip([n for n, _ in model.named_parameters()], found, strict=True))

    groups = _blocks(ho, model, layers) if partition == "block" else partition
    order, diagonal = QUANTITIES[quantity]
    return problem, gradient, {"order": order, "partition": groups, "diagonal": diagonal, "memory": memory}


def measured(row: dict[str, Any]) -> dict[str, Any]:
    """One row, in this process."""
    import hoanalysis as ho
    from hoanalysis.derivatives.engines import Tangents, Task
    from hoanalysis.summaries import Settings, Work

    problem, gradient, options = subject(**row)
    u = gradient()
    seconds = [_seconds(gradient) for _ in range(3)]
    before = high_water()
    options |= {"direction": u, "self_check": False}
    work = Work(problem, Settings(**options))
    task = Task(problem, work.state(None), u, work.partition, work.settings.request, work.memory)
    start = time.perf_counter()
    cost = Tangents(task).cost(problem.first_batch())
    captured = time.perf_counter() - start
    order = options.pop("order")

    def call() -> None:
        ho.summarize(problem, order, engine="tangents", progress=False, **options)

    took = _seconds(call)
    again = _seconds(call) if took < AGAIN else None
    high = high_water()
    seconds += [_seconds(gradient) for _ in range(3)]
    return {
        "parameters": sum(p.numel() for p in problem.model.parameters()),
        "S": len(work.partition),
        "gradient_seconds": statistics.median(seconds),
        "capture_seconds": captured,
        "seconds": took,
        "again": again,
        "gradient_bytes": before,
        "bytes": high,
        "flops": cost.flops,
        "sweep_bytes": cost.bytes,
    }


def counted(row: dict[str, Any]) -> dict[str, Any]:
    """The operations and bytes of the sweeps of a row that is not run, from its graph."""
    from hoanalysis.derivatives.engines import Tangents, Task
    from hoanalysis.summaries import Settings, Work

    problem, _, options = subject(**row)
    work = Work(problem, Settings(**options, self_check=False))
    state = work.state(None)
    task = Task(problem, state, state.parameters, work.partition, work.settings.request, work.memory)
    cost = Tangents(task).cost(problem.first_batch())
    parameters = sum(p.numel() for p in problem.model.parameters())
    return {"S": len(work.partition), "parameters": parameters, "flops": cost.flops, "sweep_bytes": cost.bytes}


def predicted(row: dict[str, Any]) -> dict[str, Any]:
    """What `ho.estimate` says of a row, in this process."""
    import hoanalysis as ho

    problem, gradient, options = subject(**row)
    start = time.perf_counter()
    said = ho.estimate(problem, direction=gradient(), self_check=False, engine="tangents", **options)
    return {
        "predicted_seconds": said.lines[0].seconds,
        "predicted_bytes": said.bytes,
        "timed": said.lines[0].timed,
        "estimate_seconds": time.perf_counter() - start,
    }


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _blocks(ho: Any, model: Any, layers: int) -> Any:
    around = {"wte": "transformer.wte.*", "wpe": "transformer.wpe.*", "ln_f": "transformer.ln_f.*"}
    return ho.Partition.by_pattern(model, {f"h.{i}": f"transformer.h.{i}.*" for i in range(layers)} | around)


def _loss(model: Any, batch: dict[str, Any]) -> Any:
    return model(**batch).loss


def _terms(batch: dict[str, Any]) -> int:
    return batch["labels"][:, 1:].numel()


def high_water() -> int:
    """The highest resident size of this process so far, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this system does not tell the highest resident size")


def in_process(what: str, row: dict[str, Any]) -> dict[str, Any]:
    """One of the two in a process of its own; nothing where it failed."""
    given = [sys.executable, __file__, "--what", what, "--row", json.dumps(row)]
    done = subprocess.run(given, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        print(f"{what}, {row}: exit code {done.returncode}", flush=True)
        return {}
    return json.loads(done.stdout.splitlines()[-1])


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table of docs/cost.md."""
    head = [
        "layers",
        "partition",
        "S",
        "quantity",
        "one gradient",
        "first call",
        "second",
        "peak memory",
        "predicted",
        "of the time",
    ]
    head += ["of the memory"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for r in sorted(rows, key=lambda r: (r["layers"], r["S"], r["quantity"])):
        cells = [
            str(r["layers"]), r["partition"], str(r["S"]), r["quantity"],
            f"{r['gradient_seconds']:.2f} s, {r['gradient_bytes'] / 2**30:.1f} GiB",
            f"{r['seconds'] / r['gradient_seconds']:.1f} gradients, {r['seconds']:.1f} s",
            f"{r['again'] / r['gradient_seconds']:.1f} gradients" if r["again"] else "not made",
            f"{r['bytes'] / 2**30:.1f} GiB",
        ]  # fmt: skip
        if "predicted_seconds" in r:
            cells += [
                f"{r['predicted_seconds']:.1f} s" + ("" if r["timed"] else " (scaled)")
                + f", {r['predicted_bytes'] / 2**30:.1f} GiB",
                f"{r['predicted_seconds'] / r['seconds']:.2f}", f"{r['predicted_bytes'] / r['bytes']:.2f}",
            ]  # fmt: skip
        lines.append("| " + " | ".join(cells + ["-"] * (len(head) - len(cells))) + " |")
    return "\n".join(lines) + "\n"


def extrapolated(rows: list[dict[str, Any]]) -> str:
    """Rows that were counted and not run, by the row of the same partition and quantity with the most layers that was:
    seconds in proportion to the operations, memory by the bytes of the sweeps and of four copies of the parameters."""
    lines = ["| layers | partition | S | quantity | time | peak memory | from |", "|---" * 7 + "|"]
    for r in (r for r in rows if "seconds" not in r and "flops" in r):
        same = [m for m in rows if "seconds" in m and all(m[k] == r[k] for k in ("partition", "quantity"))]
        if not same:
            continue
        m = max(same, key=lambda m: m["layers"])
        seconds = m["seconds"] * r["flops"] / m["flops"]
        size = m["bytes"] + r["sweep_bytes"] - m["sweep_bytes"] + 16 * (r["parameters"] - m["parameters"])
        cells = [r["layers"], r["partition"], r["S"], r["quantity"], f"{seconds:.0f} s", f"{size / 2**30:.1f} GiB"]
        lines.append("| " + " | ".join(map(str, [*cells, f"{m['layers']} layers"])) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=list(LAYERS))
    parser.add_argument("--partition", nargs="+", choices=PARTITIONS, default=list(PARTITIONS))
    parser.add_argument("--quantity", nargs="+", choices=QUANTITIES, default=list(QUANTITIES))
    parser.add_argument("--memory", default="14GiB", help="budget of the derivatives of the batch")
    parser.add_argument("--rows", type=Path, help="a file of rows, read before and added to")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no row is begun after so many")
    parser.add_argument("--what", nargs="+", choices=tuple(DONE), default=["measured", "predicted"])
    parser.add_argument("--row", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row:
        print(json.dumps(globals()[args.what[0]](json.loads(args.row))))
        return
    begun, rows = time.perf_counter(), []
    if args.rows and args.rows.exists():
        rows = [json.loads(line) for line in args.rows.read_text().splitlines()]
    names = ("layers", "partition", "quantity", "memory")
    for values in itertools.product(args.layers, args.partition, args.quantity, [args.memory]):
        wanted = dict(zip(names, values, strict=True))
        row = next((r for r in rows if all(r[n] == wanted[n] for n in names)), None)
        if row is None:
            rows.append(row := dict(wanted))
        for what, key in DONE.items():
            if what in args.what and key not in row and time.perf_counter() - begun < args.seconds:
                row |= in_process(what, wanted)
                print(json.dumps(row), flush=True)
                if args.rows:
                    args.rows.write_text("".join(json.dumps(r) + "\n" for r in rows))
    print(markdown([r for r in rows if "seconds" in r]))
    print(extrapolated(rows))


if __name__ == "__main__":
    main()
