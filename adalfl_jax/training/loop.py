"""`train` for one method, `compare` for several: phases in chunks on the device, measures between them."""

from __future__ import annotations

import dataclasses
import functools
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from rich.console import Console

from adalfl_jax.analysis.statistics import describe
from adalfl_jax.training import workdir as layout
from adalfl_jax.training.checkpoint import save_state
from adalfl_jax.training.config import LEARNING, METHODS, TrainConfig
from adalfl_jax.training.evaluation import Evaluation
from adalfl_jax.training.outputs import finish_run, save_last_finite_state
from adalfl_jax.training.phases import (
    Phase,
    SeedKeys,
    init_phi,
    init_training,
    make_offline_phase,
    make_seed_keys,
    make_training_phase,
    restart_outer_optimizer,
    splits_of,
)
from adalfl_jax.training.progress import show_progress
from adalfl_jax.training.results import DivergenceError, History, MethodResult
from adalfl_jax.training.setup import Setup, learning_rate_schedule, make_setup
from adalfl_jax.training.state import RunState, without_carry
from adalfl_jax.training.steps import STEPS, StepFactory
from adalfl_jax.training.writers import MetricWriters

Observer = Callable[[int, dict[str, np.ndarray]], None]  # (step, scalars [S])


def train(config: TrainConfig, workdir: str | os.PathLike[str]) -> dict[str, Any]:
    """Trains `config.method` for all seeds of the config and writes the workdir.

    Args:
      config: from `TrainConfig.from_mapping`.
      workdir: a folder for this run alone. A finished run of the same config is not repeated.

    Returns:
      What `summary.json` holds.

    Raises:
      ConfigError: a config whose parts do not fit together.
      WorkdirError: a folder that cannot be written or holds something else.
      DivergenceError: a number that is not finite; the last finite state is in the workdir.
    """
    return _run(config, (config.method,), workdir, "train")


def compare(config: TrainConfig, workdir: str | os.PathLike[str]) -> dict[str, Any]:
    """Trains every method of `config.methods`, seed for seed, and adds paired tests and `report.html`.

    Arguments, result and errors are those of `train`.
    """
    return _run(config, config.methods, workdir, "compare")


def _run(
    config: TrainConfig, methods: tuple[str, ...], workdir: str | os.PathLike[str], command: str
) -> dict[str, Any]:
    setup = make_setup(config)
    if (summary := layout.finished_summary(workdir, config, command)) is not None:
        Console(stderr=True).print(f"{workdir} holds this run, finished; its summary is read back.", markup=False)
        return summary
    folder = layout.open_workdir(workdir, config, command)
    results = []
    with MetricWriters(folder) as writers:
        run = _Run(setup, writers)
        for method in methods:
            try:
                results.append(run.method(method))
                save_state(folder / layout.STATES / method, results[-1].state)
            except DivergenceError as error:
                save_last_finite_state(folder, setup, error)
                raise
    return finish_run(folder, setup, results, with_report=command == "compare")


