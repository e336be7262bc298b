"""The program: its commands and options, its exit codes, and how it says what went wrong.

Nothing of oodcore that is slow to import is imported before a command runs.
"""

from __future__ import annotations

import functools
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from oodcore import __version__
from oodcore.cli import streams
from oodcore.errors import ConfigurationError, OodcoreError

DONE, FAILED, MISUSED, INTERRUPTED, UNREAD = 0, 1, 2, 130, 141
"""Exit codes; the last two are what a shell says of a program that a signal ended."""

# typer has a click of its own in some versions and imports it in others; this is in both.
_UsageError: Any = typer.BadParameter.__mro__[1]
_EVERYWHERE = ("--debug", "--no-plugins")

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Out = Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="The folder to write.")]
Config = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML or JSON file.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]
Cache = Annotated[
    Path | None,
    typer.Option(
        "--cache", metavar="DIR", help="Keep here what the model says, and do not ask it twice."
    ),
]
Allow = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME", help="Code that the artifact may run, as package.module:name."),
]


def main() -> None:
    """The console script ``oodcore``."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a character gets its number, not a traceback.
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run the program on its arguments; returns the exit code.

    0 is done, 1 failed, 2 wrong usage or configuration, 130 interrupted, 141 output that nobody
    reads any more. ``--debug`` and ``--no-plugins`` may stand anywhere before ``--``.
    """
    own = list(arguments)[: arguments.index("--")] if "--" in arguments else list(arguments)
    front = [argument for argument in own if argument in _EVERYWHERE]
    rest = [argument for argument in own if argument not in _EVERYWHERE]
    after = list(arguments)[len(own) :]
    try:
        work = app(
            [*front, *(rest or ["--help"]), *after], prog_name="oodcore", standalone_mode=False
        )
        if isinstance(work, int):
            return work
        with streams.readable_warnings():
            work()
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001
        if "--debug" in front:
            traceback.print_exc()
        return _explained(error)
    return DONE


def _explained(error: BaseException) -> int:
    """Say on stderr what went wrong, in words for whoever typed the command; the exit code."""
    if isinstance(error, KeyboardInterrupt):
        streams.complain("interrupted")
        return INTERRUPTED
    if isinstance(error, streams.Unread):
        return UNREAD
    if isinstance(error, _UsageError):
        context = getattr(error, "ctx", None)
        path = context.command_path if context else "oodcore"
        streams.complain(f"{error.format_message().rstrip('.')}. See '{path} --help'.")
        return MISUSED
    if isinstance(error, OodcoreError):
        streams.complain(str(error))
        return MISUSED if isinstance(error, ConfigurationError) else FAILED
    if isinstance(error, OSError):
        named = f"{error.filename}: " if error.filename else ""
        streams.complain(f"{named}{error.strerror or error}")
        return FAILED
    text = " ".join(str(error).split())
    streams.complain(f"{type(error).__name__}: {text} (unexpected; run again with --debug)")
    return FAILED


