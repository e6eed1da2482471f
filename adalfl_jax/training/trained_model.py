"""A model that a finished run trained, read back to predict."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adalfl_jax.data import Preprocessing
from adalfl_jax.learned_losses import FrozenLoss
from adalfl_jax.models import Model
from adalfl_jax.training import workdir as layout
from adalfl_jax.training.checkpoint import load_state
from adalfl_jax.training.config import TrainConfig
from adalfl_jax.training.evaluation import EVAL_BATCHES
from adalfl_jax.training.files import WorkdirError, read_json, reading, resolve_folder
from adalfl_jax.training.methods import METHODS
from adalfl_jax.types import PyTree


@dataclasses.dataclass(frozen=True, eq=False)
class TrainedModel:
    """A model of one method and one seed at the end of its training, from `load_model`.

    `model.apply(params, model_state, preprocessing.normalize(inputs), train=False, rng_key=None)` is what it makes of
    inputs as the splits of the dataset hold them; `predict` takes them as they were given.
    """

    config: TrainConfig  # of the run
    method: str
    seed: int
    preprocessing: Preprocessing  # by the statistics of the training data
    model: Model
    params: PyTree
    model_state: PyTree
    learned_loss: FrozenLoss | None  # what the method learned for this seed; None where it learns none

    def predict(self, inputs: Any) -> np.ndarray:
        """Outputs `[N, C]` of the model in eval mode: logits, or what a regression predicts in the target's units.

        Args:
          inputs: any number of rows `[N, ...]` in the units of the raw data, as `Preprocessing.encode` takes them. A
            few batches of them are on the device at a time.

        Returns:
          float32 logits, or float64 numbers of a regression.

        Raises:
          DatasetError: inputs of another shape or type than the run's, or that are not finite.
        """
        inputs = self.preprocessing.encode(inputs)
        size = EVAL_BATCHES * self.config.batch_size
        outputs = [np.zeros((0, self.preprocessing.num_outputs), np.float32)]  # for no rows
        for start in range(0, len(inputs), size):
            batch = inputs[start : start + size]
            num_rows = len(batch)
            # A program is compiled for each power of 2, and not for each number of rows.
            num_more = min(size, 1 << (num_rows - 1).bit_length()) - num_rows
            padded = np.pad(batch, [(0, num_more)] + [(0, 0)] * (batch.ndim - 1))
            outputs.append(np.asarray(self._outputs(self.params, self.model_state, padded))[:num_rows])
        return self.preprocessing.decode(np.concatenate(outputs))

    @functools.cached_property
    def _outputs(self) -> Any:
        def apply(params: PyTree, model_state: PyTree, inputs: jax.Array) -> jax.Array:
            inputs = self.preprocessing.normalize(inputs)
            return self.model.apply(params, model_state, inputs, train=False, rng_key=None)[0]

        return jax.jit(apply)


def load_model(workdir: str | os.PathLike[str], method: str | None = None, seed: int | None = None) -> TrainedModel:
    """Reads back a model of a finished run; one device suffices, whatever mesh it was trained on.

    All of it is in the folder, which may have been moved: the data of the run are not needed.

    Args:
      workdir: the folder of `train` or `compare`.
      method: one of the run's; None takes the only one.
      seed: one of the run's; None takes the one with the best validation metric.

    Raises:
      WorkdirError: no finished run in the folder, no such method or seed in it, or files that are missing or cannot be
        read.

    Example:
      >>> trained = load_model("runs/diabetes_mlp", method="adalfl")  # doctest: +SKIP
      >>> trained.predict([[59, 2, 32.1, 101, 157, 93.2, 38, 4, 4.8598, 87]]).shape  # doctest: +SKIP
      (1, 1)
    """
    folder = resolve_folder(workdir)
    layout.require_run(folder)
    if not (folder / layout.SUMMARY).is_file():
        raise WorkdirError(
            f"{folder} holds no finished run: it has no {layout.SUMMARY}; the command of the run, given again, goes on"
        )
    summary = layout.read_summary(folder)
    method = _choose_method(folder, summary, method)
    seed = _choose_seed(folder, summary, method, seed)
    with _telling_its_version(folder, summary):
        _, config = layout.read_config(folder)
        preprocessing = _read_preprocessing(folder / layout.PREPROCESSING)
        model = config.model.make(preprocessing.input_shape, preprocessing.num_outputs)
        loss = config.learned_loss.make(config.task_loss) if METHODS[method].has_learned_loss else None
        keys = jax.random.split(jax.random.key(0), len(summary["seeds"]))
        params, model_state = jax.eval_shape(jax.vmap(model.init), keys)
        structure: dict[str, Any] = {"theta": {"params": params, "model_state": model_state}}
        if loss is not None:
            structure["phi"] = {"params": jax.eval_shape(jax.vmap(loss.init), keys)}
        state = load_state(folder / layout.STATES / method, structure)
    index = summary["seeds"].index(seed)
    state = jax.tree.map(lambda leaf: jnp.asarray(leaf[index]), state)
    learned_loss = None if loss is None else FrozenLoss(loss, state["phi"]["params"], {"method": method, "seed": seed})
    return TrainedModel(config, method, seed, preprocessing, model, **state["theta"], learned_loss=learned_loss)


def _choose_method(folder: Path, summary: Mapping[str, Any], method: str | None) -> str:
    methods = list(summary["methods"])
    if method is None and len(methods) == 1:
        return methods[0]
    if method is None or method not in methods:
        asked = "several methods, of which one must be named" if method is None else f"no method {method!r}"
        raise WorkdirError(f"{folder} holds {asked}: {', '.join(methods)}")
    return method


def _choose_seed(folder: Path, summary: Mapping[str, Any], method: str, seed: int | None) -> int:
    seeds = summary["seeds"]
    if seed is None:
        return seeds[int(np.argmin(summary["methods"][method]["valid"]["per_seed"]))]
    if seed not in seeds:
        raise WorkdirError(f"{folder} holds no seed {seed!r}; it has {', '.join(map(str, seeds))}")
    return seed


def _read_preprocessing(path: Path) -> Preprocessing:
    values = read_json(path, *(field.name for field in dataclasses.fields(Preprocessing)))
    with reading(path):
        return Preprocessing.from_dict(values)


@contextlib.contextmanager
def _telling_its_version(folder: Path, summary: Mapping[str, Any]) -> Iterator[None]:
    """Adds to an error in reading a run that another version of this package wrote it."""
    try:
        yield
    except WorkdirError as error:
        theirs, ours = summary.get("environment", {}).get("adalfl_jax"), importlib.metadata.version("adalfl_jax")
        if theirs in (None, ours):
            raise
        raise WorkdirError(f"{error} (adalfl_jax {theirs} wrote it, and this is {ours})") from error
