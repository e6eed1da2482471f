"""The sections of a configuration; `configs/default.py` says what each field means."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Annotated

from adalfl_jax.data import LAST_SEED, STREAMING, Corruption, Spec, is_seed, load_spec
from adalfl_jax.hypergradient import ESTIMATORS, Estimator, estimator_settings, make_estimator
from adalfl_jax.learned_losses import (
    FAMILIES,
    LossNetwork,
    RescaledLoss,
    WeightNetwork,
    configurable_families,
    require_savable,
)
from adalfl_jax.models import (
    COMPUTE_DTYPES,
    INITIALIZATIONS,
    MODELS,
    Model,
    make_model,
    model_options,
    required_options,
)
from adalfl_jax.registry import require_known
from adalfl_jax.task_losses import FOR_LABELS, TASK_LOSSES
from adalfl_jax.training.fields import (
    Expected,
    NonNegativeFloat,
    NonNegativeInt,
    Options,
    PositiveFloat,
    PositiveInt,
    PositiveShare,
    ProperFraction,
    require,
    require_expected,
)
from adalfl_jax.types import LearnedLoss

SCHEDULES = ("constant", "linear", "cosine")
STARTS = ("random", "task_loss", *TASK_LOSSES)  # anything else is the path of losses that were learned before
OUTER_SPLITS = ("train", "valid")
_MODEL_SETTINGS = ("hidden_sizes", "depth", "width", "remat")  # options of models that are fields of their own


def _require_options(kind: str, options: Options, by_name: Iterable[Iterable[str]], settings: Iterable[str]) -> None:
    """Raises ValueError for an option that nothing of this kind takes, the chosen one or another."""
    own = {option for taken in by_name for option in taken}.difference(settings)
    for option in options:
        require_known(f"option of a {kind}", own, option)


@dataclasses.dataclass(frozen=True, slots=True)
class ModelConfig:
    """The base model."""

    name: str
    hidden_sizes: tuple[int, ...]
    depth: int
    width: int
    initialization: str
    compute_dtype: str
    remat: bool
    options: Options

    def __post_init__(self) -> None:
        require_known("model", MODELS, self.name)
        require(
            "model.hidden_sizes", self.hidden_sizes, all(s > 0 for s in self.hidden_sizes), "sizes of 1 unit or more"
        )
        require_known("initialization", INITIALIZATIONS, self.initialization)
        require_known("compute_dtype", COMPUTE_DTYPES, self.compute_dtype)
        has_blocks = "remat" in model_options(self.name)
        require("model.remat", self.remat, has_blocks or not self.remat, f"False: {self.name!r} has no blocks")
        _require_options("model", self.options, map(model_options, MODELS), _MODEL_SETTINGS)

    def make(self, input_shape: tuple[int, ...], num_outputs: int) -> Model:
        """The model these settings describe; those of other models are left out."""
        given = {name: getattr(self, name) for name in _MODEL_SETTINGS} | self.options
        options = {option: given[option] for option in model_options(self.name) if option in given}
        if missing := [option for option in required_options(self.name) if option not in options]:
            raise ValueError(
                f"model {self.name!r} needs {', '.join(missing)}; give a default, or set config.model.options."
                f"{missing[0]} in the file"
            )
        settings = {"compute_dtype": self.compute_dtype, "initialization": self.initialization}
        return make_model(self.name, input_shape, num_outputs, **settings, **options)


@dataclasses.dataclass(frozen=True, slots=True)
class DatasetConfig:
    """Which data, where they are, and how they are held."""

    name: str
    data_dir: str
    cache_dir: str
    image_size: NonNegativeInt
    valid_fraction: ProperFraction
    valid_examples: NonNegativeInt
    imbalance: float
    label_noise: float
    noise_kind: str
    seed: int
    streaming: str

    def __post_init__(self) -> None:
        require_expected(self, "dataset")
        require("dataset.name", self.name, bool(self.name), "a name or the path of an .npz file")
        require("dataset.seed", self.seed, is_seed(self.seed), f"a whole number from 0 to {LAST_SEED}")
        require_known("streaming", STREAMING, self.streaming)
        self.corruption()

    def corruption(self) -> Corruption:
        """What these settings do to the training split."""
        return Corruption(self.label_noise, self.noise_kind, self.imbalance)

    def spec(self) -> Spec:
        """The shapes of the dataset; errors are those of `adalfl_jax.data.load_spec`."""
        return load_spec(
            self.name,
            data_dir=self.data_dir,
            image_size=self.image_size,
            valid_fraction=self.valid_fraction,
            valid_examples=self.valid_examples,
        )


@dataclasses.dataclass(frozen=True, slots=True)
class AugmentationConfig:
    """What is done to training images; those of the validation and the test split are left alone."""

    padding: NonNegativeInt
    flip: bool

    def __post_init__(self) -> None:
        require_expected(self, "augmentation")


@dataclasses.dataclass(frozen=True, slots=True)
class InnerConfig:
    """The optimiser of theta."""

    learning_rate: PositiveFloat
    first_step_rate: NonNegativeFloat
    momentum: Annotated[float, Expected("a number in [0, 1)", lambda value: 0 <= value < 1)]
    nesterov: bool
    weight_decay: NonNegativeFloat
    clip_norm: NonNegativeFloat
    schedule: str
    milestones: tuple[int, ...]
    milestone_factor: PositiveShare

    def __post_init__(self) -> None:
        require_expected(self, "inner")
        is_free = not (self.first_step_rate and self.clip_norm)
        require("inner.first_step_rate", self.first_step_rate, is_free, "0 with inner.clip_norm, which shortens it")
        fits = self.momentum > 0 or not self.nesterov
        require("inner.nesterov", self.nesterov, fits, "False with inner.momentum 0; set that above 0 for True")
        require_known("schedule", (*SCHEDULES, "milestones"), self.schedule)
        rising = list(self.milestones) == sorted({step for step in self.milestones if step > 0})
        require("inner.milestones", self.milestones, rising, "steps above 0, each later than the one before")
        if self.schedule == "milestones":
            require("inner.milestones", self.milestones, bool(self.milestones), 'one step or more for "milestones"')


@dataclasses.dataclass(frozen=True, slots=True)
class OuterConfig:
    """Adam of phi while theta trains, and what its gradient may cost."""

    learning_rate: PositiveFloat
    schedule: str
    split: str
    split_fraction: PositiveShare
    every: PositiveInt
    inner_fraction: PositiveShare
    outer_fraction: PositiveShare
    pipelined: bool
    joint_share: Annotated[float, Expected("a number in [0, 1]", lambda value: 0 <= value <= 1)]

    def __post_init__(self) -> None:
        require_expected(self, "outer")
        require_known("schedule", SCHEDULES, self.schedule)
        require_known("split", OUTER_SPLITS, self.split)
        whole = self.split_fraction == 1 or self.split == "valid"
        require("outer.split_fraction", self.split_fraction, whole, '1.0 with outer.split "train"')
        if self.pipelined:
            alone = {"every": 1, "inner_fraction": 1, "outer_fraction": 1, "split": "train"}
            others = [
                f"outer.{field} {getattr(self, field)!r}" for field in alone if getattr(self, field) != alone[field]
            ]
            require("outer.pipelined", True, not others, f"False with {' and '.join(others)}")
        fits = self.joint_share == 0 or self.split == "valid"
        require("outer.joint_share", self.joint_share, fits, '0 with outer.split "train", which is no clean set')


@dataclasses.dataclass(frozen=True, slots=True)
class OfflineConfig:
    """Algorithm 1, the phase that ML3 is and AdaLFL starts from."""

    num_steps: Annotated[int, Expected("a whole number of at least 0, below 2**31", lambda value: 0 <= value < 2**31)]
    num_inner_steps: PositiveInt
    learning_rate: PositiveFloat

    def __post_init__(self) -> None:
        require_expected(self, "offline")


@dataclasses.dataclass(frozen=True, slots=True)
class LearnedLossConfig:
    """M_phi."""

    family: str
    hidden_sizes: tuple[int, ...]
    activation: str
    beta: float
    gamma: float
    output_activation: str
    use_bias: bool
    reduction: str
    predictions: str
    use_progress: bool
    start: str
    weight_hidden_size: PositiveInt
    floor: NonNegativeFloat
    ceiling: float
    options: Options

    def __post_init__(self) -> None:
        require_expected(self, "learned_loss")
        require_known("family", configurable_families(), self.family)
        self.network()
        registered = map(_fields, FAMILIES.registered.values())
        _require_options("registered learned loss", self.options, registered, _LOSS_SETTINGS)
        require("learned_loss.start", self.start, bool(self.start), f"one of {', '.join(STARTS)}, or a path")
        for switch in ("use_progress", "use_bias"):
            fits = switch in _fields(configurable_families()[self.family]) or not getattr(self, switch)
            require(
                f"learned_loss.{switch}", getattr(self, switch), fits, f"False: {self.family!r} has no such setting"
            )
        fits = self.ceiling == 0 or self.ceiling >= self.floor
        require("learned_loss.ceiling", self.ceiling, fits, "0 for none, or no less than the floor")
        is_fixed = self.is_bounded and self.floor == self.ceiling and self.family == "scaled_task_loss"
        require(
            "learned_loss.ceiling", self.ceiling, not is_fixed, f"above the floor for {self.family!r}, a scale alone"
        )

    @property
    def is_bounded(self) -> bool:
        """Whether the length of its gradient has a bound."""
        return self.floor > 0 or self.ceiling != 0

    def network(self) -> LossNetwork:
        """The loss network these settings describe."""
        return LossNetwork(**{name: getattr(self, name) for name in _fields(LossNetwork)})

    def make(self, task_loss: str) -> LearnedLoss:
        """The learned loss these settings describe.

        Raises:
          ConfigError: a weight network with the task loss of a regression.
          ValueError: a registered family with a setting that neither has a default nor is one of the loss network, or
            one that cannot be saved.
        """
        loss = self._make_family(task_loss)
        return RescaledLoss(loss, task_loss, self.floor, self.ceiling or None) if self.is_bounded else loss

    def _make_family(self, task_loss: str) -> LearnedLoss:
        if self.family == "weight_network":
            fits = task_loss in FOR_LABELS
            require("learned_loss.family", self.family, fits, f"one without cross-entropy for task loss {task_loss!r}")
            return WeightNetwork(self.weight_hidden_size)
        family = configurable_families()[self.family]
        known = {name: getattr(self, name) for name in _fields(LossNetwork)} | {"task_loss": task_loss} | self.options
        if missing := [name for name, has_default in _fields(family).items() if not (has_default or name in known)]:
            raise ValueError(
                f"learned loss {self.family!r} needs {', '.join(missing)}, which is no setting of the loss network; "
                f"give it a default, or set config.learned_loss.options.{missing[0]} in the file"
            )
        try:
            loss = family(**{name: known[name] for name in _fields(family) if name in known})
        except TypeError as error:  # of a check of the family's own
            raise ValueError(f"learned loss {self.family!r} cannot be made of its settings: {error}") from error
        require_savable(loss)  # now, not once a run is over
        return loss


def _fields(family: type) -> dict[str, bool]:
    """The settings of a family of learned losses, and which have a default."""
    missing = dataclasses.MISSING
    return {
        field.name: not (field.default is missing and field.default_factory is missing)
        for field in dataclasses.fields(family)
        if field.init
    }


_LOSS_SETTINGS = frozenset((*_fields(LossNetwork), "task_loss"))


@dataclasses.dataclass(frozen=True, slots=True)
class EstimatorConfig:
    """Settings of the estimators that have some."""

    window: int
    num_iterations: int
    step_size: float
    damping: float
    num_pairs: int
    sigma: float
    horizon: int

    def __post_init__(self) -> None:
        for name in ESTIMATORS:
            self.make(name)

    def make(self, name: str) -> Estimator:
        """The named estimator; settings of others are left out."""
        return make_estimator(name, **{setting: getattr(self, setting) for setting in estimator_settings(name)})


@dataclasses.dataclass(frozen=True, slots=True)
class BaselineConfig:
    """What the methods without a learned loss train on."""

    loss: str
    fine_tuning: ProperFraction

    def __post_init__(self) -> None:
        require_expected(self, "baseline")
        if self.loss:
            require_known("task loss", TASK_LOSSES, self.loss)


@dataclasses.dataclass(frozen=True, slots=True)
class TuningConfig:
    """The search behind the method "tuned_task_loss"."""

    learning_rates: tuple[float, ...]

    def __post_init__(self) -> None:
        rates = self.learning_rates
        good = 0 < len(rates) == len(set(rates)) and all(rate > 0 for rate in rates)
        require("tuning.learning_rates", rates, good, "one number above 0 or more, each once")


@dataclasses.dataclass(frozen=True, slots=True)
class MeshConfig:
    """The devices a run is divided over."""

    seed: NonNegativeInt
    data: NonNegativeInt
    model: NonNegativeInt

    def __post_init__(self) -> None:
        require_expected(self, "mesh")
        sizes = (self.seed, self.data, self.model)
        require("mesh", sizes, sizes.count(0) <= 1, "sizes of which at most one is 0, for the devices that are left")


@dataclasses.dataclass(frozen=True, slots=True)
class HostsConfig:
    """The processes of a run."""

    connect: str
    num_processes: NonNegativeInt
    process_id: int
    timeout_seconds: PositiveInt

    def __post_init__(self) -> None:
        require_expected(self, "hosts")
        address = self.connect.rpartition(":")
        good = self.connect in ("", "auto") or (address[0] and address[2].isdigit())
        require("hosts.connect", self.connect, bool(good), '"", "auto" or "ADDRESS:PORT"')
        fits = -1 <= self.process_id < (self.num_processes or 2**31)
        require("hosts.process_id", self.process_id, fits, "a number from 0, below hosts.num_processes; or -1")
        has_address = self.connect not in ("", "auto")
        fits = has_address or (self.num_processes == 0 and self.process_id == -1)
        require("hosts.connect", self.connect, fits, '"ADDRESS:PORT" with hosts.num_processes or hosts.process_id')


@dataclasses.dataclass(frozen=True, slots=True)
class CheckpointConfig:
    """How often a run is saved while it goes on, and how many checkpoints are kept."""

    every_seconds: NonNegativeFloat
    every_steps: NonNegativeInt
    keep: NonNegativeInt

    def __post_init__(self) -> None:
        require_expected(self, "checkpoint")
        fits = self.keep > 0 or self.every_steps == 0
        require("checkpoint.every_steps", self.every_steps, fits, "0 with checkpoint.keep 0, which keeps none")
