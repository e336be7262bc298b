"""The registry: finds plugins, remembers who brought what, and what went wrong."""

from __future__ import annotations

import importlib.metadata
import os
import re
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

import pluggy

from oodcore import hookspecs
from oodcore.errors import ConfigurationError, PluginError, PluginWarning

if TYPE_CHECKING:
    from oodcore.component import Component

GROUP = "oodcore"
OWN = "oodcore"
UNNAMED = "unnamed"
"""Stands for the distribution of what was registered by hand and installed by none."""
SLOTS: Mapping[str, str] = {
    "extractor": "oodcore.extractor:Extractor",
    "statistic": "oodcore.statistic:Statistic",
    "scorer": "oodcore.scorer:Scorer",
    "shaper": "oodcore.scorer:Shaper",
    "regularizer": "oodcore.regularizer:Regularizer",
    "source": "oodcore.data:Source",
}


@dataclass(frozen=True)
class Plugin:
    """One plugin and what became of it.

    ``components`` holds (slot, kind) pairs; ``error`` says why it was left out, or is None.
    """

    name: str
    distribution: str
    version: str
    module: str
    components: tuple[tuple[str, str], ...] = ()
    error: str | None = None

    def __str__(self) -> str:
        return f"{self.name} ({self.distribution} {self.version})"


@dataclass
class _Staged:
    """What the plugin that is registering at this moment has brought so far."""

    classes: list[tuple[str, type[Component]]] = field(default_factory=list)


