"""Image data sets, on small files in the layouts they are really distributed in."""

from __future__ import annotations

import io
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from _data import load_data
from helpers import save_tiny, smoke_request
from PIL import Image
from scipy.io import savemat

from fedbench.data.formats.images import ImageSource
from fedbench.data.image_files import ImageFiles
from fedbench.data.rows import RawData
from fedbench.data.sets import images as sets
from fedbench.data.sources import HubState
from fedbench.errors import FedbenchError
from fedbench.run.prepare import prepare
from fedbench.run.run import run
from fedbench.scenario.tables import DatasetSettings, PublicSettings

CIFAR10 = DatasetSettings(name="cifar10", validation=10)


def images(n: int, seed: int, size: int = 32) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, size, size, 3), dtype=np.uint8)


def png(image: np.ndarray, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, kind)
    return buffer.getvalue()


def batch(rows: np.ndarray, labels: list[int], key: bytes) -> bytes:
    """A batch as CIFAR's authors pickled it: byte strings for keys, channels first, numpy's old module names."""
    flat = rows.transpose(0, 3, 1, 2).reshape(len(rows), 3072)
    names = [f"{i}.png".encode() for i in range(len(rows))]
    content = pickle.dumps({b"data": flat, key: labels, b"filenames": names}, protocol=2)
    return content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


def cifar10(folder: Path) -> Path:
    """Five batches of six rows, and a test batch of ten."""
    folder.mkdir(parents=True)
    for i in range(5):
        labels = [(6 * i + k) % 10 for k in range(6)]
        (folder / f"data_batch_{i + 1}").write_bytes(batch(images(6, i), labels, b"labels"))
    (folder / "test_batch").write_bytes(batch(images(10, 9), [*range(10)], b"labels"))
    return folder


