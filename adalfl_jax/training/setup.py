"""From a configuration to the functions and arrays it names."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from adalfl_jax import data
from adalfl_jax.data import Dataset, DatasetError
from adalfl_jax.learned_losses import at_progress
from adalfl_jax.models import Model
from adalfl_jax.task_losses import FOR_LABELS, METRICS, TASK_LOSSES
from adalfl_jax.training.config import TrainConfig
from adalfl_jax.training.fields import ConfigError, require
from adalfl_jax.training.hosts import warn
from adalfl_jax.training.methods import has_offline_phase
from adalfl_jax.training.sections import DatasetConfig
from adalfl_jax.training.sharding import divide_state, make_mesh, replicate
from adalfl_jax.training.state import RunState
from adalfl_jax.types import Batch, LearnedLoss, LossFn
from adalfl_jax.validation import require_floats, require_loss, returning_scalar


@dataclasses.dataclass(frozen=True)
class Setup:
    """Everything a run needs, built and checked."""

    config: TrainConfig
    dataset: Dataset  # its validation split is what the validation metric is measured on
    outer_examples: Batch | None  # what outer batches come from; None for the training split
    model: Model
    learned_loss: LearnedLoss
    task_loss_fn: LossFn
    metric_fn: LossFn
    mesh: Mesh | None = None  # what the run is divided over; None for one device

    def divide(self, state: RunState) -> RunState:
        """A seed's state with its large arrays divided over the mesh, where there is one."""
        return divide_state(self.mesh, state, self.config.batch_size)


def make_setup(config: TrainConfig, dataset: Dataset | None = None) -> Setup:
    """Loads the data and builds the model and the losses.

    Args:
      config: of the run.
      dataset: used instead of loading the one the config names.

    Raises:
      ConfigError: parts that do not fit together: a batch larger than its split, a model that cannot take the
        inputs, a loss that does not take the targets, a mesh of more devices than there are.
      DatasetError: data that is missing or damaged.
    """
    try:
        mesh = make_mesh(config)
        dataset, outer_examples = _set_outer_examples_apart(config, dataset or load_dataset(config.dataset))
        _check_augmentation(config, dataset)
        model = config.model.make(dataset.input_shape, dataset.num_outputs)
        learned_loss = config.learned_loss.make(config.task_loss)
        task_loss_fn, metric_fn = TASK_LOSSES[config.task_loss], METRICS[config.metric]
        setup = Setup(config, dataset, outer_examples, model, learned_loss, task_loss_fn, metric_fn, mesh)
        _check_kinds(config, dataset)
        _check_losses(setup)
    except DatasetError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error
    check_batch_size(config, dataset.train, outer_examples)
    return setup if mesh is None or dataset.is_streamed else _on_every_device(setup)


def _on_every_device(setup: Setup) -> Setup:
    """With the examples on every device of the mesh, so that gathering a batch takes no messages."""
    splits = replicate(setup.mesh, {name: getattr(setup.dataset, name) for name in ("train", "valid", "test")})
    outer = replicate(setup.mesh, setup.outer_examples)
    return dataclasses.replace(setup, dataset=dataclasses.replace(setup.dataset, **splits), outer_examples=outer)


def _set_outer_examples_apart(config: TrainConfig, dataset: Dataset) -> tuple[Dataset, Batch | None]:
    """Sets apart the validation examples that outer batches come from, where others are held out; returns both."""
    if config.outer.split == "train":
        return dataset, None
    _warn_of_unchecked_labels(config, dataset)
    if config.outer.split_fraction == 1:
        return dataset, dataset.valid
    is_outer = np.zeros(len(dataset.valid.inputs), bool)
    is_outer[data.representative_rows(dataset.valid.targets, num_outer_examples(config, len(is_outer)))] = True
    outer, held_out = (Batch(*(array[rows] for array in dataset.valid)) for rows in (is_outer, ~is_outer))
    if not len(outer.inputs) or not len(held_out.inputs):
        raise ConfigError(
            f"config.outer.split_fraction must leave examples on both sides of {len(is_outer)}; got "
            f"{config.outer.split_fraction}"
        )
    return dataclasses.replace(dataset, valid=held_out), outer


def _warn_of_unchecked_labels(config: TrainConfig, dataset: Dataset) -> None:
    """Warns of a clean set that was cut off a user's own examples, whose labels nobody may have checked."""
    is_made_here = config.dataset.label_noise > 0
    is_own = data.is_file(dataset.name) and dataset.is_classification
    if is_own and not (dataset.has_own_valid or is_made_here):
        warn(
            f'config.outer.split is "valid", and {dataset.name!r} has no valid_inputs and valid_targets, so that split '
            "was cut off its training examples: where their labels are wrong, those of the clean set are too; put "
            "examples whose labels were checked there"
        )


def num_outer_examples(config: TrainConfig, num_valid: int) -> int:
    """How many examples of a validation split outer batches come from."""
    return round(config.outer.split_fraction * num_valid)


def examples_for_a_batch(config: TrainConfig) -> int:
    """How many examples a split must have for a batch to be drawn from it, and one to be held out."""
    fraction = config.outer.split_fraction
    least = math.ceil(config.batch_size / fraction)
    return least if fraction == 1 else max(least, math.ceil(1 / (1 - fraction)))


