from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from oodcore.data import Batch, Stream
from oodcore.errors import DataError
from oodcore_plugins.npz import Npz

DATA = Path(__file__).parents[2] / "../shared/data"


def random() -> np.random.Generator:
    return np.random.default_rng(0)


def images(*shape: int) -> np.ndarray:
    return random().integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture
def saved(tmp_path: Path) -> Any:
    def save(**arrays: Any) -> Path:
        path = tmp_path / "data.npz"
        np.savez(path, **arrays)
        return path

    return save


def labels_of(batch: Batch) -> list[int]:
    return [-1] * len(batch) if batch.labels is None else batch.labels.tolist()


def everything(source: Npz) -> tuple[torch.Tensor, list[int], list[int]]:
    batches = list(Stream(source, batch_size=4))
    return (
        torch.cat([batch.inputs for batch in batches]),
        [row for batch in batches for row in labels_of(batch)],
        torch.cat([batch.ids for batch in batches]).tolist(),
    )


@pytest.mark.parametrize(
    ("shape", "layout", "axes"),
    [
        ((7, 5, 6), "hw", None),
        ((7, 5, 6, 3), "hwc", (0, 3, 1, 2)),
        ((7, 5, 6, 1), "hwc", (0, 3, 1, 2)),
        ((7, 3, 5, 6), "chw", (0, 1, 2, 3)),
        ((7, 1, 5, 6), "chw", (0, 1, 2, 3)),
    ],
)
@pytest.mark.parametrize("told", [True, False])
def test_bytes_of_every_layout_become_channels_first_in_the_unit_interval(
    saved: Any, shape: tuple[int, ...], layout: str, axes: tuple[int, ...] | None, told: bool
) -> None:
    x = images(*shape)
    y = np.arange(7, dtype=np.uint8)
    inputs, labels, ids = everything(Npz(path=saved(x=x, y=y), layout=layout if told else "auto"))
    expected = (x[:, None] if axes is None else x.transpose(axes)).astype(np.float32) / 255
    assert inputs.dtype == torch.float32
    assert np.array_equal(inputs.numpy(), expected)
    assert labels == ids == list(range(7))


def test_vectors_are_plain_numbers(saved: Any) -> None:
    x = random().normal(size=(5, 9)) * 100
    inputs, labels, _ = everything(Npz(path=saved(x=x), labels=None))
    assert np.array_equal(inputs.numpy(), x.astype(np.float32))
    assert labels == [-1] * 5
    ints, _, _ = everything(Npz(path=saved(x=images(5, 9)), labels=None))
    assert float(ints.max()) > 1
    series, _, _ = everything(Npz(path=saved(x=x.reshape(5, 3, 3)), labels=None, layout="plain"))
    assert series.shape == (5, 3, 3)


