"""The errors that oodcore raises on purpose; each message says what to do."""

from __future__ import annotations


class OodcoreError(Exception):
    """Any error that oodcore raises on purpose."""


class ConfigurationError(OodcoreError, ValueError):
    """A configuration or an argument that oodcore cannot accept."""


class PluginError(OodcoreError):
    """A plugin that cannot be registered, or a component that no plugin brings."""


class PluginWarning(UserWarning):
    """A plugin was left out; everything else works."""


class DataError(OodcoreError, ValueError):
    """Data that oodcore cannot fit on or score: shapes, labels, non-finite values."""


class NotFittedError(OodcoreError, RuntimeError):
    """A detector was asked for what it has not learnt yet."""


class ArtifactError(OodcoreError, ValueError):
    """A saved folder that is damaged, hostile, or not what it says it is."""


class ExtraError(OodcoreError, ImportError):
    """An optional dependency is missing; the message names the extra that brings it."""
