"""CIFAR-10 with VGG-16 with batch norm: 14,728,266 parameters.

    .venv/bin/python -m adalfl_jax.data.prepare cifar10
    .venv/bin/python -m experiments.compare --config=configs/cifar10_vgg16.py --workdir=runs/cifar10_vgg16

For a GPU. An estimate of the time: a task-loss step takes 190 GFLOP and an AdaLFL step 2.66 times that
(experiments.describe counts them). Task loss, ML3 and AdaLFL together take (1 + 1 + 2.66) x 190 GFLOP x 150,000 =
0.13 EFLOP a seed, beside which the offline phase (1 %) and evaluation are little. Ten seeds take 18 hours on a device
that sustains 20 TFLOP/s, which is assumed, not measured. Where its memory does not hold ten at once, --config.seed
and --config.num_seeds run them in parts.

It was not run here yet, and no figure of the paper for this pair is at hand.
"""

from configs import cifar10_resnet18


def get_config():
    """Returns the configuration of ResNet-18 with another model."""
    config = cifar10_resnet18.get_config()
    config.model.name = "vgg16"
    return config
