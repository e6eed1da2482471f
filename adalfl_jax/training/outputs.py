"""What a run leaves in its workdir once its phases are over."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from adalfl_jax.analysis.animation import animate_loss_shapes
from adalfl_jax.analysis.figures import write_figures
from adalfl_jax.analysis.record import RunRecord
from adalfl_jax.analysis.report import render_report
from adalfl_jax.learned_losses import save_learned_loss
from adalfl_jax.training import workdir as layout
from adalfl_jax.training.checkpoint import save_state
from adalfl_jax.training.divergence import DivergenceError
from adalfl_jax.training.files import keep_on_disk, read_json, reading, write_json, write_text, writing
from adalfl_jax.training.hosts import is_first
from adalfl_jax.training.results import MethodResult
from adalfl_jax.training.setup import Setup
from adalfl_jax.training.state import RunState
from adalfl_jax.training.summary import summarize
from adalfl_jax.training.unfinished import read_unfinished


def finish_run(workdir: Path, setup: Setup, results: Sequence[MethodResult], *, with_report: bool) -> dict[str, Any]:
    """Writes all that a workdir keeps, and last the summary, whose presence marks a run as finished."""
    _save_shapes(workdir, results)
    summary = summarize(setup, results)
    best_loss = _save_learned_loss(workdir, setup, results)
    if best_loss is not None:
        summary["learned_loss"] = best_loss
    record = read_record(workdir, summary)
    figures = write_figures(workdir / layout.FIGURES, record)
    if with_report:
        write_text(workdir / layout.REPORT, render_report(record, figures))
    write_json(workdir / layout.PREPROCESSING, dataclasses.asdict(setup.dataset.preprocessing))
    keep_on_disk(workdir / layout.METRICS, workdir / layout.SHAPES)
    write_json(workdir / layout.SUMMARY, summary)
    return summary


def rebuild_report(workdir: Path) -> list[Path]:
    """Draws the pictures and the page of a run, over or not, from its files, and an animation of the learned loss.

    Returns:
      The files that were written.

    Raises:
      WorkdirError: no run in the folder, one whose files cannot be read, or a folder that cannot be written to.
    """
    layout.require_run(workdir)
    is_over = (workdir / layout.SUMMARY).is_file()
    record = read_record(workdir) if is_over else read_unfinished(workdir)
    with writing(workdir):
        figures = write_figures(workdir / layout.FIGURES, record)
        write_text(workdir / layout.REPORT, render_report(record, figures))
        animation = workdir / layout.FIGURES / "loss_shapes.gif"
        moving = [animation] if animate_loss_shapes(animation, record) else []
    if not is_over and (workdir / layout.SUMMARY).is_file():  # it ended meanwhile, and has a report that says so
        return rebuild_report(workdir)
    return [*figures.values(), *moving, workdir / layout.REPORT]


def read_record(workdir: Path, summary: dict[str, Any] | None = None) -> RunRecord:
    """Reads the files of a workdir; the summary from its file where it is not given.

    Raises:
      WorkdirError: one of them cannot be read, or holds something else.
    """
    shapes_path, metrics_path = workdir / layout.SHAPES, workdir / layout.METRICS
    shapes: dict[str, np.ndarray] = {}
    if shapes_path.exists():
        with reading(shapes_path), shapes_path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            shapes = dict(file)
    with reading(metrics_path):
        lines = metrics_path.read_text().splitlines()
    return RunRecord(
        config=read_json(workdir / layout.CONFIG, "command"),
        summary=summary if summary is not None else layout.read_summary(workdir),
        scalars=layout.read_records(metrics_path, lines),
        shapes=shapes,
    )


def keep_divergence(workdir: Path, setup: Setup, error: DivergenceError) -> None:
    """Keeps why a run diverged, the state it was last finite in and the learned loss in that; the error says where."""
    if error.step > 0:  # or its start was not finite
        _save_last_finite_state(workdir, setup, error)
    if is_first():
        write_text(workdir / layout.DIVERGENCE, str(error))


def _save_last_finite_state(workdir: Path, setup: Setup, error: DivergenceError) -> None:
    folder = workdir / layout.STATES / f"{error.method}_last_finite"
    save_state(folder, error.state)
    kept = str(folder)
    if error.state.phi is not None and is_first():
        index = setup.config.seeds.index(error.seed)
        origin = {"method": error.method, "seed": error.seed, "step": error.state_step, "diverged_at": error.step}
        _save_phi(workdir, setup, error.state, index, origin)
        kept += f", its learned loss in {workdir / layout.LEARNED_LOSS}"
    error.args = (f"{error.args[0]}, kept in {kept}",)


def _save_shapes(workdir: Path, results: Sequence[MethodResult]) -> None:
    arrays: dict[str, np.ndarray] = {}
    for result in results:
        if result.shapes and result.predictions is not None:
            arrays["predictions"] = result.predictions
            arrays[f"{result.method}/steps"] = np.asarray(result.shape_steps)
            arrays[f"{result.method}/values"] = np.stack(result.shapes, axis=1)  # [S, T, 2, P]
    if arrays:
        np.savez_compressed(workdir / layout.SHAPES, **arrays)  # pyright: ignore[reportArgumentType]


def _save_learned_loss(workdir: Path, setup: Setup, results: Sequence[MethodResult]) -> dict[str, Any] | None:
    """Keeps the learned loss of the last method that has one, of the seed with the best validation metric."""
    learned = [result for result in results if result.state.phi is not None]
    if not learned:
        return None
    result = learned[-1]
    index = int(result.valid.argmin())
    config = setup.config
    origin = {
        "method": result.method,
        "seed": config.seeds[index],
        "step": config.num_steps,
        f"valid/{config.metric}": float(result.valid[index]),
        f"test/{config.metric}": float(result.test[index]),
    }
    _save_phi(workdir, setup, result.state, index, origin)
    return origin


def _save_phi(workdir: Path, setup: Setup, state: RunState, index: int, origin: dict[str, Any]) -> None:
    assert state.phi is not None
    params = jax.tree.map(lambda leaf: leaf[index], state.phi.params)
    metadata = {**origin, "config": setup.config.to_dict()}
    save_learned_loss(workdir / layout.LEARNED_LOSS, setup.learned_loss, params, metadata)
