"""Progression of diabetes (442 patients, 10 measurements) with an MLP 10-64-64-1: a regression.

    .venv/bin/python -m experiments.compare --config=configs/diabetes_mlp.py --workdir=runs/diabetes_mlp

About 20 seconds on two CPU cores. The task loss is hard to beat here: expect a test MSE, in units of the target's
variance, of 0.56 with the task loss and 0.60 to 0.64 with ML3 and AdaLFL. With 317 rows for training and 36 to learn
phi on, a learned loss trains faster and overfits sooner: its validation error is the lowest of all, its test error is
not. docs/results.md has figures of ten seeds with a larger validation split, which are worse for a learned loss.
"""

from configs import default


def get_config():
    """Returns the configuration."""
    config = default.get_config()
    config.dataset.name = "diabetes"
    config.model.hidden_sizes = (64, 64)
    config.task_loss = "squared_error"
    config.metric = "mean_squared_error"
    config.batch_size = 32
    config.num_steps = 200  # the paper's 10,000 overfit an MLP on so few rows, whatever the loss
    config.eval_every = 10
    config.outer.split = "valid"  # phi learns from rows theta does not see, or it learns to overfit
    config.learned_loss.predictions = "raw"
    config.tuning.learning_rates = (0.001, 0.003, 0.01, 0.03, 0.1)
    return config
