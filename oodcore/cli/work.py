"""What takes time: the demonstration, training, fitting, scoring, benchmarks."""

from __future__ import annotations

import csv
import io
import json
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oodcore.artifact import refuse_to_overwrite
from oodcore.cache import Cache
from oodcore.calibration import check_rows
from oodcore.cli import streams
from oodcore.component import Component
from oodcore.config import DetectorConfig, EnsembleConfig, read, validate
from oodcore.data import Batch, Stream
from oodcore.demo import demo
from oodcore.detector import Detector, load
from oodcore.document import parse
from oodcore.ensemble import Ensemble
from oodcore.errors import ConfigurationError
from oodcore.experiment import REPORT, OnProgress, carry_out
from oodcore.features import Features
from oodcore.metrics import METRICS
from oodcore.participants import detectors_of
from oodcore.plugins import registry
from oodcore.report import write
from oodcore.results import Results, write_text
from oodcore.tables import percent
from oodcore.training import train
from oodcore.training_config import TrainingConfig


def demonstrate(out: Path) -> None:
    """Run the demonstration, print its table, the best detector and where everything is."""
    with _one_thread(), streams.bars() as bars:
        outcome = demo(out, on_progress=_training(bars))
    best = outcome.detectors[outcome.results.best()]
    streams.draw(outcome.results.table())
    streams.write(f"\n{_verdict(outcome.results)}\n")
    for name, files in {
        "report": ["report.html"],
        "results": ["results.csv", "results.json"],
        "detector": ["detector"],
        "models": [
            f"models/{title}" for title in sorted({e.model for e in outcome.results.entries})
        ],
    }.items():
        streams.write(f"{name:<9} {', '.join(str(out / file) for file in files)}")
    command = ["oodcore", "score", str(out / "detector"), _example(outcome.results)]
    command += ["--out", "scores.csv"]
    extractors = [one.extractor for one in detectors_of([best]) if one.extractor]
    for name in dict.fromkeys(name for one in extractors for name in one.code()):
        command += ["--allow", name]
    streams.write(f"\nScore rows with the detector:\n  {shlex.join(command)}")


def train_network(config: Path, out: Path, resume: bool, overwrite: bool) -> None:
    """Train a network, and print where it is, how accurate and how collapsed."""
    document = read(config)
    run = validate(TrainingConfig, document)
    with streams.bars() as bars:
        folder = train(
            run, out, resume=resume, overwrite=overwrite, on_progress=bars.steps("training")
        )
    streams.write(f"trained {run.network.factory}: {_accuracy(folder)}")
    streams.write(f"saved to {folder}; as an extractor: {{kind: run, path: {folder}}}")


def fit_detector(config: Path, out: Path, overwrite: bool, store: bool, cache: Path | None) -> None:
    """Fit and calibrate a detector or an ensemble, save it, and print what was done."""
    document = read(config)
    several = "members" in document.data
    checked = validate(EnsembleConfig if several else DetectorConfig, document)
    if checked.train is None:
        raise ConfigurationError(f"{config}: train: is needed to fit; name the rows to fit on")
    refuse_to_overwrite(out, overwrite)
    if checked.calibrate is not None and (rows := Stream(checked.calibrate).rows) is not None:
        check_rows(rows, checked.false_alarm_rate)
    detector: Detector | Ensemble = (Ensemble if several else Detector).from_config(document)
    if cache is not None:
        for one in detectors_of([detector]):
            one.cache = Cache(cache)
    with streams.bars():
        detector.fit(checked.train, checked.held_out)
        if checked.calibrate is not None:
            detector.calibrate(checked.calibrate, checked.false_alarm_rate)
        detector.save(out, overwrite=overwrite, store=store)
    streams.write(f"fitted {_told(detector)}; {_threshold(detector)}")
    streams.write(f"saved to {out}")


