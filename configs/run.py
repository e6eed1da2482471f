"""The configuration of a run, over or not, as its workdir keeps it: to repeat the run, or to vary it.

    .venv/bin/python -m experiments.compare --config=configs/run.py:runs/digits_mlp --workdir=runs/longer \\
        --config.num_steps=2000

The folder stands behind the colon; fields are set as with any file here.
"""

from pathlib import Path

from ml_collections import ConfigDict

from adalfl_jax.training.workdir import read_config
from configs import default


def get_config(workdir: str) -> ConfigDict:
    """Returns the configuration in a workdir.

    Raises:
      WorkdirError: no run in the folder, or one whose configuration cannot be read.
    """
    config = default.get_config()
    _, made_with = read_config(Path(workdir).expanduser())
    config.update(made_with.to_dict())
    return config
