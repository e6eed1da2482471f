"""Datasets by name, their splits, sampling and augmentation on the device."""

from adalfl_jax.data.augmentation import augment as augment
from adalfl_jax.data.corruption import NOISE_KINDS as NOISE_KINDS
from adalfl_jax.data.corruption import Corruption as Corruption
from adalfl_jax.data.errors import DatasetError as DatasetError
from adalfl_jax.data.examples import Examples as Examples
from adalfl_jax.data.loading import DATASETS as DATASETS
from adalfl_jax.data.loading import STREAMING as STREAMING
from adalfl_jax.data.loading import is_file as is_file
from adalfl_jax.data.loading import load as load
from adalfl_jax.data.loading import load_examples as load_examples
from adalfl_jax.data.loading import load_spec as load_spec
from adalfl_jax.data.loading import register_dataset as register_dataset
from adalfl_jax.data.preprocessing import Preprocessing as Preprocessing
from adalfl_jax.data.sampling import epoch_indices as epoch_indices
from adalfl_jax.data.sampling import take as take
from adalfl_jax.data.scaling import Scaling as Scaling
from adalfl_jax.data.specs import Spec as Spec
from adalfl_jax.data.specs import abstract_splits as abstract_splits
from adalfl_jax.data.specs import random_dataset as random_dataset
from adalfl_jax.data.splits import LAST_SEED as LAST_SEED
from adalfl_jax.data.splits import Dataset as Dataset
from adalfl_jax.data.splits import is_seed as is_seed
from adalfl_jax.data.splits import make_dataset as make_dataset
from adalfl_jax.data.splits import representative_rows as representative_rows