def score_rows(
    artifact: Path,
    given: str,
    out: Path,
    allow: tuple[str, ...],
    sha256: str | None,
    rate: float | None,
    cache: Path | None,
    as_json: bool,
) -> None:
    """Score the rows of a source into a .csv file, and print how many were flagged.

    Args:
        artifact: what ``fit`` saved.
        given: the source: a kind, a mapping in YAML, or a file that holds one.
        out: the file; it is there whole, or not at all.
        allow: code that the artifact may run.
        sha256: of the artifact's manifest.
        rate: the false-alarm rate to predict with; the artifact's own if None.
        cache: the folder that keeps what models say; None for none.
        as_json: print JSON.

    Raises:
        ConfigurationError: the source, the file's name, or a rate without a calibration.
        ArtifactError: as ``oodcore.load``.
        DataError: rows that cannot be scored.
    """
    if out.suffix != ".csv":
        raise ConfigurationError(f"{out}: the scores are written as .csv; give --out NAME.csv")
    if out.is_dir():
        raise ConfigurationError(f"{out} is a folder; give --out a file")
    source = _source(given)
    detector: Detector | Ensemble = load(artifact, allow=allow, sha256=sha256)
    if cache is not None:
        for one in detectors_of([detector]):
            one.cache = Cache(cache)
    rate = _rate(detector, rate)
    rows = _Numbered(source, detector)
    with streams.bars() as bars:
        bars.rows = rows.total
        scores = detector.score(rows)
    columns = {"id": rows.ids(), "score": scores.tolist()}
    answer: dict[str, Any] = {"out": str(out), "rows": len(scores)}
    told = "not calibrated, so nothing is flagged"
    if detector.calibration is not None and rate is not None:
        flagged = detector.calibration.flagged(scores, rate)
        columns["p_value"] = detector.calibration.p_values(scores).tolist()
        columns["prediction"] = [-1 if flag else 1 for flag in flagged]
        answer |= {"flagged": int(flagged.sum()), "false_alarm_rate": rate}
        told = f"{answer['flagged']} flagged at a false-alarm rate of {rate:g}"
    _write_columns(out, columns)
    if as_json:
        streams.write_json(answer)
    else:
        streams.write(f"scored {len(scores)} rows, {told}: {out}")


def run_benchmark(
    config: Path, out: Path, cache: Path | None, overwrite: bool, as_json: bool
) -> None:
    """Train what is to be trained, compare detectors, write results and report, print the table."""
    with streams.bars() as bars:
        outcome = carry_out(
            config, out, overwrite=overwrite, cache=cache, on_progress=_training(bars)
        )
    results, report = outcome.results, out / REPORT
    if as_json:
        streams.write_json(
            {
                "best": results.best(),
                "protocol": results.protocol,
                "repeats": results.repeats,
                "false_alarm_rate": results.configuration.get("false_alarm_rate"),
                "rows": [asdict(row) for row in results.rows],
            }
        )
        return
    streams.draw(results.table())
    streams.write(f"\n{_verdict(results)}\n\n{report}, results.csv and results.json beside it")


def render_report(folder: Path) -> None:
    """Write the report of saved results again."""
    streams.write(str(write(Results.load(folder), folder / "report.html")))


def _training(bars: streams.Bars) -> OnProgress:
    """A bar for each training, once it begins."""
    reports: dict[str, Any] = {}

    def report(title: str, done: int, total: int, numbers: Mapping[str, float]) -> None:
        if title not in reports:
            reports[title] = bars.steps(f"training {title}")
        reports[title](done, total, numbers)

    return report


class _Numbered:
    """The batches of a source, and the ids that went by."""

    def __init__(self, source: Component, detector: Detector | Ensemble) -> None:
        first = detectors_of([detector])[0]
        self._stream = Stream(source, batch_size=first.batch_size, num_workers=first.num_workers)
        self._seen: list[Tensor] = []
        self.total = self._stream.rows

    def __iter__(self) -> Iterator[Batch | Features]:
        self._seen = []
        for batch in self._stream:
            assert batch.ids is not None
            self._seen.append(batch.ids)
            yield batch

    def ids(self) -> list[int]:
        """The ids of the last pass, in its order."""
        return [int(number) for part in self._seen for number in part]


