"""Medusa, the MLP speculator and MTP: their equations, their training, and lossless drafting."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import drafts
import models
from specdistill_jax import api
from specdistill_jax.checkpoints import key_tables
from specdistill_jax.drafters import families
from specdistill_jax.drafters import feature
from specdistill_jax.losses import chunked
from specdistill_jax.losses import objectives
from specdistill_jax.models import base
from specdistill_jax.training import laws
from specdistill_jax.training import step

POSITIONS = 3
KINDS = {
    'medusa': dict(family='medusa', positions=POSITIONS),
    'medusa on the target\'s head': dict(family='medusa', positions=POSITIONS, own_heads=False),
    'mlp': dict(family='mlp', positions=POSITIONS, inner_width=12),
    'mlp tied': dict(family='mlp', positions=POSITIONS, inner_width=20, tied=True),
    'mtp': dict(family='mtp', unrolled_steps=POSITIONS),
}
BATCH = drafts.rows()


@functools.cache
def target():
  with jax.ensure_compile_time_eval():
    return drafts.target(num_layers=2)


@functools.cache
def draft(kind):
  with jax.ensure_compile_time_eval():
    config = families.config(KINDS[kind], target().config)
    module = jax.jit(families.init, static_argnums=0)(config, jax.random.key(3))
    rng = np.random.default_rng(0)
    return base.Model(jax.tree.map(
        lambda x: x + jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype), module), config)


@functools.cache
def unrolled(kind):
  steps = jax.jit(lambda d, t: d.unroll(t, BATCH))(draft(kind).module, target().module)
  return jax.tree.map(np.asarray, steps)


@functools.cache
def features_of_the_target():
  return np.asarray(jax.jit(target().module.causal)(BATCH.tokens_bt).features['final_btd'],
                    np.float64)


def law(kind, read_btd):
  """Of single steps' reads, as decoding computes it."""
  return np.asarray(draft(kind).module.logits(jnp.asarray(read_btd), target().module), np.float64)


