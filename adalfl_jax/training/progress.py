"""What a person sees while a run goes on: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from adalfl_jax.training.hosts import is_first

Update = Callable[[int, str], None]  # (steps done, what to show beside them)


@contextmanager
def show_progress(
    description: str, num_steps: int, console: Console | None = None, *, first_step: int = 0
) -> Iterator[Update]:
    """Shows one phase of a run, with steps a second and the time left.

    Args:
      description: of the phase.
      num_steps: it will take.
      console: where to; standard error when None.
      first_step: where a resumed phase goes on.

    Yields:
      A function to call with the steps done and a few words on the state of things.
    """
    console = console or _console()
    begun = [(time.perf_counter(), first_step)]

    def rate(done: int) -> float:
        """Steps a second since the first call, if there was one: before it programs are compiled."""
        now = time.perf_counter()
        since, step = begun[-1]
        if len(begun) == 1:
            begun.append((now, done))
        return (done - step) / max(now - since, 1e-9)

    if not console.is_terminal:

        def print_line(done: int, words: str) -> None:
            speed = rate(done)
            left = (num_steps - done) / max(speed, 1e-9)
            console.print(
                f"{description}  {done}/{num_steps}  {speed:.0f} steps/s  {left:.0f} s left  {words}", soft_wrap=True
            )

        yield print_line
        return

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=12),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]:>5.0f} steps/s"),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[words]}", markup=False),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(f"{description:<20}", total=num_steps, completed=first_step, rate=0.0, words="compiling")
        yield lambda done, words: bar.update(task, completed=done, rate=rate(done), words=words)


def tell(text: str) -> None:
    """Prints a line about the run to standard error; of several processes, the first one does."""
    _console().print(text, markup=False, soft_wrap=True)


def _console() -> Console:
    return Console(stderr=True, highlight=False, quiet=not is_first())
