"""Tiny models that several tests share."""

import jax

from specdistill_jax.models import base
from specdistill_jax.models import decoder
from specdistill_jax.models import families
from specdistill_jax.models import t5

VOCAB = 19

FAMILIES = {
    'llama': dict(),
    'qwen3': dict(qk_norm=True, tie_embeddings=False),
    'qwen2': dict(attention_bias=True),
    'gemma': dict(sliding_window=4, global_every=2, post_norms=True, norm_offset=1.0,
                  embedding_scale=4.0, attention_softcap=5.0, logit_softcap=3.0,
                  activation='gelu_tanh', query_scale=0.3),
    'gpt': dict(norm='layer', position='learned', max_positions=64, attention_bias=True,
                output_bias=True, mlp_bias=True, gated_mlp=False, activation='gelu_tanh'),
}


def config(**fields):
  defaults = dict(vocab_size=VOCAB, num_layers=2, width=16, num_heads=4, num_kv_heads=2,
                  head_dim=8, mlp_width=24, dtype='float32')
  return decoder.DecoderConfig(**{**defaults, **fields})


def tiny(seed=0, *, scale=1.0, **fields):
  """A random decoder; `scale` above 1 sharpens its predictions."""
  return _random(config(**fields), seed, scale)


def t5_config(**fields):
  defaults = dict(vocab_size=VOCAB, num_encoder_layers=2, num_decoder_layers=2, width=16,
                  num_heads=2, head_dim=8, mlp_width=24, relative_buckets=8,
                  relative_max_distance=12, dtype='float32')
  return t5.T5Config(**{**defaults, **fields})


def tiny_t5(seed=0, *, scale=1.0, **fields):
  """A random T5; its few buckets grow logarithmically within the tests' short rows."""
  return _random(t5_config(**fields), seed, scale)


def _random(built, seed, scale):
  with jax.ensure_compile_time_eval():  # it may first be asked for inside a trace
    module = jax.jit(families.init, static_argnums=0)(built, jax.random.key(seed))
    module = jax.tree.map(lambda x: x * scale if x.ndim > 1 else x, module)
  return base.Model(module, built)


def perturbed(model, amount, seed=9):
  """The same model with noise on every weight: a draft that often agrees."""
  leaves, structure = jax.tree.flatten(model.module)
  keys = jax.random.split(jax.random.key(seed), len(leaves))
  noisy = [leaf + amount * jax.random.normal(key, leaf.shape)
           for leaf, key in zip(leaves, keys)]
  return base.Model(structure.unflatten(noisy), model.config)
