"""EAGLE-1 (arXiv 2401.15077) and FSPAD (arXiv 2408.15562): one network, by config fields.

EAGLE-1 fuses the embedding of the next token with the target's last feature in one linear map,
runs one decoder layer, and takes its output both as the next feature and as what the target's
head reads. FSPAD adds to it, each by a field of its own:

  feature sampling   the token's embedding gates the fused vector in a wide inner space;
  partial alignment  the layer writes two vectors: one that the head reads, one that is held
                     to the target's next feature and fed to the next step.

The layer has no norm before attention and none at its end: features are past the target's
final norm already. FSPAD's equations are those of its official code (Luc4Gui/FSPAD).
"""

import dataclasses
from typing import Any, ClassVar

from flax import nnx
import jax
import jax.numpy as jnp

from specdistill_jax import structs
from specdistill_jax.drafters import feature_config
from specdistill_jax.models import cache as cache_lib
from specdistill_jax.models import decoder_layers
from specdistill_jax.models import layers

NOISE_LENGTH = 512  # tokens of a row at which the noise has its nominal width


@dataclasses.dataclass(frozen=True)
class EagleConfig(feature_config.FeatureConfig):
  """EAGLE-1.

  Attributes:
    fusion_bias: of the linear fusion (the LLaMA-3 drafts of EAGLE-1 have none).
    feature_noise: width of the uniform noise on input features, in rows of 512 tokens.
    regression_weight: of the feature loss (SmoothL1).
    classification_weight: of the cross-entropy against the target's law.
  """
  family: ClassVar[str] = 'eagle'
  feature_sampling: ClassVar[bool] = False
  partial_alignment: ClassVar[bool] = False
  fusion_bias: bool = True
  feature_noise: float = 0.2
  regression_weight: float = 1.0
  classification_weight: float = 0.1


@dataclasses.dataclass(frozen=True)
class FSPADConfig(feature_config.FeatureConfig):
  """FSPAD; without both of its parts it is EAGLE-1. Other fields as in `EagleConfig`."""
  family: ClassVar[str] = 'fspad'
  feature_sampling: bool = True
  partial_alignment: bool = True
  fusion_bias: bool = True
  feature_noise: float = 0.2
  regression_weight: float = 1.0
  classification_weight: float = 0.1

  @property
  def size(self) -> str:
    without = [name for name, used in (('feature sampling', self.feature_sampling),
                                       ('partial alignment', self.partial_alignment)) if not used]
    return f'1x{self.width}' + (f' without {" and ".join(without)}' if without else '')


class FeatureSampling(nnx.Module):
  """fused + down(SiLU(gate(embedding)) * up(norm(fused))): the token's mask on the feature."""

  def __init__(self, config: FSPADConfig, *, rngs: nnx.Rngs):
    d, f = config.width, config.mlp_width
    self.norm = feature_config.norm(config)
    self.gate_fd = feature_config.linear_init(rngs, f, d)
    self.up_fd = feature_config.linear_init(rngs, f, d)
    self.down_df = feature_config.linear_init(rngs, d, f)

  def __call__(self, fused_btd, embedded_btd):
    gate_btf = jax.nn.silu(layers.linear(embedded_btd, self.gate_fd[...]))
    value_btf = layers.linear(self.norm(fused_btd), self.up_fd[...])
    return fused_btd + layers.linear(gate_btf * value_btf, self.down_df[...])


