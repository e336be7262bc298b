"""label_smoothing: cross-entropy to softened labels."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field
from torch import Tensor
from torch.nn.functional import cross_entropy

import oodcore
from oodcore.features import Features, required
from oodcore.regularizer import Inner


class LabelSmoothing(oodcore.Regularizer):
    """In place of cross-entropy to the label, cross-entropy to ``(1 - e) onehot + e / K``:

        -(1 - e) log p_y - e / K sum_k log p_k

    The winning run of SURE-OOD uses e = 0.1 in every classification term, those of mixed rows too.

    There is no term, so a ``weight`` above 0 means nothing more than that it takes part.

    Args:
        smoothing: e, the share of the label that is spread over all K classes, in [0, 1).
        weight: 0 switches it off.

    Raises a DataError if the features have no logits.
    """

    kind = "label_smoothing"
    replaces_loss = True
    paper = oodcore.Paper(
        title="Rethinking the Inception Architecture for Computer Vision",
        authors="Christian Szegedy, Vincent Vanhoucke, Sergey Ioffe, Jonathon Shlens, "
        "Zbigniew Wojna",
        venue="CVPR",
        year=2016,
        url="https://arxiv.org/abs/1512.00567",
    )

    smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1

    def criterion(
        self, rows: Features, labels: Tensor, inner: Inner, step: oodcore.Step, state: Any
    ) -> Tensor:
        logits = required(rows.logits, "logits")
        return cross_entropy(logits, labels, reduction="none", label_smoothing=self.smoothing)


@oodcore.hookimpl
def register_regularizers(register: Any) -> None:
    register(LabelSmoothing)
