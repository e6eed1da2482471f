"""Communities and Crime (1,994 communities, 100 columns) with an MLP 100-64-64-1: a regression.

    .venv/bin/python -m adalfl_jax.data.prepare crime
    .venv/bin/python -m experiments.compare --config=configs/crime_mlp.py --workdir=runs/crime_mlp

About two minutes on two CPU cores, measured on noise in the shape of the data. It was not run on the data here yet, and
no figure of the paper is at hand. 10,000 steps are 900 epochs of so few rows, so a model trained on the task loss may
well overfit by the end.
"""

from configs import california_mlp


def get_config():
    """Returns the configuration of California Housing on other data."""
    config = california_mlp.get_config()
    config.dataset.name = "crime"
    return config
