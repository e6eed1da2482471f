"""MNIST with logistic regression: 7,850 parameters, SGD at 0.01.

    .venv/bin/python -m adalfl_jax.data.prepare mnist
    .venv/bin/python -m experiments.compare --config=configs/mnist_logistic.py --workdir=runs/mnist_logistic

Seven minutes on two CPU cores. Expect what one such run gave: test errors of 7.80 ± 0.08 % with the task loss, 7.59 ±
0.10 % at its tuned rate of 0.03, 7.8 ± 0.9 % with ML3 and 7.21 ± 0.16 % with AdaLFL, the lowest (paired t-test against
the tuned task loss: p = 3e-5). Two seeds of ten draw a phi with which ML3 ends at 9.5 %; AdaLFL mends both.
"""

from configs import default


def get_config():
    """Returns the configuration."""
    config = default.get_config()
    config.dataset.name = "mnist"
    config.model.name = "logistic"
    config.model.initialization = "pytorch"  # the default of the authors' stack
    config.batch_size = 128
    config.num_steps = 10_000
    config.eval_every = 500
    config.outer.learning_rate = 1e-5  # the paper's
    return config
