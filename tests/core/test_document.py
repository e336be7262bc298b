from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oodcore.document import DEEPEST, LARGEST, Document, read
from oodcore.errors import ConfigurationError


@pytest.fixture
def reading(tmp_path, monkeypatch):
    """Reads a text as the file ``c.yaml`` in the working directory."""
    monkeypatch.chdir(tmp_path)

    def read_text(text: str | bytes) -> Document:
        raw = text if isinstance(text, bytes) else text.encode()
        (tmp_path / "c.yaml").write_bytes(raw)
        return read("c.yaml")

    return read_text


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1),
        ("-7", -7),
        ("+3", 3),
        ("010", 10),
        ("0o17", 15),
        ("0x1F", 31),
        ("1e-3", 0.001),
        ("1E5", 1e5),
        ("1.", 1.0),
        (".5", 0.5),
        ("-1.5e+2", -150.0),
        (".inf", math.inf),
        ("-.INF", -math.inf),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("off", "off"),
        ("no", "no"),
        ("yes", "yes"),
        ("12:30", "12:30"),
        ("2024-01-01", "2024-01-01"),
        ("1_000", "1_000"),
        ("0b1", "0b1"),
        ("1e", "1e"),
        (".", "."),
        ("nan", "nan"),
        ("'1'", "1"),
        ('"true"', "true"),
        ("''", ""),
        ("|\n  1\n", "1\n"),
        ("<<", "<<"),
        ("[1, [2], {b: 3}]", [1, [2], {"b": 3}]),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text, value, reading):
    read = reading(f"a: {text}\n").data["a"]
    assert read == value
    assert type(read) is type(value)


def test_not_a_number(reading):
    assert math.isnan(reading("a: .nan").data["a"])


def test_values_are_plain(reading):
    data = reading("a: {b: [1, x, 1.5]}\n'c': |\n  text\n").data
    assert data == {"a": {"b": [1, "x", 1.5]}, "c": "text\n"}
    kinds = {type(v) for v in (data, data["a"], data["a"]["b"], *data["a"]["b"], data["c"])}
    assert kinds == {dict, list, int, str, float}


# YAML reads a key of a flow mapping only if it is shorter than 1024 characters, escapes counted.
keys = st.text(max_size=60)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=8,
)


@given(
    value=st.dictionaries(keys, json_values, max_size=3),
    ascii_only=st.booleans(),
    indent=st.sampled_from([None, 2, "\t"]),
)
def test_json_is_read_as_json_reads_it(value, ascii_only, indent, tmp_path_factory):
    path = tmp_path_factory.mktemp("json") / "c.json"
    text = json.dumps(value, ensure_ascii=ascii_only, indent=indent)
    if not ascii_only and not text.isprintable():
        text = json.dumps(value, indent=indent)
    path.write_text(text, encoding="utf-8")
    assert read(path).data == value