class _Run:
    """The methods of one run; what they share is computed once."""

    def __init__(self, setup: Setup, writers: MetricWriters):
        self.setup = setup
        self.writers = writers
        self.keys: SeedKeys = make_seed_keys(setup.config.seeds)
        self.evaluation = Evaluation(setup)
        self.schedule = learning_rate_schedule(setup.config)
        self._offline: tuple[RunState, float] | None = None
        self._programs: dict[StepFactory, Phase] = {}

    def method(self, method: str) -> MethodResult:
        """Trains one method from its start to its end."""
        if method == "tuned_task_loss":
            return self._tuned_task_loss()
        rate = self.setup.config.inner.learning_rate
        if method not in LEARNING:
            return self._training(method, None, rate, observe=self._writer(method))
        offline, seconds = self._offline_phase()
        assert offline.phi is not None
        result = self._training(method, restart_outer_optimizer(offline.phi), rate, observe=self._writer(method))
        return dataclasses.replace(result, offline_seconds=seconds)

    def _tuned_task_loss(self) -> MethodResult:
        """The baseline at each rate of the grid; the best mean validation metric of all seeds wins."""
        tried: dict[float, tuple[MethodResult, list]] = {}  # by mean validation metric
        table: dict[str, float | None] = {}
        diverged: DivergenceError | None = None
        start = time.perf_counter()
        for rate in self.setup.config.tuning.learning_rates:
            observed: list = []
            try:
                result = self._training("tuned_task_loss", None, rate, lambda *item, to=observed: to.append(item))
                valid = table[str(rate)] = describe(result.valid.tolist())["mean"]
                tried.setdefault(valid, (result, observed))
            except DivergenceError as error:  # a rate that is too high is a finding of the search, not its end
                diverged, table[str(rate)] = error, None
        if diverged is not None and not tried:
            raise diverged
        result, observed = tried[min(tried)]
        for item in observed:
            self._writer("tuned_task_loss")(*item)
        return dataclasses.replace(result, seconds=time.perf_counter() - start, tuning=table)

    def _offline_phase(self) -> tuple[RunState, float]:
        if self._offline is None:
            config = self.setup.config
            history = self._advance(
                "offline",
                "offline",
                make_offline_phase(self.setup),
                RunState(None, init_phi(self.setup, self.keys)),
                config.offline.num_steps,
                config.inner.learning_rate,
                self._writer("offline", "offline"),
            )
            self._offline = history.state, history.seconds
        return self._offline

    def _training(self, method: str, phi, learning_rate: float, observe: Observer) -> MethodResult:
        config = self.setup.config
        kind = STEPS[method]
        if kind not in self._programs:
            self._programs[kind] = make_training_phase(self.setup, method)
        program = self._programs[kind]
        state = init_training(self.setup, method, self.keys, phi)
        history = self._advance(method, "training", program, state, config.num_steps, learning_rate, observe)
        return MethodResult(
            method=method,
            learning_rate=learning_rate,
            state=without_carry(history.state),
            test=history.scalars[f"test/{config.metric}"],
            valid=history.scalars[f"valid/{config.metric}"],
            seconds=history.seconds,
            shape_steps=history.shape_steps,
            shapes=history.shapes,
            predictions=np.asarray(self.evaluation.predictions) if history.shapes else None,
        )

    def _advance(
        self,
        method: str,
        phase: str,
        program: Phase,
        state: RunState,
        num_steps: int,
        learning_rate: float,
        observe: Observer,
    ) -> History:
        """Advances a state by `num_steps` in chunks, measuring before the first, between them and after the last."""
        config, splits = self.setup.config, splits_of(self.setup)
        check = functools.partial(_check_finite, method=method, phase=phase, seeds=config.seeds)
        history = History(state)
        start = time.perf_counter()
        measured = self._measure(state, learning_rate, 0)
        check({}, measured, state, last_finite=state, first_step=0)
        self._record(history, state, 0, measured, observe)
        with show_progress(_title(method, learning_rate), num_steps) as update:
            for first_step in range(0, num_steps, config.eval_every):
                chunk = min(config.eval_every, num_steps - first_step)
                state, metrics = program.advance(
                    history.state, self.keys, splits, learning_rate, first_step, num_steps=chunk
                )
                metrics, done = jax.device_get(metrics), first_step + chunk
                every = config.outer.every if phase == "training" else 1
                means = {f"train/{name}": value for name, value in _means(metrics, first_step, every).items()}
                measured = self._measure(state, learning_rate, done)
                check(metrics, measured, state, last_finite=history.state, first_step=first_step)
                self._record(history, state, done, means | measured, observe)
                update(done, _words(history.scalars, config.metric))
        history.seconds = time.perf_counter() - start
        return history

    def _measure(self, state: RunState, learning_rate: float, step: int) -> dict[str, np.ndarray]:
        rate = learning_rate * float(np.asarray(self.schedule(step)))
        return jax.device_get(self.evaluation.scalars(state, rate))

    def _record(
        self, history: History, state: RunState, step: int, scalars: dict[str, np.ndarray], observe: Observer
    ) -> None:
        history.state, history.scalars = state, scalars
        if (shape := self.evaluation.loss_shape(state)) is not None:
            history.shape_steps.append(step)
            history.shapes.append(np.asarray(shape))
        if scalars:
            observe(step, scalars)

    def _writer(self, method: str, phase: str = "training") -> Observer:
        seeds = self.setup.config.seeds
        return lambda step, scalars: self.writers.write(method, phase, step, seeds, scalars)


def _title(method: str, learning_rate: float) -> str:
    if method == "tuned_task_loss":
        return f"task loss, rate {learning_rate:g}"
    return METHODS.get(method, "offline phase (ML3)")


def _words(scalars: dict[str, np.ndarray], metric: str) -> str:
    """The mean over seeds of the validation metric or, in the offline phase, of the task loss."""
    for title, name in (("valid", f"valid/{metric}"), ("task loss", "train/outer_loss")):
        if name in scalars:
            return f"{title} {scalars[name].mean():.4f}"
    return ""


def _means(metrics: dict[str, np.ndarray], first_step: int, outer_every: int) -> dict[str, np.ndarray]:
    """Means `[S]` over the steps of a chunk; what is measured where phi is updated, over those steps."""
    num_steps = next(iter(metrics.values())).shape[1]
    is_due = (first_step + np.arange(num_steps)) % outer_every == outer_every - 1
    is_due |= not is_due.any()
    of_updates = ("outer_loss", "hypergradient_norm")
    return {
        name: (values[:, is_due] if name in of_updates else values).mean(axis=1) for name, values in metrics.items()
    }


def _check_finite(
    metrics: dict[str, np.ndarray],  # [S, num_steps] each; empty before the first step
    measured: dict[str, np.ndarray],  # [S] each, after the last of these steps
    state: RunState,
    *,
    last_finite: RunState,
    first_step: int,
    method: str,
    phase: str,
    seeds: tuple[int, ...],
) -> None:
    """Raises for the first number that is not finite in the metrics of a chunk, the state after it or its measures."""
    num_steps = next(iter(metrics.values())).shape[1] if metrics else 0
    found = [
        (int(step), name, int(index))
        for name, values in metrics.items()
        for index, step in np.argwhere(~np.isfinite(values))
    ]
    last = num_steps - 1
    for name, tree in without_carry(state)._asdict().items():
        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(tree) if np.issubdtype(leaf.dtype, np.floating)]
        broken = (i for i in range(len(seeds)) if not all(np.isfinite(leaf[i]).all() for leaf in leaves))
        found += [(last, name, index) for index in broken]
    for name, values in measured.items():
        found += [(last, name, int(index)) for index in np.flatnonzero(~np.isfinite(values))]
    if found:
        step, name, index = min(found, key=lambda item: item[0])
        raise DivergenceError(
            method, phase, name, first_step + step + 1, seeds[index], without_carry(last_finite), first_step
        )
