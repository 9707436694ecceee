"""What a `Recorder` costs: epochs of LeNet-5 on MNIST with it and without, in turns, in one run.

    python benchmarks/recorder.py [--epochs N]

Prints the median share of an epoch that recording takes, with its spread over the pairs of epochs; the same from the
seconds of its calls, slow ones too, within the epoch itself, which a machine whose speed varies does not blur; the time
of one call beside that of one training step, medians over all of them; and in the same loop the least that it could be,
a bare copy of the same bytes into a ring of as many files that are mapped into memory.
"""

import argparse
import ctypes
import itertools
import mmap
import statistics
import tempfile
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

import hoanalysis as ho
from hoanalysis import data, models

RING = 16


def epoch(model, optimizer, train, after: Callable | None) -> tuple[float, list[float], list[float]]:
    """Seconds of one epoch, those of each training step, and those of what is called after each."""
    steps, calls, start = [], [], time.perf_counter()
    for x, y in train:
        begun = time.perf_counter()
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        done = time.perf_counter()
        steps.append(done - begun)
        if after is not None:
            after(loss)
            calls.append(time.perf_counter() - done)
    return time.perf_counter() - start, steps, calls


def bare_copy(tensors: list[torch.Tensor], folder: str) -> Callable:
    """A call that copies these tensors into the next of a ring of mapped files, and does nothing else."""
    sizes = [t.nbytes for t in tensors]
    offsets = [0, *itertools.accumulate(sizes)]
    maps, rings = [], []
    for i in range(RING):
        with open(f"{folder}/{i}", "wb+") as stream:
            stream.truncate(offsets[-1])
            maps.append(mmap.mmap(stream.fileno(), offsets[-1]))
        start = torch.frombuffer(maps[-1], dtype=torch.uint8).data_ptr()
        rings.append([start + o for o in offsets[:-1]])
    turn = itertools.cycle(rings)
    pointers = [t.data_ptr() for t in tensors]

    def copy(_: torch.Tensor) -> None:
        for into, of, n in zip(next(turn), pointers, sizes, strict=True):
            ctypes.memmove(into, of, n)

    copy.maps = maps  # they live as long as the call
    return copy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20)
    given = parser.parse_args()
    torch.manual_seed(0)
    model, train = models.LeNet5(), list(data.mnist5k("train", batch_size=100))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    epoch(model, optimizer, train, None)
    shares, within, plain_steps, calls, copies = [], [], [], [], []
    with (
        tempfile.TemporaryDirectory() as folder,
        tempfile.TemporaryDirectory() as other,
        ho.Recorder(model, optimizer, folder, ring=RING) as recorder,
    ):
        momenta = [optimizer.state[p]["momentum_buffer"] for p in model.parameters()]
        copy = bare_copy([*model.parameters(), *momenta], other)
        epoch(model, optimizer, train, recorder.step)
        epoch(model, optimizer, train, copy)
        for _ in range(given.epochs):
            plain, steps, _ = epoch(model, optimizer, train, None)
            recorded, _, recording = epoch(model, optimizer, train, recorder.step)
            _, _, copying = epoch(model, optimizer, train, copy)
            shares.append(recorded / plain - 1)
            within.append(sum(recording) / (recorded - sum(recording)))
            plain_steps += steps
            calls += recording
            copies += copying
    low, _, high = statistics.quantiles(shares, n=4)
    print(f"recording takes {statistics.median(shares):.1%} of an epoch (quartiles {low:.1%} and {high:.1%})")
    low, middle, high = statistics.quantiles(within, n=4)
    print(f"its calls take {middle:.2%} of the rest of the same epoch (quartiles {low:.2%} and {high:.2%})")
    step, call, least = map(statistics.median, (plain_steps, calls, copies))
    print(f"one call {call * 1e6:.0f} us beside a training step of {step * 1e3:.2f} ms: {call / step:.2%}")
    print(f"a bare copy of the same bytes {least * 1e6:.0f} us: {least / step:.2%}")


if __name__ == "__main__":
    main()
