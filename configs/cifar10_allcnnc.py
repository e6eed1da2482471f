"""CIFAR-10 with All-CNN-C: 1,372,254 parameters.

    .venv/bin/python -m adalfl_jax.data.prepare cifar10
    .venv/bin/python -m experiments.compare --config=configs/cifar10_allcnnc.py --workdir=runs/cifar10_allcnnc

For a GPU. An estimate of the time: a task-loss step takes 196 GFLOP and an AdaLFL step 2.66 times that
(experiments.describe counts them). Task loss, ML3 and AdaLFL together take (1 + 1 + 2.66) x 196 GFLOP x 150,000 =
0.14 EFLOP a seed, beside which the offline phase (1 %) and evaluation are little. Ten seeds take 19 hours on a device
that sustains 20 TFLOP/s, which is assumed, not measured. Where its memory does not hold ten at once, --config.seed
and --config.num_seeds run them in parts.

Expect about 7 % test error with the task loss: Springenberg et al. (2015) report 7.25 % without batch norm, with
augmentation. No figure of the paper for this pair is at hand, and it was not run here yet.
"""

from configs import cifar10_resnet18


def get_config():
    """Returns the configuration of ResNet-18 with another model."""
    config = cifar10_resnet18.get_config()
    config.model.name = "allcnnc"
    return config
