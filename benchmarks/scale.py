"""What docs/scale.md says of networks past these machines: its formulas as a table, and the one input that is measured.

python benchmarks/scale.py                    the table, from the formulas alone
python benchmarks/scale.py --measure          tokens for 5 % standard error, on checkpoints of the shipped GPT
"""

import argparse
from pathlib import Path

import numpy as np

GROUPS = 32
RATE = 33e12  # float32 operations a second that a device sustains: half of the 67e12 that its maker names
MEMORY = 80e9  # bytes of a device, half of them for weights and direction
BANDWIDTH = 50e9  # bytes a second into a device from the others
TARGET = 0.05
STUDY = Path(__file__).parent.parent / "data" / "gpt-docs"


def forwards(quantity: str, s: int = GROUPS) -> float:
    """Forward passes of a token; the floors of docs/engine.md without their contraction."""
    return {"gradient": 3, "D2": 4 + s / 2, "D2 + diag D3": 4 + s, "D3": 4 + 2 * s}[quantity]


def operations(parameters: float, quantity: str) -> float:
    """Of a token: a forward pass is a product and a sum a parameter."""
    return 2 * parameters * forwards(quantity)


def devices(parameters: float) -> int:
    """That hold weights and direction in float32 in half of their memory."""
    return int(np.ceil(8 * parameters / (MEMORY / 2)))


def tokens_to_hide(quantity: str, gathers: float = 16) -> float:
    """Tokens of a batch on each device above which gathering costs nothing: ``gathers`` bytes a parameter and batch."""
    return gathers * RATE / (2 * forwards(quantity) * BANDWIDTH)


def tokens_needed(ds, tokens: int, share: float = 0.1) -> np.ndarray:
    """Tokens for a relative standard error of 5 % at each entry of D2 of at least ``share`` of the largest."""
    value, error = np.abs(ds.D2.values), ds.D2_se.values
    matters = value >= share * value.max()
    return tokens * (error[matters] / value[matters] / TARGET) ** 2


def table(tokens: float) -> None:
    print("| parameters | devices | quantity | operations a token | seconds a token, one device | device hours |")
    print("|---|---|---|---|---|---|")
    for parameters, name in ((1e9, "1B"), (100e9, "100B")):
        for quantity in ("gradient", "D2", "D2 + diag D3", "D3"):
            ops = operations(parameters, quantity)
            hours = tokens * ops / RATE / 3600
            print(f"| {name} | {devices(parameters)} | {quantity} | {ops:.2g} | {ops / RATE:.2g} | {hours:.2g} |")
    for quantity in ("D2", "D3"):
        print(f"gathers are hidden above {tokens_to_hide(quantity):.0f} tokens a batch and device for {quantity}")


def measure(batches: int) -> None:
    import hoanalysis as ho
    from hoanalysis.study import StudySpec

    spec = StudySpec.read(STUDY)
    problem, run = spec.problem(), spec.run()
    tokens = sum(int(batch[1].numel()) for batch in problem.batches(batches))
    for position in (0, len(run) // 2, len(run) - 1):
        for direction in ("weights", "gradient"):
            ds = ho.summarize(
                problem, 2, checkpoint=run[position], partition="layer", direction=direction, max_batches=batches,
                self_check=False, progress=False,
            )  # fmt: skip
            needed = tokens_needed(ds, tokens)
            print(
                f"step {run.steps[position]:5}  u = {direction:8}  S = {ds.sizes['group']}  {len(needed)} entries over "
                f"{tokens} tokens: 5 % takes {np.median(needed):.2g} tokens (median), {needed.max():.2g} (worst)",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--batches", type=int, default=16)
    parser.add_argument("--tokens", type=float, default=1e5)
    given = parser.parse_args()
    measure(given.batches) if given.measure else table(given.tokens)


if __name__ == "__main__":
    main()
