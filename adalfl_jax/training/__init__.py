"""Runs: a configuration in, a workdir with trained models, a learned loss, metrics and figures out."""

from adalfl_jax.training.config import TrainConfig as TrainConfig
from adalfl_jax.training.divergence import DivergenceError as DivergenceError
from adalfl_jax.training.fields import ConfigError as ConfigError
from adalfl_jax.training.files import BusyError as BusyError
from adalfl_jax.training.files import WorkdirError as WorkdirError
from adalfl_jax.training.preemption import PreemptionError as PreemptionError
from adalfl_jax.training.run import compare as compare
from adalfl_jax.training.run import train as train
from adalfl_jax.training.setup import load_dataset as load_dataset
from adalfl_jax.training.trained_model import TrainedModel as TrainedModel
from adalfl_jax.training.trained_model import load_model as load_model
