"""Attention as kernel regression: sparse attention with compact kernels, in JAX."""

from kreg import sharding as sharding
from kreg.attention import attention as attention
from kreg.attention import explain_implementation as explain_implementation
from kreg.bandwidth import Adaptive as Adaptive
from kreg.bandwidth import Anchored as Anchored
from kreg.bandwidth import Fixed as Fixed
from kreg.bandwidth import Nearest as Nearest
from kreg.constrained import budget as budget
from kreg.constrained import normmax as normmax
from kreg.kernels import Kernel as Kernel
from kreg.kernels import biweight as biweight
from kreg.kernels import box as box
from kreg.kernels import epanechnikov as epanechnikov
from kreg.kernels import gaussian as gaussian
from kreg.kernels import rectified_polynomial as rectified_polynomial
from kreg.kernels import triweight as triweight
from kreg.losses import entmax15_loss as entmax15_loss
from kreg.losses import entmax_loss as entmax_loss
from kreg.losses import normmax_loss as normmax_loss
from kreg.losses import sparsemax_loss as sparsemax_loss
from kreg.maps import entmax as entmax
from kreg.maps import entmax15 as entmax15
from kreg.maps import normalized_relu as normalized_relu
from kreg.maps import relumax as relumax
from kreg.maps import softmax as softmax
from kreg.maps import sparsemax as sparsemax
from kreg.maps import topk_softmax as topk_softmax
from kreg.maps import topk_uniform as topk_uniform
from kreg.masks import Mask as Mask
from kreg.regression import nadaraya_watson as nadaraya_watson

__version__ = "0.1.0"
