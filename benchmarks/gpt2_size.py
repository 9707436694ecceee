"""D2 and the diagonal of D3 of a model of GPT-2-small's size: time and memory, and how they grow with layers and S.

    python benchmarks/gpt2_size.py                     # all rows
    python benchmarks/gpt2_size.py --layers 2 --out cost

The model is `transformers.GPT2LMHeadModel` from a configuration: width 768, 12 heads, vocabulary 50,257, random weights
(124 million parameters with 12 layers), no dropout, eager attention; the batch one sequence of 256 random tokens, the
loss its own cross-entropy of the next token. Each row is a process of its own, and its memory the highest resident size
of that process (VmHWM). One gradient is measured before, in the same process; the time is that of a call of
`ho.summarize` along a given gradient, without self-check, after the capture of the graph, in units of it; predicted is
what the engine's planner says. With ``--out NAME`` the table is written to NAME.md as well.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

LAYERS = (2, 6, 12)
LENGTH = 256
PARTITIONS = ("kind", "block", "layer")  # block: one group a transformer block, and one each for what is around them
QUANTITIES = {"D2": (2, None), "D2 + diag D3": (2, 3)}


def row(layers: int, partition: str, quantity: str, memory: str) -> dict[str, Any]:
    """One measurement, in this process."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    import hoanalysis as ho
    from hoanalysis.derivatives.engines import Tangents, Task
    from hoanalysis.summaries import Settings, Work

    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=layers, n_positions=1024, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
        attn_implementation="eager",
    )  # fmt: skip
    model = GPT2LMHeadModel(config).eval()
    tokens = torch.randint(0, config.vocab_size, (1, LENGTH))
    problem = ho.Problem(model, [{"input_ids": tokens, "labels": tokens}], batch_loss=_loss, batch_size=_terms)
    parameters = list(model.parameters())
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        gradient = torch.autograd.grad(_loss(model, {"input_ids": tokens, "labels": tokens}), parameters)
        seconds.append(time.perf_counter() - start)
    u = dict(zip([n for n, _ in model.named_parameters()], gradient, strict=True))
    del gradient
    before = high_water()
    groups = _blocks(ho, model, layers) if partition == "block" else partition
    order, diagonal = QUANTITIES[quantity]
    options = {"direction": u, "partition": groups, "diagonal": diagonal, "memory": memory, "self_check": False}
    work = Work(problem, Settings(order=order, **options))
    start = time.perf_counter()
    task = Task(problem, work.state(None), u, work.partition, work.settings.request, work.memory)
    cost = Tangents(task).cost(problem.first_batch())
    captured = time.perf_counter() - start
    start = time.perf_counter()
    ds = ho.summarize(problem, order, engine="tangents", progress=False, **options)
    took = time.perf_counter() - start
    return {
        "layers": layers,
        "parameters": sum(p.numel() for p in parameters),
        "partition": partition,
        "S": ds.sizes["group"],
        "quantity": quantity,
        "gradient_seconds": statistics.median(seconds[1:]),
        "capture_seconds": captured,
        "seconds": took,
        "gradient_bytes": before,
        "bytes": high_water(),
        "predicted_gradients": cost.gradients,
        "predicted_bytes": cost.bytes,
    }


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


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table of docs/cost.md."""
    head = ["layers", "parameters", "partition", "S", "quantity", "one gradient", "time", "peak memory"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for r in rows:
        cells = [
            str(r["layers"]), f"{r['parameters'] / 1e6:.0f} million", r["partition"], str(r["S"]), r["quantity"],
            f"{r['gradient_seconds']:.2f} s, {r['gradient_bytes'] / 2**30:.1f} GiB",
            f"{r['seconds'] / r['gradient_seconds']:.1f} gradients, {r['seconds']:.1f} s",
            f"{r['bytes'] / 2**30:.1f} GiB",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=list(LAYERS))
    parser.add_argument("--partition", nargs="+", choices=PARTITIONS, default=list(PARTITIONS))
    parser.add_argument("--quantity", nargs="+", choices=QUANTITIES, default=list(QUANTITIES))
    parser.add_argument("--memory", default="14GiB", help="budget of the derivatives of the batch")
    parser.add_argument("--out", type=Path, help="NAME of NAME.md")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row:
        print(json.dumps(row(**json.loads(args.row))))
        return
    rows = []
    for layers in args.layers:
        for partition in args.partition:
            for quantity in args.quantity:
                wanted = {"layers": layers, "partition": partition, "quantity": quantity, "memory": args.memory}
                done = subprocess.run(
                    [sys.executable, __file__, "--row", json.dumps(wanted)], stdout=subprocess.PIPE, text=True
                )
                if done.returncode:
                    print(f"{wanted}: exit code {done.returncode}", flush=True)
                    continue
                rows.append(json.loads(done.stdout.splitlines()[-1]))
                print(json.dumps(rows[-1]), flush=True)
    print(markdown(rows))
    if args.out:
        args.out.with_suffix(".md").write_text(markdown(rows))


if __name__ == "__main__":
    main()
