"""networks: classifiers, named in configurations as importable factories."""

from __future__ import annotations

from oodcore_plugins.networks.residual import resnet18, wide_resnet
from oodcore_plugins.networks.small import digits_cnn, mlp, mnist_convnet

__all__ = ["digits_cnn", "mlp", "mnist_convnet", "resnet18", "wide_resnet"]
