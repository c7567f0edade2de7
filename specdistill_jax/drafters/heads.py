"""Drafts of heads on one feature of the target: Medusa and IBM's MLP speculator.

Both draft all positions of a round from the feature behind the last verified token, without
attention, and each position has weights of its own. Medusa (Cai et al. 2024, arXiv 2401.10774)
has independent heads that see no drafted token. The MLP speculator (Wertheimer et al. 2024, arXiv
2404.19124) carries a state from head to head and mixes in each drafted token's embedding.

As feature-level drafts they are run a position at a time. So that a step knows which of them it
is, the last entry of what it carries, and of what the head reads, is the number of the step. A
round longer than the heads goes on with the last one.
"""

import dataclasses
from typing import Any, ClassVar

from flax import nnx
import jax
import jax.numpy as jnp

from specdistill_jax import structs
from specdistill_jax.drafters import feature_config
from specdistill_jax.models import cache as cache_lib
from specdistill_jax.models import layers


@dataclasses.dataclass(frozen=True)
class MedusaConfig(feature_config.FeatureConfig):
  """Medusa.

  Attributes:
    positions: heads.
    own_heads: whether each has a matrix over the vocabulary; else all use the target's head.
    step_decay: weight of a head, over that of the one before, in its own loss.
  """
  family: ClassVar[str] = 'medusa'
  positions: int = 6
  own_heads: bool = True
  step_decay: float = 0.8

  def __post_init__(self):
    super().__post_init__()
    _check_positions(self)


@dataclasses.dataclass(frozen=True)
class MLPConfig(feature_config.FeatureConfig):
  """IBM's MLP speculator.

  Attributes:
    positions: heads.
    inner_width: of the state; None: the target's width.
    tied: whether heads share embeddings, matrices and norms, but for the first, which reads
      a feature and not a state.
    step_decay: weight of a head, over that of the one before, in its own loss (the paper's: 1).
  """
  family: ClassVar[str] = 'mlp'
  positions: int = 6
  inner_width: int | None = None
  tied: bool = False
  step_decay: float = 1.0

  def __post_init__(self):
    super().__post_init__()
    _check_positions(self)

  @property
  def inner(self) -> int:
    return self.inner_width or self.width


def _check_positions(config):
  if config.positions < 1:
    raise ValueError(f'{config.family}: positions is {config.positions}; it must be at least 1')


class _Heads(nnx.Module):
  """What both have in common; `_pass` and `_matrices` are theirs."""
  captured = ()
  head_by_position = True  # see `heads`

  @property
  def positions(self) -> int:
    """Drafted, and trained."""
    return self.config.positions

  def __call__(self, embedded_btd, carried_btd, positions_bt, mask_bts, cache=None):
    """As `fspad.Eagle`; a place sees neither others nor the cache, which only counts."""
    del positions_bt, mask_bts
    step = _step(carried_btd)
    read_btd, kept_btd = self._pass(step, embedded_btd, carried_btd[..., :-1])
    if cache is not None:
      cache = cache.replace(length_b=cache.length_b + carried_btd.shape[1])
    return _numbered(read_btd, step), _numbered(kept_btd, step + 1), cache

  def logits(self, read_btd, target) -> jax.Array:
    """Logits over the target's vocabulary, of one position's head."""
    matrices = self._matrices()
    if matrices is None:
      return target.logits(read_btd[..., :-1])
    return layers.linear(read_btd[..., :-1], _of(matrices, _step(read_btd)),
                         result_dtype=jnp.float32)

  head = logits

  def heads(self, read_btgd, target) -> jax.Array:
    """The same of all positions at once, `[b, t, g, v]`."""
    matrices = self._matrices()
    b, t, g = read_btgd.shape[:3]
    if matrices is None or matrices.shape[0] == 1:
      flat_btd = read_btgd[..., :-1].reshape(b, t * g, -1)
      logits = target.logits(flat_btd) if matrices is None else layers.linear(
          flat_btd, matrices[0], result_dtype=jnp.float32)
      return logits.reshape(b, t, g, -1)
    every = [layers.linear(read_btgd[:, :, n, :-1], matrices[n], result_dtype=jnp.float32)
             for n in range(g)]
    return jnp.stack(every, axis=2)

  def restrict(self, logits_btv) -> jax.Array:
    """The target's logits over its own vocabulary."""
    return logits_btv

  @property
  def loss_settings(self) -> dict[str, Any]:
    """For `losses.features.feature_loss`: cross-entropy alone, against the target's law."""
    return dict(regression=0.0, classification=1.0, decay=self.config.step_decay,
                frozen_head=self._matrices() is None)

  def unroll(self, teacher, batch: structs.Batch, key=None) -> tuple[structs.DraftStep, ...]:
    """All heads at every place, on true tokens, held to the target's laws further on."""
    del key
    output = teacher.causal(batch.tokens_bt)
    features_btd = jax.lax.stop_gradient(output.features['final_btd'])
    positions_bt, mask_bts = feature_config.causal(batch.tokens_bt)
    mask_bt = feature_config.pair_mask(batch)
    carried_btd, steps = self.inputs(dict(final_btd=features_btd)), []
    for k in range(self.positions):
      embedded_btd = self.embedded(feature_config.shift_left(batch.tokens_bt, k + 1), carried_btd)
      read_btd, carried_btd, _ = self(embedded_btd, carried_btd, positions_bt, mask_bts)
      steps.append(structs.DraftStep(
          read_btd=read_btd, predicted_btd=carried_btd,
          taught_btd=feature_config.shift_left(features_btd, k + 1),
          mask_bt=feature_config.shift_left(mask_bt, k)))
    return tuple(steps)

  def init_cache(self, batch: int, num_slots: int) -> cache_lib.KVCache:
    c = self.config
    return cache_lib.init_cache(0, batch, num_slots, c.num_kv_heads, c.head_dim,
                                jnp.dtype(c.dtype))


