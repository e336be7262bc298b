"""views: the mean score over crops and mirror images, against views cut by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oodcore import Detector
from oodcore.errors import ConfigurationError, DataError
from oodcore.plugins import registry

IMAGES = torch.rand(7, 2, 6, 9, generator=torch.Generator().manual_seed(0)).double()


class Network(nn.Module):
    """Of images of any size, and not the same for a mirror image."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        kernel = torch.randn(8, 2, 2, 2, generator=generator).double()
        self.weight = nn.Parameter(kernel)
        self.head = nn.Linear(8, 3, dtype=torch.float64)
        with torch.no_grad():
            self.head.weight.copy_(torch.randn(3, 8, generator=generator))
            self.head.bias.zero_()

    def forward(self, inputs: Tensor) -> Tensor:
        maps = F.conv2d(inputs, self.weight).relu()
        logits: Tensor = self.head(maps.mean(dim=(2, 3)))
        return logits


class OfOneSize(Network):
    """Takes images of 6 x 9 pixels alone."""

    def forward(self, inputs: Tensor) -> Tensor:
        assert inputs.shape[2:] == (6, 9)
        return super().forward(inputs)


def by_hand(views, side=None, resize=True):
    """The views of an image, each by its corner."""
    if views == "flips":
        return [IMAGES, torch.from_numpy(IMAGES.numpy()[:, :, :, ::-1].copy())]
    corners = [(0, 0), (0, 9 - side), (6 - side, 0), (6 - side, 9 - side)]
    corners.append((round((6 - side) / 2), round((9 - side) / 2)))
    found = []
    for top, left in corners:
        part = torch.stack([image[:, top : top + side, left : left + side] for image in IMAGES])
        if resize:
            part = F.interpolate(part, (6, 9), mode="bilinear", antialias=True)
        found.append(part)
        if views == "ten_crop":
            found.append(torch.from_numpy(part.numpy()[..., ::-1].copy()))
    return found


@pytest.mark.parametrize("inner", ["msp", "energy", {"kind": "knn", "k": 2}, "mahalanobis"])
@pytest.mark.parametrize(
    ("views", "crop", "resize", "count"),
    [
        ("flips", None, True, 2),
        ("five_crop", 4, True, 5),
        ("five_crop", 3, False, 5),
        ("ten_crop", 5, True, 10),
        ("ten_crop", 6, False, 10),
    ],
)
def test_it_is_the_mean_over_the_views(inner, views, crop, resize, count):
    scorer = {"kind": "views", "scorer": inner, "views": views, "crop": crop, "resize": resize}
    detector = Detector(Network(), scorer=scorer).fit(IMAGES)
    plain = Detector(Network(), scorer=inner).fit(IMAGES)
    seen = by_hand(views, crop, resize)
    assert len(seen) == count
    wanted = np.mean([plain.score(view) for view in seen], axis=0)
    np.testing.assert_allclose(detector.score(IMAGES), wanted, rtol=1e-12)


def test_views_differ_and_a_symmetric_image_has_the_score_of_itself():
    plain = Detector(Network(), scorer="energy")
    flips = Detector(Network(), scorer={"kind": "views", "scorer": "energy"})
    assert (flips.score(IMAGES) != plain.score(IMAGES)).all()
    same = IMAGES + IMAGES.flip(3)
    np.testing.assert_allclose(flips.score(same), plain.score(same), rtol=1e-12)
    whole = {"kind": "views", "scorer": "energy", "views": "five_crop", "crop": 6}
    square = IMAGES[..., :6]
    np.testing.assert_allclose(
        Detector(Network(), scorer=whole).score(square), plain.score(square), rtol=1e-12
    )


def test_a_model_of_one_size_takes_crops_that_are_resized():
    scorer = {"kind": "views", "scorer": "energy", "views": "five_crop", "crop": 4}
    assert np.isfinite(Detector(OfOneSize(), scorer=scorer).score(IMAGES)).all()
    with pytest.raises(DataError, match=r"fails on inputs \[7, 2, 4, 4\]"):
        Detector(OfOneSize(), scorer={**scorer, "resize": False}).score(IMAGES)


@pytest.mark.parametrize(("views", "crop", "passes"), [("flips", None, 2), ("ten_crop", 4, 11)])
def test_how_often_a_row_passes_through_the_model(views, crop, passes):
    detector = Detector(
        Network(), scorer={"kind": "views", "scorer": "msp", "views": views, "crop": crop}
    )
    before = IMAGES.clone()
    detector.score(IMAGES)
    assert torch.equal(IMAGES, before)
    assert detector.model is not None
    assert detector.model.rows_seen == passes * len(IMAGES)


@pytest.mark.parametrize("view", [{"views": "flips"}, {"views": "five_crop", "crop": 4}])
def test_it_goes_with_what_moves_the_input(view):
    """Moving the input of the mean, and the mean over inputs that are moved."""
    views = {"kind": "views", "scorer": "energy", **view}
    moved = {"kind": "perturbed", "scorer": views, "epsilon": 1e-6}
    plain = Detector(Network(), scorer=views).score(IMAGES)
    gradient = Detector(Network(), scorer=moved).score(IMAGES) - plain
    assert (gradient > 0).all()
    inside = {"kind": "views", "scorer": {"kind": "odin", "epsilon": 0.1, "temperature": 1}, **view}
    odin = Detector(Network(), scorer={"kind": "odin", "epsilon": 0.1, "temperature": 1})
    seen = by_hand(view["views"], view.get("crop"))
    wanted = np.mean([odin.score(one) for one in seen], axis=0)
    np.testing.assert_allclose(Detector(Network(), scorer=inside).score(IMAGES), wanted, rtol=1e-9)


def test_views_go_through_the_shapers():
    shaper = {"kind": "react", "percentile": 60}
    scorer = {"kind": "views", "scorer": "energy"}
    both = Detector(Network(), scorer=scorer, shapers=[shaper]).fit(IMAGES)
    one = Detector(Network(), scorer="energy", shapers=[shaper]).fit(IMAGES)
    wanted = (one.score(IMAGES) + one.score(IMAGES.flip(3))) / 2
    np.testing.assert_allclose(both.score(IMAGES), wanted, rtol=1e-12)


def test_what_is_refused():
    for fields, told in (
        ({"crop": 3}, "'flips' takes no crop"),
        ({"views": "five_crop"}, "'five_crop' needs a crop"),
        ({"views": "ten_crop", "crop": 0}, "crop"),
        ({"views": "nine_crop"}, "views"),
    ):
        with pytest.raises(ConfigurationError, match=told):
            registry.build("scorer", {"kind": "views", "scorer": "msp", **fields})
    large = {"kind": "views", "scorer": "msp", "views": "five_crop", "crop": 7}
    with pytest.raises(DataError, match="a crop of 7 pixels does not fit into images of 6 x 9"):
        Detector(Network(), scorer=large).score(IMAGES)
    linear = nn.Linear(4, 3)
    with pytest.raises(DataError, match=r"views are of images.*\[5, 4\]"):
        Detector(linear, scorer={"kind": "views", "scorer": "msp"}).score(torch.zeros(5, 4))
    with pytest.raises(DataError, match="needs a model and its inputs"):
        Detector(scorer={"kind": "views", "scorer": "max_norm"}).score(torch.zeros(5, 4))
