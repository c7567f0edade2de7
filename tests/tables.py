"""Models without a network: next-token laws given by a table, exact in every digit.

A `TableModel` looks two tokens back: for tokens that it sees, at its own position and the one
before. A slip in cache, mask, rollback, path or position changes its law.
"""

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from specdistill_jax import structs


@struct.dataclass
class TableCache:
  """Remembers fed tokens where a network would keep keys and values."""
  tokens_bs: jax.Array
  positions_bs: jax.Array
  length_b: jax.Array

  def rollback(self, length_b):
    return self.replace(length_b=length_b)

  def write(self, tokens_bt, positions_bt):
    write = jax.vmap(lambda row, new, at: jax.lax.dynamic_update_slice(row, new, (at,)))
    return TableCache(write(self.tokens_bs, tokens_bt, self.length_b),
                      write(self.positions_bs, positions_bt.astype(jnp.int32), self.length_b),
                      self.length_b + tokens_bt.shape[1])

  def keep_path(self, offset_b, path_bt):
    taken = lambda rows: jnp.take_along_axis(rows, offset_b[:, None] + path_bt, axis=1)
    kept = self.rollback(offset_b).write(taken(self.tokens_bs), taken(self.positions_bs))
    return kept.rollback(self.length_b)

  def look(self, positions_bt, mask_bts):
    """The token that a query sees at a position, 0 where it sees none there."""
    is_there_bts = mask_bts & (self.positions_bs[:, None] == positions_bt[..., None])
    return jnp.sum(jnp.where(is_there_bts, self.tokens_bs[:, None], 0), axis=-1)


def table_cache(batch, num_slots):
  # A token that no prompt holds: reading a slot that was never written shows.
  zeros = jnp.zeros((batch, num_slots), jnp.int32)
  return TableCache(zeros, zeros, jnp.zeros((batch,), jnp.int32))


@struct.dataclass
class TableModel:
  """`logits_vvv[first, second]` are the logits after the tokens first, second."""
  logits_vvv: jax.Array

  def start(self, prompts_bt, prompt_lengths_b):
    return structs.Start(prompts_bt, prompt_lengths_b)

  def init_cache(self, batch, num_slots, memory=None):
    del memory
    return table_cache(batch, num_slots)

  def __call__(self, tokens_bt, positions_bt, mask_bts, cache):
    cache = cache.write(tokens_bt, positions_bt)
    logits_btv = self.logits_vvv[cache.look(positions_bt - 1, mask_bts),
                                 cache.look(positions_bt, mask_bts)]
    return structs.TargetOutput(
        logits_btv=logits_btv, cache=cache,
        features={'final_btd': logits_btv, 'token_btd': tokens_bt[..., None]})

  def logits(self, final_btd):
    return final_btd


def random_table(seed, vocab_size, scale=1.5):
  shape = (vocab_size, vocab_size, vocab_size)
  return TableModel(jnp.asarray(scale * np.random.default_rng(seed).normal(size=shape),
                                jnp.float32))


def warped(logits_v, temperature, top_k, top_p):
  """The law that is sampled from, in float64, one token at a time: an oracle of its own."""
  logits = [float(x) for x in logits_v]
  size = len(logits)
  if temperature == 0:
    best = max(range(size), key=lambda i: (logits[i], -i))
    return np.eye(size)[best]
  order = sorted(range(size), key=lambda i: -logits[i])
  kept = order[:top_k] if top_k else order
  weights = {i: np.exp((logits[i] - logits[order[0]]) / temperature) for i in kept}
  if top_p is not None:
    total, mass, nucleus = sum(weights.values()), 0.0, []
    for i in kept:
      nucleus.append(i)
      mass += weights[i] / total
      if mass >= top_p:
        break
    weights = {i: weights[i] for i in nucleus}
  law = np.zeros(size)
  for i, weight in weights.items():
    law[i] = weight / sum(weights.values())
  return law


def enumerated_law(model, prompt, depth, **warp):
  """Probability of each sequence of `depth` new tokens; the end token ends one early."""
  table = np.asarray(model.logits_vvv, np.float64)
  law = {}

  def extend(sequence, probability):
    if len(sequence) - len(prompt) == depth or (
        len(sequence) > len(prompt) and sequence[-1] == structs.EOS_ID):
      law[tuple(sequence[len(prompt):])] = probability
      return
    before = sequence[-2] if len(sequence) > 1 else 0
    for token, p in enumerate(warped(table[before, sequence[-1]], **warp)):
      if p > 0:
        extend([*sequence, token], probability * p)

  extend(list(prompt), 1.0)
  assert np.isclose(sum(law.values()), 1.0)
  return law


def chi_square_p_value(law, samples, lengths, depth):
  """Goodness of fit of sampled sequences; 0 when something impossible was drawn."""
  from scipy import stats
  samples, lengths = np.asarray(samples)[:, :depth], np.asarray(lengths)
  base = 2 + max(int(samples.max()), max(max(s) for s in law))
  real = np.arange(depth) < lengths[:, None]
  powers = base ** np.arange(depth)
  codes = np.where(real, samples + 1, 0) @ powers
  code_of = lambda sequence: sum((t + 1) * int(w) for t, w in zip(sequence, powers))
  counts = np.bincount(codes, minlength=base ** depth)
  observed = np.array([counts[code_of(s)] for s in law], np.float64)
  if observed.sum() != len(samples):
    return 0.0
  expected = np.array(list(law.values())) * len(samples)
  rare = expected < 10
  if rare.any():
    expected = np.append(expected[~rare], expected[rare].sum())
    observed = np.append(observed[~rare], observed[rare].sum())
  if expected.size == 1:
    return 1.0
  statistic = np.sum((observed - expected) ** 2 / np.maximum(expected, 1e-12))
  return float(stats.chi2.sf(statistic, expected.size - 1))


def holm(p_values):
  """P-values corrected for their number (Holm 1979), in the order given."""
  order = np.argsort(p_values)
  scaled = np.asarray(p_values)[order] * np.arange(len(order), 0, -1)
  adjusted = np.empty(len(order))
  adjusted[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)
  return adjusted
