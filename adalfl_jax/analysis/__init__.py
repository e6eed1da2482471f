"""Measures of a learned loss and tests of differences; figures and the report of a run are in modules of their own."""

from adalfl_jax.analysis.measures import GradientComparison as GradientComparison
from adalfl_jax.analysis.measures import along_true_class as along_true_class
from adalfl_jax.analysis.measures import compare_gradients as compare_gradients
from adalfl_jax.analysis.measures import flat_share as flat_share
from adalfl_jax.analysis.measures import make_loss_shape as make_loss_shape
from adalfl_jax.analysis.statistics import adjust_p_values as adjust_p_values
from adalfl_jax.analysis.statistics import paired_difference as paired_difference
from adalfl_jax.analysis.statistics import signed_rank_test as signed_rank_test