def check_batch_size(config: TrainConfig, train: Batch, outer: Batch | None) -> None:
    """Raises ConfigError if a split that batches are drawn from is smaller than a batch."""
    for name, split in (("train", train), (config.outer.split, outer)):
        if split is not None and config.batch_size > (num_examples := split.inputs.shape[0]):
            is_part = split is outer and config.outer.split_fraction < 1
            held_out = f" (config.outer.split_fraction {config.outer.split_fraction:g} holds others out)"
            raise ConfigError(
                f"config.batch_size is {config.batch_size}, and split {name!r} of {config.dataset.name!r} has only "
                f"{num_examples} examples to draw from{held_out if is_part else ''}; take a smaller batch"
            )


def load_dataset(config: DatasetConfig) -> Dataset:
    """The dataset of this section of a config.

    Raises:
      DatasetError: as in `adalfl_jax.data.load`.
    """
    settings = dataclasses.asdict(config)
    return data.load(settings.pop("name"), **settings)


def _check_augmentation(config: TrainConfig, dataset: Dataset) -> None:
    augmentation, shape = config.augmentation, dataset.input_shape
    if (augmentation.padding or augmentation.flip) and len(shape) != 3:
        raise ConfigError(
            f"config.augmentation is for images [H, W, channels], and dataset {dataset.name!r} has inputs of {shape}; "
            "set padding to 0 and flip to False"
        )
    if augmentation.padding and augmentation.padding >= min(shape[:2]):
        raise ConfigError(
            f"config.augmentation.padding must be smaller than the images, {shape[0]}x{shape[1]}, or crops may hold "
            f"none of them; got {augmentation.padding}"
        )
    if augmentation.flip and not dataset.can_flip:
        raise ConfigError(
            f"config.augmentation.flip must be False for dataset {dataset.name!r}: a mirrored input has another label, "
            "or none, as characters do"
        )


def _check_kinds(config: TrainConfig, dataset: Dataset) -> None:
    """Raises ConfigError for a loss, a metric or predictions of labels for a regression, or the other way around."""
    named = {
        "task_loss": (config.task_loss, TASK_LOSSES),
        "metric": (config.metric, METRICS),
        "baseline.loss": (config.baseline.loss, TASK_LOSSES),
        "learned_loss.start": (config.learned_loss.start, TASK_LOSSES),
    }
    targets = "labels"
    if not dataset.is_classification:
        remedy = "labels are integers [N]: targets.astype(int), or targets.argmax(1) of one-hot rows"
        targets = f"numbers [N, {dataset.num_outputs}] ({remedy})"
    for field, (name, known) in named.items():
        fitting = [each for each in known if (each in FOR_LABELS) == dataset.is_classification]
        expected = f"one of {', '.join(fitting)} for dataset {dataset.name!r}, whose targets are {targets}"
        require(field, name, name in fitting or name not in known, expected)


def check_predictions(config: TrainConfig, methods: Iterable[str], dataset: Dataset) -> None:
    """Raises ConfigError if one of the methods would learn a loss of probabilities for a regression."""
    learned = config.learned_loss
    if has_offline_phase(methods) and learned.family == "network":
        fits = learned.predictions == "raw" or dataset.is_classification
        expected = f"'raw' for dataset {dataset.name!r}, whose outputs are numbers and no logits"
        require("learned_loss.predictions", learned.predictions, fits, expected)


def _check_losses(setup: Setup) -> None:
    """Raises ValueError if the losses or the metric cannot be traced on the shapes of one training example.

    A learned loss may be a user's own, and then its parameters may have no gradients, or it may be no mean.
    """
    name, learned_loss = setup.config.learned_loss.family, setup.learned_loss
    require_loss(f"{name}.apply", learned_loss.apply, "phi_params", "targets", "outputs", optional=("progress",))
    require_floats(f"{name}.init(rng_key)", jax.eval_shape(learned_loss.init, jax.random.key(0)))
    learned_loss_fn = returning_scalar(f"{name}.apply", at_progress(learned_loss.apply, 0.0))

    def trace(rng_key: jax.Array) -> list[jax.Array]:
        params, model_state = setup.model.init(rng_key)
        inputs, targets = jax.tree.map(lambda array: array[:1], setup.dataset.train)
        inputs = setup.dataset.normalize(jnp.asarray(inputs))
        outputs, _ = setup.model.apply(params, model_state, inputs, train=False, rng_key=None)
        phi_params = learned_loss.init(rng_key)
        targets = jnp.asarray(targets)
        losses = [setup.task_loss_fn(targets, outputs), setup.metric_fn(targets, outputs)]
        return [*losses, learned_loss_fn(phi_params, targets, outputs)]

    try:
        jax.eval_shape(trace, jax.random.key(0))
    except ValueError as error:
        config = setup.config
        raise ValueError(
            f"task loss {config.task_loss!r}, metric {config.metric!r} or learned loss {config.learned_loss.family!r} "
            f"does not fit dataset {setup.dataset.name!r}: "
            f"{error}"
        ) from error
