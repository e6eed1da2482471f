"""MNIST with wrong labels on 40 % of the training split and 1,000 clean ones, which phi learns from; MLP 784-256-10.

    .venv/bin/python -m adalfl_jax.data.prepare mnist
    .venv/bin/python -m experiments.compare --config=configs/mnist_noisy_labels.py --workdir=runs/mnist_noisy_labels

About 15 minutes on two CPU cores, an estimate: ten seeds of all five methods, by the seconds of the study's runs.
With ML3 and AdaLFL expect the test errors of the study `noisy_labels` in docs/results.md. That study tunes the rates of
the other methods, which train at 0.01 here. docs/noisy_labels.md says how to do this with data of your own.
"""

from configs import default


def get_config():
    """Returns the configuration."""
    config = default.get_config()
    config.dataset.name = "mnist"
    config.dataset.label_noise = 0.4
    # The clean set: labels of the validation split are never made wrong.
    config.dataset.valid_examples = 1000
    config.outer.split = "valid"
    config.model.hidden_sizes = (256,)
    config.model.initialization = "pytorch"  # whose small weights let phi learn a larger scale
    config.methods = ("task_loss", "fine_tuned", "reweighting", "ml3", "adalfl")
    config.num_steps = 6000
    config.eval_every = 250
    return config