def test_floats_and_other_integers_with_their_scale(saved: Any) -> None:
    x = random().random((4, 3, 3))
    assert np.array_equal(
        everything(Npz(path=saved(x=x), labels=None))[0][:, 0].numpy(), x.astype(np.float32)
    )
    wide = random().integers(0, 4096, (4, 3, 3), dtype=np.uint16)
    inputs = everything(Npz(path=saved(x=wide), labels=None, scale=4095))[0]
    assert np.allclose(inputs[:, 0].numpy(), wide / 4095)
    with pytest.raises(DataError, match="set scale to the number that stands for white"):
        Npz(path=saved(x=wide), labels=None).open()
    masks = random().random((4, 3, 3)) > 0.5
    inputs = everything(Npz(path=saved(x=masks), labels=None))[0]
    assert set(inputs.unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("dtype", [">f4", ">u2", "float16", "longdouble"])
def test_number_types_that_torch_does_not_share(saved: Any, dtype: str) -> None:
    x = images(4, 3, 3).astype(dtype)
    inputs = everything(Npz(path=saved(x=x), labels=None, scale=255))[0]
    assert np.allclose(inputs[:, 0].numpy(), x.astype(float) / 255, atol=1e-6)


def test_arrays_stored_in_fortran_order(saved: Any) -> None:
    x = np.asfortranarray(images(4, 5, 6, 3))
    assert np.array_equal(
        everything(Npz(path=saved(x=x), labels=None))[0].numpy(),
        x.transpose(0, 3, 1, 2).astype(np.float32) / 255,
    )


def test_grey_rgb_crop_and_pad(saved: Any) -> None:
    x = images(4, 10, 8, 3)
    path = saved(x=x)
    grey = everything(Npz(path=path, labels=None, colour="grey"))[0]
    luma = (x.astype(float) / 255) @ np.array([0.299, 0.587, 0.114])
    assert np.allclose(grey[:, 0].numpy(), luma, atol=1e-6)
    square = everything(Npz(path=path, labels=None, size=4))[0]
    assert square.shape == (4, 3, 4, 4)
    padded = everything(Npz(path=path, labels=None, size=12, resize="pad"))[0]
    assert torch.equal(padded[..., 1:11, 2:10], torch.from_numpy(x).movedim(-1, 1) / 255)
    path = saved(x=x[..., 0])
    assert everything(Npz(path=path, labels=None, colour="rgb"))[0].shape == (4, 3, 10, 8)
    with pytest.raises(DataError, match="cannot be padded to 9"):
        everything(Npz(path=path, labels=None, size=9, resize="pad"))


def test_classes_are_relabelled_and_ids_stay(saved: Any) -> None:
    x, y = images(12, 2, 2), np.arange(12) % 4
    inputs, labels, ids = everything(Npz(path=saved(x=x, y=y), classes=(3, 1)))
    assert ids == [1, 3, 5, 7, 9, 11]
    assert labels == [1, 0, 1, 0, 1, 0]
    assert np.array_equal(inputs[:, 0].numpy(), x[ids].astype(np.float32) / 255)


@settings(max_examples=20, deadline=None)
@given(cut=st.floats(0.2, 0.8), seed=st.integers(-(2**40), 2**70))
def test_parts_divide_the_rows(tmp_path_factory: Any, cut: float, seed: int) -> None:
    path = tmp_path_factory.getbasetemp() / "parts.npz"
    if not path.exists():
        np.savez(path, x=images(60, 2), y=np.arange(60) % 3)
    classes = (2, 0)
    halves = [
        everything(Npz(path=path, part=part, seed=seed, classes=classes))[2]
        for part in ((0, cut), (cut, 1))
    ]
    assert sorted(halves[0] + halves[1]) == [row for row in range(60) if row % 3 != 1]


def test_one_row_is_the_row_of_a_batch(saved: Any) -> None:
    rows = Npz(path=saved(x=images(6, 4, 4, 3), y=np.arange(6))).open()
    for (image, label, number), row in zip(rows.__getitems__([5, 0, 5]), (5, 0, 5), strict=True):
        assert torch.equal(image, rows[row][0])
        assert (label, number) == (row, row)
    image = rows[0][0]
    image.fill_(7)
    assert float(rows[0][0].max()) <= 1
    for row in (6, -1):
        with pytest.raises(IndexError):
            rows[row]


def test_workers_and_pickle_give_the_same_rows(saved: Any) -> None:
    source = Npz(path=saved(x=images(9, 4, 4), y=np.arange(9)), part=(0, 0.9))
    alone = everything(source)
    together = list(Stream(source, batch_size=4, num_workers=2))
    assert torch.equal(torch.cat([batch.inputs for batch in together]), alone[0])
    assert torch.equal(pickle.loads(pickle.dumps(source.open()))[2][0], alone[0][2])
    assert Npz.model_validate(source.dump()) == source


@pytest.mark.parametrize(
    ("arrays", "fields", "message"),
    [
        ({"x_train": images(2, 2), "y": np.arange(2)}, {}, "no array 'x'; it has: x_train, y"),
        ({"x": images(2, 2)}, {}, "no array 'y'; it has: x; .* set labels: null"),
        ({"x": images(2, 2), "y": np.arange(3)}, {}, r"must hold 2 integers.*int64 of shape \[3\]"),
        ({"x": images(2, 2), "y": np.ones(2)}, {}, "must hold 2 integers.*float64"),
        ({"x": images(2, 2), "y": np.array([True, False])}, {}, "must hold 2 integers.*bool"),
        ({"x": images(2, 2), "y": np.ones((2, 1), int)}, {}, r"of shape \[2, 1\]"),
        ({"x": np.array(["a", "b"])}, {"labels": None}, "'x' is <U1; numbers are needed"),
        ({"x": np.array(3)}, {"labels": None}, "single number"),
        ({"x": images(0, 2, 2)}, {"labels": None}, "no rows"),
        ({"x": np.ones((2, 3), complex)}, {"labels": None}, "complex128; numbers are needed"),
        ({"x": images(2, 3, 5, 3)}, {"labels": None}, "cannot be told from its shape"),
        ({"x": images(2, 4, 5, 6)}, {"labels": None}, "cannot be told from its shape"),
        ({"x": images(2, 4, 5, 6)}, {"labels": None, "layout": "hwc"}, "one or three channels"),
        ({"x": images(2, 4, 5)}, {"labels": None, "layout": "chw"}, r"layout 'chw' is \[N, C"),
        ({"x": images(2)}, {"labels": None, "layout": "chw"}, r"layout 'chw' is \[N, C"),
        ({"x": images(2, 0, 4)}, {"labels": None}, "images without pixels"),
        ({"x": images(2, 4)}, {"labels": None, "size": 2}, "no images"),
        ({"x": images(2, 4)}, {"labels": None, "colour": "grey"}, "no images"),
        ({"x": np.full((2, 2, 2), 255.0)}, {"labels": None}, "from 255 to 255.* set scale"),
        ({"x": np.full((2, 2, 2), -0.1)}, {"labels": None}, "layout: plain"),
        ({"x": images(9, 9, 9)}, {"labels": None, "scale": 10}, "set scale"),
        ({"x": np.array([[1.0], [np.nan]])}, {"labels": None}, "row 1 has numbers.* not finite"),
        ({"x": np.array([[1.0], [-np.inf]])}, {"labels": None}, "row 1 has numbers.* not finite"),
        ({"x": np.array([[1e300]])}, {"labels": None}, "too large for float32"),
        ({"x": images(2, 2), "y": np.arange(2)}, {"classes": (5,)}, "no row of 2 has a label in"),
    ],
)
def test_what_cannot_be_read_is_named(
    saved: Any, arrays: dict[str, Any], fields: dict[str, Any], message: str
) -> None:
    path = saved(**arrays)
    with pytest.raises(DataError, match=message):
        Npz(path=path, **fields).open()


class Bomb:
    def __reduce__(self) -> Any:
        return (pytest.fail, ("an object was unpickled",))


def test_nothing_is_unpickled(saved: Any, tmp_path: Path) -> None:
    path = saved(x=np.array([Bomb()], dtype=object), y=np.arange(1))
    with pytest.raises(DataError, match="'x' holds Python objects"):
        Npz(path=path).open()
    path = tmp_path / "pickled.npz"
    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(DataError, match=r"damaged, or no \.npz archive"):
        Npz(path=path).open()


def test_files_that_are_no_archives(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no file"):
        Npz(path=tmp_path / "none.npz").open()
    with pytest.raises(DataError, match="there is no file"):
        Npz(path=tmp_path).open()
    for content in (b"", b"not a zip", b"PK\x03\x04" + b"x" * 99):
        path = tmp_path / "wrong.npz"
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"damaged, or no \.npz archive"):
            Npz(path=path).open()
    np.save(tmp_path / "single.npy", images(2, 2))
    with pytest.raises(DataError, match=r"np\.savez"):
        Npz(path=tmp_path / "single.npy").open()


def test_damage_anywhere_is_an_error_or_harmless(saved: Any, tmp_path: Path) -> None:
    whole = saved(x=images(4, 6, 6), y=np.arange(4)).read_bytes()
    expected = everything(Npz(path=tmp_path / "data.npz"))
    path = tmp_path / "damaged.npz"
    places = random().integers(0, len(whole), 150)
    contents = [whole[:length] for length in places[:50]]
    for place in places[50:]:
        changed = bytearray(whole)
        changed[place] ^= 1 << int(place) % 8
        contents.append(bytes(changed))
    refused = 0
    for content in contents:
        path.write_bytes(content)
        try:
            read = everything(Npz(path=path))
        except DataError:
            refused += 1
        else:
            assert torch.equal(read[0], expected[0])
            assert read[1:] == expected[1:]
    assert refused > 100


def test_a_member_that_is_no_array(tmp_path: Path) -> None:
    path = tmp_path / "mixed.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x", "text")
    with pytest.raises(DataError, match="'x' is no array"):
        Npz(path=path, labels=None).open()


