"""A feature-level draft without its target, so that the cost of drafting alone can be seen."""

from typing import Any

from flax import struct
import jax
import jax.numpy as jnp

from specdistill_jax import structs
from specdistill_jax.drafters import feature


@struct.dataclass
class Carrying:
  """The cache of a feature-level draft that reads its own outputs alone."""
  cache: Any
  carried_b1d: jax.Array

  @property
  def length_b(self):
    return self.cache.length_b

  def rollback(self, length_b):
    return self.replace(cache=self.cache.rollback(length_b))


@struct.dataclass
class Alone:
  """A feature-level draft as a `structs.Decodable`: drafting costs what this decoding costs.

  What it writes means nothing, since there is no target behind it.
  """
  bound: feature.Bound

  def start(self, prompts_bt, prompt_lengths_b):
    return structs.Start(prompts_bt, prompt_lengths_b)

  def init_cache(self, batch, num_slots, memory=None):
    del memory
    config = self.bound.module.config
    return Carrying(self.bound.init_cache(batch, num_slots),
                    jnp.zeros((batch, 1, config.width), config.dtype))

  def __call__(self, tokens_bt, positions_bt, mask_bts, cache):
    carried_btd = jnp.broadcast_to(
        cache.carried_b1d, (*tokens_bt.shape, cache.carried_b1d.shape[-1]))
    read_btd, carried_btd, held = self.bound.read(tokens_bt, carried_btd, positions_bt, mask_bts,
                                                  cache.cache)
    return structs.TargetOutput(logits_btv=self.bound.logits(read_btd),
                                features={'final_btd': read_btd},
                                cache=Carrying(held, carried_btd[:, -1:]))