def archive(folder: Path, path: Path, inside: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as file:
        file.add(folder, inside)
    return path


def rows_of(data: RawData) -> np.ndarray:
    assert isinstance(data.train.images, np.ndarray)
    return data.train.images


def test_cifar10_unpacked(tmp_path: Path) -> None:
    cifar10(tmp_path / "cifar-10-batches-py")
    data = load_data(CIFAR10, None, tmp_path)
    assert (len(data.train), len(data.validation), len(data.test)) == (20, 10, 10)
    assert rows_of(data).dtype == np.uint8
    assert rows_of(data).shape == (20, 32, 32, 3)
    assert np.array_equal(data.test.images, images(10, 9)), "channels last, rows in order"  # type: ignore[arg-type]
    assert data.test.labels.tolist() == [*range(10)]
    assert data.class_names[3] == "cat"
    assert any("python version, 30 and 10 images" in note for note in data.notes)


@pytest.mark.parametrize(
    "place", ["cifar-10-python.tar.gz", "cifar10/cifar-10-python.tar.gz", "CIFAR10/cifar-10-batches-py"]
)
def test_the_archive_and_other_places_hold_the_same(tmp_path: Path, place: str) -> None:
    unpacked = cifar10(tmp_path / "a" / "cifar-10-batches-py")
    expected = load_data(CIFAR10, None, tmp_path / "a").content_hash
    target = tmp_path / "b" / place
    if place.endswith("gz"):
        archive(unpacked, target, "cifar-10-batches-py")
    else:
        cifar10(target)
    assert load_data(CIFAR10, None, tmp_path / "b").content_hash == expected


def test_parquet_holds_the_same(tmp_path: Path) -> None:
    cifar10(tmp_path / "a" / "cifar-10-batches-py")
    expected = load_data(CIFAR10, None, tmp_path / "a").content_hash
    folder = tmp_path / "b" / "cifar10" / "plain_text"
    folder.mkdir(parents=True)
    train = np.concatenate([images(6, i) for i in range(5)])
    for name, rows in (("train-00000-of-00002", train[:17]), ("train-00001-of-00002", train[17:])):
        start = 0 if "00000-" in name else 17
        table = {
            "img": [{"bytes": png(r), "path": None} for r in rows],
            "label": [(start + i) % 10 for i in range(len(rows))],
        }
        pd.DataFrame(table).to_parquet(folder / f"{name}.parquet")
    table = {"img": [{"bytes": png(r), "path": None} for r in images(10, 9)], "label": [*range(10)]}
    pd.DataFrame(table).to_parquet(folder / "test-00000-of-00001.parquet")
    assert load_data(CIFAR10, None, tmp_path / "b").content_hash == expected
    pd.DataFrame({"img": [], "target": []}).to_parquet(folder / "test-00000-of-00001.parquet")
    with pytest.raises(FedbenchError, match="unknown layout, columns img, target; needs img or image and label"):
        load_data(CIFAR10, None, tmp_path / "b")
    (folder / "test-00000-of-00001.parquet").unlink()
    with pytest.raises(FedbenchError, match="no test file"):
        load_data(CIFAR10, None, tmp_path / "b")


def test_the_hub_holds_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    cifar10(tmp_path / "cifar-10-batches-py")
    expected = load_data(CIFAR10, None, tmp_path).content_hash
    features = datasets.Features(img=datasets.Image(), label=datasets.ClassLabel(names=[*"0123456789"]))
    train = np.concatenate([images(6, i) for i in range(5)])
    splits = {
        split: datasets.Dataset.from_dict(
            {"img": [{"bytes": png(r), "path": None} for r in rows], "label": [i % 10 for i in range(len(rows))]},
            features=features,
        )
        for split, rows in (("train", train), ("test", images(10, 9)))
    }
    asked: list[tuple[object, ...]] = []

    def load_dataset(name: str, configuration: str | None, revision: str) -> datasets.DatasetDict:
        asked.append((name, revision))
        return datasets.DatasetDict(splits)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("fedbench.data.sources.hub_state", lambda: HubState(True, ""))
    assert load_data(CIFAR10, None, None).content_hash == expected
    assert isinstance(sets.CIFAR10.source, ImageSource) and sets.CIFAR10.source.hub
    assert asked == [sets.CIFAR10.source.hub[:2]]
    assert len(asked[0][1]) == 40  # type: ignore[arg-type]
    with pytest.raises(FedbenchError, match="has the splits train, test, train and validation are needed"):
        load_data(DatasetSettings(name="flowers102", validation=10), None, None)


def test_image_folders_go_by_class_name_or_number(tmp_path: Path) -> None:
    found = []
    for root, names in (("named", sets.CIFAR10.classes), ("numbered", [f"{i:02}" for i in range(1, 11)])):
        for part, each in (("train", 3), ("test", 1)):
            for label, name in enumerate(names):
                folder = tmp_path / root / "cifar10" / part / name
                folder.mkdir(parents=True)
                for i in range(each):
                    (folder / f"{i}.png").write_bytes(png(images(1, 10 * label + i)[0]))
                (folder / "Thumbs.db").write_bytes(b"no image")
        found.append(load_data(CIFAR10, None, tmp_path / root))
    assert found[0].content_hash == found[1].content_hash
    assert (len(found[0].train), len(found[0].validation), len(found[0].test)) == (20, 10, 10)
    assert np.array_equal(found[0].test.images[7], images(1, 70)[0])  # type: ignore[index]
    (tmp_path / "named" / "cifar10" / "train" / "dog").rename(tmp_path / "named" / "cifar10" / "train" / "hound")
    with pytest.raises(FedbenchError, match="its 10 folders are not the 10 classes, 'dog' is missing"):
        load_data(CIFAR10, None, tmp_path / "named")


def image_folders(root: Path, name: Callable[[int], str] = lambda i: f"{i}.png") -> Path:
    """CIFAR-10 with three training images and one test image a class."""
    for part, each in (("train", 3), ("test", 1)):
        for label, called in enumerate(sets.CIFAR10.classes):
            for i in range(each):
                path = root / "cifar10" / part / called / name(i)
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(images(1, 10 * label + i)[0]).save(path, lossless=True)
    return root / "cifar10"


def test_image_folders_of_other_formats_and_folders_in_them_hold_the_same(tmp_path: Path) -> None:
    image_folders(tmp_path / "a")
    expected = load_data(CIFAR10, None, tmp_path / "a")
    image_folders(tmp_path / "b", lambda i: ("0.webp", "1.BMP", "2.tiff")[i])
    assert load_data(CIFAR10, None, tmp_path / "b").content_hash == expected.content_hash
    image_folders(tmp_path / "c", lambda i: ("0.PNG", "1/images/x.ppm", "2.PNG")[i])
    found = load_data(CIFAR10, None, tmp_path / "c")
    assert (len(found.train), len(found.validation)) == (20, 10)
    # In the order of their paths, in which `1/` comes between `0.PNG` and `2.PNG`.
    assert found.content_hash == expected.content_hash
    assert not any("left out" in note for note in found.notes)


def test_files_that_are_left_out_of_image_folders_are_counted(tmp_path: Path) -> None:
    folder = image_folders(tmp_path)
    before = load_data(CIFAR10, None, tmp_path).content_hash
    for name in ("train/cat/a.txt", "train/dog/b.TXT", "train/cat/.0.png", "train/.DS_Store", "train/dog/c.heic"):
        (folder / name).write_bytes(b"x")
    (folder / "train" / "ship" / "README").write_bytes(b"x")
    (folder / "train" / "index.csv").write_bytes(b"x")
    for hidden in (folder / "train" / ".ipynb_checkpoints", folder / "train" / "ship" / ".thumbnails"):
        hidden.mkdir()
        (hidden / "0.png").write_bytes(b"x")
    (folder / "train" / "frog" / "more").symlink_to(folder / "train" / "cat")
    data = load_data(CIFAR10, None, tmp_path)
    assert data.content_hash == before
    assert any(
        "30 images (train) and 10 (test); left out in train: "
        "1 .csv, 1 .heic, 2 .txt, 4 hidden, 1 linked folder, 1 without suffix" in note
        for note in data.notes
    )


def test_classes_without_images_are_said(tmp_path: Path) -> None:
    folder = image_folders(tmp_path)
    for path in (folder / "test" / "dog").iterdir():
        path.rename(path.with_suffix(".jxl"))
    data = load_data(CIFAR10, None, tmp_path)
    assert any("left out in test: 1 .jxl; no images in test of dog" in note for note in data.notes)
    for path in (folder / "test").rglob("*.png"):
        path.unlink()
    with pytest.raises(FedbenchError, match=r"test: its class folders hold no \.png.* files, but 1 \.jxl"):
        load_data(CIFAR10, None, tmp_path)


def test_a_damaged_or_missing_image_is_named(tmp_path: Path) -> None:
    path = image_folders(tmp_path) / "train" / "bird" / "0.png"
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(FedbenchError, match=r"train/bird/0\.png: cannot be decoded"):
        load_data(CIFAR10, None, tmp_path)
    path.unlink()
    path.symlink_to(tmp_path / "gone.png")
    with pytest.raises(FedbenchError, match=r"train/bird/0\.png: cannot be read"):
        load_data(CIFAR10, None, tmp_path)


def test_images_that_were_held_upright_have_a_size_of_their_own(tmp_path: Path) -> None:
    """All headers say 12 x 8; one image says that it was turned."""
    folder = image_folders(tmp_path)
    exif = Image.Exif()
    for path in folder.rglob("*.png"):
        exif[0x0112] = 6 if path.match("train/cat/1.png") else 1
        Image.fromarray(images(1, 0, 12)[0, :8]).save(path, exif=exif)
    data = load_data(CIFAR10, None, tmp_path)
    parts = (data.train, data.validation)
    assert all(isinstance(part.images, ImageFiles) for part in parts)
    sizes = [part.images.decode(i).shape for part in parts for i in range(len(part))]  # type: ignore[union-attr]
    assert (sizes.count((8, 12, 3)), sizes.count((12, 8, 3))) == (29, 1)
    assert isinstance(data.test.images, np.ndarray)


def cifar10_parquet(root: Path, change: Callable[[list[Any], list[Any]], object] | None = None) -> None:
    """30 training and 10 test images; `change` is made to cells and labels of the training rows."""
    folder = root / "cifar10"
    folder.mkdir(parents=True)
    for split, n in (("train", 30), ("test", 10)):
        cells: list[Any] = [{"bytes": png(row), "path": None} for row in images(n, n)]
        labels: list[Any] = [i % 10 for i in range(n)]
        if change is not None and split == "train":
            change(cells, labels)
        pd.DataFrame({"img": cells, "label": labels}).to_parquet(folder / f"{split}.parquet")


@pytest.mark.parametrize(
    "change",
    [
        lambda cells, labels: cells.__setitem__(slice(None), [cell["bytes"] for cell in cells]),
        lambda cells, labels: labels.__setitem__(slice(None), [sets.CIFAR10.classes[i] for i in labels]),
        lambda cells, labels: labels.__setitem__(slice(None), map(float, labels)),
        lambda cells, labels: labels.__setitem__(slice(None), map(str, labels)),
    ],
    ids=["bytes", "names", "floats", "numbers in text"],
)
def test_images_and_labels_of_other_types_are_read_from_parquet(tmp_path: Path, change: Any) -> None:
    cifar10_parquet(tmp_path / "a")
    cifar10_parquet(tmp_path / "b", change)
    expected, found = (load_data(CIFAR10, None, tmp_path / root) for root in "ab")
    assert found.content_hash == expected.content_hash


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda cells, labels: cells.__setitem__(5, None), "row 6 holds None where an encoded image is expected"),
        (lambda cells, labels: cells.__setitem__(5, {"bytes": None, "path": "a.png"}), "row 6 holds a path, but no b"),
        (lambda cells, labels: cells.__setitem__(slice(None), ["a.png"] * 30), "row 1 holds 'a.png' where an"),
        (lambda cells, labels: cells.__setitem__(slice(None), [[1, 2]] * 30), "row 1 holds array.* where an"),
        (lambda cells, labels: cells[5].__setitem__("bytes", b""), "row 6: cannot be decoded as an image"),
        (lambda cells, labels: labels.__setitem__(5, 0.5), "row 6 has label 0.5, expected a whole number or one of a"),
        (lambda cells, labels: labels.__setitem__(5, None), "row 6 has label nan, expected a whole number"),
        (lambda cells, labels: labels.__setitem__(5, 10), "row 6 has label 10, expected 0 to 9"),
        (lambda cells, labels: labels.__setitem__(slice(None), [True] * 30), "row 1 has label True, expected a whole"),
        (lambda cells, labels: labels.__setitem__(slice(None), ["hound"] * 30), "row 1 has label 'hound', expected a"),
    ],
)
def test_bad_rows_of_parquet_are_named(tmp_path: Path, change: Any, says: str) -> None:
    cifar10_parquet(tmp_path, change)
    with pytest.raises(FedbenchError, match=rf"cifar10/train\.parquet: {says}") as caught:
        load_data(CIFAR10, None, tmp_path)
    assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)


