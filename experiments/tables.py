"""Numbers as a reader is shown them, and tables of them as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

Row = dict[str, Any]
SIGNIFICANT = 0.05


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


def either(values: Iterable[Any]) -> str:
    """The distinct values, joined by " or "; one that was joined before counts as its parts."""
    return " or ".join(dict.fromkeys(part for value in values for part in str(value).split(" or ")))


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


def rounded(value: Any) -> Any:
    """A value of JSON with its numbers to six digits."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list | tuple) else value
