"""`train` for one method, `compare` for several: phases in chunks on the device, measures between them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from adalfl_jax.analysis.figures import LossShapes, picture_of_loss, prediction_label
from adalfl_jax.training import workdir as layout
from adalfl_jax.training.checkpoint import save_state
from adalfl_jax.training.config import TrainConfig
from adalfl_jax.training.digest import digest_of_offline_phase
from adalfl_jax.training.divergence import DivergenceError
from adalfl_jax.training.evaluation import Evaluation
from adalfl_jax.training.fields import require
from adalfl_jax.training.files import BusyError, WorkdirError, is_locked, lock_folder, resolve_folder
from adalfl_jax.training.hosts import agreed_signal, connect, is_first, on_first, require_same, warn
from adalfl_jax.training.initial import SeedKeys, init_phi, init_theta, init_training, make_seed_keys, warn_of_poor_fit
from adalfl_jax.training.methods import METHODS, OFFLINE, has_offline_phase, phase_of
from adalfl_jax.training.outputs import finish_run, keep_divergence
from adalfl_jax.training.phases import Program, make_offline_program, make_training_program
from adalfl_jax.training.preemption import Preemption, PreemptionError
from adalfl_jax.training.progress import tell
from adalfl_jax.training.results import MethodResult, Scalars
from adalfl_jax.training.setup import Setup, check_predictions, make_setup
from adalfl_jax.training.sharding import to_host
from adalfl_jax.training.stage import Observer, Stage, StageRunner
from adalfl_jax.training.start import pin_start
from adalfl_jax.training.state import RunState, without_carry
from adalfl_jax.training.steps import STEPS, StepFactory
from adalfl_jax.training.weights_and_biases import require_wandb
from adalfl_jax.training.writers import MetricWriters
from adalfl_jax.types import Theta


def train(
    config: TrainConfig,
    workdir: str | os.PathLike[str],
    *,
    offline_dir: str | os.PathLike[str] | None = None,
    wait: bool = True,
) -> dict[str, Any]:
    """Trains `config.method` for all seeds of the config and writes the workdir.

    Args:
      config: from `TrainConfig.from_mapping`.
      workdir: a folder for this run alone. A finished run of the same config is not repeated, an unfinished one goes
        on.
      offline_dir: a folder of offline phases, each under a digest of all it depends on. The first run that needs one
        trains and leaves it there, and others begin with it as if it were theirs, to the bit.
      wait: for an offline phase that another run trains; if False that is a `BusyError`, so that the caller can do
        something else meanwhile.

    Returns:
      What `summary.json` holds.

    Raises:
      ConfigError: a config whose parts do not fit together.
      DatasetError: data that are missing or damaged.
      WorkdirError: a folder that cannot be written, or holds something else.
      BusyError: another process works on the folder or, where that is not waited for, on the offline phase; the same
        call goes on when it is done.
      DivergenceError: a number that is not finite; the last finite state is in the workdir.
      PreemptionError: SIGTERM or SIGINT came, and how far the run is has been saved.
    """
    return _run(config, (config.method,), workdir, "train", offline_dir, wait)


def compare(config: TrainConfig, workdir: str | os.PathLike[str]) -> dict[str, Any]:
    """Trains every method of `config.methods`, seed for seed, and adds paired tests and `report.html`.

    Result and errors are those of `train`.
    """
    return _run(config, config.methods, workdir, "compare", None, wait=True)


def _run(
    config: TrainConfig,
    methods: tuple[str, ...],
    workdir: str | os.PathLike[str],
    command: str,
    offline_dir: str | os.PathLike[str] | None,
    wait: bool,
) -> dict[str, Any]:
    _check_methods(config, methods)
    connect(config.hosts)
    require_wandb(config)
    config = pin_start(config)
    setup = make_setup(config)
    check_predictions(config, methods, setup.dataset)
    _warn_of_a_random_loss(config, methods)
    _warn_of_milestones(config)
    learns_offline = config.offline.num_steps > 0 and has_offline_phase(methods)
    shares_offline = offline_dir is not None and learns_offline
    keep = config.checkpoint.keep
    require("checkpoint.keep", keep, keep > 0 or not shares_offline, "at least 1 to share an offline phase")
    require_same(
        config.to_dict()
        | {"hosts": None, "command": command, "data": setup.dataset.content, "offline_dir": shares_offline}
    )
    with contextlib.ExitStack() as held:
        if (summary := _read_finished(setup, workdir, command)) is not None:
            return summary
        on_first(lambda: held.enter_context(lock_folder(workdir)))
        if (summary := _read_finished(setup, workdir, command)) is not None:  # by who held it till now
            return summary
        shared = None
        if offline_dir is not None and shares_offline:
            shared = resolve_folder(offline_dir) / digest_of_offline_phase(config)
            if not wait:  # looked for now, not once files are written and programs compiled
                on_first(functools.partial(_refuse_if_busy, shared))
        folder = Path(on_first(lambda: str(layout.open_workdir(workdir, config, command, setup.dataset.content))))
        try:
            return _run_methods(setup, methods, folder, shared, wait, with_report=command == "compare")
        except WorkdirError:
            raise
        except OSError as error:  # a full disk, a folder that is gone
            raise WorkdirError(f"the run in {folder} broke off: {error}. Once that is mended it goes on") from error


def _check_methods(config: TrainConfig, methods: tuple[str, ...]) -> None:
    """Raises ConfigError for methods that the other settings do not fit."""
    outer = config.outer
    is_read = not all(METHODS[method].has_learned_loss for method in methods)
    alone = f'"" with {" and ".join(methods)} alone, which learn the loss'
    require("baseline.loss", config.baseline.loss, is_read or not config.baseline.loss, alone)
    for method in methods:
        fits = outer.split == "valid" or not METHODS[method].needs_clean_set
        require("outer.split", outer.split, fits, f'"valid" for the method {method!r}, which needs a clean set')
        if METHODS[method].is_tuned:
            fits = not config.trains_on_valid(method)
            expected = f'0 for "{method}", or outer.split_fraction below 1: it would choose by examples it trains on'
            require("outer.joint_share", outer.joint_share, fits, expected)
        if METHODS[method].updates_phi:
            first = config.first_joint_step
            expected = (
                f"so small that {method} updates phi before the clean set joins, which it would after {first} steps"
            )
            require("outer.joint_share", outer.joint_share, outer.every <= first, expected)


def _refuse_if_busy(shared: Path) -> None:
    if shared.is_dir() and is_locked(shared):
        raise BusyError(f"another run trains the offline phase {shared}; this one can begin when that is done")


def _warn_of_milestones(config: TrainConfig) -> None:
    """Warns of milestones that no schedule looks at."""
    inner = config.inner
    if inner.milestones and inner.schedule != "milestones":
        warn(
            f"config.inner.milestones {inner.milestones} has no effect with inner.schedule {inner.schedule!r}; "
            'inner.schedule "milestones" goes by it'
        )


def _warn_of_a_random_loss(config: TrainConfig, methods: tuple[str, ...]) -> None:
    loss = config.learned_loss
    is_random = config.offline.num_steps == 0 and loss.start == "random" and loss.family != "scaled_task_loss"
    if "ml3" in methods and is_random:
        warn(
            "ml3 learns its loss offline alone and config.offline.num_steps is 0, so it trains on one as it was drawn; "
            "set that, or config.learned_loss.start"
        )


def _read_finished(setup: Setup, workdir: str | os.PathLike[str], command: str) -> dict[str, Any] | None:
    """The summary of this run where the folder holds it finished, or None."""
    summary = on_first(lambda: layout.finished_summary(workdir, setup.config, command))
    if summary is None:
        return None
    if summary["data"] != setup.dataset.content:
        raise WorkdirError(
            f"{workdir} holds this run, finished, on other data than config.dataset names now ({summary['data']} -> "
            f"{setup.dataset.content}); bring those back, or choose a new folder"
        )
    tell(f"{workdir} holds this run, finished; its summary is read back.")
    if is_first() and not is_locked(workdir):
        layout.remove_checkpoints(workdir)  # where the run was killed just before it did
    return summary


def _run_methods(
    setup: Setup, methods: tuple[str, ...], folder: Path, shared: Path | None, wait: bool, *, with_report: bool
) -> dict[str, Any]:
    results = []
    only_first = MetricWriters(folder, setup.config) if is_first() else contextlib.nullcontext()
    with only_first as writers, Preemption() as preemption:
        runner = _MethodRunner(setup, methods, writers, folder, shared, preemption, wait)
        for method in methods:
            try:
                results.append(runner.train(method))
                save_state(folder / layout.STATES / method, results[-1].state)
            except DivergenceError as error:
                keep_divergence(folder, setup, error)
                raise
    summary = on_first(lambda: finish_run(folder, setup, results, with_report=with_report))
    if is_first():
        layout.remove_checkpoints(folder)
    if (number := agreed_signal(preemption.signal)) is not None:  # came after the last chunk
        raise PreemptionError(number, "the run is over, and its results are written")
    return summary


class _MethodRunner:
    """The methods of one run; what they share is computed once.

    A run is a series of stages: the offline phase, each method, each rate of a search. Each keeps its own checkpoints,
    and one that is over is read back from its last, so a resumed run makes its results just as an unbroken one does.
    """

    def __init__(
        self,
        setup: Setup,
        methods: tuple[str, ...],
        writers: MetricWriters | None,  # None in a process that writes nothing
        workdir: Path,
        offline_checkpoints: Path | None,
        preemption: Preemption,
        waits: bool,
    ):
        self._setup = setup
        self._waits = waits
        self._offline_checkpoints = offline_checkpoints
        self._writers = writers
        self._keys: SeedKeys = make_seed_keys(setup.config.seeds, setup.mesh)
        self._evaluation = Evaluation(setup)
        self._preemption = preemption
        num_stages = _count_stages(setup.config, methods)
        self._stages = StageRunner(setup, self._keys, self._evaluation, workdir, preemption, num_stages)
        self._offline: tuple[RunState, float] | None = None
        self._programs: dict[StepFactory, Program] = {}

    def train(self, method: str) -> MethodResult:
        """Trains one method from its start to its end."""
        if METHODS[method].is_tuned:
            return self._tuned(method)
        rate = self._setup.config.inner.learning_rate
        if not METHODS[method].has_learned_loss:
            return self._training(method, None, rate, observe=self._writer(method))
        offline, seconds = self._offline_phase()
        assert offline.phi is not None
        result = self._training(method, offline.phi, rate, observe=self._writer(method))
        return dataclasses.replace(result, offline_seconds=seconds)

    def _tuned(self, method: str) -> MethodResult:
        """A baseline at each rate of the grid; the best mean validation metric of all seeds wins."""
        best: tuple[float, MethodResult, list] | None = None  # the first of equals, with its mean validation metric
        table: dict[str, float | None] = {}
        diverged: DivergenceError | None = None
        seconds = 0.0
        for rate in self._setup.config.tuning.learning_rates:
            observed: list = []
            try:
                result = self._training(method, None, rate, lambda *item, to=observed: to.append(item))
                valid = table[str(rate)] = float(result.valid.mean(dtype=np.float64))
                if best is None or valid < best[0]:
                    best = valid, result, observed
                seconds += result.seconds
            except DivergenceError as error:  # a rate that is too high is a finding of the search, not its end
                diverged, table[str(rate)] = error.with_traceback(None), None  # its frames hold states
                seconds += error.seconds
        if best is None:
            assert diverged is not None
            raise diverged
        _, result, observed = best
        for item in observed:
            self._writer(method)(*item)
        return dataclasses.replace(result, seconds=seconds, tuning=table)

    def _offline_phase(self) -> tuple[RunState, float]:
        if self._offline is None:
            config, phi = self._setup.config, init_phi(self._setup, self._keys)
            warn_of_poor_fit(self._setup, phi)
            stage = Stage(
                method=OFFLINE,
                program=make_offline_program(self._setup),
                start=RunState(None, phi),
                num_steps=config.offline.num_steps,
                learning_rate=config.inner.learning_rate,
                observe=self._writer(OFFLINE),
                backed_off=_backed_off(self._setup, make_offline_program),
                checkpoints=self._offline_checkpoints,
            )
            with contextlib.ExitStack() as held:
                if self._offline_checkpoints is not None:
                    self._hold(self._offline_checkpoints, held)
                history = self._stages.advance(stage)
            self._offline = history.state, history.seconds
        return self._offline

    def _hold(self, shared: Path, held: contextlib.ExitStack) -> None:
        """Locks a shared offline phase; waits while another run trains it, or until a signal comes."""

        def hold() -> bool:
            try:
                held.enter_context(lock_folder(shared))
            except BusyError:  # after a moment
                if not self._waits:
                    raise
                return False
            return True

        has_told = False
        while not on_first(hold):
            if (number := agreed_signal(self._preemption.signal)) is not None:  # to any of the processes
                raise PreemptionError(number, f"the run was waiting for {shared}; start it again to go on")
            if not has_told:
                tell(f"another process works on {shared}; this one waits for it")
            has_told = True

    @functools.cached_property
    def _theta(self) -> Theta:
        return init_theta(self._setup, self._keys)

    def _training(self, method: str, phi, learning_rate: float, observe: Observer) -> MethodResult:
        config = self._setup.config
        kind = STEPS[method]
        if kind not in self._programs:
            self._programs[kind] = make_training_program(self._setup, method)
        program = self._programs[kind]
        state = init_training(self._setup, method, self._keys, phi, self._theta)
        is_online = METHODS[method].updates_phi
        backed_off = _backed_off(self._setup, lambda setup: make_training_program(setup, method)) if is_online else None
        stage = Stage(method, program, state, config.num_steps, learning_rate, observe, backed_off)
        history = self._stages.advance(stage)
        end = to_host(without_carry(history.state))
        rates = None if end.rate_factor is None else learning_rate * np.asarray(end.rate_factor, np.float64)
        return MethodResult(
            method=method,
            learning_rate=learning_rate if rates is None else float(np.median(rates)),
            learning_rates=None if rates is None else rates.tolist(),
            state=end,
            test=history.scalars[f"test/{config.metric}"],
            valid=history.scalars[f"valid/{config.metric}"],
            seconds=history.seconds,
            shape_steps=history.shape_steps,
            shapes=history.shapes,
            predictions=np.asarray(self._evaluation.predictions) if history.shapes else None,
        )

    def _writer(self, method: str) -> Observer:
        config, phase = self._setup.config, phase_of(method)
        learner = "the offline phase" if method == OFFLINE else METHODS[method].title

        def write(step: int, scalars: Scalars, shapes: LossShapes | None) -> None:
            if self._writers is None:
                return
            self._writers.write(method, phase, step, config.seeds, scalars)
            if shapes is not None:
                predictions = np.asarray(self._evaluation.predictions)
                label = prediction_label(config.learned_loss.predictions)
                picture = picture_of_loss(shapes, predictions, label, f"What {learner} learned, seed {config.seed}")
                self._writers.write_picture(method, phase, step, config.seed, picture)

        return write


def _count_stages(config: TrainConfig, methods: tuple[str, ...]) -> int:
    """Stages of a run: one for each method or, of a search, for each rate, and one for the offline phase."""
    num_rates = len(config.tuning.learning_rates)
    return has_offline_phase(methods) + sum(num_rates if METHODS[method].is_tuned else 1 for method in methods)


def _backed_off(setup: Setup, make_program: Callable[[Setup], Program]) -> Callable[[int], Program]:
    """Makes the program of a phase with eta halved so many times."""

    def make(times: int) -> Program:
        config, share = setup.config, 0.5**times
        outer = dataclasses.replace(config.outer, learning_rate=config.outer.learning_rate * share)
        offline = dataclasses.replace(config.offline, learning_rate=config.offline.learning_rate * share)
        return make_program(
            dataclasses.replace(setup, config=dataclasses.replace(config, outer=outer, offline=offline))
        )

    return make
