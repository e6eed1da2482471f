"""Tables on the terminal and in the section of a page that is theirs, with the numbers beside it.

A section lies between the lines `<!-- tables: NAME -->` and `<!-- end of tables -->`; all around it stays. One that is
made piece by piece has a line `<!-- part: NAME -->` before each; a part that is made anew leaves the others alone.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from absl import flags

from adalfl_jax.training.files import lock_folder, write_json, write_text
from experiments.tables import Table, either, render_table, rounded

WRITE = flags.DEFINE_string("write", None, "Markdown page that the tables are also written into, section by section.")

NUMBERS = "results"  # beside the page
FOLDED = 3  # so many commands are shown
END = "<!-- end of tables -->"
COLUMNS = "What the columns are: docs/results.md, How to read the tables."  # on the terminal, below tables


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


def join_machines(machines: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """What several machines were; one that names no device is a CPU."""
    absent = {"device": "cpu"}
    names = dict.fromkeys(name for machine in machines for name in machine)
    joined = {name: either(machine.get(name, absent.get(name, "unknown")) for machine in machines) for name in names}
    return {name: value for name, value in joined.items() if absent.get(name) != value}


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
    return lock_folder(path.parent, patience=600)


def write_numbers(path: Path, numbers: Mapping[str, Any]) -> dict[str, Any]:
    """Writes numbers as JSON in one line, to six digits, and returns those, for a page to show what lies beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shown = rounded(numbers)
    write_json(path, shown, indent=None)
    return shown


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
