"""California Housing (20,640 districts, 8 columns) with an MLP 8-64-64-1: a regression.

python -m adalfl_jax.data.prepare california
python -m experiments.compare --config=configs/california_mlp.py --workdir=runs/california_mlp
"""

from configs import diabetes_mlp


def get_config():
    """Returns the configuration of Diabetes with the authors' setting for regressions."""
    config = diabetes_mlp.get_config()
    config.dataset.name = "california"
    config.batch_size = 128
    config.num_steps = 10_000
    config.eval_every = 500
    config.inner.momentum = 0.9
    config.inner.nesterov = True
    config.inner.weight_decay = 5e-4
    return config
