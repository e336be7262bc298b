"""The last layer norm of a backbone, and how to do without it."""

from __future__ import annotations

from torch import nn

from oodcore.errors import ConfigurationError

_NORMS = ("LayerNorm", "RMSNorm")


def drop_last_norm(model: nn.Module) -> None:
    """Put the identity in place of the one layer norm between the last block and the head.

    Raises:
        ConfigurationError: there is none, or more than one.
    """
    parts = list(model.named_modules())
    blocks = [place for place, (name, _) in enumerate(parts) if _within_blocks(name)]
    after = parts[blocks[-1] + 1 :] if blocks else []
    names = [name for name, part in after if type(part).__name__.endswith(_NORMS)]
    if len(names) != 1:
        raise ConfigurationError(
            f"drop_last_norm: a {type(model).__name__} has no single layer norm between its blocks "
            f"and its head; it has {', '.join(names) or 'none'}"
        )
    *above, name = names[0].split(".")
    setattr(model.get_submodule(".".join(above)), name, nn.Identity())


def _within_blocks(name: str) -> bool:
    return any(part.isdigit() for part in name.split("."))
