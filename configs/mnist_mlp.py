"""MNIST with the paper's MLP 784-1000-1000-10: 1,796,010 parameters, SGD at 0.01.

    .venv/bin/python -m adalfl_jax.data.prepare mnist
    .venv/bin/python -m experiments.compare --config=configs/mnist_mlp.py --workdir=runs/mnist_mlp

About 65 minutes on two CPU cores, an estimate: for ten seeds 4 for each of the six runs on the task loss (26 ms a
step of five seeds), 18 for the offline phase, 10 for ML3, 13 for AdaLFL. --config.num_seeds=5
--config.methods="('task_loss', 'ml3', 'adalfl')" took 26 minutes beside other work. Expect what that gave, test
errors of 4.3 ± 0.1 % with the task loss, 1.6 ± 0.4 % with ML3 and 1.7 ± 0.5 % with AdaLFL, which is no difference
between the last two (p = 0.4); three seeds of five end below 1.4 %. The paper reports 4.47, 3.50 and 3.12 % on MNIST.

The same five seeds with --config.model.initialization=he_glorot: 3.1 ± 0.1 % with the task loss, 2.5 ± 0.1 % with ML3.
The offline phase learns the best single step. With PyTorch's small initial weights that is 48 times as large as alpha
(`implicit_learning_rate` at step 0), with He's about as large, so there is little to learn.
"""

from configs import mnist_logistic


def get_config():
    """Returns the configuration of logistic regression with an MLP in its place."""
    config = mnist_logistic.get_config()
    config.model.name = "mlp"
    config.model.hidden_sizes = (1000, 1000)
    # The authors' neighbouring code has 10,000 steps of 128; with these the task loss ends where the paper has it.
    config.batch_size = 100
    config.num_steps = 5000
    config.eval_every = 250
    return config
