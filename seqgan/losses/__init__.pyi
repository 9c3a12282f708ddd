"""Public names, one import each: the package loads them from here when they are first used."""

from .perceptual import LPIPS as LPIPS
from .perceptual import SemanticPerceptualLoss as SemanticPerceptualLoss
from .perceptual import vgg16 as vgg16
from .terms import adaptive_weight as adaptive_weight
from .terms import autoregressive_loss as autoregressive_loss
from .terms import discriminator_loss as discriminator_loss
from .terms import generator_loss as generator_loss
from .terms import gradient_penalty as gradient_penalty
from .terms import masked_loss as masked_loss
from .terms import started as started