def test_medusa_s_heads_are_the_paper_s():
  p, h = drafts.numbers(draft('medusa').module), features_of_the_target()
  for k, made in enumerate(unrolled('medusa')):
    read = h + drafts.silu(h @ p['block_gdd'][k].T + p['bias_gd'][k])
    np.testing.assert_allclose(law('medusa', made.read_btd), read @ p['head_gvd'][k].T,
                               rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize('kind', ['mlp', 'mlp tied'])
def test_the_mlp_speculator_s_states_are_the_paper_s(kind):
  config, p = draft(kind).config, drafts.numbers(draft(kind).module)
  normalised = lambda x: (x - x.mean(-1, keepdims=True)) / np.sqrt(
      x.var(-1, keepdims=True) + config.norm_eps)
  state = normalised(features_of_the_target()) / 2 ** 0.5
  kept = 0.5 ** (0.5 / POSITIONS)
  weight = np.sqrt((1 - kept ** 2) * config.inner / 2) / kept
  gelu = lambda x: np.asarray(jax.nn.gelu(x, approximate=False), np.float64)
  b, t = BATCH.tokens_bt.shape
  for k, made in enumerate(unrolled(kind)):
    own = 0 if config.tied else k
    tokens = np.pad(BATCH.tokens_bt, ((0, 0), (0, k + 1)))[:, k + 1:]
    mix = p['state_gfw'][min(k, len(p['state_gfw']) - 1)][:, :state.shape[-1]]
    state = normalised(state @ mix.T + weight * p['embedding_gvf'][own][tokens])
    state = gelu(state * p[f'norms/{own}/scale_d'] + p[f'norms/{own}/bias_d'])
    np.testing.assert_allclose(law(kind, made.read_btd), state @ p['head_gvf'][own].T,
                               rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize('kind', [*KINDS, 'eagle3'])
def test_a_step_is_held_to_what_the_one_before_is_held_to_a_place_further(kind):
  """So that the losses may compute the target's law of a token once."""
  steps = unrolled(kind) if kind in KINDS else jax.jit(lambda d, t: d.unroll(t, BATCH))(
      drafts.tiny(kind, target()).module, target().module)
  assert len(steps) == POSITIONS
  for earlier, later in zip(steps, steps[1:]):
    np.testing.assert_array_equal(later.taught_btd[:, :-1], earlier.taught_btd[:, 1:])
    assert not np.any(later.taught_btd[:, -1])  # behind the row, where chunks are filled with zeros
    assert not np.any(later.mask_bt[:, -1])
  module = draft(kind).module if kind in KINDS else drafts.tiny(kind, target()).module
  assert isinstance(laws.heads(module, target().module)[1], chunked.Sliding)


@pytest.mark.parametrize('kind', KINDS)
def test_training_s_steps_are_drafting_s(kind):
  """Unrolled at every place = run step by step on the same tokens from that place alone."""
  bound = feature.Bound(draft(kind).module, target().module.without_layers())
  h, row, place = features_of_the_target(), 0, 4
  tokens = BATCH.tokens_bt[row]

  @jax.jit
  def run(bound, pairs_1t, carried_1td, drafted):
    cache = bound.init_cache(1, 16)
    see = lambda first, count: (jnp.arange(first, first + count)[None],
                                jnp.arange(16)[None, None] <= jnp.arange(
                                    first, first + count)[None, :, None])
    read, carried, cache = bound.read(pairs_1t, carried_1td, *see(0, place + 1), cache)
    found, carried = [bound.logits(read[:, -1:])[:, 0]], carried[:, -1:]
    for k, token in enumerate(drafted):
      read, carried, cache = bound.read(token[None, None], carried, *see(place + 1 + k, 1), cache)
      found.append(bound.logits(read)[:, 0])
    return found

  inputs = draft(kind).module.inputs(dict(final_btd=jnp.asarray(h[row:row + 1], jnp.float32)))
  found = run(bound, jnp.asarray(tokens[None, 1:place + 2]), inputs[:, :place + 1],
              [jnp.asarray(tokens[place + 2 + k]) for k in range(POSITIONS - 1)])
  for k, logits in enumerate(found):
    expected = law(kind, unrolled(kind)[k].read_btd)[row, place]
    np.testing.assert_allclose(logits[0], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize('kind, name', [
    *((kind, 'lk_hybrid') for kind in KINDS),
    *((kind, name) for kind in ('medusa', 'mtp') for name in ('end_to_end_tvd', 'feature'))])
def test_objectives_reach_every_parameter_in_both_forms(kind, name):
  """And chunks of places give the gradients of whole logits, whosever heads they are."""
  objective = objectives.Objective(name, normalisation='token')
  def loss(module, chunk):
    totals = step.losses(objective, module, target().module, BATCH, chunk=chunk)
    return totals.loss, totals
  run = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)
  (grads, totals), (chunked_grads, chunked_totals) = (
      run(draft(kind).module, chunk) for chunk in (None, 2 * POSITIONS))
  assert totals.count_g.shape == (POSITIONS,)
  for x, y in zip(jax.tree.leaves((totals, grads)),
                  jax.tree.leaves((chunked_totals, chunked_grads)), strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)
  for path, grad in key_tables.by_path(grads).items():
    assert np.abs(np.asarray(grad)).max() > 1e-6, path


@pytest.mark.parametrize('kind', ['medusa', 'mlp', 'mtp'])
def test_greedy_drafting_changes_no_token_and_figures_are_of_every_position(kind):
  prompts = [[3, 4, 5], [6, 7]]
  options = dict(max_new_tokens=8, temperature=0.0, key=jax.random.key(0))
  expected = api.generate(target(), prompts, **options)
  # A chain longer than the heads are many, and a tree.
  for shape in (dict(gamma=4), dict(tree='0 1 00 01 10 000')):
    found = api.speculate(target(), draft(kind), prompts, **shape, **options)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
  measured = jax.jit(laws.measure)(draft(kind).module, target().module, BATCH)
  assert measured.alpha.shape == (POSITIONS,)


def test_more_heads_than_none():
  for kind in ('medusa', 'mlp'):
    with pytest.raises(ValueError, match=f'{kind}: positions is 0'):
      families.config(dict(family=kind, positions=0), target().config)
  with pytest.raises(ValueError, match='mtp: unrolled_steps is 0'):
    families.config(dict(family='mtp', unrolled_steps=0), target().config)
