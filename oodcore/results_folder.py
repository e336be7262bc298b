"""The folder that a benchmark leaves: results.json holds everything, results.csv the numbers."""

from __future__ import annotations

import csv
import io
import json
import os
import secrets
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from oodcore.errors import ArtifactError
from oodcore.metrics import METRICS

if TYPE_CHECKING:
    from oodcore.results import Results

SCHEMA = 3
COLUMNS = ("detector", "model", "data", "group", "metric", "value", "sd")
"""Of results.csv: a row's fields, and its standard deviation over the repeats."""


def write_results(results: Results, folder: str | Path) -> Path:
    """See ``Results.save``."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows([getattr(row, name) for name in COLUMNS] for row in results.rows)
    write_text(folder / "results.csv", table.getvalue())
    measured = {row.metric for row in results.rows}
    content = {
        "schema": SCHEMA,
        "conventions": {n: metric.meaning for n, metric in METRICS.items() if n in measured},
        **asdict(results),
    }
    lines = (f"{json.dumps(name)}: {json.dumps(value)}" for name, value in content.items())
    write_text(folder / "results.json", "{\n" + ",\n".join(lines) + "\n}\n")
    return folder


def read_results(folder: str | Path) -> Results:
    """See ``Results.load``."""
    from oodcore.results import Results

    path = Path(folder) / "results.json"
    try:
        content = json.loads(path.read_bytes())
        schema = content.pop("schema", None) if isinstance(content, dict) else None
        if type(schema) is not int or schema < 1:
            raise ArtifactError(f"{path} has no schema number: it is not a benchmark's results")
        if schema > SCHEMA:
            raise ArtifactError(
                f"{path} has schema {schema} and this oodcore reads schema {SCHEMA}: upgrade it"
            )
        content.pop("conventions", None)
        if schema == 1:
            _from_schema_1(content)
        return TypeAdapter(Results).validate_json(json.dumps(content))
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ArtifactError(f"{path} is not JSON: {error}") from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "as a whole"
        raise ArtifactError(f"{path}: {where}: {first['msg']}") from None


def _from_schema_1(content: dict[str, Any]) -> None:
    """Take away what the first schema had and no version ever filled: an entry's two times."""
    entries = content.get("entries")
    for entry in entries if isinstance(entries, list) else ():
        if isinstance(entry, dict):
            for name in ("seconds_fit", "seconds_score"):
                entry.pop(name, None)


def write_text(path: Path, text: str) -> None:
    """Put a text file in its place in one step."""
    passing = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        passing.write_text(text, encoding="utf-8", newline="\n")
        os.replace(passing, path)
    finally:
        passing.unlink(missing_ok=True)
