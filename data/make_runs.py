"""Train the shipped runs: ``python data/make_runs.py lenet5-mnist`` (or ``gpt-docs``, or ``all``).

A run is a folder beside this file: checkpoints ``step_00000.safetensors`` (the initial weights), ... named by optimizer
step, the training log ``log.csv``, and ``study.toml``, which says how to analyse it. Everything is seeded and
uses one thread; another version of PyTorch or another processor may still give other last digits.

To add a run, write a function that takes its folder, and enter it in ``RUNS``.
"""

import argparse
import csv
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
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


RUNS: dict[str, Callable[[Path], None]] = {
    "lenet5-mnist": lenet5_mnist,
    "gpt-docs": gpt_docs,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", choices=[*RUNS, "all"])
    chosen = parser.parse_args().run
    torch.set_num_threads(1)
    for name in RUNS if chosen == "all" else [chosen]:
        print(f"{name}:")
        fresh(HERE / name)
        RUNS[name](HERE / name)


if __name__ == "__main__":
    main()
