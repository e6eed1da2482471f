"""MNIST with wrong labels on 40 % of the training split and 1,000 clean ones, which phi learns from; MLP 784-256-10.

    python -m adalfl_jax.data.prepare mnist
    python -m experiments.compare --config=configs/mnist_noisy_labels.py --workdir=runs/mnist_noisy_labels

docs/noisy_labels.md says how to do this with data of your own, docs/results.md what comes out beside tuned baselines.
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
    config.methods = ("task_loss", "fine_tuned", "joint_loss", "reweighting", "ml3", "adalfl")
    config.num_steps = 6000
    config.eval_every = 250
    return config
