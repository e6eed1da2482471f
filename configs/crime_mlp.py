"""Communities and Crime (1,994 communities, 100 columns) with an MLP 100-64-64-1: a regression.

    .venv/bin/python -m adalfl_jax.data.prepare crime
    .venv/bin/python -m experiments.compare --config=configs/crime_mlp.py --workdir=runs/crime_mlp

About two minutes on two CPU cores, measured on noise in the shape of the data. What to expect is not known: no figure
of the paper is at hand, and it was not run on the data here yet. 10,000 steps are 900 epochs of so few rows, so the
last iterate of the task loss may well overfit.
"""

from configs import california_mlp


def get_config():
    """Returns the configuration of California Housing on other data."""
    config = california_mlp.get_config()
    config.dataset.name = "crime"
    return config