def hub(monkeypatch: pytest.MonkeyPatch, column: Any, labels: list[Any]) -> None:
    """A hub whose CIFAR-10 has these images and labels in both splits."""
    import datasets

    rows = datasets.Dataset.from_dict({"img": column, "label": labels})
    splits = datasets.DatasetDict(train=rows, test=rows)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: splits)
    monkeypatch.setattr("fedbench.data.sources.hub_state", lambda: HubState(True, ""))


@pytest.mark.parametrize(
    ("row", "label", "says"),
    [
        (None, 0, "train: row 2 holds None where an encoded image is expected"),
        ({"bytes": None, "path": "/absent/a.png"}, 0, "train: row 2 holds a path, but no bytes"),
        ({"bytes": b"x", "path": None}, 0, "train: row 2: cannot be decoded as an image"),
        ({"bytes": png(images(1, 1)[0]), "path": None}, None, "train: row 2 has label None, expected a whole number"),
        ({"bytes": png(images(1, 1)[0]), "path": None}, 0.5, "train: row 2 has label 0.5, expected a whole number"),
        ({"bytes": png(images(1, 1)[0]), "path": None}, 11, "train: row 2 has label 11, expected 0 to 9"),
    ],
)
def test_bad_rows_of_the_hub_are_named(monkeypatch: pytest.MonkeyPatch, row: Any, label: Any, says: str) -> None:
    hub(monkeypatch, [{"bytes": png(images(1, 0)[0]), "path": None}, row], [0, label])
    with pytest.raises(FedbenchError, match=f"data set cifar10: uoft-cs/cifar10 at revision 0b2714987fa4: {says}"):
        load_data(CIFAR10, None, None)


