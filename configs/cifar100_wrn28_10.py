"""CIFAR-100 with WideResNet 28-10: 36,536,884 parameters.

    python -m adalfl_jax.data.prepare cifar100
    python -m experiments.compare --config=configs/cifar100_wrn28_10.py --workdir=runs/cifar100_wrn28_10
"""

from configs import cifar10_resnet18


def get_config():
    """Returns the configuration of CIFAR-10 on CIFAR-100 with another model."""
    config = cifar10_resnet18.get_config()
    config.dataset.name = "cifar100"
    config.model.name = "wide_resnet"
    config.model.depth = 28
    config.model.width = 10
    return config
