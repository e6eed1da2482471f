"""Tables as Markdown, on the terminal and in the section of a page that is theirs.

A section lies between the lines `<!-- tables: NAME -->` and `<!-- end of tables -->`; all around it stays. One that is
made piece by piece has a line `<!-- part: NAME -->` before each; a part that is made anew leaves the others alone.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from absl import flags

from adalfl_jax.training.files import hold_workdir, write_json, write_text

WRITE = flags.DEFINE_string("write", None, "Markdown page that the tables are also written into, section by section.")

Row = dict[str, Any]
NUMBERS = "results"  # beside the page
SIGNIFICANT = 0.05
FOLDED = 3  # so many commands are shown
END = "<!-- end of tables -->"
COLUMNS = "What the columns are: docs/results.md, How to read the tables."  # on the terminal, below tables


class Table(NamedTuple):
    """Figures, and how to show them."""

    title: str
    columns: Mapping[str, Callable[[Row], str]]  # heading -> the cell of a row
    rows: list[Row]
    notes: tuple[str, ...] = ()  # a paragraph each


def render_table(table: Table) -> str:
    """A Markdown table whose columns also line up as plain text."""
    cells = [list(table.columns), *([cell(row) for cell in table.columns.values()] for row in table.rows)]
    cells = [[" ".join(cell.split()).replace("|", "\\|") for cell in row] for row in cells]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in cells]
    lines.insert(1, "|-" + "-|-".join("-" * width for width in widths) + "-|")
    body = "\n".join(lines)
    return "\n\n".join([f"**{table.title}**", body, *table.notes])


def render_section(
    command: str,
    machine: Mapping[str, Any],
    tables: Sequence[Table],
    pictures: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """Tables and pictures, title -> file, with the command that made them and what they were made on.

    Many commands, a line each, are folded away.
    """
    made_by = f"```sh\n{command}\n```"
    if (count := len(command.splitlines())) > FOLDED:
        made_by = f"<details><summary>Made by {count} commands</summary>\n\n{made_by}\n\n</details>"
    facts = ", ".join(f"{name} {value}" for name, value in machine.items())
    shown = [f"![{title}]({file})" for title, file in pictures.items()]
    return "\n\n".join([made_by, f"{facts}.", *map(render_table, tables), *shown])


def either(values: Iterable[Any]) -> str:
    """The distinct values, joined by " or "; one that was joined before counts as its parts."""
    return " or ".join(dict.fromkeys(part for value in values for part in str(value).split(" or ")))


def join_machines(machines: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """What several machines were; one that names no device is a CPU."""
    absent = {"device": "cpu"}
    names = dict.fromkeys(name for machine in machines for name in machine)
    joined = {name: either(machine.get(name, absent.get(name, "unknown")) for machine in machines) for name in names}
    return {name: value for name, value in joined.items() if absent.get(name) != value}


def show_mean(described: Row, scale: float = 1.0, digits: int = 2) -> str:
    """A mean and, of several seeds, the standard deviation, with as many digits after the point."""
    parts = (described["mean"], described["std"])
    return " ± ".join(f"{scale * part:.{digits}f}" for part in parts if part is not None)


def show_difference(test: Row | None, scale: float = 1.0) -> str:
    """A mean difference and its interval, where there are any."""
    if test is None:
        return ""
    interval = test["interval"]
    around = "" if interval is None else " ({:+.2f} to {:+.2f})".format(*(scale * end for end in interval))
    return f"{scale * test['mean_difference']:+.2f}{around}"


def is_level(test: Mapping[str, Any]) -> bool:
    """Whether a test finds no difference, or is not defined."""
    p_value = test.get("adjusted_p_value")
    return p_value is None or p_value >= SIGNIFICANT


def show_p_value(test: Mapping[str, Any] | None) -> str:
    """The adjusted p-value of a test, to a digit, or near 0.05 to three and more, so that its side is seen."""
    p_value = (test or {}).get("adjusted_p_value")
    if p_value is None or not 0.045 <= p_value < 0.055:
        return show_number(p_value, ".1g")
    shown = (f"{p_value:.{digits}g}" for digits in range(3, 18))
    return next(text for text in shown if (float(text) < SIGNIFICANT) == (p_value < SIGNIFICANT))


def show_number(value: float | None, form: str) -> str:
    """A number, or nothing."""
    return "" if value is None else format(value, form)


def show_point(point: Mapping[str, Any] | None, tuning: Sequence[Row], field_name: Callable[[str], str] = str) -> str:
    """The point that was taken of those in `tuning`; a value has "(edge)" where none beyond it was tried."""

    def shown(field: str, value: float) -> str:
        tried = {entry["point"][field] for entry in tuning}
        is_at_edge = len(tried) > 1 and value in (min(tried), max(tried))
        return f"{field_name(field)} {value:g}" + (" (edge)" if is_at_edge else "")

    return ", ".join(shown(field, value) for field, value in (point or {}).items())


def require_section(name: str, *, in_parts: bool = False) -> None:
    """Looks for a section on the page that `--write` names, if it names one: before what takes time, not after.

    Raises:
      OSError: there is no such page, or it may not be written to.
      ValueError: it has no such section, or several, or one that is not made of parts where it should be.
    """
    if WRITE.value:
        if not (path := Path(WRITE.value)).is_file():
            raise FileNotFoundError(f"there is no page {path} for --write to renew; make it first")
        if not os.access(path, os.W_OK) or not os.access(path.parent, os.W_OK):
            raise PermissionError(f"page {path} and its folder may not be written to; change their permissions")
        text = path.read_text(encoding="utf-8")
        if in_parts:
            replace_parts(text, name, {})
        else:
            replace_section(text, name, "")


def path_of_numbers(name: str, workdir: Path) -> Path:
    """Where the numbers of a study are kept: beside the page that `--write` names, else in a folder of results."""
    folder = Path(WRITE.value).parent / NUMBERS if WRITE.value else workdir
    return folder / f"{name}.json"


def folder_of_pictures(target: Path) -> Path:
    """Where the pictures of a page are kept, beside it; made if need be."""
    folder = target.parent / "images" / target.stem
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def publishing(path: Path) -> contextlib.AbstractContextManager[None]:
    """Keeps off others that would publish what they read, numbers or the page, before this process wrote its own.

    Args:
      path: from `path_of_numbers`.

    Raises:
      BusyError: others took ten minutes.
    """
    return hold_workdir(path.parent, patience=600)


def write_numbers(path: Path, numbers: Mapping[str, Any]) -> dict[str, Any]:
    """Writes numbers as JSON in one line, to six digits, and returns those, for a page to show what lies beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shown = rounded(numbers)
    write_json(path, shown, indent=None)
    return shown


