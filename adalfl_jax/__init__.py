"""Learn a loss function while a model trains (AdaLFL, arXiv 2301.13247)."""

from importlib.metadata import version

from adalfl_jax import task_losses as task_losses
from adalfl_jax.bilevel import make_bilevel_step as make_bilevel_step
from adalfl_jax.bilevel import make_task_step as make_task_step
from adalfl_jax.bilevel import prime as prime
from adalfl_jax.fitting import fit_to_task_loss as fit_to_task_loss
from adalfl_jax.hypergradient import make_estimator as make_estimator
from adalfl_jax.initialization import initialize_offline as initialize_offline
from adalfl_jax.initialization import make_offline_step as make_offline_step
from adalfl_jax.learned_losses import FrozenLoss as FrozenLoss
from adalfl_jax.learned_losses import LossNetwork as LossNetwork
from adalfl_jax.learned_losses import RescaledLoss as RescaledLoss
from adalfl_jax.learned_losses import ScaledTaskLoss as ScaledTaskLoss
from adalfl_jax.learned_losses import WeightNetwork as WeightNetwork
from adalfl_jax.learned_losses import load_learned_loss as load_learned_loss
from adalfl_jax.learned_losses import register_learned_loss as register_learned_loss
from adalfl_jax.learned_losses import save_learned_loss as save_learned_loss
from adalfl_jax.reweighting import ReweightingMetrics as ReweightingMetrics
from adalfl_jax.reweighting import make_reweighting_step as make_reweighting_step
from adalfl_jax.types import Batch as Batch
from adalfl_jax.types import BilevelBatch as BilevelBatch
from adalfl_jax.types import BilevelMetrics as BilevelMetrics
from adalfl_jax.types import LearnedLoss as LearnedLoss
from adalfl_jax.types import Phi as Phi
from adalfl_jax.types import TaskMetrics as TaskMetrics
from adalfl_jax.types import Theta as Theta

__version__ = version("adalfl_jax")
