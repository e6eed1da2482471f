"""California Housing (20,640 districts, 8 columns) with an MLP 8-64-64-1: a regression.

    .venv/bin/python -m adalfl_jax.data.prepare california
    .venv/bin/python -m experiments.compare --config=configs/california_mlp.py --workdir=runs/california_mlp

About two minutes on two CPU cores, measured on noise in the shape of the data. With the task loss expect a test MSE
near 0.19, in units of the target's variance: Gorishniy et al. (2021) report a root mean squared error of 0.499 for a
tuned MLP, and the target's deviation is 1.154. It was not run on the data here yet, and no figure of the paper is at
hand.
"""

from configs import diabetes_mlp


def get_config():
    """Returns the configuration of Diabetes with outer batches from the validation split and the authors' optimiser."""
    config = diabetes_mlp.get_config()
    config.dataset.name = "california"
    config.batch_size = 128
    config.num_steps = 10_000
    config.eval_every = 500
    config.inner.momentum = 0.9
    config.inner.nesterov = True
    config.inner.weight_decay = 5e-4
    config.outer.learning_rate = 1e-5  # the paper's
    return config