def test_a_column_of_the_hub_without_images_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    hub(monkeypatch, [1, 2], [0, 1])
    with pytest.raises(FedbenchError, match="train: column img holds no encoded images"):
        load_data(CIFAR10, None, None)


def cifar100(folder: Path, train: int) -> None:
    """Fine labels in turn, coarse labels all 0; 100 test images."""
    folder.mkdir()
    for name, n in (("train", train), ("test", 100)):
        rows = images(n, n)
        content = pickle.loads(batch(rows, [i % 100 for i in range(n)], b"fine_labels"))
        content[b"coarse_labels"] = [0] * n
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))


def test_cifar100_reads_the_fine_labels(tmp_path: Path) -> None:
    cifar100(tmp_path / "cifar-100-python", 120)
    data = load_data(DatasetSettings(name="cifar100", validation=20), None, tmp_path)
    assert (len(data.train), len(data.class_names)) == (100, 100)
    assert data.test.labels.tolist() == [*range(100)]
    # A named set can be another's public corpus, without its labels.
    cifar10(tmp_path / "cifar-10-batches-py")
    both = load_data(CIFAR10, PublicSettings(name="cifar100", rows=50), tmp_path)
    assert both.public is not None
    assert (len(both.public), int(both.public.labels.max())) == (50, 0)


