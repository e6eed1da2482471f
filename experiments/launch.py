"""What every program here does around its work: flags in, a table or a clear error out."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import re
import shlex
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import jax
from absl import app, flags, logging
from ml_collections import config_flags
from rich.console import Console
from rich.table import Table
from rich.text import Text

from adalfl_jax.analysis.record import TRAINED_ON, UNREAD
from adalfl_jax.data import DatasetError
from adalfl_jax.training import ConfigError, DivergenceError, PreemptionError, TrainConfig
from adalfl_jax.training.fields import field_paths, require_path
from adalfl_jax.training.files import resolve_folder
from adalfl_jax.training.workdir import REPORT
from experiments.compilation_cache import keep_compiled_programs
from experiments.tables import show_mean

try:
    CONFIG = config_flags.DEFINE_config_file(
        "config",
        None,
        "File with the configuration, one of configs/; --config.FIELD=VALUE sets a field, and configs/default.py "
        "documents them all.",
        lock_config=True,
    )
except flags.CantOpenFlagFileError as error:  # which is read when the flag is defined
    sys.exit(f"--flagfile cannot be read: {error}")
WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Folder of the run, or of all runs of studies and sweeps; what trains makes it if it does not exist.",
)

_COMPILATION_CACHE = flags.DEFINE_string(
    "compilation_cache",
    None,
    "Folder that keeps compiled programs for later runs, or '' for none. By default $JAX_COMPILATION_CACHE_DIR or else "
    "adalfl_jax in $XDG_CACHE_HOME (~/.cache).",
)
NOTHING_RETURNED = "get_config() returned None"
SHARED = ("config", "workdir", "write", "compilation_cache")  # flags of several programs; --write is that of `page`


def launch(run: Callable[[TrainConfig, str], dict[str, Any]]) -> None:
    """Runs `train` or `compare`: reads `--config` and `--workdir`, calls it, and prints the summary it returns."""
    flags.mark_flags_as_required(["config", "workdir"])

    def main(argv: list[str]) -> None:
        del argv
        with told_in_a_line():
            summary = run(TrainConfig.from_mapping(CONFIG.value), WORKDIR.value or "")
        if jax.process_index() == 0:
            print_summary(summary, WORKDIR.value or "")

    app.run(main, flags_parser=functools.partial(parse_flags, unused=(f"config.{UNREAD[run.__name__]}",)))


def studies_folder() -> Path:
    """Where the numbers of studies are kept: `--workdir`, or runs/studies."""
    if WORKDIR.value is None:
        return Path("runs/studies")
    resolve_folder(WORKDIR.value)  # for its errors; messages show the folder as it was named
    return Path(WORKDIR.value).expanduser()


def command_line(program: str) -> str:
    """The command that this program, a module of `experiments`, was started by, as the documents write it.

    `--jobs` is left out: it changes no number.
    """
    kept, arguments = [], iter(sys.argv[1:])
    for argument in arguments:
        name, has_value, _ = argument.lstrip("-").partition("=")
        if name != "jobs":
            kept.append(argument)
        elif not has_value:  # it comes next
            next(arguments, None)
    return shlex.join([".venv/bin/python", "-m", f"experiments.{program}", *kept])


@contextlib.contextmanager
def told_in_a_line(*errors: type[Exception]) -> Iterator[None]:
    """Ends the program with a line, and no traceback, where a run, a file or a folder fails or a signal comes.

    Args:
      *errors: others that are for the user.
    """
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
    # Checkpoints are chatty, and what fails there is an error of ours.
    logging.get_absl_logger().addFilter(lambda record: "orbax" not in record.pathname)
    # Not restored: they say it while the program ends.
    sys.unraisablehook = functools.partial(_pass_on, sys.unraisablehook)
    with_source, warnings.formatwarning = warnings.formatwarning, lambda message, *_, **__: f"warning: {message}\n"
    try:
        yield
    except (ConfigError, DatasetError, DivergenceError, OSError, *errors) as error:
        # The name of a plain ValueError says nothing to a user.
        kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
        _end(f"{kind}{error}")
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        first_line, *_ = *str(error).splitlines(), type(error).__name__
        _end(
            f"out of memory: {first_line}\nLess is taken by a smaller batch_size or num_seeds, by model.remat and by "
            "dataset.streaming; experiments.describe says how much a step takes"
        )
    except PreemptionError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(128 + error.signal)
    except KeyboardInterrupt:
        sys.stderr.write("SIGINT: ended; a run goes on from its last checkpoint by the same command.\n")
        sys.exit(128 + signal.SIGINT)
    finally:
        warnings.formatwarning = with_source


def _pass_on(hook: Callable[[Any], Any], unraisable: Any) -> None:
    """All but what writers of a checkpoint say that end after one of them has failed, which is told as the error."""
    if str(unraisable.exc_value) != "Event loop is closed":
        hook(unraisable)


def _end(message: str) -> None:
    """Ends the program with a message. Of several processes this may be the only one, so it waits for no other."""
    if not jax.distributed.is_initialized():
        sys.exit(message)
    sys.stderr.write(f"{message}\n")
    sys.stderr.flush()
    os._exit(1)


def parse_flags(arguments: list[str], *, unused: tuple[str, ...] = ()) -> list[str]:
    """absl's parser, with errors of one line for unknown fields, tuples set twice, broken config files and stray words.

    Args:
      arguments: the command line.
      unused: flags that a program has no use for, which are then refused: of `SHARED`, or a field of the
        configuration, "config.method" say; "config." refuses all of these.
    """
    arguments = flags.FLAGS.read_flags_from_files(arguments, force_gnu=False)
    # What does not begin with a dash is the value of the flag before it, a file config.json say.
    given = [argument.lstrip("-") for argument in arguments[1:] if argument.startswith("-")]
    names = [argument.partition("=")[0] for argument in given]
    _refuse_unused(names, unused)
    _refuse_unknown_fields(given, names)
    for name in SHARED:  # or `--help` would show the flags of the program's own file alone
        if name not in unused and name in flags.FLAGS:
            flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[name])
    try:
        remaining = flags.FLAGS(arguments)
        if CONFIG.value is not None:
            CONFIG.value.lock()  # what stands for a file that is not there fails at any use
        elif "config" in names:
            _refuse_file(NOTHING_RETURNED)
    except flags.Error as error:
        _refuse_flags(error, names)
    except Exception as error:  # whatever a user's configuration file raises while it is loaded
        _refuse_options(names, error)
        # Of an OSError the file comes last, behind where else it was looked for or that it was looked for before.
        is_of_file = isinstance(error, OSError)
        reason = re.split(r"\n|failure to load: ", str(error))[-1].strip() if is_of_file else error
        _refuse_file(f"{reason}" if is_of_file and reason else f"{type(error).__name__}: {reason}")
    for name in names:
        is_tuple = name.startswith("config.") and isinstance(flags.FLAGS[name], flags.MultiFlag)  # which adds them up
        if is_tuple and names.count(name) > 1:
            sys.exit(f"ConfigError: --{name} must be given once; it came {names.count(name)} times, leave one")
    if len(remaining) > 1:
        sys.exit(f"unexpected arguments {remaining[1:]}; flags look like --NAME=VALUE")
    keep_compiled_programs(_COMPILATION_CACHE.value)
    return remaining


def _refuse_unused(names: list[str], unused: tuple[str, ...]) -> None:
    """Ends the program at a flag that has no effect on it."""
    for name in names:
        if any(name == flag or name.startswith(f"{flag.removesuffix('.')}.") for flag in unused):
            sys.exit(f"--{name} has no effect on this program; leave it out")


def _refuse_unknown_fields(given: list[str], names: list[str]) -> None:
    """Ends the program at a field that no configuration has, fields without a file, or a path without a file."""
    for argument in given:
        if re.fullmatch(r"config=.*\.json", argument):
            sys.exit(
                f"ConfigError: --{argument} is what a run was made with; name its folder: "
                "--config=configs/run.py:FOLDER"
            )
    fields = [name.removeprefix("config.") for name in names if name.startswith("config.")]
    for field in fields:
        try:
            require_path(TrainConfig, field)
        except ValueError as error:
            sys.exit(f"ConfigError: {error}")
    if fields and "config" not in names:
        sys.exit("ConfigError: --config=FILE must be given beside fields of it; configs/ has files")


def _refuse_flags(error: flags.Error, names: list[str]) -> NoReturn:
    """Ends the program at flags that absl does not take, or at a configuration file that fails as it is read."""
    *traceback, innermost = str(error).split("\n  File ")
    if traceback:
        _, *below = innermost.splitlines()  # lines of code, and then what the file raised, which may have several
        _refuse_file(" ".join(itertools.dropwhile(lambda line: line.startswith("    "), below)))
    if missing := re.match(r"flag --(\w+)=None", str(error)):
        if missing[1] in names:
            _refuse_file(NOTHING_RETURNED)
        sys.exit(f"--{missing[1]} must be given (--help shows the flags)")
    fields = [path for path in field_paths(TrainConfig) if f"flag '{path}'" in str(error)]
    hint = f"did you mean --config.{fields[0]}?" if fields else "--help shows the flags"
    if str(error).startswith("flag --config."):
        hint = "configs/default.py documents it"
    sys.exit(f"{error} ({hint})")


def _refuse_options(names: list[str], error: Exception) -> None:
    """Ends the program where an error is of an option on the command line that the configuration file does not set."""
    for name in names:
        section, _, option = name.rpartition(".")
        is_told = isinstance(error, AttributeError) and re.match(rf"\W*{option}\W", str(error))
        if section.endswith(".options") and is_told:
            sys.exit(f"ConfigError: --{name} is an option that the file has to set first; write {name} = ... there")


def _refuse_file(reason: str) -> NoReturn:
    """Ends the program with why a configuration cannot be loaded and, where the file is something else, what one is."""
    is_none = any(words in reason for words in ("get_config", "No such file", "no attribute 'lock'"))
    remedy = "; it must be a file with a get_config() that returns a ConfigDict, as in configs/" * is_none
    sys.exit(f"ConfigError: the configuration cannot be loaded: {reason}{remedy}")


def print_summary(summary: dict[str, Any], workdir: str) -> None:
    """Prints the table of a run."""
    first, last = summary["seeds"][0], summary["seeds"][-1]
    title = f"{summary['dataset']}, {summary['num_steps']} steps, seeds {first} to {last}"
    table = Table(title=Text(title))  # names in brackets are no markup
    table.add_column("method")
    for split in ("valid", "test"):
        table.add_column(f"{split} {summary['metric']}", justify="right")
    table.add_column("learning rate", justify="right")
    for info in summary["methods"].values():
        mark = "*" if "trains_on_valid" in info else ""
        errors = (mark + show_mean(info["valid"], digits=4), show_mean(info["test"], digits=4))
        table.add_row(info["title"], *errors, f"{info['learning_rate']:.4g}")
    if any("trains_on_valid" in info for info in summary["methods"].values()):
        table.caption = TRAINED_ON
    console = Console()
    console.print(table)
    report = Path(workdir) / REPORT
    where = f"{workdir}; open {report}" if report.exists() else workdir
    console.print(f"Everything is in {where}", soft_wrap=True, markup=False)