class Registry:
    """All components of all plugins, by slot and kind.

    Installed plugins are found on first use, through the entry-point group ``oodcore``. A plugin
    is taken whole or left out whole.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._loaded = self._loading = False
        self._classes: dict[str, dict[str, type[Component]]] = {slot: {} for slot in SLOTS}
        self._owners: dict[tuple[str, str], Plugin] = {}
        self._plugins: list[Plugin] = []
        self._staged = _Staged()
        self._manager = pluggy.PluginManager("oodcore")
        self._manager.add_hookspecs(hookspecs)
        for slot in SLOTS:
            hook = getattr(self._manager.hook, f"register_{slot}s")
            hook.call_historic(kwargs={"register": self._stager(slot)})

    # -- looking up

    def get(self, slot: str, kind: str) -> type[Component]:
        """The class of a kind.

        Raises:
            PluginError: no plugin brings it; the message names near kinds and left-out plugins.
        """
        cls = self.find(slot, kind)
        if cls is None:
            raise PluginError(self.unknown(slot, kind))
        return cls

    def find(self, slot: str, kind: str) -> type[Component] | None:
        """The class of a kind, or None."""
        return self.all(slot).get(kind)

    def all(self, slot: str) -> Mapping[str, type[Component]]:
        """Every class of a slot, by kind, in alphabetical order."""
        if slot not in SLOTS:
            raise ConfigurationError(f"unknown slot '{slot}'; the slots are: {', '.join(SLOTS)}")
        self.load()
        with self._lock:
            return dict(sorted(self._classes[slot].items()))

    def build(self, slot: str, spec: Any) -> Component:
        """An instance from a kind, a mapping with a kind, or an instance (given back as it is).

        Raises:
            ConfigurationError: the specification is wrong; the message says where and why.
        """
        from pydantic import ValidationError
        from pydantic_core import PydanticCustomError

        from oodcore.component import Slot, named

        try:
            return named(slot, spec)
        except PydanticCustomError as error:
            raise ConfigurationError(f"{slot}: {error.message()}") from None
        except ValidationError as error:
            from oodcore.document import Document
            from oodcore.messages import explain

            text = explain(error, at=slot, document=Document(spec), wanted=Slot(slot))
            raise ConfigurationError(text) from None

    def owner(self, component: Component | type[Component]) -> Plugin | None:
        """The plugin that brought a component's class; None if nobody registered it."""
        cls = component if isinstance(component, type) else type(component)
        kind = getattr(cls, "kind", None)
        if kind is None or self.find(cls.slot, kind) is not cls:
            return None
        return self._owners[cls.slot, kind]

    def plugins(self) -> tuple[Plugin, ...]:
        """Every plugin that was found or registered, left-out ones too."""
        self.load()
        return tuple(self._plugins)

    def unknown(self, slot: str, kind: str) -> str:
        """What to say about a kind that no plugin brings."""
        from oodcore.component import suggestion

        known = list(self.all(slot))
        other = [name for name in SLOTS if kind in self._classes[name]]
        near = f" (it is {one(other[0])});" if other else suggestion(kind, known) or ";"
        text = f"unknown {slot} '{kind}'{near} installed: {', '.join(known) or 'none'}"
        left = [f"{plugin}: {plugin.error}" for plugin in self._plugins if plugin.error]
        return text + (f"; left out: {'; '.join(left)}" if left else "")

    # -- registering

    def register(self, plugin: Any, name: str | None = None) -> Plugin:
        """Register a plugin (a module or an object with hook implementations) by hand.

        Raises:
            PluginError: the plugin is invalid or brings a kind that is taken; nothing is
                registered.
        """
        self.load()
        title = name or str(getattr(plugin, "__name__", type(plugin).__name__))
        record = Plugin(title, *_distribution_of(plugin), module=title)
        return self._admit(plugin, record)

    @contextmanager
    def using(self, plugin: Any) -> Iterator[Plugin]:
        """Register a plugin for the length of a with-block."""
        record = self.register(plugin)
        try:
            yield record
        finally:
            self._dismiss(plugin, record)

    def load(self) -> None:
        """Find and register the installed plugins; the first use of the registry does it.

        A plugin that fails is left out with one warning. ``OODCORE_STRICT_PLUGINS=1`` raises
        instead. ``OODCORE_PLUGINS=a,b`` admits only these third-party distributions.
        """
        if self._loaded:
            return
        with self._lock:
            if self._loaded or self._loading:
                return
            self._loading = True
            try:
                for distribution, version, entry in _entry_points():
                    self._load(Plugin(entry.name, distribution, version, entry.value), entry)
                self._loaded = True
            finally:
                self._loading = False
        for plugin in self._plugins:
            if plugin.error:
                text = f"plugin {plugin} is left out: {plugin.error}"
                warnings.warn(text, PluginWarning, stacklevel=2)

    def _load(self, record: Plugin, entry: importlib.metadata.EntryPoint) -> None:
        if any(plugin.module == record.module for plugin in self._plugins):
            return
        try:
            self._admit(entry.load(), record)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            reason = str(error) if isinstance(error, PluginError) else _shown(error)
            if os.environ.get("OODCORE_STRICT_PLUGINS") == "1":
                raise PluginError(f"plugin {record} failed: {reason}") from error
            self._plugins.append(replace(record, error=reason))

    def _admit(self, plugin: Any, record: Plugin) -> Plugin:
        with self._lock:
            if self._manager.is_registered(plugin):
                raise PluginError(f"plugin {record.name} is registered already")
            self._staged = _Staged()
            try:
                self._manager.register(plugin, name=f"{record.distribution}:{id(plugin)}")
                self._refuse_misspelt(plugin)
                return self._commit(record)
            except BaseException as error:
                if self._manager.is_registered(plugin):
                    self._manager.unregister(plugin)
                if isinstance(error, pluggy.PluginValidationError):
                    raise PluginError(str(error)) from None
                raise
            finally:
                self._staged = _Staged()

    def _dismiss(self, plugin: Any, record: Plugin) -> None:
        with self._lock:
            self._manager.unregister(plugin)
            self._plugins.remove(record)
            for slot, kind in record.components:
                del self._classes[slot][kind], self._owners[slot, kind]

    def _stager(self, slot: str) -> hookspecs.Register:
        def register(cls: type[Any]) -> None:
            self._staged.classes.append((slot, cls))

        return register

    def _refuse_misspelt(self, plugin: Any) -> None:
        callers = self._manager.get_hookcallers(plugin)
        if not callers:
            raise PluginError("it brings nothing: no function in it is marked @oodcore.hookimpl")
        for caller in callers:
            own = [hook for hook in caller.get_hookimpls() if hook.plugin is plugin]
            if not caller.has_spec() and not all(hook.optionalhook for hook in own):
                from oodcore.component import suggestion

                known = [f"register_{slot}s" for slot in SLOTS]
                raise PluginError(
                    f"there is no hook '{caller.name}'{suggestion(caller.name, known)}"
                )

    def _commit(self, record: Plugin) -> Plugin:
        from oodcore.component import faults

        staged = self._staged.classes
        for slot, cls in staged:
            if fault := faults(cls, _base(slot)):
                raise PluginError(fault)
        taken: dict[tuple[str, str], str] = {k: str(owner) for k, owner in self._owners.items()}
        for slot, cls in staged:
            if owner := taken.get((slot, cls.kind)):
                raise PluginError(
                    f"{record} brings the {slot} '{cls.kind}', which {owner} has brought already"
                )
            taken[slot, cls.kind] = str(record)
        admitted = replace(record, components=tuple((slot, cls.kind) for slot, cls in staged))
        for slot, cls in staged:
            self._classes[slot][cls.kind] = cls
            self._owners[slot, cls.kind] = admitted
        self._plugins.append(admitted)
        return admitted


