"""Families of learned losses of a user's own, in files, configurations and runs."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

import adalfl_jax
from adalfl_jax.learned_losses import FAMILIES
from adalfl_jax.training import ConfigError, WorkdirError, load_model, train
from adalfl_jax.training.digest import digest_of
from tests.training.tiny import tiny_config

BRIEF = {"learned_loss.family": "Smoothing", "model.name": "logistic", "num_seeds": 1, "num_steps": 2, "eval_every": 2}


@pytest.fixture
def forgotten_behind():
    """What a test registers under this name is forgotten behind it."""
    yield
    FAMILIES.pop("Smoothing", None)


@dataclasses.dataclass(frozen=True)
class Smoothing:
    """A learned label smoothing and scale."""

    task_loss: str  # of the run
    logit: float = -2.0
    hidden_sizes: tuple[int, ...] = (1,)

    def init(self, rng_key):
        del rng_key
        return {"share": {"logit": jnp.full((), self.logit)}, "log_scale": jnp.zeros(())}

    def apply(self, phi_params, targets, outputs):
        labels = jax.nn.one_hot(targets, outputs.shape[1])
        smoothed = optax.smooth_labels(labels, jax.nn.sigmoid(phi_params["share"]["logit"]))
        task_loss = adalfl_jax.task_losses.find_task_loss(self.task_loss)
        return jnp.exp(phi_params["log_scale"]) * task_loss(smoothed, outputs)


@pytest.mark.usefixtures("forgotten_behind")
def test_a_registered_loss_is_saved_and_loaded(tmp_path):
    loss = Smoothing("softmax_cross_entropy", -1.0, (3, 2))
    path, params = tmp_path / "loss.safetensors", loss.init(jax.random.key(0))
    with pytest.raises(ValueError, match=r"can be saved; got Smoothing; register yours first \(register_learned_loss"):
        adalfl_jax.save_learned_loss(path, loss, params)
    assert adalfl_jax.register_learned_loss(Smoothing) is Smoothing
    adalfl_jax.register_learned_loss(Smoothing)  # again, as a notebook does
    adalfl_jax.save_learned_loss(path, loss, params)
    frozen = adalfl_jax.load_learned_loss(path)
    assert frozen.loss == loss
    chex.assert_trees_all_equal(frozen.params, params)
    rescaled = adalfl_jax.RescaledLoss(loss, floor=0.5)
    adalfl_jax.save_learned_loss(path, rescaled, params)
    assert adalfl_jax.load_learned_loss(path).loss == rescaled
    FAMILIES.pop("Smoothing")
    with pytest.raises(
        ValueError, match=r"unknown family of learned losses 'Smoothing'.*Register one of your own first"
    ):
        adalfl_jax.load_learned_loss(path)


@pytest.mark.usefixtures("forgotten_behind", "without_figures")
def test_a_registered_loss_is_learned_by_a_run_and_read_back(tmp_path):
    adalfl_jax.register_learned_loss(Smoothing)
    config = tiny_config(BRIEF | {"learned_loss.start": "task_loss"})
    assert config.learned_loss.make(config.task_loss) == Smoothing("softmax_cross_entropy", hidden_sizes=(8,))
    train(config, tmp_path / "run")
    trained = load_model(tmp_path / "run")
    assert trained.learned_loss is not None
    assert trained.learned_loss.loss == config.learned_loss.make(config.task_loss)
    saved = adalfl_jax.load_learned_loss(tmp_path / "run" / "learned_loss.safetensors")
    chex.assert_trees_all_equal(saved.params, trained.learned_loss.params)
    assert saved.params["log_scale"] != 0
    train(tiny_config(BRIEF | {"learned_loss.start": str(tmp_path / "run"), "offline.num_steps": 0}), tmp_path / "on")
    FAMILIES.pop("Smoothing")
    with pytest.raises(WorkdirError, match=r"run of the learned loss 'Smoothing', which is not known.*--config=FILE"):
        load_model(tmp_path / "run")


@pytest.mark.usefixtures("forgotten_behind")
def test_a_setting_that_no_field_gives_needs_a_default_or_a_value_in_a_configuration():
    @dataclasses.dataclass(frozen=True)
    class Smoothing:
        num_heads: int

        def init(self, rng_key):
            return {"heads": jnp.zeros(self.num_heads)}

        def apply(self, phi_params, targets, outputs): ...

    adalfl_jax.register_learned_loss(Smoothing)
    config = tiny_config({"learned_loss.family": "Smoothing"})
    with pytest.raises(
        ValueError,
        match=r"'Smoothing' needs num_heads, which is no setting .* or set .*options\.num_heads in the file",
    ):
        config.learned_loss.make(config.task_loss)
    config = tiny_config({"learned_loss.family": "Smoothing", "learned_loss.options": {"num_heads": 3}})
    assert config.learned_loss.make(config.task_loss) == Smoothing(3)


def family_of(name="Smoothing", *, frozen=True, **methods):
    methods = {"init": lambda self, rng_key: {}, "apply": lambda self, phi_params, targets, outputs: 0.0} | methods
    return dataclasses.make_dataclass(name, [], namespace=methods, frozen=frozen)


@pytest.mark.usefixtures("forgotten_behind")
@pytest.mark.parametrize(
    ("family", "message"),
    [
        (adalfl_jax.LossNetwork(), r"must be a frozen dataclass.*got LossNetwork\("),
        (type("Smoothing", (), {}), "must be a frozen dataclass.*got Smoothing"),
        (family_of(frozen=False), "must be a frozen dataclass.*got Smoothing"),
        (family_of("LossNetwork"), "there is a family of learned losses 'LossNetwork' in this package; register yours"),
        (family_of("network"), "there is a family of learned losses 'network' in this package; register yours"),
        (family_of(init=None), r"Smoothing\.init is called as init\(rng_key\): it has none"),
        (family_of(apply=lambda self, phi: 0.0), r"apply is called as apply\(phi_params, targets, outputs\): too many"),
        (
            family_of(apply=lambda self, phi_params, targets, outputs, *, params: 0.0),
            r"Smoothing\.apply declares params, and programs measure a loss by the outputs alone",
        ),
    ],
    ids=[
        "an instance",
        "no dataclass",
        "not frozen",
        "ours",
        "of a configuration",
        "no init",
        "other arguments",
        "reads theta",
    ],
)
def test_what_cannot_be_registered_is_refused(family, message):
    with pytest.raises(ValueError, match=message):
        adalfl_jax.register_learned_loss(family)
    assert "Smoothing" not in FAMILIES


@pytest.mark.usefixtures("forgotten_behind")
@pytest.mark.parametrize(
    ("methods", "message"),
    [
        (
            {"init": lambda self, rng_key: {"scale": jnp.zeros((), int)}},
            r"Smoothing\.init\(rng_key\)\['scale'\] is int\d+, which has no gradient",
        ),
        (
            {"apply": lambda self, phi_params, targets, outputs: outputs.mean(axis=1)},
            r"Smoothing\.apply must return one float, the mean over the batch say; got float32\[1\]",
        ),
        (
            {"apply": lambda self, phi_params, logits, labels: logits.mean()},
            r"Smoothing\.apply .* named the other way round, logits before labels",
        ),
    ],
    ids=["whole numbers", "no mean", "swapped"],
)
def test_a_registered_loss_that_cannot_be_learned_ends_before_there_is_a_folder(methods, message, tmp_path):
    adalfl_jax.register_learned_loss(of_fields(**methods))
    with pytest.raises(ConfigError, match=message):
        train(tiny_config({"learned_loss.family": "Smoothing"}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("forgotten_behind")
def test_an_option_that_a_check_of_the_class_cannot_take_is_told():
    def check(self):
        assert self.rate >= 0

    adalfl_jax.register_learned_loss(of_fields(("rate", float, 0.5), __post_init__=check))
    config = tiny_config({"learned_loss.family": "Smoothing", "learned_loss.options": {"rate": "0.5"}})
    with pytest.raises(ValueError, match=r"learned loss 'Smoothing' cannot be made of its settings: '>='"):
        config.learned_loss.make(config.task_loss)


@pytest.mark.usefixtures("forgotten_behind", "without_figures")
def test_options_are_compared_when_a_run_goes_on_and_belong_to_its_digest(tmp_path):
    adalfl_jax.register_learned_loss(Smoothing)
    settings = BRIEF | {"learned_loss.options": {"logit": -1.0}, "offline.num_steps": 0}
    config = tiny_config(settings)
    assert config.learned_loss.make(config.task_loss) == Smoothing("softmax_cross_entropy", -1.0, (8,))
    train(config, tmp_path / "run")
    assert load_model(tmp_path / "run").learned_loss.loss.logit == -1.0  # pyright: ignore[reportOptionalMemberAccess]
    other = tiny_config({**settings, "learned_loss.options": {"logit": -2.0}})
    with pytest.raises(WorkdirError, match=r"learned_loss\.options\.logit: -1\.0 -> -2\.0"):
        train(other, tmp_path / "run")
    assert digest_of(config) != digest_of(other)
    network = tiny_config({**settings, "learned_loss.family": "network"})  # as in a comparison with it
    assert network.learned_loss.make("softmax_cross_entropy") == adalfl_jax.LossNetwork((8,))
    with pytest.raises(ConfigError, match=r"unknown option of a registered learned loss 'logits'; did you mean 'l"):
        tiny_config({**settings, "learned_loss.options": {"logits": -1.0}})


def of_fields(*fields, **methods):
    init = {"init": lambda self, rng_key: {"scale": jnp.zeros(())}}
    apply = {"apply": lambda self, phi_params, targets, outputs: phi_params["scale"] * outputs.mean()}
    return dataclasses.make_dataclass("Smoothing", fields, namespace=init | apply | methods, frozen=True)


@pytest.mark.usefixtures("forgotten_behind")
@pytest.mark.parametrize(
    ("family", "message"),
    [
        (of_fields(("act", object, jnp.tanh)), "its settings must be JSON, and make it anew"),
        (of_fields(("bound", float, float("inf"))), "its settings must be JSON, and make it anew"),
        (of_fields(("names", dict, dataclasses.field(default_factory=lambda: {1: 2}))), "it is another loss; let them"),
        (of_fields(init=lambda self, rng_key: (jnp.zeros(()),)), "its parameters must be dictionaries"),
        (of_fields(init=lambda self, rng_key: {"a.b": jnp.zeros(())}), "with names that have no dot"),
    ],
    ids=["a function", "infinite", "keys of numbers", "a tuple", "a dot"],
)
def test_what_a_file_would_not_give_back_is_refused_before_a_run(family, message):
    adalfl_jax.register_learned_loss(family)
    with pytest.raises(ValueError, match=rf"cannot be saved: .*{message}"):
        tiny_config({"learned_loss.family": "Smoothing"}).learned_loss.make("softmax_cross_entropy")


@pytest.mark.usefixtures("forgotten_behind")
def test_settings_that_json_changes_the_form_of_come_back(tmp_path):
    derived = dataclasses.field(init=False, default=3)
    family = of_fields(("pairs", tuple, ((1, 2), (3, 4))), ("derived", int, derived))
    adalfl_jax.register_learned_loss(family)
    path, loss = tmp_path / "loss.safetensors", family(pairs=((5, 6),))
    adalfl_jax.save_learned_loss(path, loss, loss.init(jax.random.key(0)))
    assert adalfl_jax.load_learned_loss(path).loss == loss
    adalfl_jax.register_learned_loss(of_fields(("pairs", tuple, ())))
    with pytest.raises(ValueError, match="got Smoothing; its class was registered again since; make the loss anew"):
        adalfl_jax.save_learned_loss(path, loss, loss.init(jax.random.key(0)))