class Evil:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return (Path.touch, (Path("pwned"),))  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("data_batch_2", pickle.dumps(Evil(), protocol=2), "is not a batch .*it asks for"),
        ("data_batch_2", b"half a fi", "is not a batch of CIFAR's python version"),
        ("test_batch", pickle.dumps({b"data": 1}, protocol=2), "test_batch: holds no data and labels"),
        ("test_batch", batch(images(2, 0), [0], b"labels"), "expected uint8 .n, 3072."),
        ("data_batch_1", batch(images(6, 0), [9] * 5 + [10], b"labels"), "data_batch_1: row 6 has label 10, exp"),
        ("data_batch_3", batch(images(2, 0), [0, 0.5], b"labels"), "data_batch_3: row 2 has label 0.5"),  # type: ignore[list-item]
        ("data_batch_3", pickle.dumps({b"data": [[1], [1, 2]], b"labels": [0, 1]}, 2), "are no lists of rows"),
        ("data_batch_3", pickle.dumps({b"data": np.zeros(3072, np.uint8), b"labels": 1}, 2), "are no lists of rows"),
        ("data_batch_4", None, "data_batch_4 is missing; unpack cifar-10-python.tar.gz again"),
    ],
)
def test_bad_batches_are_named_and_run_no_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes | None, says: str
) -> None:
    path = cifar10(tmp_path / "cifar-10-batches-py") / name
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FedbenchError, match=says):
        load_data(CIFAR10, None, tmp_path)
    assert not (tmp_path / "pwned").exists()


def test_a_cut_off_archive_is_named(tmp_path: Path) -> None:
    path = archive(cifar10(tmp_path / "x"), tmp_path / "cifar-10-python.tar.gz", "cifar-10-batches-py")
    whole = path.read_bytes()
    for content in (whole[:5000], whole[:-4], b""):
        path.write_bytes(content)
        with pytest.raises(FedbenchError, match=r"cifar-10-python\.tar\.gz: cannot be read as an archive"):
            load_data(CIFAR10, None, tmp_path)


@pytest.mark.parametrize("place", [0.25, 0.5, 0.75])
def test_a_bit_that_flipped_in_an_archive_is_named(tmp_path: Path, place: float) -> None:
    """Pixels hardly compress, so that the archive unpacks with one other pixel; only its checksum tells."""
    path = archive(cifar10(tmp_path / "x"), tmp_path / "cifar-10-python.tar.gz", "cifar-10-batches-py")
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1
    path.write_bytes(content)
    with pytest.raises(FedbenchError, match=r"cifar-10-python\.tar\.gz: (cannot be read|\w+ is )"):
        load_data(CIFAR10, None, tmp_path)


def test_nothing_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(FedbenchError, match="three ways: connect to the hub .uoft-cs/cifar10.*DIR/cifar10 or"):
        load_data(CIFAR10, None, tmp_path)
    (tmp_path / "cifar10").mkdir()
    with pytest.raises(FedbenchError, match="no layout of cifar10 recognised"):
        load_data(CIFAR10, None, tmp_path)


FLOWERS = DatasetSettings(name="flowers102", validation=10)


