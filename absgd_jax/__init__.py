"""Attentional-biased training on imbalanced and noisy data, as optax transformations."""

from absgd_jax import data as data
from absgd_jax import diagnostics as diagnostics
from absgd_jax import losses as losses
from absgd_jax._attention import Attention as Attention
from absgd_jax._attention import attention as attention
from absgd_jax._attention import AttentionState as AttentionState
from absgd_jax._attention import robust_loss as robust_loss
from absgd_jax._merge import accumulate as accumulate
from absgd_jax._merge import AccumulateState as AccumulateState
from absgd_jax._merge import pmerge as pmerge
from absgd_jax._temperature import AutomaticTemperature as AutomaticTemperature
from absgd_jax._temperature import target_ess as target_ess
from absgd_jax._temperature import target_kl as target_kl
from absgd_jax._temperature import TemperatureState as TemperatureState
from absgd_jax._transform import abadam as abadam
from absgd_jax._transform import absgd as absgd
from absgd_jax._transform import get_temperature as get_temperature
from absgd_jax._transform import scale_by_attention as scale_by_attention