def test_fields_are_checked() -> None:
    for fields in (
        {"part": (0.5, 0.5)},
        {"part": (0, 1.5)},
        {"scale": 0},
        {"size": 0},
        {"resize": "pad"},
        {"path": 3},
    ):
        with pytest.raises(ValidationError):
            Npz(**{"path": "data.npz", **fields})


@pytest.mark.skipif(not DATA.is_dir(), reason="the development data sets are not here")
def test_real_sets_agree_with_their_arrays() -> None:
    with np.load(DATA / "mnist.npz", allow_pickle=False) as archive:
        x, y = archive["x_test"], archive["y_test"]
    source = Npz(path=DATA / "mnist.npz", inputs="x_test", labels="y_test", classes=(4, 9))
    inputs, labels, ids = everything(source)
    assert np.array_equal(inputs[:, 0].numpy(), x[ids].astype(np.float32) / 255)
    assert np.array_equal(np.array([4, 9])[labels], y[ids])
    assert len(ids) == 982 + 1009
    textures = Npz(
        path=DATA / "dtd_subset32.npz", inputs="x_test", labels="y_test", colour="grey", size=28
    )
    assert everything(textures)[0].shape == (1200, 1, 28, 28)


def test_several_arrays_are_a_mapping(saved: Any) -> None:
    h, z = random().normal(size=(5, 3)), random().normal(size=(5, 2, 4)).astype(np.float32)
    y = np.array([0, 1, 0, 2, 1])
    source = Npz(path=saved(h=h, z=z, y=y), inputs=("h", "z"), classes=(1, 0))
    rows = source.open()
    assert len(rows) == 4
    row, label, number = rows[0]
    assert (label, number) == (1, 0)
    assert row.keys() == {"h", "z"}
    assert np.array_equal(row["h"].numpy(), h[0].astype(np.float32))
    (batch,) = Stream(source, batch_size=8)
    assert batch.ids.tolist() == [0, 1, 2, 4]
    assert batch.labels.tolist() == [1, 0, 1, 0]
    assert np.array_equal(batch.inputs["z"].numpy(), z[[0, 1, 2, 4]])
    assert Npz.model_validate(source.dump()) == source


def test_several_arrays_need_as_many_rows(saved: Any) -> None:
    path = saved(h=np.zeros((5, 3)), z=np.zeros((4, 3)), bad=np.full((5, 1), np.nan))
    with pytest.raises(DataError, match="array 'z' has 4 rows, and 'h' has 5"):
        Npz(path=path, inputs=("h", "z"), labels=None).open()
    with pytest.raises(DataError, match="array 'bad': row 0 has numbers that are not finite"):
        Npz(path=path, inputs=("h", "bad"), labels=None).open()
    with pytest.raises(DataError, match="no array 'x'"):
        Npz(path=path, inputs=("h", "x"), labels=None).open()
    for fields in ({"inputs": ()}, {"inputs": ("h", "h")}):
        with pytest.raises(ValidationError, match="one name, or several different ones"):
            Npz(path=path, **fields)
    for fields in ({"layout": "chw"}, {"colour": "grey"}, {"size": 3}):
        with pytest.raises(ValidationError, match="several inputs are plain numbers"):
            Npz(path=path, inputs=("h", "z"), **fields)
