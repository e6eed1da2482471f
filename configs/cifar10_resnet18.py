"""CIFAR-10 with ResNet-18: 11,173,962 parameters. The other files on small colour images start from this one.

    python -m adalfl_jax.data.prepare cifar10
    python -m experiments.compare --config=configs/cifar10_resnet18.py --workdir=runs/cifar10_resnet18
"""

from configs import default


def get_config():
    """Returns the configuration: the authors' setting for CIFAR and SVHN."""
    config = default.get_config()
    config.methods = ("task_loss", "ml3", "adalfl")  # what the paper compares; tuning the rate takes five runs more
    config.dataset.name = "cifar10"
    config.augmentation.padding = 4
    config.augmentation.flip = True
    config.model.name = "resnet"
    config.model.depth = 18
    config.batch_size = 128
    config.num_steps = 150_000
    config.eval_every = 1000
    config.inner.momentum = 0.9
    config.inner.nesterov = True
    config.inner.weight_decay = 5e-4  # of every parameter, those of batch norm included
    config.inner.schedule = "milestones"
    config.inner.milestones = (100_000, 135_000)
    config.outer.learning_rate = 1e-5  # the paper's; the default was chosen for runs thirty times as short
    return config