def flowers(folder: Path) -> Path:
    """Of each of 102 classes one image for trnid, one for valid and two for tstid, in sizes of their own."""
    (folder / "jpg").mkdir(parents=True)
    n = 4 * 102
    for i in range(n):
        size = (9 + i % 3, 7)
        picture = Image.fromarray(images(1, i, 8)[0]).resize(size)
        picture.save(folder / "jpg" / f"image_{i + 1:05}.jpg")
    savemat(folder / "imagelabels.mat", {"labels": np.arange(n)[None] // 4 + 1})
    ids = np.arange(1, n + 1).reshape(102, 4)
    savemat(
        folder / "setid.mat", {"trnid": ids[:, 0][None], "valid": ids[:, 1][None], "tstid": ids[:, 2:].reshape(1, -1)}
    )
    return folder


def test_flowers_as_their_authors_publish_them(tmp_path: Path) -> None:
    folder = flowers(tmp_path / "flowers-102")
    data = load_data(FLOWERS, None, tmp_path)
    assert (len(data.train), len(data.validation), len(data.test)) == (194, 10, 204)
    assert data.test.labels.tolist() == [c for c in range(102) for _ in range(2)]
    assert isinstance(data.test.images, ImageFiles)
    assert data.test.images.content(0) == (folder / "jpg" / "image_00003.jpg").read_bytes()
    assert data.test.images.decode(0).shape == (7, 11, 3)
    assert any("official parts train and validation" in note for note in data.notes)
    (folder / "jpg").rename(tmp_path / "jpg")
    archive(tmp_path / "jpg", folder / "102flowers.tgz", "jpg")
    assert load_data(FLOWERS, None, tmp_path).content_hash == data.content_hash


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: (f / "jpg" / "image_00007.jpg").unlink(), r"image_00007\.jpg is missing \(1 in all\)"),
        (lambda f: (f / "setid.mat").write_bytes(b"x"), r"setid\.mat cannot be read"),
        (lambda f: savemat(f / "imagelabels.mat", {"labels": np.ones((1, 50))}), "names images beyond the 50"),
        (
            lambda f: savemat(f / "imagelabels.mat", {"labels": np.full((1, 408), 1.5)}),
            r"imagelabels\.mat: row 1 has label 1\.5, expected a whole number",
        ),
        (
            lambda f: savemat(f / "imagelabels.mat", {"labels": np.full((1, 408), 103)}),
            r"imagelabels\.mat: row 1 has label 103, expected 1 to 102",
        ),
        (lambda f: savemat(f / "setid.mat", {n: [[1.0, 1.5]] for n in ("trnid", "valid", "tstid")}), "images beyond"),
        (lambda f: savemat(f / "setid.mat", {n: [[1, 2]] for n in ("trnid", "valid", "tstid")}), "an image twice"),
        (lambda f: (f / "jpg").rename(f / "pictures"), "no images; expected 102flowers.tgz or the folder jpg"),
        (lambda f: (f / "setid.mat").unlink(), "no layout of flowers102 recognised"),
    ],
)
def test_bad_flowers_are_named(tmp_path: Path, damage: Callable[[Path], object], says: str) -> None:
    damage(flowers(tmp_path / "flowers-102"))
    with pytest.raises(FedbenchError, match=says):
        load_data(FLOWERS, None, tmp_path)


def test_flowers_in_class_folders(tmp_path: Path) -> None:
    """Numbered from 1, with a validation folder that joins the training rows."""
    for part in ("train", "valid", "test"):
        for c in range(1, 103):
            folder = tmp_path / "flowers102" / part / str(c)
            folder.mkdir(parents=True)
            (folder / f"{c}.jpg").write_bytes(png(images(1, c, 4)[0], "JPEG"))
    data = load_data(FLOWERS, None, tmp_path)
    assert (len(data.train), len(data.validation), len(data.test)) == (194, 10, 102)
    assert data.test.labels.tolist() == [*range(102)]
    assert any("204 images (train, valid) and 102 (test)" in note for note in data.notes)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "flowers102"])
def test_a_run_on_colour_images(tmp_path: Path, name: str) -> None:
    """Larger in the files than in the model, which takes 8 pixels; the public corpus is grey."""
    if name == "cifar10":
        folder = cifar10(tmp_path / "cifar-10-batches-py")
        for i in range(1, 6):
            (folder / f"data_batch_{i}").write_bytes(batch(images(20, i), [*range(10)] * 2, b"labels"))
    elif name == "cifar100":
        cifar100(tmp_path / "cifar-100-python", 500)
    else:
        flowers(tmp_path / "flowers-102")
    scenario = {"flowers102": "flowers102-iid"}.get(name, f"{name}-dir")
    prepared = prepare(smoke_request(tmp_path, "fedpft", scenario, save_tiny("vit", tmp_path / "vit")))
    pixels = prepared.loaded.train.pixels
    assert pixels is not None
    train, test = {"cifar10": (60, 10), "cifar100": (400, 60), "flowers102": (164, 60)}[name]
    assert (pixels.dtype, tuple(pixels.shape)) == (torch.uint8, (train, 3, 8, 8))
    accuracy = run(prepared).accuracy
    assert accuracy.plug_in.rows == test
    assert "extra_tests" not in accuracy.to_json()
