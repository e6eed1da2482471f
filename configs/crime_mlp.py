"""Communities and Crime (1,994 communities, 100 columns) with an MLP 100-64-64-1: a regression.

python -m adalfl_jax.data.prepare crime
python -m experiments.compare --config=configs/crime_mlp.py --workdir=runs/crime_mlp
"""

from configs import diabetes_mlp


def get_config():
    """Returns the configuration of Diabetes with the authors' setting for regressions."""
    config = diabetes_mlp.get_config()
    config.dataset.name = "crime"
    config.batch_size = 128
    config.num_steps = 10_000
    config.eval_every = 500
    config.inner.momentum = 0.9
    config.inner.nesterov = True
    config.inner.weight_decay = 5e-4
    return config
