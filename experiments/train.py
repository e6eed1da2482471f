"""Trains one method; experiments.compare trains several and writes a report.

.venv/bin/python -m experiments.train --config=configs/digits_mlp.py --workdir=runs/adalfl --config.method=adalfl
"""

from adalfl_jax.training import train
from experiments.launch import launch

if __name__ == "__main__":
    launch(train)
