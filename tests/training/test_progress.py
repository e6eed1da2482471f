import io
import re
import time

import pytest
from rich.console import Console

from adalfl_jax.training.progress import show_progress


def shown(console_options, num_steps, updates, first_step=0):
    stream = io.StringIO()
    console = Console(file=stream, **console_options)
    with show_progress("AdaLFL", num_steps, console, first_step=first_step) as update:
        for done, words in updates:
            update(done, words)
    return stream.getvalue()


def test_plain_lines_have_steps_speed_and_time_left():
    lines = shown({"force_terminal": False}, 20, [(10, "valid/loss 0.5"), (20, "valid/loss 0.25")]).splitlines()
    assert len(lines) == 2
    assert re.fullmatch(r"AdaLFL  10/20  \d+ steps/s  \d+ s left  valid/loss 0\.5", lines[0])
    assert re.fullmatch(r"AdaLFL  20/20  \d+ steps/s  0 s left  valid/loss 0\.25", lines[1])


def test_speed_and_time_left_do_not_count_what_came_before_the_first_line(monkeypatch):
    clock = iter([0.0, 100.0, 101.0, 103.0])  # the first chunk waits for the compiler
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    lines = shown({"force_terminal": False}, 100, [(10, ""), (20, ""), (40, "")]).splitlines()
    assert [line.split("  ")[2:4] for line in lines] == [
        ["0 steps/s", "900 s left"],
        ["10 steps/s", "8 s left"],
        ["10 steps/s", "6 s left"],
    ]


def test_speed_does_not_count_the_steps_of_the_processes_before(monkeypatch):
    clock = iter([0.0, 10.0, 11.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    lines = shown({"force_terminal": False}, 100, [(60, ""), (70, "")], first_step=50).splitlines()
    assert [line.split("  ")[1:4] for line in lines] == [
        ["60/100", "1 steps/s", "40 s left"],
        ["70/100", "10 steps/s", "3 s left"],
    ]


def test_a_bar_begins_where_a_resumed_phase_goes_on():
    text = shown({"force_terminal": True, "width": 120}, 20, [], first_step=5)
    assert "5/20" in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    assert "compiling" in text


def test_plain_line_is_not_wrapped_on_a_narrow_console():
    words = "word " * 20 + "end"
    assert shown({"force_terminal": False, "width": 20}, 2, [(1, words)]).count("\n") == 1


def test_terminal_shows_a_bar():
    text = shown({"force_terminal": True, "width": 120}, 20, [(10, "half"), (20, "whole")])
    assert "━" in text
    assert "20/20" in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    assert "steps/s" in text
    assert "whole" in text


@pytest.mark.parametrize("is_terminal", [False, True])
def test_single_step_is_shown(is_terminal):
    text = shown({"force_terminal": is_terminal, "width": 120}, 1, [(1, "")])
    assert "1/1" in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
