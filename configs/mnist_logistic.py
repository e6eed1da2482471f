"""MNIST with logistic regression: 7,850 parameters, SGD at 0.01.

python -m adalfl_jax.data.prepare mnist
python -m experiments.compare --config=configs/mnist_logistic.py --workdir=runs/mnist_logistic
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
