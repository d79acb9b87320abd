"""Attentional-biased training on imbalanced and noisy data, as optax transformations."""

from absgd_jax import data as data
from absgd_jax import diagnostics as diagnostics
from absgd_jax import losses as losses
from absgd_jax._state import AttentionState as AttentionState
from absgd_jax._state import get_temperature as get_temperature
from absgd_jax._sums import Sums as Sums
from absgd_jax._sums import zero_sums as zero_sums
from absgd_jax._temperature import target_ess as target_ess
from absgd_jax._temperature import target_kl as target_kl
from absgd_jax._temperature import Temperature as Temperature
from absgd_jax._temperature import two_stage as two_stage
from absgd_jax._tilt import robust_loss as robust_loss
from absgd_jax._tilt import tilt as tilt
from absgd_jax._transform import abadam as abadam
from absgd_jax._transform import absgd as absgd
from absgd_jax._transform import scale_by_attention as scale_by_attention
