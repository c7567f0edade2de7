"""What the feature-level drafts have in common: sizes that come from the target, and shifts.

A feature-level draft reads pairs: a feature of the target at position t and the *next* token,
x_{t+1}, which says what was sampled there. It so predicts what follows x_{t+1}. Where embedding
and head are the target's own, no draft holds or copies them.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any, ClassVar

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from specdistill_jax import structs
from specdistill_jax.models import decoder
from specdistill_jax.models import layers

# Fields that are the target's unless a config says otherwise.
FROM_TARGET = (
    'vocab_size', 'width', 'num_heads', 'num_kv_heads', 'head_dim', 'mlp_width', 'norm_eps',
    'rope_theta', 'rope_scaling', 'rope_factor', 'rope_low_frequency_factor',
    'rope_high_frequency_factor', 'rope_original_positions', 'eos_id', 'dtype')


@dataclasses.dataclass(frozen=True)
class FeatureConfig:
  """Sizes of a draft that is one LLaMA layer; names as in `decoder.DecoderConfig`.

  Attributes:
    vocab_size: of the target, and of the logits.
    width: of the target, whose embedding and features are read.
    dropout: must be 0; the papers' regulariser is noise on the features.
    remat: 'none', or what is kept of an unrolled step for its backward pass.
    eos_id: the target's.
  """
  family: ClassVar[str]
  max_positions: ClassVar[int] = 0
  vocab_size: int
  width: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  mlp_width: int
  norm_eps: float = 1e-6
  rope_theta: float = 10_000.0
  rope_scaling: str = 'none'
  rope_factor: float = 1.0
  rope_low_frequency_factor: float = 1.0
  rope_high_frequency_factor: float = 4.0
  rope_original_positions: int = 8192
  dropout: float = 0.0
  remat: str = 'none'
  eos_id: int | tuple[int, ...] = structs.EOS_ID
  dtype: str = 'bfloat16'

  def __post_init__(self):
    if isinstance(self.eos_id, list):  # as JSON gives a tuple back
      object.__setattr__(self, 'eos_id', tuple(self.eos_id))
    if self.dropout:
      raise ValueError(f'{self.family}: dropout is {self.dropout}; it must be 0, feature-level '
                       'drafts have none')
    self.layer()  # checks the sizes

  def layer(self) -> decoder.DecoderConfig:
    """The sizes of its one layer, as attention and MLP take them."""
    shared = {name: getattr(self, name) for name in (*FROM_TARGET, 'remat')}
    return decoder.DecoderConfig(num_layers=1, **shared)

  def frequencies(self) -> np.ndarray:
    return layers.rope_frequencies(
        self.rope_theta, self.head_dim, scaling=self.rope_scaling, factor=self.rope_factor,
        low=self.rope_low_frequency_factor, high=self.rope_high_frequency_factor,
        original_positions=self.rope_original_positions)

  @classmethod
  def defaults_for(cls, target: Any) -> dict[str, Any]:
    """Fields of a kind's own that depend on the target."""
    del target
    return {}

  @property
  def size(self) -> str:
    """Short and readable: layers x width."""
    return f'1x{self.width}'


def for_target(cls: type[FeatureConfig], fields: Mapping[str, Any], target: Any) -> FeatureConfig:
  """The config of a draft for a target: what `fields` leave out, or None, is the target's.

  Raises:
    ValueError: the target is no decoder with rotary positions, or the widths differ.
  """
  kind = getattr(target, 'family', None)
  if kind != 'decoder' or target.position != 'rope':
    raise ValueError(f'the draft is of the family {cls.family!r}, which needs a target that is a '
                     f'decoder with rotary positions, and the target is a {kind}')
  given = {name: value for name, value in fields.items()
           if value is not None and name != 'family'}
  config = cls(**{name: getattr(target, name) for name in FROM_TARGET} | cls.defaults_for(target)
               | given)
  check_fits(config, target)
  return config


def check_fits(config: FeatureConfig, target: Any) -> None:
  """Raises ValueError unless the draft reads features and tokens of such a target."""
  for name in ('width', 'vocab_size'):
    if getattr(config, name) != getattr(target, name):
      raise ValueError(f'{config.family}: {name} is {getattr(config, name)}; it must be the '
                       f"target's, {getattr(target, name)}, whose embedding and head are shared")


def norm(config: FeatureConfig) -> layers.Norm:
  return layers.Norm(config.width, kind='rms', eps=config.norm_eps)


def linear_init(rngs: nnx.Rngs, *shape: int) -> nnx.Param:
  """A weight `[outputs, inputs]` as PyTorch initialises it, which the papers' codes leave so."""
  return layers.uniform(rngs.params(), shape, shape[-1])


def shift_left(x_bt: jax.Array, count: int) -> jax.Array:
  """`x[:, t + count]` at t, zeros behind the end."""
  width = [(0, 0)] * x_bt.ndim
  width[1] = (0, count)
  return jnp.pad(x_bt, width)[:, count:]


def pair_mask(batch: structs.Batch) -> jax.Array:
  """Which pairs (feature t, token t + 1) are learnt from, float32 `[b, t]`.

  The loss mask of token t itself, not shifted, as in the released codes, although what is
  learnt follows token t + 1; nothing follows the last pair of a row.
  """
  position_t = jnp.arange(batch.tokens_bt.shape[1])
  inside_bt = position_t[None] < batch.lengths_b[:, None] - 1
  return jnp.where(inside_bt, batch.loss_mask_bt, 0).astype(jnp.float32)


def causal(tokens_bt: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Positions of pairs, and the mask under which each sees itself and those before it."""
  b, t = tokens_bt.shape
  positions_bt = jnp.broadcast_to(jnp.arange(t), (b, t))
  return positions_bt, positions_bt[:, :, None] >= jnp.arange(t)[None, None, :]