class Eagle(nnx.Module):
  """The network of both; an instance is a pytree of its own parameters alone."""
  captured = ()  # layers of the target whose inputs it reads, beside the final feature
  positions = 1  # unrolled in training

  def __init__(self, config: EagleConfig | FSPADConfig, *, rngs: nnx.Rngs):
    d, layer = config.width, config.layer()
    self.config = config
    self.fusion_dw = feature_config.linear_init(rngs, d, 2 * d)
    self.fusion_bias_d = (layers.uniform(rngs.params(), (d,), 2 * d) if config.fusion_bias
                          else None)
    self.sampling = FeatureSampling(config, rngs=rngs) if config.feature_sampling else None
    self.attention = decoder_layers.Attention(layer, rngs=rngs, init=layers.uniform)
    self.mlp_norm = feature_config.norm(config)
    self.mlp = decoder_layers.MLP(layer, rngs=rngs, init=layers.uniform,
                                  output_width=2 * d if config.partial_alignment else d)

  def inputs(self, features: dict[str, jax.Array]) -> jax.Array:
    """What is carried beside a token at a verified position: the target's last feature."""
    return features['final_btd'].astype(self.config.dtype)

  def __call__(self, embedded_btd, carried_btd, positions_bt, mask_bts, cache=None):
    """Returns what the head reads, what the next step carries, both `[b, t, d]`, and the cache.

    Args:
      embedded_btd: the target's embedding of each pair's token.
      carried_btd: each pair's feature.
      positions_bt: of the feature: a pair stands a place before its token.
      mask_bts: as in `structs.TargetFn`, slots being pairs.
    """
    carried_btd = carried_btd.astype(self.config.dtype)
    x_btd = layers.linear(
        jnp.concatenate([embedded_btd.astype(carried_btd.dtype), carried_btd], axis=-1),
        self.fusion_dw[...])
    if self.fusion_bias_d is not None:
      x_btd = x_btd + self.fusion_bias_d[...].astype(x_btd.dtype)
    if self.sampling is not None:
      x_btd = self.sampling(x_btd, embedded_btd.astype(x_btd.dtype))
    held = None if cache is None else (cache.keys_bksh[0], cache.values_bksh[0])
    out_btd, held = self.attention(x_btd, positions_bt, mask_bts, held,
                                   None if cache is None else cache.length_b,
                                   self.config.frequencies())
    if cache is not None:
      cache = cache.replace(keys_bksh=(held[0],), values_bksh=(held[1],),
                            length_b=cache.length_b + positions_bt.shape[1])
    x_btd = x_btd + out_btd
    out_btd = self.mlp(self.mlp_norm(x_btd))
    if not self.config.partial_alignment:
      return x_btd + out_btd, x_btd + out_btd, cache
    read_btd, aligned_btd = jnp.split(out_btd, 2, axis=-1)
    return x_btd + read_btd, x_btd + aligned_btd, cache

  def head(self, read_btd, target) -> jax.Array:
    """Logits over its own vocabulary, all of the target's."""
    return target.logits(read_btd)

  def logits(self, read_btd, target) -> jax.Array:
    """Logits over the target's vocabulary, by the target's own head."""
    return target.logits(read_btd)

  def restrict(self, logits_btv) -> jax.Array:
    """The target's logits over its own vocabulary."""
    return logits_btv

  @property
  def loss_settings(self) -> dict[str, Any]:
    """For `losses.features.feature_loss`."""
    c = self.config
    return dict(regression=c.regression_weight, classification=c.classification_weight,
                frozen_head=True)

  def unroll(self, teacher, batch: structs.Batch, key=None) -> tuple[structs.DraftStep, ...]:
    """One step of teacher forcing: each pair from the true feature, with noise if given a key."""
    features_btd = jax.lax.stop_gradient(self.inputs(teacher.causal(batch.tokens_bt).features))
    carried_btd = features_btd
    if key is not None:
      carried_btd = noisy(features_btd, batch.lengths_b, key, self.config.feature_noise)
    positions_bt, mask_bts = feature_config.causal(batch.tokens_bt)
    tokens_bt = feature_config.shift_left(batch.tokens_bt, 1)
    embedded_btd = jax.lax.stop_gradient(teacher.embed(tokens_bt, positions_bt + 1))
    read_btd, predicted_btd, _ = self(embedded_btd, carried_btd, positions_bt, mask_bts)
    return structs.DraftStep(
        read_btd=read_btd, predicted_btd=predicted_btd,
        taught_btd=feature_config.shift_left(features_btd, 1),
        mask_bt=feature_config.pair_mask(batch)),

  def init_cache(self, batch: int, num_slots: int) -> cache_lib.KVCache:
    c = self.config
    return cache_lib.init_cache(1, batch, num_slots, c.num_kv_heads, c.head_dim,
                                jnp.dtype(c.dtype))


def noisy(features_btd: jax.Array, lengths_b: jax.Array, key: jax.Array,
          width: float) -> jax.Array:
  """Features with independent uniform noise of this width at 512 tokens, less in longer rows.

  (r - 1/2) * width * 512 / length, r uniform in (0, 1): EAGLE-1's augmentation, as released.
  """
  draw_btd = jax.random.uniform(key, features_btd.shape, jnp.float32, -0.5, 0.5)
  scale_b = width * NOISE_LENGTH / lengths_b.astype(jnp.float32)
  return features_btd + (draw_btd * scale_b[:, None, None]).astype(features_btd.dtype)


def init(config: EagleConfig | FSPADConfig, key: jax.Array) -> Eagle:
  """A freshly initialised draft; trace it under `sharding.sharded_init` to lay it out."""
  generator = jax.random.key(jax.random.bits(key, dtype=jnp.uint32), impl='rbg')
  return Eagle(config, rngs=nnx.Rngs(params=generator))
