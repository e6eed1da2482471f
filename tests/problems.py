"""Small bilevel problems the tests of the core share: a model of each kind, every inner optimiser, batches."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import adalfl_jax
from adalfl_jax.models import Model, functionalize
from adalfl_jax.models.layers import ConvNormRelu, Stack, global_average

NUM_INPUTS, NUM_OUTPUTS, BATCH_SIZE = 5, 3, 8


class Plain(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(NUM_INPUTS, 6, rngs=rngs)
        self.output = nnx.Linear(6, NUM_OUTPUTS, rngs=rngs)

    def __call__(self, inputs):
        return self.output(jnp.tanh(self.hidden(inputs)))


class WithBatchNorm(Plain):
    def __init__(self, rngs):
        super().__init__(rngs)
        self.norm = nnx.BatchNorm(6, rngs=rngs)

    def __call__(self, inputs):
        return self.output(jnp.tanh(self.norm(self.hidden(inputs))))


class WithDropout(Plain):
    def __init__(self, rngs):
        super().__init__(rngs)
        self.dropout = nnx.Dropout(0.3, rngs=rngs)

    def __call__(self, inputs):
        return self.output(self.dropout(jnp.tanh(self.hidden(inputs))))


class Convolutional(nnx.Module):
    """Of images: two blocks of convolution, batch norm and ReLU."""

    def __init__(self, num_channels, num_outputs, *, rngs, remat=False):
        blocks = [ConvNormRelu(num_channels, 8, 3, rngs=rngs), ConvNormRelu(8, 8, 3, stride=2, rngs=rngs)]
        self.features = Stack(blocks, remat=remat)
        self.output = nnx.Linear(8, num_outputs, rngs=rngs)

    def __call__(self, inputs):
        return self.output(global_average(self.features(inputs)))


MODELS = {"plain": Plain, "batch_norm": WithBatchNorm, "dropout": WithDropout}

OPTIMIZERS = {
    "sgd": optax.sgd(0.3),
    "momentum": optax.sgd(0.3, momentum=0.9),
    "nesterov": optax.sgd(0.3, momentum=0.9, nesterov=True),
    "weight_decay": optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.3)),
    "schedule": optax.sgd(optax.linear_schedule(0.3, 0.1, 4)),
    "clip": optax.chain(optax.clip_by_global_norm(0.05), optax.sgd(0.3)),
    "adam": optax.adam(0.03),
}


def apply_linear(params, model_state, inputs, *, train, rng_key):
    """With dropout and a statistic, and few operations, for steps without jit, which compile them one by one."""
    if train and rng_key is not None:
        inputs = jnp.where(jax.random.bernoulli(rng_key, 0.7, inputs.shape), inputs, 0.0)
    return inputs @ params, {"mean": 0.9 * model_state["mean"] + 0.1 * inputs.mean(axis=0)} if train else model_state


def make_model(name="plain"):
    """A model whose parameters follow the test's default precision; nnx itself always starts in float32."""
    if name == "linear":
        state = {"mean": jnp.zeros(NUM_INPUTS)}
        return Model(lambda rng_key: (jax.random.normal(rng_key, (NUM_INPUTS, NUM_OUTPUTS)), state), apply_linear)
    model = functionalize(lambda rngs: MODELS[name](rngs))

    def init(rng_key):
        return jax.tree.map(lambda leaf: leaf.astype(jnp.zeros(()).dtype), model.init(rng_key))

    return model._replace(init=init)


def make_batch(rng_key, num_inner_steps=None):
    """Batches of distinct examples; the third input is constant, so its weights have a gradient of exactly zero."""
    keys = jax.random.split(rng_key, 5)
    lead = () if num_inner_steps is None else (num_inner_steps,)

    def draw(key_x, key_y, lead):
        inputs = jax.random.normal(key_x, (*lead, BATCH_SIZE, NUM_INPUTS)).at[..., 2].set(0.0)
        return adalfl_jax.Batch(inputs, jax.random.randint(key_y, (*lead, BATCH_SIZE), 0, NUM_OUTPUTS))

    return adalfl_jax.BilevelBatch(draw(keys[0], keys[1], lead), draw(keys[2], keys[3], ()), keys[4])


def make_problem(model="plain", optimizer="sgd", rng_key=None, loss=None):
    """(model, optimizer, learned loss, theta with a used optimiser state, phi's parameters)."""
    theta_key, phi_key, gradient_key = jax.random.split(jax.random.key(0) if rng_key is None else rng_key, 3)
    model, optimizer = make_model(model), OPTIMIZERS[optimizer]
    loss = loss or adalfl_jax.LossNetwork(hidden_sizes=(4, 4))
    theta = adalfl_jax.Theta.create(*model.init(theta_key), optimizer)
    earlier = jax.tree.map(lambda leaf: 0.1 * jax.random.normal(gradient_key, leaf.shape, leaf.dtype), theta.params)
    opt_state = optimizer.update(earlier, theta.opt_state, theta.params)[1]
    return model, optimizer, loss, theta._replace(opt_state=opt_state), loss.init(phi_key)
