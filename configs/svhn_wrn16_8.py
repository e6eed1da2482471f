"""SVHN (cropped digits) with WideResNet 16-8: 10,961,370 parameters.

    python -m adalfl_jax.data.prepare svhn_cropped
    python -m experiments.compare --config=configs/svhn_wrn16_8.py --workdir=runs/svhn_wrn16_8
"""

from configs import cifar10_resnet18


def get_config():
    """Returns the configuration of CIFAR-10 on SVHN with another model."""
    config = cifar10_resnet18.get_config()
    config.dataset.name = "svhn_cropped"
    config.augmentation.flip = False  # a mirrored digit is another one, or none
    config.model.name = "wide_resnet"
    config.model.depth = 16
    config.model.width = 8
    return config