def rounded(value: Any) -> Any:
    """A value of JSON with its numbers to six digits."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list | tuple) else value


def publish(
    name: str, command: str, machine: Mapping[str, Any], table: Table, draw: Callable[[Path], None], workdir: Path
) -> None:
    """Prints a table, draws its picture into a folder of results and, where `--write` says, puts both into a page."""
    print(render_section(command, machine, [table]), COLUMNS, sep="\n\n")
    draw(workdir / f"{name}.png")
    if WRITE.value:
        target = Path(WRITE.value)
        picture = folder_of_pictures(target) / f"{name}.png"
        draw(picture)
        section = render_section(command, machine, [table], {table.title: f"{picture.relative_to(target.parent)}"})
        renew(target, replace_section, name, section)


def renew(target: Path, replace: Callable[[str, str, Any], str], name: str, content: Any) -> None:
    """Writes a page with other content in one section, by `replace_section` or `replace_parts`, whole or not at all."""
    write_text(target, replace(target.read_text(encoding="utf-8"), name, content))


def replace_section(text: str, name: str, content: str) -> str:
    """The page with other content in one section.

    Raises:
      ValueError: the page has no such section, or several.
    """
    before, _, after = _around(text, name)
    return before + (f"{content}\n\n" if content else "") + after


def replace_parts(text: str, name: str, parts: Mapping[str, str]) -> str:
    """The page with some parts of a section, name -> content, made anew and put first, in their order.

    Raises:
      ValueError: as `replace_section`, or the section has something before its first part.
    """
    _, content, _ = _around(text, name)
    start, *pieces = re.split(r"^<!-- part: (.+) -->$", content, flags=re.MULTILINE)
    if start.strip():
        raise ValueError(
            f"the section {name!r} begins with something that is no part and would be lost: {start.strip()[:60]!r}; "
            "put a line `<!-- part: NAME -->` before it, or take it out"
        )
    there = {part: text.strip() for part, text in zip(pieces[::2], pieces[1::2], strict=True)}
    there = {part: content for part, content in there.items() if part not in parts}
    shown = (f"<!-- part: {part} -->\n{content}" for part, content in {**parts, **there}.items())
    return replace_section(text, name, "\n\n".join(shown))


def _around(text: str, name: str) -> tuple[str, str, str]:
    """The page up to the content of a section, the content, and the rest."""
    start = f"<!-- tables: {name} -->\n"
    found = re.findall(rf"{re.escape(start)}((?:(?!<!-- tables: ).)*?){re.escape(END)}", text, re.DOTALL)
    if len(found) != 1:
        raise ValueError(
            f"the page must have one section {name!r} and has {len(found)}; put these two lines where its tables "
            f"belong:\n{start}{END}"
        )
    before, after = text.split(start + found[0] + END)
    return before + start, found[0], END + after
