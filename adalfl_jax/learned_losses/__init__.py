"""Families of learned losses M_phi, each a frozen dataclass with `init` and `apply`, and how one is kept in a file."""

from adalfl_jax.learned_losses.activations import ACTIVATIONS as ACTIVATIONS
from adalfl_jax.learned_losses.activations import smooth_leaky_relu as smooth_leaky_relu
from adalfl_jax.learned_losses.families import FAMILIES as FAMILIES
from adalfl_jax.learned_losses.families import configurable_families as configurable_families
from adalfl_jax.learned_losses.families import register_learned_loss as register_learned_loss
from adalfl_jax.learned_losses.keywords import at_progress as at_progress
from adalfl_jax.learned_losses.keywords import declares as declares
from adalfl_jax.learned_losses.keywords import require_family as require_family
from adalfl_jax.learned_losses.keywords import require_progress as require_progress
from adalfl_jax.learned_losses.keywords import wrapped_functions as wrapped_functions
from adalfl_jax.learned_losses.network import LossNetwork as LossNetwork
from adalfl_jax.learned_losses.persistence import FrozenLoss as FrozenLoss
from adalfl_jax.learned_losses.persistence import load_learned_loss as load_learned_loss
from adalfl_jax.learned_losses.persistence import require_savable as require_savable
from adalfl_jax.learned_losses.persistence import save_learned_loss as save_learned_loss
from adalfl_jax.learned_losses.rescaled import RescaledLoss as RescaledLoss
from adalfl_jax.learned_losses.scaled import ScaledTaskLoss as ScaledTaskLoss
from adalfl_jax.learned_losses.weighting import WeightNetwork as WeightNetwork
