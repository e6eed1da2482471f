"""The zoo of base models, by name, behind the functional adapter."""

from adalfl_jax.models.all_cnn import AllCNNC as AllCNNC
from adalfl_jax.models.classic import MLP as MLP
from adalfl_jax.models.classic import LeNet5 as LeNet5
from adalfl_jax.models.classic import LogisticRegression as LogisticRegression
from adalfl_jax.models.functional import COMPUTE_DTYPES as COMPUTE_DTYPES
from adalfl_jax.models.functional import Model as Model
from adalfl_jax.models.functional import functionalize as functionalize
from adalfl_jax.models.initializers import redraw_as_pytorch as redraw_as_pytorch
from adalfl_jax.models.resnet import ResNet as ResNet
from adalfl_jax.models.squeezenet import SqueezeNet as SqueezeNet
from adalfl_jax.models.vgg import VGG16 as VGG16
from adalfl_jax.models.wide_resnet import WideResNet as WideResNet
from adalfl_jax.models.zoo import INITIALIZATIONS as INITIALIZATIONS
from adalfl_jax.models.zoo import MODELS as MODELS
from adalfl_jax.models.zoo import count_params as count_params
from adalfl_jax.models.zoo import make_model as make_model
from adalfl_jax.models.zoo import model_options as model_options
from adalfl_jax.models.zoo import register_model as register_model
from adalfl_jax.models.zoo import required_options as required_options
