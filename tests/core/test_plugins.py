from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import textwrap
import threading
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import oodcore
from oodcore.errors import ConfigurationError, PluginError, PluginWarning
from oodcore.plugins import SLOTS, Registry

HEADER = """
import oodcore

class {name}(oodcore.Source):
    kind = "{kind}"

    def open(self):
        return []
"""
HOOK = """
@oodcore.hookimpl
def register_sources(register):
    register({name})
"""


class Shelf:
    """Distributions that are installed in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def entry_points(self, *, group: str) -> list[importlib.metadata.EntryPoint]:
        distributions = importlib.metadata.distributions(path=[str(self.folder)])
        return [e for d in distributions for e in d.entry_points if e.group == group]

    def module(self, name: str, text: str) -> None:
        (self.folder / f"{name}.py").write_text(textwrap.dedent(text))

    def install(self, distribution: str, entries: dict[str, str], version: str = "1.0") -> None:
        info = self.folder / f"{re.sub(r'[-.]', '_', distribution)}-{version}.dist-info"
        info.mkdir()
        lines = "".join(f"{name} = {value}\n" for name, value in entries.items())
        (info / "entry_points.txt").write_text(f"[oodcore]\n{lines}")
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n"
        )

    def plugin(self, distribution: str, kind: str, *, text: str | None = None) -> str:
        """A distribution with one module that brings one source; the module's name."""
        module = re.sub(r"\W", "_", f"{distribution}_{kind}_module")
        name = kind.title().replace("_", "")
        default = (HEADER + HOOK).format(name=name, kind=kind)
        self.module(module, default if text is None else text)
        self.install(distribution, {kind: module})
        return module


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """A shelf on which alone a registry looks."""
    oodcore.registry.load()
    before = set(sys.modules)
    monkeypatch.delenv("OODCORE_PLUGINS", raising=False)
    monkeypatch.delenv("OODCORE_STRICT_PLUGINS", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    shelf = Shelf(tmp_path)
    monkeypatch.setattr(importlib.metadata, "entry_points", shelf.entry_points)
    yield shelf
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", None)):
            del sys.modules[name]


def loaded(expected: int = 0) -> tuple[Registry, list[str]]:
    """A registry that has looked for plugins, and what it warned of."""
    registry = Registry()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        registry.load()
    messages = [str(w.message) for w in caught if issubclass(w.category, PluginWarning)]
    assert len(messages) == expected, messages
    return registry, messages


class Bring:
    """A plugin in memory that registers classes."""

    def __init__(self, *classes: Any) -> None:
        self.classes = classes

    @oodcore.hookimpl
    def register_sources(self, register: Any) -> None:
        for cls in self.classes:
            register(cls)


def source(kind: str) -> Any:
    return type("Made", (oodcore.Source,), {"kind": kind, "open": lambda self: []})


# Finding


def test_installed_plugins_are_found(shelf):
    shelf.plugin("oodcore-one", "one")
    shelf.plugin("oodcore-two", "two")
    registry, _ = loaded()
    assert list(registry.all("source")) == ["one", "two"]
    assert registry.get("source", "one").__name__ == "One"
    assert registry.all("scorer") == {}


def test_installed_plugins_are_found_by_a_process_of_its_own(tmp_path):
    shelf = Shelf(tmp_path)
    shelf.plugin("oodcore-one", "one")
    shelf.plugin("oodcore-bad", "bad", text="raise RuntimeError('at import')")
    code = """
        import sys, warnings
        warnings.simplefilter("ignore")
        import oodcore
        assert "torch" not in sys.modules
        plugin = oodcore.registry.owner(oodcore.registry.get("source", "one"))
        print(plugin, oodcore.registry.get("source", "digits").kind)
        print([str(p) for p in oodcore.registry.plugins() if p.error])
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stderr == ""
    assert result.stdout.splitlines() == [
        "one (oodcore-one 1.0) digits",
        "['bad (oodcore-bad 1.0)']",
    ]


def test_nothing_is_imported_before_the_first_look(shelf):
    module = shelf.plugin("oodcore-one", "one")
    registry = Registry()
    assert module not in sys.modules
    registry.find("source", "one")
    assert module in sys.modules


def test_a_plugin_is_loaded_once(shelf):
    shelf.plugin("oodcore-one", "one")
    registry, _ = loaded()
    first = registry.get("source", "one")
    registry.load()
    assert registry.get("source", "one") is first
    assert len(registry.plugins()) == 1


def test_provenance(shelf):
    module = shelf.plugin("Oodcore.One", "one")
    registry, _ = loaded()
    cls = registry.get("source", "one")
    plugin = registry.owner(cls)
    assert plugin == registry.owner(cls())
    assert plugin == registry.plugins()[0]
    assert (plugin.name, plugin.distribution, plugin.version) == ("one", "oodcore-one", "1.0")
    assert plugin.module == module
    assert plugin.components == (("source", "one"),)
    assert str(plugin) == "one (oodcore-one 1.0)"
    assert registry.owner(source("one")) is None
    assert registry.owner(source("nowhere")) is None


def test_one_plugin_may_fill_several_slots(shelf):
    shelf.plugin(
        "oodcore-many",
        "many",
        text=HEADER.format(name="A", kind="a")
        + HEADER.format(name="B", kind="b")
        + """
class Same(oodcore.Scorer):
    kind = "a"

    def needs(self):
        return frozenset()

    def score(self, features, state):
        return features.logits[:, 0]

@oodcore.hookimpl
def register_sources(register):
    register(A)
    register(B)

@oodcore.hookimpl
def register_scorers(register):
    register(Same)
""",
    )
    registry, _ = loaded()
    (plugin,) = registry.plugins()
    assert sorted(plugin.components) == [("scorer", "a"), ("source", "a"), ("source", "b")]
    assert registry.get("scorer", "a") is not registry.get("source", "a")


def test_two_entry_points_to_one_module_are_one_plugin(shelf):
    module = shelf.plugin("oodcore-one", "one")
    shelf.install("oodcore-two", {"again": module})
    registry, _ = loaded()
    assert [str(plugin) for plugin in registry.plugins()] == ["one (oodcore-one 1.0)"]


def test_two_entry_points_to_one_broken_module_warn_once(shelf):
    module = shelf.plugin("oodcore-one", "one", text="1 / 0")
    shelf.install("oodcore-two", {"again": module})
    loaded(expected=1)


def test_an_entry_point_may_name_an_object(shelf):
    text = (
        HEADER.format(name="One", kind="one")
        + """
class Plugin:
    @oodcore.hookimpl
    def register_sources(self, register):
        register(One)

plugin = Plugin()
"""
    )
    shelf.module("object_module", text)
    shelf.install("oodcore-one", {"one": "object_module:plugin"})
    registry, _ = loaded()
    assert list(registry.all("source")) == ["one"]


# What goes wrong


BROKEN = {
    "import": ("import a_module_that_is_nowhere", 'ModuleNotFoundError("No module named'),
    "raises": ("1 / 0", "ZeroDivisionError"),
    "exits": ("raise SystemExit(3)", "SystemExit(3)"),
    "escapes": ("class Odd(BaseException):\n    pass\nraise Odd('far')", "Odd('far')"),
    "closes": ("raise GeneratorExit", "GeneratorExit()"),
    "cannot_be_shown": (
        "class Odd(Exception):\n    def __repr__(self):\n        raise ValueError\nraise Odd",
        "Odd",
    ),
    "cannot_be_written": ("raise ValueError('\\ud800')", "ValueError('\\ud800')"),
    "syntax": ("def f(:", "SyntaxError"),
    "hook_raises": (
        HEADER.format(name="A", kind="a")
        + """
@oodcore.hookimpl
def register_sources(register):
    register(A)
    raise ValueError("half way")
""",
        "ValueError('half way')",
    ),
    "misspelt": (
        HEADER.format(name="A", kind="a")
        + """
@oodcore.hookimpl
def register_sources(register):
    register(A)

@oodcore.hookimpl
def register_scorer(register):
    pass
""",
        "there is no hook 'register_scorer'; did you mean 'register_scorers'?",
    ),
    "argument": (
        HEADER.format(name="A", kind="a")
        + """
@oodcore.hookimpl
def register_sources(registre):
    registre(A)
""",
        "registre",
    ),
    "unmarked": (
        HEADER.format(name="A", kind="a")
        + """
def register_sources(register):
    register(A)
""",
        "no function in it is marked @oodcore.hookimpl",
    ),
    "no_class": (
        "import oodcore\n@oodcore.hookimpl\ndef register_sources(register):\n    register(3)",
        "3 is not a subclass of Source",
    ),
    "other_slot": (
        HEADER.format(name="A", kind="a")
        + "\n@oodcore.hookimpl\ndef register_scorers(register):\n    register(A)",
        "is not a subclass of Scorer",
    ),
    "no_kind": (
        """
import oodcore

class A(oodcore.Source):
    def open(self):
        return []
"""
        + HOOK.format(name="A"),
        "A needs a kind",
    ),
    "list_field": (
        HEADER.format(name="A", kind="a")
        + "\nA = type('A', (A,), {'__annotations__': {'x': list[int]}, 'x': [], '__module__': 'm'})"
        + HOOK.format(name="A"),
        "A.x: a field cannot be a list",
    ),
    "good_then_bad": (
        HEADER.format(name="A", kind="a")
        + "\n@oodcore.hookimpl\ndef register_sources(register):\n"
        + "    register(A)\n    register(int)",
        "is not a subclass of Source",
    ),
    "kind_twice": (
        HEADER.format(name="A", kind="a")
        + HEADER.format(name="B", kind="a")
        + "\n@oodcore.hookimpl\ndef register_sources(register):\n    register(A)\n    register(B)",
        "brings the source 'a', which broken (oodcore-broken 1.0) has brought already",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_plugin_that_fails_is_left_out_whole(name, shelf, monkeypatch):
    text, reason = BROKEN[name]
    shelf.plugin("oodcore-broken", "broken", text=text)
    shelf.plugin("oodcore-apart", "first")
    shelf.plugin("oodcore-zebra", "last")
    registry, messages = loaded(expected=1)
    assert messages[0].startswith("plugin broken (oodcore-broken 1.0) is left out: ")
    assert reason in messages[0]
    assert list(registry.all("source")) == ["first", "last"]
    assert registry.all("scorer") == {}
    failed = [plugin for plugin in registry.plugins() if plugin.error]
    assert [str(plugin) for plugin in failed] == ["broken (oodcore-broken 1.0)"]
    assert reason in str(failed[0].error)
    assert failed[0].components == ()
    monkeypatch.setattr("oodcore.component.registry", registry)
    assert registry.build("source", "last").kind == "last"
    with pytest.raises(ConfigurationError) as error:
        registry.build("source", "a")
    assert "left out: broken (oodcore-broken 1.0): " in str(error.value)
    assert reason in str(error.value)


def test_the_entry_point_of_a_module_that_is_not_there(shelf):
    shelf.install("oodcore-gone", {"gone": "a_module_that_is_nowhere"})
    shelf.install("oodcore-half", {"half": "json:nothing"})
    _, messages = loaded(expected=2)
    assert "ModuleNotFoundError" in messages[0]
    assert "AttributeError" in messages[1]


def test_a_warning_that_is_an_error_does_not_stop_the_others(shelf):
    shelf.plugin("oodcore-bad", "bad", text="1 / 0")
    shelf.plugin("oodcore-one", "one")
    registry = Registry()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(PluginWarning):
            registry.load()
        assert list(registry.all("source")) == ["one"]
    assert len(registry.plugins()) == 2


def test_an_interrupt_goes_through(shelf):
    shelf.plugin("oodcore-slow", "slow", text="raise KeyboardInterrupt")
    registry = Registry()
    with pytest.raises(KeyboardInterrupt):
        registry.load()


def test_strict_mode_raises(shelf, monkeypatch):
    monkeypatch.setenv("OODCORE_STRICT_PLUGINS", "1")
    shelf.plugin("oodcore-bad", "bad", text="1 / 0")
    shelf.plugin("oodcore-a", "fine")
    registry = Registry()
    for _ in range(2):
        with pytest.raises(
            PluginError, match=r"plugin bad \(oodcore-bad 1.0\) failed: ZeroDivisionError"
        ):
            registry.all("source")
    monkeypatch.setenv("OODCORE_STRICT_PLUGINS", "0")
    with pytest.warns(PluginWarning):
        assert list(registry.all("source")) == ["fine"]


def test_metadata_that_is_damaged_hurts_nobody_else(shelf):
    shelf.plugin("oodcore-one", "one")
    shelf.plugin("oodcore-two", "two")
    (shelf.folder / "oodcore_two-1.0.dist-info" / "METADATA").write_text("")
    registry, _ = loaded()
    assert list(registry.all("source")) == ["one", "two"]


# Who comes first


def test_a_taken_kind_is_the_later_ones_error_and_names_both(shelf):
    shelf.plugin("oodcore-a", "same")
    text = HEADER.format(name="Fresh", kind="fresh") + HEADER.format(name="Same", kind="same")
    text += "\n@oodcore.hookimpl\ndef register_sources(register):\n    register(Fresh)\n"
    shelf.plugin("oodcore-b", "other", text=text + "    register(Same)")
    registry, messages = loaded(expected=1)
    assert (
        "other (oodcore-b 1.0) brings the source 'same', which same (oodcore-a 1.0) has brought"
        in messages[0]
    )
    assert list(registry.all("source")) == ["same"]
    assert registry.owner(registry.get("source", "same")).distribution == "oodcore-a"


def test_oodcores_own_come_first(shelf):
    shelf.plugin("aaa", "same")
    shelf.plugin("oodcore", "own", text=(HEADER + HOOK).format(name="Same", kind="same"))
    registry, messages = loaded(expected=1)
    assert "which own (oodcore 1.0) has brought already" in messages[0]
    assert registry.owner(registry.get("source", "same")).distribution == "oodcore"
    assert [plugin.distribution for plugin in registry.plugins()] == ["oodcore", "aaa"]


# Who is let in


@pytest.mark.parametrize(
    ("allowed", "kinds"),
    [
        (None, ["one", "own", "two"]),
        ("", ["own"]),
        ("oodcore-one", ["one", "own"]),
        ("Oodcore_One", ["one", "own"]),
        (" oodcore.one , oodcore-two", ["one", "own", "two"]),
        ("one", ["own"]),
        ("nobody", ["own"]),
    ],
)
def test_only_those_allowed_are_imported(allowed, kinds, shelf, monkeypatch):
    modules = {
        "own": shelf.plugin("oodcore", "own"),
        "one": shelf.plugin("oodcore-one", "one"),
        "two": shelf.plugin("oodcore_two", "two"),
    }
    if allowed is not None:
        monkeypatch.setenv("OODCORE_PLUGINS", allowed)
    registry, _ = loaded()
    assert list(registry.all("source")) == kinds
    assert {kind for kind, module in modules.items() if module in sys.modules} == set(kinds)


# By hand


def test_using_lasts_as_long_as_the_block(shelf):
    registry, _ = loaded()
    plugin = Bring(source("one"))
    with registry.using(plugin) as record:
        assert registry.owner(registry.get("source", "one")) == record
        assert record.name == "Bring"
        assert record.components == (("source", "one"),)
        assert record in registry.plugins()
    assert registry.find("source", "one") is None
    assert registry.plugins() == ()
    with registry.using(plugin):
        assert registry.find("source", "one") is not None


def test_using_ends_with_an_error_too(shelf):
    registry, _ = loaded()
    with pytest.raises(RuntimeError), registry.using(Bring(source("one"))):
        raise RuntimeError
    assert registry.find("source", "one") is None


def test_using_several_at_once(shelf):
    registry, _ = loaded()
    one, two = Bring(source("one")), Bring(source("two"))
    with registry.using(one):
        with registry.using(two):
            assert list(registry.all("source")) == ["one", "two"]
        assert list(registry.all("source")) == ["one"]


def test_registering_by_hand_is_all_or_nothing(shelf):
    registry, _ = loaded()
    registry.register(Bring(source("one")), name="mine")
    with pytest.raises(
        PluginError,
        match=r"yours \(\S+ \S+\) brings the source 'one', which mine \(\S+ \S+\) has brought",
    ):
        registry.register(Bring(source("two"), source("one")), name="yours")
    assert list(registry.all("source")) == ["one"]
    assert [plugin.name for plugin in registry.plugins()] == ["mine"]
    registry.register(Bring(source("two")), name="yours")
    assert list(registry.all("source")) == ["one", "two"]


def test_what_failed_may_be_tried_again(shelf):
    registry, _ = loaded()
    plugin = Bring(source("one"))
    with registry.using(Bring(source("one"))), pytest.raises(PluginError, match="has brought"):
        registry.register(plugin)
    registry.register(plugin)
    assert list(registry.all("source")) == ["one"]


def test_the_same_object_is_not_registered_twice(shelf):
    registry, _ = loaded()
    plugin = Bring(source("one"))
    registry.register(plugin)
    with pytest.raises(PluginError, match="registered already"):
        registry.register(plugin)
    assert list(registry.all("source")) == ["one"]


def test_registering_what_is_no_plugin(shelf):
    registry, _ = loaded()
    with pytest.raises(PluginError, match="brings nothing"):
        registry.register(SimpleNamespace(x=1))


def test_a_module_registered_by_hand_knows_its_distribution(shelf):
    registry, _ = loaded()
    assert registry.register(Bring(source("one"))).distribution == "unnamed"
    module = SimpleNamespace(register_sources=Bring(source("two")).register_sources)
    module.__name__ = "yaml_thing"
    module.__module__ = "pluggy.thing"
    record = registry.register(module)
    assert record.distribution == "pluggy"
    assert record.version == importlib.metadata.version("pluggy")


def test_a_plugin_may_use_the_registry_while_it_loads(shelf):
    text = (
        HEADER.format(name="Two", kind="two")
        + """
@oodcore.hookimpl
def register_sources(register):
    import oodcore.plugins
    seen.append(list(the_registry[0].all("source")))
    register(Two)

seen = []
the_registry = []
"""
    )
    shelf.plugin("oodcore-one", "one")
    module = shelf.plugin("oodcore-two", "two", text=text)
    registry = Registry()
    __import__(module)
    sys.modules[module].the_registry.append(registry)
    assert list(registry.all("source")) == ["one", "two"]
    assert sys.modules[module].seen == [["one"]]


# Asking


def test_an_unknown_kind_is_answered(shelf):
    shelf.plugin("oodcore-one", "energetic")
    shelf.plugin("oodcore-bad", "bad", text="import a_module_that_is_nowhere")
    registry, _ = loaded(expected=1)
    with pytest.raises(PluginError) as error:
        registry.get("source", "energetc")
    assert str(error.value) == (
        "unknown source 'energetc'; did you mean 'energetic'? installed: energetic; "
        "left out: bad (oodcore-bad 1.0): "
        "ModuleNotFoundError(\"No module named 'a_module_that_is_nowhere'\")"
    )
    assert registry.unknown("scorer", "zzz").startswith("unknown scorer 'zzz'; installed: none")
    assert registry.unknown("scorer", "energetic").startswith(
        "unknown scorer 'energetic' (it is a source); installed: none"
    )


def test_an_unknown_slot_is_answered(shelf):
    registry, _ = loaded()
    with pytest.raises(ConfigurationError, match="unknown slot 'scorers'; the slots are: extr"):
        registry.all("scorers")


def test_what_all_gives_is_a_copy(shelf):
    registry, _ = loaded()
    with registry.using(Bring(source("one"))):
        given = registry.all("source")
        given.clear()
        assert list(registry.all("source")) == ["one"]


def test_every_slot_has_a_base_class_and_a_hook():
    from oodcore import hookspecs

    for slot, home in SLOTS.items():
        module, _, name = home.partition(":")
        base = getattr(__import__(module, fromlist=[name]), name)
        assert base.slot == slot
        assert callable(getattr(hookspecs, f"register_{slot}s"))


# Building


def test_build(shelf):
    registry = oodcore.registry

    class Sized(oodcore.Source):
        kind = "sized_thing"
        size: int = 1

        def open(self) -> Any:
            return []

    with registry.using(Bring(Sized)):
        built = registry.build("source", "sized_thing")
        assert built == Sized()
        assert registry.build("source", built) is built
        assert registry.build("source", {"kind": "sized_thing", "size": 3}) == Sized(size=3)
        with pytest.raises(ConfigurationError) as error:
            registry.build("source", {"kind": "sized_thing", "size": "3", "sise": 2})
        assert str(error.value).splitlines() == [
            "source.size: must be a whole number, not text '3'",
            "source.sise: unknown field; did you mean 'size'?",
        ]
        with pytest.raises(ConfigurationError, match=r"^source: write a source as its kind"):
            registry.build("source", 3)
        with pytest.raises(ConfigurationError, match=r"^scorer: this is a source 'sized_thing'"):
            registry.build("scorer", built)
        with pytest.raises(ConfigurationError, match=r"^source: unknown source 'sized_thign'; did"):
            registry.build("source", "sized_thign")


# Threads


def test_the_first_look_may_come_from_many_threads(shelf):
    for index in range(4):
        text = (HEADER + HOOK).format(name="A", kind=f"slow_{index}")
        shelf.plugin(
            f"oodcore-{index}", f"slow_{index}", text=f"import time\ntime.sleep(0.02)\n{text}"
        )
    registry = Registry()
    ready = threading.Barrier(8)
    seen: list[Any] = []

    def look() -> None:
        ready.wait()
        seen.append(list(registry.all("source")))

    threads = [threading.Thread(target=look) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [[f"slow_{index}" for index in range(4)]] * 8
    assert len(registry.plugins()) == 4


def test_looking_while_others_register(shelf):
    registry, _ = loaded()
    wrong: list[BaseException] = []
    done = threading.Event()

    def look() -> None:
        while not done.is_set():
            try:
                registry.all("source")
            except RuntimeError as error:
                wrong.append(error)

    thread = threading.Thread(target=look)
    thread.start()
    classes = [source(f"made_{index}") for index in range(60)]
    for cls in classes:
        registry.register(Bring(cls))
    done.set()
    thread.join()
    assert wrong == []
    assert len(registry.all("source")) == 60
