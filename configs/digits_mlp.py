"""Handwritten digits (8x8, 1,293 of them for training) with an MLP 64-512-512-10, trained three ways and tuned.

python -m experiments.compare --config=configs/digits_mlp.py --workdir=runs/digits_mlp
"""

from configs import default


def get_config():
    """Returns the default configuration, which is this one."""
    return default.get_config()
