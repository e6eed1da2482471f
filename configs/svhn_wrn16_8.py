"""SVHN (cropped digits) with WideResNet 16-8: 10,961,370 parameters.

    .venv/bin/python -m adalfl_jax.data.prepare svhn_cropped
    .venv/bin/python -m experiments.compare --config=configs/svhn_wrn16_8.py --workdir=runs/svhn_wrn16_8

For a GPU. An estimate of the time: a task-loss step takes 1085 GFLOP and an AdaLFL step 2.67 times that
(experiments.describe counts them). Task loss, ML3 and AdaLFL together take (1 + 1 + 2.67) x 1085 GFLOP x 150,000 =
0.76 EFLOP a seed, beside which the offline phase (1 %) and evaluation are little. Ten seeds take 4.4 days on a device
that sustains 20 TFLOP/s, which is assumed, not measured. Where its memory does not hold ten at once, --config.seed
and --config.num_seeds run them in parts.

Expect a test error above 2 % with the task loss: Zagoruyko & Komodakis (2016) report 1.54 % with dropout and with the
531,131 extra images, and this has neither. No figure of the paper for this pair is at hand, and it was not run here
yet.
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
