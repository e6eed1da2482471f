"""Draws the pictures and the report of a run, over or not, and the learned loss changing shape as an animation.

.venv/bin/python -m experiments.report --workdir=runs/digits_mlp
"""

from __future__ import annotations

import functools
from pathlib import Path

from absl import app, flags

from adalfl_jax.training.outputs import rebuild_report
from experiments.launch import WORKDIR, parse_flags, told_in_a_line


def main(argv: list[str]) -> None:
    """Writes figures/*.png, figures/loss_shapes.gif and report.html, and says where they are."""
    del argv
    with told_in_a_line():
        for path in rebuild_report(Path(WORKDIR.value or "").expanduser()):
            print(path)


if __name__ == "__main__":
    flags.mark_flag_as_required("workdir")
    app.run(main, flags_parser=functools.partial(parse_flags, unused=("config.",)))
