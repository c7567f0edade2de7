"""Tiny feature-level drafts, and their equations in NumPy float64, that several tests share."""

import jax
import jax.numpy as jnp
import numpy as np

import models
from specdistill_jax import structs
from specdistill_jax.drafters import eagle3
from specdistill_jax.drafters import families
from specdistill_jax.models import base

LAYERS = 6
DRAFT_IDS = (1, 2, 5, 6, 7, 8, 11, 12, 14, 17, 18)  # of 19 tokens
KINDS = {
    'eagle': dict(family='eagle'),
    'eagle without bias': dict(family='eagle', fusion_bias=False),
    'fspad': dict(family='fspad'),
    'fspad without feature sampling': dict(family='fspad', feature_sampling=False),
    'fspad without partial alignment': dict(family='fspad', partial_alignment=False),
    'eagle3': dict(family='eagle3', draft_vocab_size=len(DRAFT_IDS), unrolled_steps=3,
                   draft_vocabulary=eagle3.vocabulary_bits(DRAFT_IDS, models.VOCAB)),
}
# Whose equations are in test_heads.py.
FURTHER = {
    'medusa': dict(family='medusa', positions=3),
    'mlp': dict(family='mlp', positions=3, inner_width=12),
    'mtp': dict(family='mtp', unrolled_steps=3),
}


def target(**fields):
  """A target whose layers all differ, with a head of its own."""
  return models.tiny(0, scale=2.0, **dict(num_layers=LAYERS, tie_embeddings=False) | fields)


def tiny(kind, target_model, seed=3, **fields):
  """A random draft for a target, its norms' scales and biases random too."""
  config = families.config((KINDS | FURTHER)[kind] | fields, target_model.config)
  rng = np.random.default_rng(seed)
  with jax.ensure_compile_time_eval():  # it may first be asked for inside a trace
    module = jax.jit(families.init, static_argnums=0)(config, jax.random.key(seed))
    module = jax.tree.map(
        lambda x: jnp.asarray(rng.uniform(0.5, 1.5, x.shape), x.dtype) if x.ndim == 1 else 2 * x,
        module)
  return base.Model(module, config)


def rows(count=3, width=9, seed=0):
  """Ragged rows with a prompt of 2 or 3 tokens."""
  rng = np.random.default_rng(seed)
  lengths = np.array([width, *rng.integers(5, width + 1, count - 1)], np.int32)
  prompts = rng.integers(2, 4, count).astype(np.int32)
  position = np.arange(width)[None]
  tokens = rng.integers(1, models.VOCAB, (count, width))
  real = position < lengths[:, None]
  return structs.Batch(
      np.where(real, tokens, structs.PAD_ID).astype(np.int32),
      ((position >= prompts[:, None]) & real).astype(np.float32), prompts, lengths)


# The equations, from the papers' released codes; one row, float64, loops where they help.


def numbers(module):
  """Parameters by name, float64."""
  from specdistill_jax.checkpoints import key_tables
  return {name: np.asarray(leaf, np.float64)
          for name, leaf in key_tables.by_path(module).items()}


def rms(x, scale, eps):
  return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * scale


def silu(x):
  return x / (1 + np.exp(-x))


def softmax(x):
  e = np.exp(x - x.max(axis=-1, keepdims=True))
  return e / e.sum(axis=-1, keepdims=True)


def rotate(x, position, theta):
  """Rotary embedding of one head's vector: pairs (i, i + h/2) turn by position / theta^(2i/h)."""
  half = len(x) // 2
  angle = position * theta ** (-np.arange(half) / half)
  return np.concatenate([x[:half] * np.cos(angle) - x[half:] * np.sin(angle),
                         x[half:] * np.cos(angle) + x[:half] * np.sin(angle)])


def attention(p, x, positions, theta, past=()):
  """Causal grouped-query attention of rows `x`; `past` holds earlier (keys, values) by slot."""
  query, key, value = (np.einsum('nhd,td->tnh', p[f'attention/{name}'], x)
                       for name in ('query_nhd', 'key_khd', 'value_khd'))
  heads, groups = query.shape[1], query.shape[1] // key.shape[1]
  turn = lambda y: np.array([[rotate(head, at, theta) for head in row]
                             for row, at in zip(y, positions)])
  query, key = turn(query), turn(key)
  slots = list(past) + list(zip(key, value))
  out = np.zeros_like(query)
  for t in range(len(x)):
    seen = slots[:len(past) + t + 1]
    for n in range(heads):
      keys = np.array([k[n // groups] for k, _ in seen])
      values = np.array([v[n // groups] for _, v in seen])
      out[t, n] = softmax(keys @ query[t, n] / np.sqrt(query.shape[-1])) @ values
  return np.einsum('dnh,tnh->td', p['attention/output_dnh'], out), slots


def swiglu(p, x):
  return silu(x @ p['mlp/gate_fd'].T) * (x @ p['mlp/up_fd'].T) @ p['mlp/down_df'].T


def eagle_step(p, config, embedded, features, positions, past=()):
  """EAGLE-1, and FSPAD's two parts: what the head reads, what is carried, and the slots."""
  u = np.concatenate([embedded, features], axis=-1) @ p['fusion_dw'].T
  if 'fusion_bias_d' in p:
    u = u + p['fusion_bias_d']
  if 'sampling/gate_fd' in p:
    normed = rms(u, p['sampling/norm/scale_d'], config.norm_eps)
    gate = silu(embedded @ p['sampling/gate_fd'].T)
    u = u + (gate * (normed @ p['sampling/up_fd'].T)) @ p['sampling/down_df'].T
  out, slots = attention(p, u, positions, config.rope_theta, past)
  a = u + out
  y = swiglu(p, rms(a, p['mlp_norm/scale_d'], config.norm_eps))
  d = config.width
  if y.shape[-1] == d:
    return a + y, a + y, slots
  y = np.concatenate([a, a], axis=-1) + y
  return y[:, :d], y[:, d:], slots


def eagle3_step(p, config, embedded, carried, positions, past=()):
  """EAGLE-3: what the head reads (normed), what is carried, and the slots."""
  both = np.concatenate([rms(embedded, p['embedding_norm/scale_d'], config.norm_eps),
                         rms(carried, p['carried_norm/scale_d'], config.norm_eps)], axis=-1)
  out, slots = attention(p, both, positions, config.rope_theta, past)
  r = carried + out
  a = r + swiglu(p, rms(r, p['mlp_norm/scale_d'], config.norm_eps))
  return rms(a, p['final_norm/scale_d'], config.norm_eps), a, slots


def step(config):
  return eagle3_step if config.family == 'eagle3' else eagle_step
