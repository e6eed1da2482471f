"""CIFAR-10 with ResNet-18: 11,173,962 parameters. The other files on small colour images start from this one.

    .venv/bin/python -m adalfl_jax.data.prepare cifar10
    .venv/bin/python -m experiments.compare --config=configs/cifar10_resnet18.py --workdir=runs/cifar10_resnet18

For a GPU. An estimate of the time: a task-loss step takes 371 GFLOP and an AdaLFL step 2.67 times that
(experiments.describe counts them). Task loss, ML3 and AdaLFL together take (1 + 1 + 2.67) x 371 GFLOP x 150,000 =
0.26 EFLOP a seed, beside which the offline phase (1 %) and evaluation are little. Ten seeds take 36 hours on a device
that sustains 20 TFLOP/s, which is assumed, not measured. Where its memory does not hold ten at once, --config.seed
and --config.num_seeds run them in parts.

Expect test errors of about 8.8 % with the task loss, 8.6 % with ML3 and 8.1 % with AdaLFL: the paper reports accuracies
of 91.2, 91.4 and 91.9 %. Not reproduced here yet.
"""

from configs import default


def get_config():
    """Returns the configuration, with the authors' optimiser, batches, steps and augmentation for CIFAR and SVHN."""
    config = default.get_config()
    config.methods = ("task_loss", "ml3", "adalfl")  # what the paper compares; tuning the rate takes five runs more
    config.dataset.name = "cifar10"
    config.augmentation.padding = 4
    config.augmentation.flip = True
    config.model.name = "resnet"
    config.model.depth = 18
    config.batch_size = 128
    config.num_steps = 150_000
    config.eval_every = 1250  # divides the offline phase too, whose program is then compiled once
    config.inner.momentum = 0.9
    config.inner.nesterov = True
    config.inner.weight_decay = 5e-4  # of every parameter, those of batch norm included
    config.inner.schedule = "milestones"
    config.inner.milestones = (100_000, 135_000)
    config.outer.learning_rate = 1e-5  # the paper's; the default was chosen for far shorter runs
    return config