class Medusa(_Heads):
  """Head k reads x + SiLU(W_k x + b_k), x being the feature; W starts at zero, as released."""

  def __init__(self, config: MedusaConfig, *, rngs: nnx.Rngs):
    g, d = config.positions, config.width
    self.config = config
    self.block_gdd = nnx.Param(jnp.zeros((g, d, d), jnp.float32))
    self.bias_gd = nnx.Param(jnp.zeros((g, d), jnp.float32))
    self.head_gvd = (feature_config.linear_init(rngs, g, config.vocab_size, d)
                     if config.own_heads else None)

  def inputs(self, features: dict[str, jax.Array]) -> jax.Array:
    """The target's last feature, and step 0."""
    return _numbered(features['final_btd'].astype(self.config.dtype), 0)

  def embedded(self, tokens_bt, carried_btd) -> jax.Array:
    """Nothing of a drafted token."""
    return jnp.zeros((*tokens_bt.shape, 0), carried_btd.dtype)

  def _pass(self, step, embedded_btd, x_btd):
    del embedded_btd
    inner_btd = layers.linear(x_btd, _of(self.block_gdd[...], step))
    inner_btd = inner_btd + _of(self.bias_gd[...], step).astype(x_btd.dtype)
    return x_btd + jax.nn.silu(inner_btd), x_btd

  def _matrices(self):
    return None if self.head_gvd is None else self.head_gvd[...]


class MLPSpeculator(_Heads):
  """state_i = GELU(LN_i(P_i state_{i-1} + weight Embedding_i(token))), logits Head_i state_i.

  The first state is LN(feature) / sqrt(2), without scale; the embedding's weight keeps the share
  of each former token as the paper has it. Initialised as released.
  """

  def __init__(self, config: MLPConfig, *, rngs: nnx.Rngs):
    g = 1 if config.tied else config.positions
    f, v, w = config.inner, config.vocab_size, max(config.inner, config.width)
    normal = lambda *shape: nnx.Param(
        jax.random.normal(rngs.params(), shape, jnp.float32) * f ** -0.5)
    self.config = config
    self.state_gfw = normal(min(2, config.positions) if config.tied else g, f, w)
    self.embedding_gvf, self.head_gvf = normal(g, v, f), normal(g, v, f)
    self.norms = nnx.List([layers.Norm(f, kind='layer', eps=config.norm_eps) for _ in range(g)])

  def inputs(self, features: dict[str, jax.Array]) -> jax.Array:
    """The normalised feature, and step 0."""
    x_btd = _layer_norm(features['final_btd'], self.config.norm_eps) * 0.5 ** 0.5
    return _numbered(self._widened(x_btd.astype(self.config.dtype)), 0)

  def embedded(self, tokens_bt, carried_btd) -> jax.Array:
    """By the embedding of the step that the tokens come to."""
    table = self.embedding_gvf[...]
    index = jnp.minimum(_step(carried_btd), table.shape[0] - 1)
    return table[index, tokens_bt].astype(carried_btd.dtype)

  def _pass(self, step, embedded_btd, x_btd):
    c = self.config
    kept = 0.5 ** (0.5 / c.positions)
    weight = ((1 - kept ** 2) * c.inner / 2) ** 0.5 / kept
    state_btd = layers.linear(x_btd, _of(self.state_gfw[...], step)) + weight * embedded_btd
    own = jax.tree.map(lambda *x: _of(jnp.stack(x), step), *self.norms)
    state_btd = jax.nn.gelu(own(state_btd), approximate=False)
    return state_btd, self._widened(state_btd)

  def _widened(self, x_btd):
    """A state or a feature in a vector that holds either."""
    wide = self.state_gfw.shape[-1]
    return jnp.pad(x_btd, ((0, 0), (0, 0), (0, wide - x_btd.shape[-1])))

  def _matrices(self):
    return self.head_gvf[...]


def _layer_norm(x, eps):
  """Without scale or bias, float32."""
  x = x.astype(jnp.float32)
  x = x - jnp.mean(x, axis=-1, keepdims=True)
  return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)


def _of(weights, step):
  """A step's own; steps behind the last have the last one's."""
  return weights[jnp.minimum(step, weights.shape[0] - 1)]


def _numbered(x_btd, step):
  return jnp.concatenate(
      [x_btd, jnp.broadcast_to(jnp.asarray(step).astype(x_btd.dtype), (*x_btd.shape[:-1], 1))],
      axis=-1)


def _step(x_btd):
  """The number of the step: the same everywhere, but 0 where a loss has blanked its inputs."""
  return jnp.max(x_btd[..., -1]).astype(jnp.int32)


def init(config: MedusaConfig | MLPConfig, key: jax.Array) -> Medusa | MLPSpeculator:
  """A freshly initialised draft; trace it under `sharding.sharded_init` to lay it out."""
  generator = jax.random.key(jax.random.bits(key, dtype=jnp.uint32), impl='rbg')
  kind = Medusa if isinstance(config, MedusaConfig) else MLPSpeculator
  return kind(config, rngs=nnx.Rngs(params=generator))