def _rate(detector: Detector | Ensemble, rate: float | None) -> float | None:
    """The false-alarm rate to flag at; None where nothing was calibrated.

    Raises:
        ConfigurationError: a rate, and no calibration, or too few of its rows for the rate.
    """
    if detector.calibration is None:
        if rate is not None:
            raise ConfigurationError(
                "this artifact was not calibrated, so there is no --rate to flag at; fit it with "
                "'calibrate' in its configuration"
            )
        return None
    rate = detector.false_alarm_rate if rate is None else rate
    assert rate is not None
    detector.calibration.threshold(rate)
    return rate


def _source(given: str) -> Component:
    """The source that a kind, a mapping in YAML or a file stands for.

    Raises:
        ConfigurationError: it is none of these.
    """
    if given.lstrip().startswith("{"):
        return registry.build("source", parse(given, "SOURCE").data)
    path = Path(given)
    if path.suffix in (".yaml", ".yml", ".json") and not registry.find("source", given):
        try:
            return registry.build("source", read(path).data)
        except ConfigurationError as error:
            text = str(error)
            raise ConfigurationError(
                text if text.startswith(given) else f"{given}: {text}"
            ) from None
    return registry.build("source", given)


def _write_columns(path: Path, columns: Mapping[str, list[Any]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text.getvalue())


@contextmanager
def _one_thread() -> Iterator[None]:
    """Within it torch computes in one thread.

    On images of 64 pixels several take longer than one, and many times longer where other
    processes want the cores as well.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _verdict(results: Results) -> str:
    """The best detector, and how its false alarms compare with what was asked for."""
    name, main = results.best(), results.main
    mean = "mean " if len(results.ood_data) > 1 else ""
    inside = results.value(name, main, results.id_data.name)
    value = results.mean(name, main) if results.metrics else inside
    text = f"Best: {name}, {mean}{METRICS[main].title} {percent(value)} %"
    measured = results.value(name, "false_alarm_rate", results.id_data.name)
    asked = results.configuration.get("false_alarm_rate")
    if measured is None or asked is None:
        return text
    return (
        f"{text}. It flags {percent(measured)} % of {results.id_data.rows} in-distribution test "
        f"rows; asked for were {100 * asked:g} %."
    )


def _example(results: Results) -> str:
    """An OOD set of a benchmark, as the command line takes it."""
    return json.dumps(results.configuration["ood"][results.ood_data[0].name])


def _accuracy(folder: Path) -> str:
    """The last row of a run's metrics, in words."""
    with (folder / "metrics.csv").open(encoding="utf-8", newline="") as file:
        last = list(csv.DictReader(file))[-1]
    told = [f"{int(last['epoch']) + 1} epochs"]
    for name, word in (("accuracy", "accuracy"), ("validation/accuracy", "on validation rows")):
        if last.get(name):
            told.append(f"{word} {percent(float(last[name]))} %")
    for name in ("wfc", "cfc"):
        if last.get(f"collapse/{name}"):
            told.append(f"{name} {float(last[f'collapse/{name}']):.3g}")
    return ", ".join(told)


def _rows_of(detector: Detector) -> str:
    fitting = detector.fitting
    assert fitting is not None
    held = f" and {fitting.held_rows} held out" if fitting.held_rows else ""
    return f"{fitting.rows} rows{held}"


def _told(detector: Detector | Ensemble) -> str:
    """What was fitted, and on how many rows."""
    if isinstance(detector, Detector):
        return f"{detector.scorer.kind} on {_rows_of(detector)}"
    members = [f"{name} on {_rows_of(member)}" for name, member in detector.members.items()]
    return f"{detector.combination.kind} of {', '.join(members)}"


def _threshold(detector: Detector | Ensemble) -> str:
    calibration, rate = detector.calibration, detector.false_alarm_rate
    if calibration is None or rate is None:
        return "no rows to calibrate on, so no threshold"
    return (
        f"flags scores below {calibration.threshold(rate):.6g}, a false-alarm rate of {rate:g} "
        f"from {len(calibration)} rows"
    )
