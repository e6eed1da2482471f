"""Fashion-MNIST with the MLP 784-1000-1000-10: 1,796,010 parameters, SGD at 0.01.

    .venv/bin/python -m adalfl_jax.data.prepare fashion_mnist
    .venv/bin/python -m experiments.compare --config=configs/fashion_mnist_mlp.py --workdir=runs/fashion_mnist_mlp

About two and a half hours on two CPU cores, an estimate: 2.56 times the training of mnist_mlp (47 minutes of its 65),
in steps times batch size, and 1.28 times its offline phase (18 minutes). Expect what one seed gave, with
--config.num_seeds=1 --config.methods="('task_loss', 'ml3', 'adalfl')" in 18 minutes on one core: test errors of 12.7 %
with the task loss, 11.0 % with ML3 and 10.2 % with AdaLFL. The paper has no figure for this pair.
"""

from configs import mnist_mlp


def get_config():
    """Returns the configuration of MNIST on Fashion-MNIST."""
    config = mnist_mlp.get_config()
    config.dataset.name = "fashion_mnist"
    # The authors' batches and steps for images of this kind.
    config.batch_size = 128
    config.num_steps = 10_000
    config.eval_every = 500
    return config
