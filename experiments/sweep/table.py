"""What the runs of a sweep have reached, as a table and as files."""

from __future__ import annotations

import contextlib
import csv
import functools
import json
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

from adalfl_jax.analysis.record import TRAINED_ON
from adalfl_jax.analysis.statistics import adjust_p_values, paired_difference
from adalfl_jax.training import ConfigError
from adalfl_jax.training.files import WorkdirError, reading, write_json, writing
from adalfl_jax.training.sections import DatasetConfig
from experiments.sweep.grid import Point
from experiments.sweep.jobs import FAILED, last_line, warnings_in
from experiments.tables import Row, Table, show_mean, show_p_value

TABLE = "sweep.json"  # by which a folder is known as a sweep's
LONGEST_STATE = 160  # characters of an error in the table
SHARED = ("data", "metric", "seeds", "state")  # by rows that are compared


def require_whole_table(root: Path, points: Sequence[Point]) -> None:
    """Raises WorkdirError where the folder's table has runs that are not of this grid, which would be lost from it."""
    path = root / TABLE
    if not path.exists():
        return
    with reading(path):
        known = {row["run"] for row in json.loads(path.read_text())}
    if others := sorted(known - {point.workdir.name for point in points}):
        raise WorkdirError(
            f"{path} has runs of another grid, {', '.join(others[:3])}{', ...' if others[3:] else ''}; give all of the "
            "values, and what is finished is not repeated, or choose a new folder"
        )


@contextlib.contextmanager
def begun_table(root: Path, points: Sequence[Point]) -> Iterator[None]:
    """Makes the folder of a sweep, which is known as one by its table, and names the runs there before they begin.

    The table stays as it was where none can begin.
    """
    path = root / TABLE
    with writing(root):
        root.mkdir(parents=True, exist_ok=True)
        rows = json.loads(path.read_text()) if path.exists() else []
        known = {row["run"] for row in rows}
        write_json(path, [*rows, *({"run": name} for point in points if (name := point.workdir.name) not in known)])
    try:
        yield
    except ConfigError:
        write_json(path, rows)
        raise


def write_table(rows: Sequence[Row], root: Path) -> None:
    """Writes the rows as JSON, with their values seed by seed, and as CSV."""
    names = list(dict.fromkeys(name for row in rows for name in row if not isinstance(row[name], list)))
    with writing(root):
        write_json(root / TABLE, rows)
        with (root / "sweep.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, names, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)


def make_rows(points: Sequence[Point]) -> list[Row]:
    """What runs have reached, and how they differ from the first that is finished."""
    trained_on: dict[DatasetConfig, tuple[str, str]] = {}
    rows = [row for point in points for row in _rows_of(point, trained_on)]
    add_differences(rows)
    return rows


def _rows_of(point: Point, trained_on: dict[DatasetConfig, tuple[str, str]]) -> list[Row]:
    """What a run has reached, a row for each of its methods; one without numbers where it is not finished.

    Args:
      point: the run.
      trained_on: the first finished run on a dataset, with the digest of its data; a run on a new one is added.
    """
    row: Row = {"run": point.workdir.name, **point.overrides}
    is_running = point.is_running()  # first: it may just be ending
    if warned := warnings_in(point.log):
        row["warnings"] = warned
    if (summary := point.summary()) is None:
        last = last_line(point.log)
        state = "running" if is_running else "unfinished" if last else "not begun"
        has_failed = last.startswith(FAILED) and not is_running
        return [row | {"state": last if has_failed else f"{state}: {last}".removesuffix(": ")}]
    first, expected = trained_on.setdefault(point.config.dataset, (point.workdir.name, summary["data"]))
    state = "finished" if summary["data"] == expected else f"finished, on other data than {first}"
    return [
        row
        | {"state": state, "method": method, "dataset": point.config.dataset.name, "data": summary["data"]}
        | {"metric": summary["metric"]}
        | {"learning_rate": info["learning_rate"]}
        | {f"{split}_{part}": info[split][part] for split in ("test", "valid") for part in ("mean", "std")}
        | {"trains_on_valid": info.get("trains_on_valid", False), "seeds": summary["seeds"]}
        | {"test_per_seed": info["test"]["per_seed"]}
        for method, info in summary["methods"].items()
    ]


def add_differences(rows: Sequence[Row]) -> None:
    """Gives finished rows what they are less the first, where data, metric, seeds and state are the same. The data are
    the same with other labels of the training split, and not with another draw of the splits.

    A row gets its mean `difference` in the test split and the `adjusted_p_value` of a paired t-test, for the number of
    rows (Benjamini and Hochberg), None where there is none.
    """
    first, *others = [row for row in rows if "test_per_seed" in row] or [{}]
    alike = [row for row in others if all(row[key] == first[key] for key in SHARED)]
    tests = [paired_difference(first["test_per_seed"], row["test_per_seed"]) for row in alike]
    adjust_p_values(tests)
    for row, test in zip(alike, tests, strict=True):
        row |= {"difference": test["mean_difference"], "adjusted_p_value": test.get("adjusted_p_value")}


def results_table(rows: list[Row], fields: list[str]) -> Table:
    """The rows with the fields that vary."""
    columns = {field: functools.partial(_cell, field) for field in fields}
    columns |= {"method": functools.partial(_cell, "method")}
    columns |= {split: functools.partial(_spread, split) for split in ("test", "valid")}
    if any("difference" in row for row in rows):
        columns |= {"test, less the first": _difference, "p": show_p_value}
    is_warned = any("warnings" in row for row in rows)
    if is_warned:
        columns |= {"warnings": lambda row: str(len(row["warnings"])) if "warnings" in row else ""}
    metric = next((row["metric"].replace("_", " ") for row in rows if "metric" in row), "no run is finished")
    about = (f"{TRAINED_ON}.",) * any(map(_is_marked, rows))
    about += ("Warnings of a run are in its log, and in sweep.json.",) * is_warned
    if any(len(row["state"]) > LONGEST_STATE for row in rows):
        about += (f"The whole of a long state is in {TABLE}.",)
    return Table(f"{len(rows)} runs: {metric}", {**columns, "state": _state}, rows, about)


def _state(row: Row) -> str:
    return textwrap.shorten(row["state"], LONGEST_STATE, placeholder=" ...")


def _cell(name: str, row: Row) -> str:
    return str(row.get(name, ""))


def _spread(split: str, row: Row) -> str:
    if f"{split}_mean" not in row:
        return ""
    mark = "*" * (split == "valid" and _is_marked(row))
    return mark + show_mean({part: row[f"{split}_{part}"] for part in ("mean", "std")}, digits=4)


def _is_marked(row: Row) -> bool:
    return row.get("trains_on_valid", False)


def _difference(row: Row) -> str:
    return f"{row['difference']:+.4f}" if "difference" in row else ""
