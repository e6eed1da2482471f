"""CIFAR-10 with VGG-16 with batch norm: 14,728,266 parameters.

    python -m adalfl_jax.data.prepare cifar10
    python -m experiments.compare --config=configs/cifar10_vgg16.py --workdir=runs/cifar10_vgg16
"""

from configs import cifar10_resnet18


def get_config():
    """Returns the configuration of ResNet-18 with another model."""
    config = cifar10_resnet18.get_config()
    config.model.name = "vgg16"
    return config
