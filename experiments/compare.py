"""Trains several methods, seed for seed, and writes report.html.

.venv/bin/python -m experiments.compare --config=configs/digits_mlp.py --workdir=runs/digits
"""

from adalfl_jax.training import compare
from experiments.launch import launch

if __name__ == "__main__":
    launch(compare)