def _shown(error: BaseException) -> str:
    """An error as it shows itself, if it can, in characters that can be written anywhere."""
    try:
        return repr(error).encode("utf-8", "backslashreplace").decode()
    except Exception:  # noqa: BLE001 - the plugin's class, which may be broken as well
        return type(error).__name__


def one(slot: str) -> str:
    """A slot's name with its article: "a scorer", "an extractor"."""
    return f"{'an' if slot[0] in 'aeiou' else 'a'} {slot}"


def _base(slot: str) -> type[Component]:
    module, _, name = SLOTS[slot].partition(":")
    base: type[Component] = getattr(import_module(module), name)
    return base


def _normal(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def _entry_points() -> list[tuple[str, str, importlib.metadata.EntryPoint]]:
    """(distribution, version, entry point) of every admitted plugin, oodcore's own first."""
    admitted = os.environ.get("OODCORE_PLUGINS")
    allowed = None if admitted is None else {_normal(n.strip()) for n in admitted.split(",")}
    found: dict[tuple[str, str], tuple[str, str, importlib.metadata.EntryPoint]] = {}
    for entry in importlib.metadata.entry_points(group=GROUP):
        name, version = _identity(entry)
        if name == OWN or allowed is None or name in allowed:
            found.setdefault((name, entry.name), (name, version, entry))
    return sorted(found.values(), key=lambda item: (item[0] != OWN, item[0], item[2].name))


def _identity(entry: importlib.metadata.EntryPoint) -> tuple[str, str]:
    """Name and version of the distribution that declares an entry point.

    A distribution whose metadata is damaged has neither, and must not take the others with it.
    """
    metadata = entry.dist.metadata if entry.dist else None
    name, version = (metadata["Name"], metadata["Version"]) if metadata else (None, None)
    return _normal(name) if name else "unknown", version or "unknown"


def _distribution_of(plugin: Any) -> tuple[str, str]:
    """The distribution that installed a plugin's module, if one did."""
    module = getattr(plugin, "__module__", None) or getattr(plugin, "__name__", "")
    top = str(module).partition(".")[0]
    for name in _packages().get(top, ()):
        return _normal(name), importlib.metadata.version(name)
    return UNNAMED, "0"


@cache
def _packages() -> Mapping[str, list[str]]:
    return importlib.metadata.packages_distributions()


registry = Registry()
"""The one registry of this process."""
