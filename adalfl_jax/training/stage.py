"""A stage of a run from its start, or from where a checkpoint left it, to its end."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from adalfl_jax.analysis.figures import LossShapes
from adalfl_jax.training import workdir as layout
from adalfl_jax.training.batches import splits_of
from adalfl_jax.training.checkpoint import StageCheckpoints
from adalfl_jax.training.chunk import (
    TOO_LONG,
    chunk_means,
    seeds_at_rest,
    seeds_with_long_steps,
    seeds_without_gradient,
    updates_of_phi,
)
from adalfl_jax.training.divergence import DivergenceError, require_finite
from adalfl_jax.training.evaluation import Evaluation
from adalfl_jax.training.hosts import agreed_signal, is_first, warn
from adalfl_jax.training.initial import SeedKeys
from adalfl_jax.training.methods import OFFLINE, Method, find_method, phase_of
from adalfl_jax.training.optimizers import learning_rate_schedule
from adalfl_jax.training.phases import Program
from adalfl_jax.training.preemption import Preemption, PreemptionError
from adalfl_jax.training.profiling import trace_chunk
from adalfl_jax.training.progress import show_progress, tell
from adalfl_jax.training.results import History, Scalars
from adalfl_jax.training.setup import Setup
from adalfl_jax.training.sharding import replicate
from adalfl_jax.training.state import RunState

MAX_BACK_OFFS = 10  # of a stage: eta is then a thousandth

# (step, scalars, the loss of the first seed so far where a picture of it is due)
Observer = Callable[[int, Scalars, LossShapes | None], None]


@dataclasses.dataclass(frozen=True)
class Stage:
    """The offline phase, a method, or a rate of a search: steps of one program."""

    method: str  # or `OFFLINE`
    program: Program
    start: RunState
    num_steps: int
    learning_rate: float
    observe: Observer  # is told the measures at the start and after every chunk
    backed_off: Callable[[int], Program] | None = None  # the program with eta halved so many times, where it has one
    checkpoints: Path | None = None  # a folder of its own, where others find it when it is over

    @property
    def name(self) -> str:
        """Of the folder of its checkpoints."""
        return f"{self.method}_{self.learning_rate}" if self.kind.is_tuned else self.method

    @property
    def kind(self) -> Method:
        """What sets the method apart from others."""
        return find_method(self.method)

    @property
    def phase(self) -> str:
        """What its measures are recorded under."""
        return phase_of(self.method)

    def progress(self, step: int) -> float:
        """The share of training that is done; none in the offline phase, whose models are fresh."""
        return 0.0 if self.method == OFFLINE else step / self.num_steps

    @property
    def title(self) -> str:
        """What a reader is shown."""
        return f"task loss, rate {self.learning_rate:g}" if self.kind.is_tuned else self.kind.title


class StageRunner:
    """Advances stages in chunks on the device; measures, saves and heeds signals between them."""

    def __init__(
        self,
        setup: Setup,
        keys: SeedKeys,
        evaluation: Evaluation,
        workdir: Path,
        preemption: Preemption,
        num_stages: int = 1,
    ):
        self._setup, self._keys, self._evaluation = setup, keys, evaluation
        self._workdir, self._preemption = workdir, preemption
        self._num_begun, self._num_stages = 0, num_stages
        self._schedule = learning_rate_schedule(setup.config)
        self._alarmed: set[tuple[str, str]] = set()  # stages, and what was told of them

    def advance(self, stage: Stage) -> History:
        """Takes a stage to its end.

        Raises:
          DivergenceError: a number that is not finite.
          PreemptionError: a signal came.
          WorkdirError: a checkpoint cannot be read or written.
        """
        self._num_begun += 1
        folder = stage.checkpoints or self._workdir / layout.CHECKPOINTS / stage.name
        with StageCheckpoints(folder, self._setup.config.checkpoint, self._setup.dataset.content) as kept:
            history = kept.restore(stage.start)
            if history is None:
                history = self._begin(stage)
            else:
                tell(f"{stage.title} goes on from step {history.step} of {stage.num_steps}")
                for step, scalars in history.observed:
                    self._hand_on(stage, history, step, scalars)
            try:
                if history.step < stage.num_steps:
                    self._advance_chunks(stage, history, kept)
            except (DivergenceError, PreemptionError):
                kept.save(history)
                raise
            kept.save(history)
        return history

    def _begin(self, stage: Stage) -> History:
        start = time.perf_counter()
        history, state = History(stage.start), stage.start
        measured = self._measure(stage, state, 0)
        self._require_finite(stage, history, {}, measured, state)
        if state.rate_factor is not None:
            factor = self._factor_of_first_step(stage, measured)
            state = state._replace(rate_factor=replicate(self._setup.mesh, jnp.asarray(factor)))
            measured["implicit_learning_rate"] = measured["implicit_learning_rate"] * factor
        # What clipping leaves of a step is not measured, and how long it is may have been asked for.
        is_exempt = self._setup.config.inner.clip_norm > 0 or state.rate_factor is not None
        self._alarm(
            stage,
            [] if is_exempt else seeds_with_long_steps(measured, stage.learning_rate),
            f"the first step is as long as one on the task loss at a rate above {TOO_LONG:g}",
            "theta may be thrown to where nothing trains it; a config.inner.first_step_rate of 0.3, say, shortens it",
        )
        self._record(stage, history, state, 0, measured)
        history.seconds = time.perf_counter() - start
        return history

    def _factor_of_first_step(self, stage: Stage, measured: Scalars) -> np.ndarray:
        """What makes the first step of each seed as long as `inner.first_step_rate` says; 1 for a loss that is flat."""
        factor = np.ones_like(measured["gradient_scale"])
        moved = np.setdiff1d(np.arange(len(factor)), seeds_at_rest(measured))
        lengths = stage.learning_rate * measured["gradient_scale"]
        factor[moved] = self._setup.config.inner.first_step_rate / lengths[moved]
        return factor

    def _advance_chunks(self, stage: Stage, history: History, kept: StageCheckpoints) -> None:
        metric, program = self._setup.config.metric, stage.program
        if history.num_back_offs and stage.backed_off is not None:
            program = stage.backed_off(history.num_back_offs)
        start = time.perf_counter() - history.seconds
        place = f"{self._num_begun} of {self._num_stages}: " if self._num_stages > 1 else ""
        with show_progress(f"{place}{stage.title}", stage.num_steps, first_step=history.step) as update:
            while history.step < stage.num_steps:
                try:
                    self._advance_chunk(stage, program, history)
                except DivergenceError as error:
                    error.seconds = history.seconds = time.perf_counter() - start
                    program = self._back_off(stage, history, error)
                    self._obey_signal(stage, history.step)
                    continue
                history.seconds = time.perf_counter() - start
                update(history.step, _words(history.scalars, metric))
                kept.save_when_due(history)
                self._obey_signal(stage, history.step)

    def _advance_chunk(self, stage: Stage, program: Program, history: History) -> None:
        config, first_step = self._setup.config, history.step
        chunk = min(config.eval_every, stage.num_steps - first_step)
        done = first_step + chunk
        traced = config.profile_steps if is_first() else ()
        with trace_chunk(self._workdir / layout.PROFILES / stage.name, traced, first_step, done):
            state, metrics = program.advance(
                history.state, self._keys, splits_of(self._setup), stage.learning_rate, first_step, num_steps=chunk
            )
            metrics = jax.device_get(metrics)
        measured = self._measure(stage, state, done)
        self._require_finite(stage, history, metrics, measured, state)
        first_update = int(config.outer.pipelined)  # such a step updates phi for what the one before did
        limits = (config.outer.every, config.first_joint_step, first_update) if stage.kind.updates_phi else ()
        updates = updates_of_phi(range(first_step, done), *limits)
        self._watch_gradients(stage, metrics, measured, first_step, updates)
        means = {f"train/{name}": value for name, value in chunk_means(metrics, updates).items()}
        if config.on_nonfinite == "back_off" and stage.backed_off is not None:
            means["train/back_offs"] = np.full(config.num_seeds, history.num_back_offs)
        self._record(stage, history, state, done, means | measured)

    def _back_off(self, stage: Stage, history: History, error: DivergenceError) -> Program:
        """The program with eta halved once more; raises the error where that is not wanted or was in vain."""
        config = self._setup.config
        is_wanted = config.on_nonfinite == "back_off" and stage.backed_off is not None
        if stage.method != OFFLINE:
            is_wanted &= history.step < config.first_joint_step  # from there on phi stays as it is
        if is_wanted and history.num_back_offs == MAX_BACK_OFFS:
            error.args = (f"{error.args[0]}. Eta was halved {MAX_BACK_OFFS} times, in vain",)
            raise error
        if not is_wanted:
            raise error
        history.num_back_offs += 1
        times = f"eta is halved ({history.num_back_offs} of at most {MAX_BACK_OFFS} times)"
        warn(f"{error}. The run goes on from there: {times}")
        assert stage.backed_off is not None
        return stage.backed_off(history.num_back_offs)

    def _watch_gradients(
        self, stage: Stage, metrics: Scalars, measured: Scalars, first_step: int, updates: np.ndarray
    ) -> None:
        """Warns of seeds on which phi or theta has no gradient any more."""
        last_step = first_step + len(updates)
        is_alone = stage.method == OFFLINE or last_step <= self._setup.config.first_joint_step
        steps = f"{stage.phase} steps {first_step + 1} to {last_step}"
        self._alarm(
            stage,
            seeds_without_gradient(metrics, updates),
            f"the meta-gradient was exactly zero at every update of {steps}",
            "phi is not learned; the learned loss may be flat",
        )
        self._alarm(
            stage,
            seeds_at_rest(measured) if is_alone else [],
            f"after step {last_step} the learned loss's gradient is below a millionth of the task loss's, or that is 0",
            "theta is not trained; the loss may be flat, or its first steps so long that the outputs are saturated",
        )

    def _alarm(self, stage: Stage, positions: list[int], found: str, so: str) -> None:
        """Warns of something found on some seeds, once a stage."""
        if positions and (stage.name, so) not in self._alarmed:
            self._alarmed.add((stage.name, so))
            seeds = ", ".join(str(self._setup.config.seeds[position]) for position in positions)
            warn(f"{stage.method}: {found} (seeds {seeds}), so {so}. This is told once")

    def _measure(self, stage: Stage, state: RunState, step: int) -> Scalars:
        taken = min(step, stage.num_steps - 1)  # at the end the rate of the last step: none follows
        rate = stage.learning_rate * float(np.asarray(self._schedule(taken)))
        return jax.device_get(self._evaluation.scalars(state, rate, stage.progress(step)))

    def _require_finite(
        self, stage: Stage, history: History, metrics: Scalars, measured: Scalars, state: RunState
    ) -> None:
        require_finite(
            metrics,
            measured,
            state,
            last_finite=history.state,
            first_step=history.step,
            method=stage.method,
            config=self._setup.config,
        )

    def _record(self, stage: Stage, history: History, state: RunState, step: int, scalars: Scalars) -> None:
        history.state, history.step = state, step
        if (shape := self._evaluation.loss_shape(state, stage.progress(step))) is not None:
            history.shape_steps.append(step)
            history.shapes.append(np.asarray(shape))
        if scalars:
            history.observed.append((step, scalars))
            self._hand_on(stage, history, step, scalars)

    def _hand_on(self, stage: Stage, history: History, step: int, scalars: Scalars) -> None:
        shapes, steps = None, [each for each in history.shape_steps if each <= step]
        if len(steps) > 1:
            wanted = self._setup.config.num_loss_figures
            is_due = steps[-1] * wanted // stage.num_steps > steps[-2] * wanted // stage.num_steps
            shapes = LossShapes(np.array(steps), np.stack(history.shapes[: len(steps)])[:, 0]) if is_due else None
        stage.observe(step, scalars, shapes)

    def _obey_signal(self, stage: Stage, step: int) -> None:
        if (number := agreed_signal(self._preemption.signal)) is None:
            return
        is_kept = self._setup.config.checkpoint.keep > 0
        after = "saved; the same command goes on from there" if is_kept else "not saved, as config.checkpoint.keep is 0"
        raise PreemptionError(number, f"the run ended after step {step} of {stage.num_steps}, {stage.title}, {after}")


def _words(scalars: Scalars, metric: str) -> str:
    """The mean over seeds of the validation metric or, in the offline phase, of the task loss."""
    for title, name in (("valid", f"valid/{metric}"), ("task loss", "train/outer_loss")):
        if name in scalars:
            return f"{title} {scalars[name].mean():.4f}"
    return ""
