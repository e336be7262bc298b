from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from oodcore.data import Stream
from oodcore.errors import DataError, ExtraError
from oodcore_plugins.image_folder import ImageFolder


def pixels(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def put(path: Path, image: np.ndarray | None = None, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(4, 4, 3) if image is None else image).save(path, **options)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three classes, put on disk in another order than that of their names."""
    images = tmp_path / "images"
    for seed, name in enumerate(("b/2.png", "b/10.png", "a/x.png", "C/z.bmp", "C/y/w.png")):
        put(images / name, pixels(6, 5, 3, seed=seed))
    return images


ORDER = ["C/y/w.png", "C/z.bmp", "a/x.png", "b/10.png", "b/2.png"]


def test_classes_and_files_are_in_the_order_of_their_names(root: Path) -> None:
    batch = next(iter(Stream(ImageFolder(path=root))))
    assert batch.labels.tolist() == [0, 0, 1, 2, 2]
    assert batch.ids.tolist() == [0, 1, 2, 3, 4]
    for image, name in zip(batch.inputs, ORDER, strict=True):
        stored = np.asarray(Image.open(root / name)).astype(np.float32) / 255
        assert np.array_equal(image.numpy(), stored.transpose(2, 0, 1))


def test_the_order_does_not_come_from_the_disk(root: Path, monkeypatch: Any) -> None:
    usual, listing = os.scandir, ImageFolder(path=root).open()

    class Reversed(list):
        def __enter__(self) -> Reversed:
            return self

        def __exit__(self, *_: Any) -> None: ...

    def backwards(folder: Any) -> Any:
        with usual(folder) as entries:
            return Reversed(sorted(entries, key=lambda entry: entry.name, reverse=True))

    monkeypatch.setattr(os, "scandir", backwards)
    other = ImageFolder(path=root).open()
    for one, same in zip(listing, other, strict=True):
        assert torch.equal(one[0], same[0])
        assert one[1:] == same[1:]


def test_hidden_files_and_other_files_are_left_out(root: Path) -> None:
    (root / "a/notes.txt").write_text("no image")
    (root / "a/._x.png").write_bytes(b"a resource fork")
    (root / ".cache").mkdir()
    (root / "README.md").write_text("no class")
    os.mkfifo(root / "b/pipe.png")
    assert len(ImageFolder(path=root).open()) == 5
    assert len(ImageFolder(path=root, labels=False).open()) == 5


def test_without_labels_every_image_below_is_a_row(root: Path) -> None:
    put(root / "a.png", pixels(6, 5, 3, seed=9))
    source = ImageFolder(path=root, labels=False)
    assert [label for _, label, _ in source.open()] == [-1] * 6
    batch = next(iter(Stream(source)))
    assert batch.labels is None
    names = [*ORDER[:2], "a/x.png", "a.png", *ORDER[3:]]
    for image, name in zip(batch.inputs, names, strict=True):
        stored = torch.from_numpy(np.array(Image.open(root / name)))
        assert torch.equal(image, stored.movedim(-1, 0).float() / 255)


def test_classes_and_parts(root: Path) -> None:
    rows = ImageFolder(path=root, classes=(2, 0)).open()
    assert [(label, number) for _, label, number in rows] == [(1, 0), (1, 1), (0, 3), (0, 4)]
    parts = [ImageFolder(path=root, part=part).open() for part in ((0, 0.5), (0.5, 1))]
    assert sorted(number for part in parts for _, _, number in part) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("mode", "value", "expected"),
    [
        ("1", 1, (1.0, 1.0, 1.0)),
        ("L", 51, (0.2, 0.2, 0.2)),
        ("LA", (51, 0), (0.2, 0.2, 0.2)),
        ("RGB", (51, 102, 255), (0.2, 0.4, 1.0)),
        ("RGBA", (51, 102, 255, 0), (0.2, 0.4, 1.0)),
        ("I;16", 13107, (0.2, 0.2, 0.2)),
    ],
)
def test_every_kind_of_image_becomes_rgb_or_grey(
    tmp_path: Path, mode: str, value: Any, expected: tuple[float, ...]
) -> None:
    Image.new(mode, (3, 2), value).save(tmp_path / "image.png")
    image, label, number = ImageFolder(path=tmp_path, labels=False).open()[0]
    assert (image.dtype, image.shape, label, number) == (torch.float32, (3, 2, 3), -1, 0)
    assert np.allclose(image[:, 1, 2].numpy(), expected, atol=1e-4)
    grey = ImageFolder(path=tmp_path, labels=False, colour="grey").open()[0][0]
    assert grey.shape == (1, 2, 3)
    assert float(grey[0, 0, 0]) == pytest.approx(np.dot((0.299, 0.587, 0.114), expected), abs=1e-4)


def test_palettes_with_transparency_and_wide_greymaps(tmp_path: Path) -> None:
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, 255, 0, 51])
    palette.save(tmp_path / "a.png", transparency=bytes([0, 128]))
    (tmp_path / "b.pgm").write_bytes(b"P5\n2 2\n65535\n" + b"\x33\x33" * 4)
    rows = ImageFolder(path=tmp_path, labels=False).open()
    assert np.allclose(rows[0][0][:, 0, 0], (1.0, 0.0, 0.2))
    assert np.allclose(rows[1][0], 0.2, atol=1e-4)


def test_numbers_whose_white_is_unknown_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.ones((2, 2), np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match=r"a\.tif has numbers of 32 bits"):
        ImageFolder(path=tmp_path, labels=False).open()[0]


def test_size_makes_squares_of_images_that_differ(tmp_path: Path) -> None:
    for seed, shape in enumerate(((40, 20, 3), (16, 16, 3), (20, 30, 3))):
        put(tmp_path / f"{seed}.png", pixels(*shape, seed=seed))
    batch = next(iter(Stream(ImageFolder(path=tmp_path, labels=False, size=16))))
    assert batch.inputs.shape == (3, 3, 16, 16)
    stored = torch.from_numpy(pixels(16, 16, 3, seed=1)).movedim(-1, 0) / 255
    assert torch.equal(batch.inputs[1], stored)
    with pytest.raises(DataError, match=r"0.png is 40 x 20 and 1.png is 16 x 16; set size"):
        list(Stream(ImageFolder(path=tmp_path, labels=False)))


def test_a_damaged_image_is_named(root: Path) -> None:
    content = (root / "b/10.png").read_bytes()
    jpeg = root / "b/30.jpg"
    put(jpeg, pixels(40, 40, 3))
    whole = jpeg.read_bytes()
    for name, damaged in (
        ("b/10.png", b""),
        ("b/10.png", b"text"),
        ("b/10.png", content[:60]),
        ("b/10.png", content[:40] + b"\xff\xff\xff\xff" + content[44:]),
        ("b/30.jpg", whole[: len(whole) // 2]),
        ("b/30.jpg", whole[:10]),
    ):
        kept = (root / name).read_bytes()
        (root / name).write_bytes(damaged)
        with pytest.raises(DataError, match=f"{name} cannot be read as an image"):
            list(Stream(ImageFolder(path=root, size=4)))
        (root / name).write_bytes(kept)
    rows = ImageFolder(path=root).open()
    (root / "a/x.png").unlink()
    with pytest.raises(DataError, match=r"a/x.png cannot be read"):
        rows[2]


def test_folders_that_hold_no_data_set(tmp_path: Path, root: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DataError, match="there is no folder"):
        ImageFolder(path=tmp_path / "none").open()
    with pytest.raises(DataError, match=r"no folders, one a class.* labels: false"):
        ImageFolder(path=root / "b").open()
    with pytest.raises(DataError, match=r"has no images \(.bmp"):
        ImageFolder(path=empty, labels=False).open()
    (root / "d").mkdir()
    with pytest.raises(DataError, match=r"the class folder .*d has no images"):
        ImageFolder(path=root).open()
    with pytest.raises(DataError, match="no row"):
        ImageFolder(path=root, labels=False, classes=(0,)).open()


def test_links_are_not_followed(root: Path, tmp_path: Path) -> None:
    (root / "a/notes").symlink_to(root / "nowhere")
    assert len(ImageFolder(path=root).open()) == 5
    for name, target in (("a/loop", root), ("a/link.png", root / "b/2.png"), ("d", root / "b")):
        link = root / name
        link.symlink_to(target)
        for labels in (True, False):
            with pytest.raises(DataError, match=f"{name} is a link"):
                ImageFolder(path=root, labels=labels).open()
        link.unlink()
    linked = tmp_path / "linked"
    linked.symlink_to(root)
    assert len(ImageFolder(path=linked).open()) == 5


def test_workers_and_pickle_give_the_same_rows(root: Path) -> None:
    source = ImageFolder(path=root, size=4, colour="grey", classes=(0, 2))
    alone = list(Stream(source, batch_size=2))
    together = list(Stream(source, batch_size=2, num_workers=2))
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one.inputs, other.inputs)
        assert torch.equal(one.ids, other.ids)
    assert torch.equal(pickle.loads(pickle.dumps(source.open()))[1][0], alone[0].inputs[1])
    assert ImageFolder.model_validate(source.dump()) == source
    for row in (-1, 5):
        with pytest.raises(IndexError):
            ImageFolder(path=root).open()[row]


def test_without_pillow_the_error_says_how_to_get_it(root: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ExtraError, match="pip install pillow"):
        ImageFolder(path=root).open()


def test_fields_are_checked(tmp_path: Path) -> None:
    for fields in ({"size": 0}, {"colour": "sepia"}, {"labels": 1}, {"classes": "ab"}):
        with pytest.raises(ValidationError):
            ImageFolder(**{"path": tmp_path, **fields})


def test_a_class_list_chooses_folders_and_numbers_them(root: Path) -> None:
    path = root.parent / "splits.json"
    path.write_text('{"known_classes": ["b"], "unknown_classes": {"Easy": ["b", "a"], "Hard": []}}')
    (root / "not_listed").mkdir()
    every = list(ImageFolder(path=root, class_list={"path": path, "entry": "known_classes"}).open())
    assert {label for _, label, _ in every} == {0}
    easy = {"path": str(path), "entry": "unknown_classes.Easy"}
    both = list(ImageFolder(path=root, class_list=easy).open())
    (root / "not_listed").rmdir()
    plain = [row for row in ImageFolder(path=root).open() if row[1] in (1, 2)]
    assert [(label, number) for _, label, number in both] == [(1, 0), (0, 1), (0, 2)]
    assert [2 - label for _, label, _ in plain] == [1, 0, 0]
    assert all(torch.equal(one[0], other[0]) for one, other in zip(both, plain, strict=True))
    chosen = list(ImageFolder(path=root, class_list=easy, classes=[1]).open())
    assert len(chosen) == 1
    assert torch.equal(chosen[0][0], plain[0][0])
    path.write_text('["a"]')
    assert len(ImageFolder(path=root, class_list={"path": path}).open()) == 1


@pytest.mark.parametrize(
    ("text", "entry", "message"),
    [
        ("{", None, "is not JSON"),
        ("[" * 100_000, None, "is not JSON"),
        ('{"known": ["a"]}', "knwon", "has no entry 'knwon'; there are: known"),
        ('{"x": {"y": ["a"]}}', "x.z", "x has no entry 'z'; there are: y"),
        ('{"x": ["a"]}', "x.z", "x has no entry 'z'; there are: no entries"),
        ('{"x": {"y": ["a"]}}', "x", "x is no list of names"),
        ("[]", None, "is no list of names"),
        ('["../a"]', None, "holds '../a', which is not the name of a folder"),
        ('["/a"]', None, "which is not the name of a folder"),
        ('[".a"]', None, "which is not the name of a folder"),
        ("[3]", None, "holds 3, which is not"),
        ('["a", "a"]', None, "holds a name twice"),
        ('["a", "c", "d"]', None, "no folder for 2 of the 3 classes in class_list, such as c"),
    ],
)
def test_a_class_list_that_does_not_fit_says_why(
    root: Path, text: str, entry: str | None, message: str
) -> None:
    path = root.parent / "list.json"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        ImageFolder(path=root, class_list={"path": path, "entry": entry}).open()


def test_a_class_list_goes_with_labels(root: Path) -> None:
    with pytest.raises(DataError, match="nowhere.json cannot be read: No such file"):
        ImageFolder(path=root, class_list={"path": "nowhere.json"}).open()
    with pytest.raises(ValueError, match="set labels: true"):
        ImageFolder(path=root, labels=False, class_list={"path": "nowhere.json"})
