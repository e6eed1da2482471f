"""CIFAR-10 with SqueezeNet: 734,986 parameters.

    python -m adalfl_jax.data.prepare cifar10
    python -m experiments.compare --config=configs/cifar10_squeezenet.py --workdir=runs/cifar10_squeezenet
"""

from configs import cifar10_resnet18


def get_config():
    """Returns the configuration of ResNet-18 with another model."""
    config = cifar10_resnet18.get_config()
    config.model.name = "squeezenet"
    return config
