"""The next character of English text from the sixteen before it, with an MLP 16x97-256-97 on one-hot characters.

    .venv/bin/python -m experiments.compare --config=configs/text_mlp.py --workdir=runs/text_mlp

The text is that of Python's own help, about 373,000 characters. It takes about an hour on two CPU cores, an estimate.
Expect ML3 and AdaLFL to fail at the defaults, by outputs that are saturated after a few steps; docs/results.md says
why, and what the task loss reaches with its rate tuned and decayed.
"""

from configs import default


def get_config():
    """Returns the configuration."""
    config = default.get_config()
    config.dataset.name = "pydoc_topics"
    config.metric = "bits_per_character"
    config.model.hidden_sizes = (256,)
    config.num_steps = 5000
    config.eval_every = 250
    return config
