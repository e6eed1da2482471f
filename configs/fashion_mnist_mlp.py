"""Fashion-MNIST with the MLP 784-1000-1000-10: 1,796,010 parameters, SGD at 0.01.

python -m adalfl_jax.data.prepare fashion_mnist
python -m experiments.compare --config=configs/fashion_mnist_mlp.py --workdir=runs/fashion_mnist_mlp
"""

from configs import mnist_mlp


def get_config():
    """Returns the configuration of MNIST on Fashion-MNIST."""
    config = mnist_mlp.get_config()
    config.dataset.name = "fashion_mnist"
    # The authors' setting for images of this kind.
    config.batch_size = 128
    config.num_steps = 10_000
    config.eval_every = 500
    return config
