"""Pairs of random models that agree as a trained pair does, for measuring speed.

The draft is the target's own first layer; the target's later layers are scaled down, so that
they cost what they cost and change little. The draft then nearly always says what the target
says, without any training.
"""

import copy
import dataclasses

import jax
import jax.numpy as jnp

from specdistill_jax.models import base
from specdistill_jax.models import decoder

LATER_LAYERS = 1e-3  # the factor on what layers after the first add to the residual stream

_COLUMNS = ('vocab_size', 'num_layers', 'width', 'num_heads', 'num_kv_heads', 'head_dim',
            'mlp_width')
PRESETS = {
    'tiny': (512, 2, 64, 2, 2, 32, 128),
    'small': (8192, 4, 256, 4, 4, 64, 1024),
    'medium': (16_384, 8, 384, 6, 6, 64, 1024),
    'big': (32_000, 12, 768, 12, 12, 64, 2048),
    '1b': (32_000, 22, 2048, 32, 4, 64, 5632),  # the shape of TinyLlama 1.1B
}


def config(preset: str, dtype: str = 'float32') -> decoder.DecoderConfig:
  """A Llama-like decoder with a head of its own.

  Raises:
    ValueError: a preset that is not in `PRESETS`.
  """
  if preset not in PRESETS:
    raise ValueError(f'preset is {preset!r}; it must be one of {", ".join(PRESETS)}')
  return decoder.DecoderConfig(**dict(zip(_COLUMNS, PRESETS[preset], strict=True)),
                               tie_embeddings=False, dtype=dtype)


def pair(target_config: decoder.DecoderConfig, key: jax.Array) -> tuple[base.Model, base.Model]:
  """A target, and a draft of one layer that nearly always agrees with it.

  Both have their layers unrolled and their parameters in the config's dtype, as one serves
  them. They share no buffer: a draft that found its head warm in the target's cache would be
  faster than any real one.
  """
  target = jax.jit(_target, static_argnums=0)(target_config, key)
  draft_config = dataclasses.replace(target_config, num_layers=1)
  # A jitted function hands back buffers of its own.
  draft = jax.jit(lambda module: jax.tree.map(jnp.copy, _first_layer(module)))(target)
  return base.Model(target, target_config), base.Model(draft, draft_config)


def _target(target_config, key):
  module = decoder.init(target_config, key)
  scale_l = jnp.where(jnp.arange(target_config.num_layers) == 0, 1.0, LATER_LAYERS)
  for parameter in (module.layers.attention.output_dnh, module.layers.mlp.down_df):
    parameter[...] = parameter[...] * scale_l.reshape(-1, *[1] * (parameter[...].ndim - 1))
  dtype = jnp.dtype(target_config.dtype)
  return jax.tree.map(lambda leaf: leaf.astype(dtype), module.unstacked())


def _first_layer(module):
  first = jax.tree.map(lambda leaf: leaf, module)  # the same arrays in a module of its own
  first.config = dataclasses.replace(module.config, num_layers=1)
  first.layers = type(module.layers)([first.layers[0]])
  return first


def stacked(model: base.Model) -> base.Model:
  """The same model with its layers stacked, as checkpoints and exports have them."""
  module = copy.copy(model.module)
  module.layers = jax.tree.map(lambda *leaves: jnp.stack(leaves), *model.module.layers)
  return dataclasses.replace(model, module=module)


def bytes_read(model: base.Model, batch: int) -> int:
  """Bytes of parameters that one step must read: all but the rows of the embedding not fed.

  With a head of its own the embedding is a look-up of `batch` rows; a tied one is read whole.
  """
  count = lambda tree: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
  if model.module.head_vd is None:
    return count(model.module)
  embedding = count(model.module.embedding_vd)
  rows = model.config.vocab_size + model.config.vocab_padding
  return count(model.module) - embedding + batch * embedding // rows
