"""Train the shipped runs: ``python data/make_runs.py all``, or one of them by name: ``lenet5-mnist``, ...

``python data/make_runs.py cifar10`` trains the runs of the paper's figures on CIFAR-10, which has to be there in its
official binary layout, ``data/cifar-10-batches-bin``. It goes on where it was stopped and leaves finished runs alone.

``python data/make_runs.py practice --out FOLDER`` trains ten runs to practise on, five with one planted fault each and
five healthy ones, which are not shipped: each is a folder of 55 checkpoints with a log and a study (14 MB a run).

A run is a folder beside this file: checkpoints ``step_00000.safetensors`` (the initial weights), ... named by optimizer
step, the training log ``log.csv``, and ``study.toml``, which says how to analyse it. Everything is seeded and
uses one thread; another version of PyTorch or another processor may still give other last digits.

To add a run, write a function that takes its folder, and enter it in ``RUNS``.
"""

import argparse
import csv
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hoanalysis import data, models

HERE = Path(__file__).parent


def shuffled(batches: data.Batches, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch in a fresh order."""
    order = torch.randperm(batches.n_samples, generator=torch.Generator().manual_seed(seed))
    for index in order.split(batches.batch_size):
        yield batches.x[index], batches.y[index]


def save(
    folder: Path,
    step: int,
    model: nn.Module,
    facts: Mapping[str, object],
    optimizer: torch.optim.Optimizer | None = None,
) -> None:
    """Write the model and, where given, the optimizer's state as tensors ``optimizer.<state>.<parameter>``."""
    tensors = {name: value.detach().clone() for name, value in model.state_dict().items()}
    if optimizer is not None:
        for name, parameter in model.named_parameters():
            for state, value in optimizer.state[parameter].items():
                tensors[f"optimizer.{state}.{name}"] = torch.as_tensor(value).clone()
    path = folder / f"step_{step:05d}.safetensors"
    # one entry only: save_file writes several in a random order, and the same run would give other bytes
    save_file(tensors, path, metadata={"training": json.dumps({"step": step, **facts})})
    path.chmod(0o644)


def fresh(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for old in folder.glob("step_*.safetensors"):
        old.unlink()


def write_log(folder: Path, rows: list[dict[str, object]]) -> None:
    with (folder / "log.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


@torch.no_grad()
def evaluate(model: nn.Module, batches: data.Batches, loss: Callable[[Tensor, Tensor], Tensor]) -> tuple[float, float]:
    """The mean loss and the share of right predictions (classes on the last axis of the output)."""
    total, right, targets = 0.0, 0, 0
    for x, y in batches:
        output = model(x)
        total += loss(output, y).item() * len(x)
        right += int((output.argmax(-1) == y).sum())
        targets += y.numel()
    return total / batches.n_samples, right / targets


def lenet5_mnist(folder: Path) -> None:
    """LeNet-5 on 4,000 MNIST images by SGD with momentum at a constant rate; one checkpoint an epoch of 40 steps."""
    epochs, rate = 12, 0.02
    torch.manual_seed(0)
    model = models.LeNet5()
    train, test = data.mnist5k("train", batch_size=100), data.mnist5k("test", batch_size=500)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    rows, step = [], 0

    def record(epoch: int) -> None:
        (loss, _), (test_loss, accuracy) = (evaluate(model, batches, F.cross_entropy) for batches in (train, test))
        row = {
            "step": step,
            "epoch": epoch,
            "loss": f"{loss:.6g}",
            "learning_rate": rate,
            "test_loss": f"{test_loss:.6g}",
            "test_accuracy": f"{accuracy:.4f}",
        }
        print(row, flush=True)
        rows.append(row)
        save(folder, step, model, {"epoch": epoch})

    record(0)
    for epoch in range(1, epochs + 1):
        for x, y in shuffled(train, seed=epoch):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            step += 1
        record(epoch)
    write_log(folder, rows)


def unigram_entropy(train: data.Batches) -> float:
    """The entropy, in nats, of the frequencies of the single characters: what a model without context can reach."""
    share = train.y.flatten().bincount().double() / train.y.numel()
    return float(-(share * share.log()).nansum())


def gpt_docs(folder: Path) -> None:
    """A two-block character GPT on the standard library's help text by AdamW; its state is in all checkpoints but one.

    The learning rate rises over 50 steps and then stays. The log's losses are over 512 windows of the training text and
    over all windows of the test text.
    """
    checkpoints, rate, warmup = (0, 50, 150, 300, 600, 1000, 1500, 2000), 3e-3, 50
    torch.manual_seed(0)
    model = models.GPT(vocab_size=len(data.vocabulary()), context=64, n_layer=2, n_head=4, width=48)
    train, test = (data.text(split=split, context=64, batch_size=32) for split in ("train", "test"))
    settings = {"lr": rate, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
    optimizer = torch.optim.AdamW(model.parameters(), **settings)  # type: ignore[arg-type]
    facts = {
        "optimizer": {"name": "AdamW", **settings},
        "text_sha256": data.text_sha256(),
        "unigram_entropy": unigram_entropy(train),
    }
    rows, step, epoch = [], 0, 0

    def record() -> None:
        loss, _ = evaluate(model, train.take(512), models.cross_entropy_tokens)
        test_loss, accuracy = evaluate(model, test, models.cross_entropy_tokens)
        rows.append(
            {
                "step": step,
                "epoch": f"{step / len(train):.3f}",
                "loss": f"{loss:.6g}",
                "learning_rate": f"{rate * min(1, step / warmup):.6g}",
                "test_loss": f"{test_loss:.6g}",
                "test_accuracy": f"{accuracy:.4f}",
            }
        )
        print(rows[-1], flush=True)
        if step in checkpoints:
            save(folder, step, model, facts, optimizer if step else None)

    record()
    while step < checkpoints[-1]:
        epoch += 1
        for x, y in shuffled(train, seed=epoch):
            step += 1
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1, step / warmup)
            optimizer.zero_grad()
            models.cross_entropy_tokens(model(x), y).backward()
            optimizer.step()
            if step % 50 == 0:
                record()
            if step == checkpoints[-1]:
                break
    print(f"unigram entropy {facts['unigram_entropy']:.4f} nats")
    write_log(folder, rows)


def lenet5_mnist_diverged(folder: Path) -> None:
    """A half-width tanh LeNet-5 whose learning rate is raised tenfold at step 120, where it should have been lowered.

    Sixteen consecutive single-step checkpoints across the break, 114 to 129, beside one every 40 steps. Half the width
    (15,738 parameters, 64 kB) keeps 21 checkpoints as small as five of the whole network.
    """
    rate, breaks_at, last = 0.05, 120, 200
    kept = {*range(0, last + 1, 40), *range(breaks_at - 6, breaks_at + 10)}
    torch.manual_seed(0)
    model = models.LeNet5(activation="tanh", width=0.5)
    train, test = data.mnist5k("train", batch_size=100), data.mnist5k("test", batch_size=500)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    rows, step = [], 0

    def record() -> None:
        (loss, _), (test_loss, accuracy) = (evaluate(model, batches, F.cross_entropy) for batches in (train, test))
        rows.append(
            {
                "step": step,
                "epoch": f"{step / len(train):.3f}",
                "loss": f"{loss:.6g}",
                "learning_rate": optimizer.param_groups[0]["lr"],
                "test_loss": f"{test_loss:.6g}",
                "test_accuracy": f"{accuracy:.4f}",
            }
        )
        print(rows[-1], flush=True)
        save(folder, step, model, {})

    record()
    for epoch in range(last // len(train)):
        for x, y in shuffled(train, seed=epoch):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            step += 1
            if step == breaks_at:
                optimizer.param_groups[0]["lr"] = 10 * rate
            if step in kept:
                record()
    write_log(folder, rows)


# ---- the paper's figures on CIFAR-10: only lenet5-cifar10 ships its checkpoints, the others their summaries ----------


@dataclass(frozen=True)
class CifarRun:
    """A network on the 50,000 training images of CIFAR-10 by plain SGD: no momentum, no weight decay, no augmentation.

    ``kept``: the epochs whose checkpoints stay. Batches of 125 make an epoch of 400 steps: epoch k is step 400 k.
    """

    model: Callable[[], nn.Module]
    kept: tuple[int, ...]
    rate: float
    seed: int = 0
    batch_size: int = 125


LENET5_KEPT = (0, 1, 2, 3, 6, 11, 16, 21)


def lenet5(activation: str = "relu") -> nn.Module:
    return models.LeNet5(in_channels=3, activation=activation)


# Of the rates 0.01, 0.02, 0.05 and 0.1, tried for two epochs, 0.1 had the lowest loss for LeNet-5 with ReLU and with
# tanh; half of it leaves room for 21 epochs at a constant rate.
CIFAR_RUNS: dict[str, CifarRun] = {
    "vgg11-cifar10": CifarRun(models.VGG11Prime, tuple(range(7)), rate=0.02),
    "lenet5-cifar10": CifarRun(lenet5, LENET5_KEPT, rate=0.05),
    "lenet5-cifar10-seed1": CifarRun(lenet5, LENET5_KEPT, rate=0.05, seed=1),
    "lenet5-cifar10-seed2": CifarRun(lenet5, LENET5_KEPT, rate=0.05, seed=2),
    "lenet5-cifar10-tanh": CifarRun(partial(lenet5, "tanh"), LENET5_KEPT, rate=0.05),
}
LOGGED = 5_000  # training images behind the log's loss: a pass over all of them is a third of an epoch


def read_log(folder: Path, last_step: int) -> list[dict[str, object]]:
    """The log's rows up to a step, to go on from there."""
    with (folder / "log.csv").open(newline="") as stream:
        return [dict(row) for row in csv.DictReader(stream) if int(row["step"]) <= last_step]


def cifar_run(folder: Path, run: CifarRun) -> None:
    """Train, or go on from the last checkpoint in ``folder``: plain SGD has no other state."""
    train, test = (data.cifar10(HERE, split, batch_size=run.batch_size) for split in ("train", "test"))
    torch.manual_seed(run.seed)
    model = run.model()
    done = sorted(folder.glob("step_*.safetensors"))
    start = int(done[-1].stem.removeprefix("step_")) // len(train) if done else -1
    rows: list[dict[str, object]] = read_log(folder, start * len(train)) if done else []
    if done:
        model.load_state_dict(load_file(done[-1]))
    optimizer = torch.optim.SGD(model.parameters(), lr=run.rate)

    def record(epoch: int) -> None:
        loss, accuracy = evaluate(model, train.take(LOGGED), F.cross_entropy)
        test_loss, test_accuracy = evaluate(model, test, F.cross_entropy)
        row = {
            "step": epoch * len(train),
            "epoch": epoch,
            "loss": f"{loss:.6g}",
            "learning_rate": run.rate,
            "accuracy": f"{accuracy:.4f}",
            "test_loss": f"{test_loss:.6g}",
            "test_accuracy": f"{test_accuracy:.4f}",
        }
        print(folder.name, row, flush=True)
        rows.append(row)
        # the log first: a checkpoint without its row would be taken as finished
        write_log(folder, rows)
        if epoch in run.kept:
            save(folder, epoch * len(train), model, {"epoch": epoch})

    for epoch in range(start + 1, run.kept[-1] + 1):
        if epoch > 0:
            for x, y in shuffled(train, seed=1000 * run.seed + epoch):
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
        record(epoch)


# ---- runs to practise on: not shipped, trained where they are wanted ------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """What is wrong with a run from the start of ``epoch`` on.

    ``kind``: "rate", the learning rate of ``tensor`` times ``factor``; "labels", the training labels shuffled;
    "momentum", the coefficient is ``factor``; "decay", the weight decay times ``factor``; "" for nothing.
    """

    kind: str = ""
    factor: float = 1.0
    tensor: str = ""
    epoch: int = 2


HEALTHY = Fault()
FAULTS: dict[str, Fault] = {
    "rate-x30": Fault("rate", 30.0, "conv2.weight"),
    "rate-x0": Fault("rate", 0.0, "fc1.weight"),
    "labels": Fault("labels"),
    "momentum": Fault("momentum", 1.05),
    "decay-x100": Fault("decay", 100.0),
}
SEEDS = range(5)
EPOCH, EPOCHS, BURST = 40, 6, 8  # steps in an epoch, epochs, single steps kept at the start of each epoch

STUDY = """# {title}; consecutive single steps at the start of every epoch, named by optimizer step.

[model]
factory = "hoanalysis.models:LeNet5"
args = {{ activation = "{activation}" }}

[data]
factory = "hoanalysis.data:mnist5k"
args = {{ split = "train" }}
batch_size = 32
max_samples = 512

[checkpoints]
log = "log.csv"

[summaries]
order = 3
directions = ["gradient", "to:next", "weights"]
keep_batches = 16
measure = ["along", "path"]
"""


def practice(
    folder: Path,
    fault: Fault = HEALTHY,
    seed: int = 0,
    activation: str = "tanh",
    rate: float = 0.05,
    adam: bool = False,
) -> None:
    """A LeNet-5 on 4,000 MNIST images by SGD (momentum 0.9, weight decay 5e-4) with one fault, six epochs of 40 steps.

    ``adam``: by AdamW instead, with PyTorch's own settings but for the rate.

    Kept are the first nine checkpoints of each epoch, which are eight consecutive single steps, and the last. A run
    whose weights overflow ends there. The log's losses are over the first 1,000 training images.
    """
    torch.manual_seed(seed)
    model = models.LeNet5(activation=activation)
    train = data.mnist5k("train", batch_size=100)
    order = torch.randperm(train.n_samples, generator=torch.Generator().manual_seed(seed))
    mislabelled = data.Batches(train.x, train.y[order], train.batch_size)
    groups = [{"params": [p], "name": n} for n, p in model.named_parameters()]
    optimizer: torch.optim.Optimizer = torch.optim.SGD(groups, lr=rate, momentum=0.9, weight_decay=5e-4)
    if adam:
        optimizer = torch.optim.AdamW(groups, lr=rate)
    rows: list[dict[str, object]] = []
    step = 0

    def record() -> None:
        loss, _ = evaluate(model, train.take(1000), F.cross_entropy)
        rows.append({"step": step, "loss": f"{loss:.6g}", "learning_rate": rate})
        save(folder, step, model, {})

    (folder / "study.toml").write_text(STUDY.format(title=f"{activation} LeNet-5, {fault}", activation=activation))
    record()
    for epoch in range(EPOCHS):
        if epoch == fault.epoch:
            plant(optimizer, fault)
        seen = mislabelled if fault.kind == "labels" and epoch >= fault.epoch else train
        for x, y in shuffled(seen, seed=1000 * (seed + 1) + epoch):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            step += 1
            if not all(bool(p.isfinite().all()) for p in model.parameters()):
                return write_log(folder, rows)
            if step % EPOCH <= BURST or step == EPOCHS * EPOCH:
                record()
    write_log(folder, rows)


def plant(optimizer: torch.optim.Optimizer, fault: Fault) -> None:
    for group in optimizer.param_groups:
        if fault.kind == "rate" and group["name"] == fault.tensor:
            group["lr"] *= fault.factor
        elif fault.kind == "momentum":
            group["momentum"] = fault.factor
        elif fault.kind == "decay":
            group["weight_decay"] *= fault.factor


def practice_runs(out: Path) -> None:
    """The five planted faults (seed 0) and five healthy seeds."""
    runs = {name: (fault, 0) for name, fault in FAULTS.items()} | {f"healthy-{s}": (HEALTHY, s) for s in SEEDS}
    for name, (fault, seed) in runs.items():
        (out / name).mkdir(parents=True, exist_ok=True)
        fresh(out / name)
        practice(out / name, fault, seed)
        print(f"{name}: {out / name}", flush=True)


RUNS: dict[str, Callable[[Path], None]] = {
    "lenet5-mnist": lenet5_mnist,
    "gpt-docs": gpt_docs,
    "lenet5-mnist-diverged": lenet5_mnist_diverged,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", choices=[*RUNS, "all", *CIFAR_RUNS, "cifar10", "practice"])
    parser.add_argument("--out", type=Path, help="the folder of the practice runs")
    parser.add_argument("--threads", type=int, default=1, help="threads of the runs on CIFAR-10")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.run == "cifar10" or given.run in CIFAR_RUNS:
        torch.set_num_threads(given.threads)
        for name in CIFAR_RUNS if given.run == "cifar10" else [given.run]:
            (HERE / name).mkdir(exist_ok=True)
            cifar_run(HERE / name, CIFAR_RUNS[name])
        return
    if given.run == "practice":
        if given.out is None:
            parser.error("practice runs are not shipped: say where they go with --out FOLDER")
        practice_runs(given.out)
        return
    for name in RUNS if given.run == "all" else [given.run]:
        print(f"{name}:")
        fresh(HERE / name)
        RUNS[name](HERE / name)


if __name__ == "__main__":
    main()
