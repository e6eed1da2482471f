"""Progression of diabetes (442 patients, 10 measurements) with an MLP 10-64-64-1: a regression through the whole path.

python -m experiments.compare --config=configs/diabetes_mlp.py --workdir=runs/diabetes_mlp
"""

from configs import default


def get_config():
    """Returns the configuration."""
    config = default.get_config()
    config.dataset = "diabetes"
    config.model.hidden_sizes = (64, 64)
    config.task_loss = "squared_error"
    config.metric = "mean_squared_error"
    config.learned_loss.predictions = "raw"
    return config
