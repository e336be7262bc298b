"""Made-up rows that are like those of a trained classifier: classes apart, after a ReLU."""

from __future__ import annotations

import torch
from torch import Tensor

from oodcore import Features, Head


class World:
    """Classes with a centre each, and rows around and between them.

    Args:
        classes: K.
        width: D.
        seed: of everything that is drawn.
    """

    def __init__(self, classes: int, width: int, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.centres = torch.randn(classes, width, generator=self.generator)
        self.weight = 0.8 * self.centres / width**0.5
        self.bias = 0.1 * torch.randn(classes, generator=self.generator)

    @property
    def head(self) -> Head:
        """A head that tells the classes apart."""
        return Head(self.weight, self.bias)

    def known(self, count: int) -> tuple[Tensor, Tensor]:
        """Embeddings ``[count, D]`` float32 and labels ``[count]``; every class occurs."""
        labels = torch.arange(count) % len(self.centres)
        labels = labels[torch.randperm(count, generator=self.generator)]
        return self._around(self.centres[labels]), labels

    def strange(self, count: int) -> Tensor:
        """Embeddings of rows between two classes each, ``[count, D]`` float32."""
        draw = (2, count)
        one, two = torch.randint(0, len(self.centres), draw, generator=self.generator)
        share = torch.rand(count, 1, generator=self.generator)
        return self._around(share * self.centres[one] + (1 - share) * self.centres[two])

    def mixed(self, count: int) -> Tensor:
        """Embeddings of which the first half is in-distribution, ``[count, D]`` float32."""
        return torch.cat([self.known(count // 2)[0], self.strange(count - count // 2)])

    def features(self, embeddings: Tensor, labels: Tensor | None = None) -> Features:
        """Features with this world's head, and the logits that it makes."""
        return Features(embeddings=embeddings, labels=labels, head=self.head)

    def _around(self, middle: Tensor) -> Tensor:
        noise = torch.randn(middle.shape, generator=self.generator)
        return torch.relu(middle + 0.8 * noise)