def _command(name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A command of this name.

    typer only reads its arguments. What it does is done outside of typer, which has its own ideas
    of a closed pipe and of Ctrl-C.
    """

    def declare(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def read(*args: Any, **kwargs: Any) -> Callable[[], None]:
            return functools.partial(function, *args, **kwargs)

        app.command(name)(read)
        return function

    return declare


def _show_version(wanted: bool) -> None:
    if wanted:
        streams.write(f"oodcore {__version__}")
        raise typer.Exit


@app.callback()
def _everywhere(
    no_plugins: Annotated[
        bool, typer.Option("--no-plugins", help="Leave out what is not oodcore's own.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_show_version, help="Print the version."),
    ] = False,
) -> None:
    """Find inputs that a trained model should not be trusted on."""
    if no_plugins:
        os.environ["OODCORE_PLUGINS"] = ""


@_command("demo")
def _demo(
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="DIR", help="The folder to write.")
    ] = Path("runs/demo"),
) -> None:
    """Train two small networks on digits and compare all detectors.

    It leaves the networks, the best detector, results and a report; what an earlier demonstration
    left in the folder is replaced.
    """
    from oodcore.cli import work

    work.demonstrate(out)


@_command("plugins")
def _plugins(as_json: Json = False) -> None:
    """What is installed, what it brings, what was left out."""
    from oodcore.cli import catalogue

    catalogue.plugins(as_json)


@_command("list")
def _list(
    slot: Annotated[
        str | None, typer.Argument(metavar="SLOT", help="scorer, shaper, source, ...")
    ] = None,
    as_json: Json = False,
) -> None:
    """The kinds that a configuration may name, by slot."""
    from oodcore.cli import catalogue

    catalogue.kinds(slot, as_json)


@_command("show")
def _show(
    kind: Annotated[str, typer.Argument(metavar="KIND", help="As in 'list', or SLOT.KIND.")],
    as_json: Json = False,
) -> None:
    """All about a kind: formula, fields, needs, paper, plugin."""
    from oodcore.cli import catalogue

    catalogue.show(kind, as_json)


@_command("check")
def _check(
    config: Config,
    allow: Annotated[
        bool,
        typer.Option(
            "--allow", help="Also load the model and open the data, running code that they name."
        ),
    ] = False,
) -> None:
    """Say what a configuration is for, or what is wrong with it.

    Nothing that it names is imported or read, unless --allow is given.
    """
    from oodcore.cli import files

    files.check(config, load=allow)


@_command("schema")
def _schema(
    target: Annotated[
        str, typer.Argument(metavar="TARGET", help="detector, ensemble, benchmark or training.")
    ] = "detector",
) -> None:
    """The JSON Schema of a configuration, for editors."""
    from oodcore.cli import files

    files.schema_of(target)


@_command("train")
def _train(
    config: Config,
    out: Out,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in the folder.")
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Train a network, with or without regularizers.

    A run that was killed goes on with --resume.
    """
    from oodcore.cli import work

    work.train_network(config, out, resume, overwrite)


@_command("fit")
def _fit(
    config: Config,
    out: Out,
    overwrite: Overwrite = False,
    store: Annotated[
        bool, typer.Option("--store", help="Keep the statistics, so that fitting can go on.")
    ] = False,
    cache: Cache = None,
) -> None:
    """Fit, calibrate and save a detector or an ensemble.

    The configuration says on which rows: train, held_out and calibrate.
    """
    from oodcore.cli import work

    work.fit_detector(config, out, overwrite, store, cache)


@_command("tune")
def _tune(
    config: Config,
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="FILE", help="The configuration to write.")
    ],
    trials: Annotated[
        int, typer.Option(metavar="N", min=1, help="How many sets of values to try at most.")
    ] = 50,
    cache: Cache = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Choose values for a detector on validation rows.

    Its block 'tune' names them. The values that are tried are those that the scorer and the shapers
    declare. All else in the file stays as it is.
    """
    from oodcore.cli import tuning

    tuning.tune_detector(config, out, trials, cache, overwrite, as_json)


@_command("score")
def _score(
    artifact: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="What 'fit' saved.")],
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE", help="A kind, a mapping such as '{kind: npz, path: x.npz}', a file."
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="FILE", help="The .csv file to write.")
    ],
    allow: Allow = None,
    sha256: Annotated[
        str | None, typer.Option(metavar="HEX", help="Of the artifact's manifest; another fails.")
    ] = None,
    rate: Annotated[
        float | None, typer.Option(metavar="RATE", help="Another false-alarm rate, in (0, 1).")
    ] = None,
    cache: Cache = None,
    as_json: Json = False,
) -> None:
    """Score rows with an artifact, into a .csv file.

    Its columns are id and score and, if the artifact is calibrated, p_value and prediction: 1 for
    in-distribution, -1 for out. A higher score is more in-distribution.
    """
    from oodcore.cli import work

    work.score_rows(artifact, source, out, tuple(allow or ()), sha256, rate, cache, as_json)


@_command("benchmark")
def _benchmark(
    config: Config,
    out: Out,
    cache: Cache = None,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Train again what has another configuration by now."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Compare detectors on many data sets.

    It leaves results.json, results.csv and report.html. What the file's trainings leave is in
    models/: a run that is finished stays, one that was killed goes on.
    """
    from oodcore.cli import work

    work.run_benchmark(config, out, cache, overwrite, as_json)


@_command("report")
def _report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What 'benchmark' wrote.")],
) -> None:
    """Write report.html again from results.json."""
    from oodcore.cli import work

    work.render_report(folder)


@_command("new-plugin")
def _new_plugin(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Of the method, such as 'margin'.")],
    folder: Annotated[
        Path | None, typer.Option("--folder", metavar="DIR", help="Where to; oodcore-NAME here.")
    ] = None,
) -> None:
    """Start a plugin of your own."""
    from oodcore.cli import files

    files.start_plugin(name, folder)
