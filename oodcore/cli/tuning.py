"""``oodcore tune``: a configuration with better values, and the record of how they were found."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from oodcore.cli import streams
from oodcore.config import DetectorConfig, read, validate
from oodcore.document import Document, parse
from oodcore.errors import ConfigurationError
from oodcore.metrics import METRICS
from oodcore.results import write_text
from oodcore.rewriting import rewritten
from oodcore.tables import percent
from oodcore.tuning import Tuned, choose, tuning_of


def tune_detector(
    config: Path, out: Path, trials: int, cache: Path | None, overwrite: bool, as_json: bool
) -> None:
    """Choose values for a configuration, write it with them, and print what was chosen.

    Args:
        config: the file of a detector.
        out: the file to write; ``study.json`` in place of its suffix is the record.
        trials: how many sets of values are tried at most.
        cache: in place of the configuration's.
        overwrite: whether files that are there may be replaced.
        as_json: print the record.

    Raises:
        ConfigurationError: the configuration, the file's name, or a file that is there.
        OodcoreError: as ``oodcore.tuning.choose``.
    """
    record = out.with_suffix(".study.json")
    for path in (out, record):
        _refuse(path, overwrite)
    document, text = read(config), config.read_bytes().decode("utf-8-sig")
    tuning = tuning_of(document)
    if cache is not None:
        tuning = replace(tuning, options={**tuning.options, "cache": cache})
    with streams.bars() as bars:
        tuned = choose(tuning, trials, bars.steps("tuning"))
    text = _with(text, document, tuned)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(record, json.dumps(tuned.dump(), indent=2, allow_nan=False) + "\n")
    write_text(out, text)
    if as_json:
        streams.write_json({"out": str(out), "record": str(record), **tuned.dump()})
        return
    for line in _told(tuned):
        streams.write(line)
    streams.write(f"saved to {out}; how it was found is in {record}")


def _with(text: str, document: Document, tuned: Tuned) -> str:
    """The configuration's text with the chosen values, read once more to be sure."""
    text = rewritten(text, document.file, tuned.values)
    before = validate(DetectorConfig, document)
    after = validate(DetectorConfig, parse(text, document.file))
    if after != before.model_copy(update={"scorer": tuned.scorer, "shapers": tuned.shapers}):
        raise ConfigurationError(
            f"{document.file}: the chosen values cannot be written into it; write its scorer and "
            "shapers as mappings"
        )
    return text


def _refuse(path: Path, overwrite: bool) -> None:
    if path.suffix not in (".yaml", ".yml", ".json"):
        raise ConfigurationError(f"{path}: a configuration is .yaml, .yml or .json; give --out one")
    if path.is_dir():
        raise ConfigurationError(f"{path} is a folder; give --out a file")
    if os.path.lexists(path) and not overwrite:
        raise ConfigurationError(f"{path} exists; give overwrite=True to replace it")


def _told(tuned: Tuned) -> list[str]:
    title, refused = METRICS[tuned.metric].title, sum(t.value is None for t in tuned.trials)
    mean = "mean " if len(tuned.data["ood"]) > 1 else ""
    tried = f"{len(tuned.trials)} trials" + (f", {refused} refused" if refused else "")
    before = tuned.trials[0].value
    written = "refused as written" if before is None else f"{percent(before)} % as written"
    return [
        f"{mean}{title} {percent(tuned.best.value)} %, {written}; {tried}",
        *_table(tuned.trials[0].values, tuned.best.values),
    ]


def _table(written: Mapping[str, object], chosen: Mapping[str, object]) -> list[str]:
    width = max(map(len, chosen))
    return [
        f"  {place:<{width}}  {json.dumps(value)}"
        + ("" if value == written[place] else f" (was {json.dumps(written[place])})")
        for place, value in chosen.items()
    ]
