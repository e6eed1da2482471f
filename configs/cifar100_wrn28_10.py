"""CIFAR-100 with WideResNet 28-10: 36,536,884 parameters.

    .venv/bin/python -m adalfl_jax.data.prepare cifar100
    .venv/bin/python -m experiments.compare --config=configs/cifar100_wrn28_10.py --workdir=runs/cifar100_wrn28_10

For a GPU. An estimate of the time: a task-loss step takes 3663 GFLOP and an AdaLFL step 2.67 times that
(experiments.describe counts them). Task loss, ML3 and AdaLFL together take (1 + 1 + 2.67) x 3663 GFLOP x 150,000 =
2.6 EFLOP a seed, beside which the offline phase (1 %) and evaluation are little. Ten seeds take 15 days on a device
that sustains 20 TFLOP/s, which is assumed, not measured. Where its memory does not hold ten at once, --config.seed
and --config.num_seeds run them in parts.

Expect about 20 % test error with the task loss: Zagoruyko & Komodakis (2016) report 19.25 % without dropout, at a
higher rate and in fewer steps. No figure of the paper for this pair is at hand, and it was not run here yet.
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