def test_every_key_and_item_knows_its_line(reading):
    document = reading(
        "# a comment\n"
        "scorer:\n"
        "  kind: knn\n"
        "  k: 3\n"
        "\n"
        "shapers:\n"
        "  - react\n"
        "  - {kind: ash, percentile: 90}\n"
        "seed: 0\n"
    )
    assert document.marks == {
        ("scorer",): (2, 1),
        ("scorer", "kind"): (3, 3),
        ("scorer", "k"): (4, 3),
        ("shapers",): (6, 1),
        ("shapers", 0): (7, 5),
        ("shapers", 1): (8, 5),
        ("shapers", 1, "kind"): (8, 6),
        ("shapers", 1, "percentile"): (8, 17),
        ("seed",): (9, 1),
    }
    assert document.line(("scorer", "k")) == 4
    assert document.line(("scorer", "missing", "deep")) == 2
    assert document.line(("missing",)) == 0
    assert document.where(("seed",)) == "c.yaml:9: "
    assert document.where(()) == "c.yaml: "
    assert Document({"a": 1}).where(("a",)) == ""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "c.yaml: the file is empty"),
        ("# nothing\n", "c.yaml: the file is empty"),
        ("---\n", "c.yaml: the file is empty"),
        ("- 1\n", "c.yaml:1: a configuration is a mapping (name: value), not a list"),
        ("text", "c.yaml:1: a configuration is a mapping (name: value), not a single value"),
        ("a: 1\nb: 2\na: 3\n", "c.yaml:3: a: given twice; the first is in line 1"),
        (
            "a:\n  - b: 1\n    'b': 2\n",
            "c.yaml:3: a.0.b: given twice; the first is in line 2",
        ),
        ("a: 1\n1: x\n", "c.yaml:2: a name must be text, not '1'; put it in quotes"),
        ("null: x\n", "c.yaml:1: a name must be text, not 'null'; put it in quotes"),
        (
            "a: 1\n? [b]\n: 2\n",
            "c.yaml:2: a name must be text, not a list or mapping; put it in quotes",
        ),
        (
            "a: &x 1\nb: *x\n",
            "c.yaml:2: the alias *x: aliases are not read; repeat the value",
        ),
        ("a: 1\nb: !!python/name:os.system ''\n", "c.yaml:2: the tag tag:yaml.org,2002:python/"),
        ("a: !!python/object/apply:os.system [ls]\n", "c.yaml:1: the tag"),
        ("a: !!str 1\n", "c.yaml:1: the tag"),
        ("a: ! 1\n", "c.yaml:1: the tag !"),
        ("a: 1\n---\nb: 2\n", "c.yaml:2: a second document; one file is one configuration"),
        ("a: 1\nb: [1, 2\n", "c.yaml:3: not YAML: while parsing a flow sequence"),
        ("a: 1\nb: c: d\n", "c.yaml:2: not YAML: mapping values are not allowed here"),
        ("a: 1\n\tb: 2\n", "c.yaml:2: not YAML: "),
        ("a: 'x\n", "c.yaml:2: not YAML: "),
        ("a: \x01\n", "c.yaml: not YAML: "),
        ('a: "\\U99999999"\n', "c.yaml: not YAML: "),
        ('a: 1\nb: "\\ud800"\n', "c.yaml:2: half a surrogate pair"),
        (b"a: 1\nb: \xff\n", "c.yaml:2: not UTF-8; save it as UTF-8"),
        (f"a: {'9' * 5000}\n", "c.yaml:1: a number of 5000 digits cannot be read"),
        (
            "a:\n" + "".join(" " * depth + "- \n" for depth in range(1, 60)),
            f"more than {DEEPEST} mappings and lists inside each other",
        ),
        ("a: " + "[" * 200_000, f"c.yaml:1: more than {DEEPEST} mappings and lists"),
        ("a: " + "x" * LARGEST, f"c.yaml: larger than {LARGEST} bytes; is it a configuration?"),
    ],
)
def test_what_is_refused_is_refused_at_its_line(text, message, reading):
    with pytest.raises(ConfigurationError) as error:
        reading(text)
    assert message in str(error.value)
    assert str(error.value).startswith("c.yaml:")
    assert "\n" not in str(error.value)


def test_an_expansion_of_aliases_never_begins(reading):
    levels = "".join(f"{b}: [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("ab", "bc", strict=True))
    with pytest.raises(ConfigurationError, match="aliases are not read"):
        reading("a: &a [x, x]\n" + levels)


@pytest.mark.parametrize(
    "text", ["\ufeffa: 1", "a: 1\r\n", "%YAML 1.1\n---\na: 1", "&x a: &y 1", "a: 1\n...\n"]
)
def test_what_is_harmless_is_read(text, reading):
    assert reading(text).data == {"a": 1}


def test_a_file_that_cannot_be_opened(tmp_path):
    with pytest.raises(ConfigurationError, match=r"nowhere\.yaml: there is no such file"):
        read(tmp_path / "nowhere.yaml")
    with pytest.raises(ConfigurationError, match="cannot be read"):
        read(tmp_path)


@given(text=st.text("ab:[]{}-?,#&*!|>'\"%@` \n\t\\01.e~<=é\x85", max_size=40))
def test_any_text_is_read_or_refused(text, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(text, encoding="utf-8", newline="")
    try:
        outcome = read(path).data
    except ConfigurationError as error:
        outcome = str(error)
    assert isinstance(outcome, dict) or outcome.startswith(f"{path}:")
