"""What a `Recorder` costs: epochs of LeNet-5 on MNIST with it and without, in turns, in one run.

    python benchmarks/recorder.py [--epochs N]

Prints the median share of an epoch that recording takes, with its spread over the pairs of epochs, and the time of one
call beside that of one training step.
"""

import argparse
import statistics
import tempfile
import time

import torch
import torch.nn.functional as F

import hoanalysis as ho
from hoanalysis import data, models


def epoch(model, optimizer, train, recorder) -> tuple[float, float]:
    """Seconds of one epoch, and those within the recorder."""
    within, start = 0.0, time.perf_counter()
    for x, y in train:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        if recorder is not None:
            before = time.perf_counter()
            recorder.step(loss)
            within += time.perf_counter() - before
    return time.perf_counter() - start, within


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20)
    given = parser.parse_args()
    torch.manual_seed(0)
    model, train = models.LeNet5(), data.mnist5k("train", batch_size=100)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    shares, calls, steps = [], [], []
    with tempfile.TemporaryDirectory() as folder, ho.Recorder(model, optimizer, folder) as recorder:
        epoch(model, optimizer, train, recorder)
        for _ in range(given.epochs):
            plain, _ = epoch(model, optimizer, train, None)
            recorded, within = epoch(model, optimizer, train, recorder)
            shares.append(recorded / plain - 1)
            calls.append(within / len(train))
            steps.append(plain / len(train))
    low, _, high = statistics.quantiles(shares, n=4)
    print(f"recording takes {statistics.median(shares):.1%} of an epoch (quartiles {low:.1%} and {high:.1%})")
    call, step = statistics.median(calls), statistics.median(steps)
    print(f"one call {call * 1e3:.3f} ms beside a training step of {step * 1e3:.2f} ms: {call / step:.1%}")


if __name__ == "__main__":
    main()
