"""The decoding loops on real (tiny) decoders: greedy equality, rows, end tokens, bad input."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specdistill_jax import api
from specdistill_jax import structs
from specdistill_jax.models import base
import models

TARGET = models.tiny(0, scale=2.5)
DRAFT = models.perturbed(TARGET, 0.1)
NEW = 20


def _prompts(count, seed=0, longest=16):
  rng = np.random.default_rng(seed)
  return [rng.integers(2, models.VOCAB, size=rng.integers(1, longest + 1)).tolist()
          for _ in range(count)]


_best = jax.jit(lambda module, tokens: jnp.argmax(module.causal(tokens).logits_btv, -1))


def _reference(prompt):
  """Greedy decoding by full forward passes, no cache, a prompt at a time."""
  row = list(prompt)
  for _ in range(NEW):
    padded = np.zeros((1, 40), np.int32)
    padded[0, :len(row)] = row
    row.append(int(_best(TARGET.module, padded)[0, len(row) - 1]))
    if row[-1] == structs.EOS_ID:
      break
  return row[len(prompt):]


def test_greedy_autoregressive_equals_full_forward_passes():
  prompts = _prompts(12)
  out = api.generate(TARGET, prompts, max_new_tokens=NEW, temperature=0, key=jax.random.key(0))
  for row, prompt in enumerate(prompts):
    expected = _reference(prompt)
    assert out.tokens[row, :out.lengths[row]].tolist() == expected
    assert not np.any(out.tokens[row, out.lengths[row]:])


@pytest.mark.parametrize('gamma, batch', [(1, 256), (6, 256), (3, 1), (4, 7)])
def test_greedy_speculative_equals_greedy_autoregressive(gamma, batch):
  """Token for token, over ragged prompts and several batch sizes."""
  prompts = _prompts(256)
  expected = api.generate(TARGET, prompts, max_new_tokens=NEW, temperature=0,
                          key=jax.random.key(0))
  calls = 0
  for start in range(0, min(256, 8 * batch), batch):
    part = prompts[start:start + batch]
    if len(part) < batch:
      break
    out = api.speculate(TARGET, DRAFT, part, gamma=gamma, max_new_tokens=NEW, temperature=0,
                        key=jax.random.key(1), prompt_width=16)
    np.testing.assert_array_equal(out.tokens, expected.tokens[start:start + batch])
    np.testing.assert_array_equal(out.lengths, expected.lengths[start:start + batch])
    calls += int(out.stats.target_calls_b.sum()) - int(out.lengths.sum())
  assert calls < 0, 'speculation never saved a call: the draft is too weak for this test'


@pytest.mark.parametrize('temperature', [1.0, 0.0])
def test_a_draft_equal_to_the_target_accepts_everything(temperature):
  out = api.speculate(TARGET, TARGET, _prompts(64), gamma=4, max_new_tokens=NEW,
                      temperature=temperature, key=jax.random.key(0))
  reached, accepted = out.stats.reached_bg.sum(), out.stats.accepted_bg.sum()
  assert reached > 300
  # Incremental draft and blockwise target round differently; a draw can land in between.
  assert accepted >= reached - (1 if temperature else 0)


@pytest.mark.parametrize('min_confidence', [0.0, 0.5])
def test_a_row_depends_neither_on_its_neighbours_nor_on_their_number(min_confidence):
  prompts = _prompts(6)
  keys = jax.random.split(jax.random.key(5), 6)
  settings = dict(gamma=3, max_new_tokens=NEW, prompt_width=16, min_confidence=min_confidence)
  together = api.speculate(TARGET, DRAFT, prompts, key=keys, **settings)
  order = np.array([4, 0, 5, 2, 1, 3])
  shuffled = api.speculate(TARGET, DRAFT, [prompts[i] for i in order], key=keys[order],
                           **settings)
  np.testing.assert_array_equal(shuffled.tokens, together.tokens[order])
  np.testing.assert_array_equal(shuffled.stats.accepted_bg, together.stats.accepted_bg[order])
  for row in (0, 3):
    alone = api.speculate(TARGET, DRAFT, prompts[row:row + 1], key=keys[row:row + 1], **settings)
    np.testing.assert_array_equal(alone.tokens[0], together.tokens[row])
  if not min_confidence:
    single_key = api.speculate(TARGET, DRAFT, prompts, key=jax.random.key(5), **settings)
    prefix = api.speculate(TARGET, DRAFT, prompts[:1], key=jax.random.key(5), **settings)
    np.testing.assert_array_equal(prefix.tokens, single_key.tokens[:1])


def test_rows_stop_at_their_end_token_and_counts_add_up():
  prompts = _prompts(64)
  out = api.speculate(TARGET, DRAFT, prompts, gamma=3, max_new_tokens=NEW,
                      key=jax.random.key(2))
  stats = jax.tree.map(np.asarray, out.stats)
  for row in range(64):
    new = out.tokens[row, :out.lengths[row]].tolist()
    assert structs.EOS_ID not in new[:-1]
    assert new[-1] == structs.EOS_ID or len(new) == NEW
    assert not np.any(out.tokens[row, out.lengths[row]:])
  # A call emits what it accepted plus one token, unless end or budget cut the block.
  emitted, calls, accepted = (stats.emitted_b, stats.target_calls_b, stats.accepted_bg.sum(1))
  assert np.all(emitted <= accepted + calls) and np.all(emitted >= accepted + calls - 1)
  assert np.all(stats.accepted_bg <= stats.reached_bg)
  assert np.all(stats.reached_bg[:, 1:] <= stats.accepted_bg[:, :-1])
  assert 1.0 <= emitted.sum() / calls.sum() <= 4.0


def test_greedy_decoding_with_drafts_that_stop_early():
  """Token for token the target's own, over a batch whose rows stop at different lengths."""
  prompts = _prompts(64)
  expected = api.generate(TARGET, prompts, max_new_tokens=NEW, temperature=0,
                          key=jax.random.key(0))
  out = api.speculate(TARGET, DRAFT, prompts, gamma=6, max_new_tokens=NEW, temperature=0,
                      min_confidence=0.5, key=jax.random.key(1))
  np.testing.assert_array_equal(out.tokens, expected.tokens)
  drafted_b, calls_b = out.stats.drafted_b, out.stats.target_calls_b
  assert np.all(drafted_b >= calls_b) and np.all(drafted_b <= 6 * calls_b)
  assert 1.1 * calls_b.sum() < drafted_b.sum() < 5.5 * calls_b.sum()
  assert np.all(out.stats.reached_bg.sum(axis=1) <= drafted_b)


def test_draft_steps_that_no_row_needs_are_not_run():
  """The loop over draft steps ends with the last confident row; the cache shows how far it ran."""
  drafter = api.make_drafter(DRAFT, gamma=6, target_sampling=api.sampling_lib.Sampling(0.0),
                             min_confidence=0.9999)
  prompts_bt, lengths_b = api.pad_prompts(TARGET, _prompts(8), NEW)
  state = api.engine.prefill_speculative(
      TARGET.module.unstacked(), drafter, prompts_bt, lengths_b, jax.random.key(0),
      max_new_tokens=NEW)
  for chosen in (drafter, dataclasses.replace(drafter, min_confidence=1e-6)):
    proposal = jax.jit(type(chosen).propose)(chosen, state, state.key_b)
    steps = int((proposal.drafter_state.length_b - state.lengths_b).max()) + 1
    assert steps == int(proposal.num_drafted_b.max())
    assert steps == (6 if chosen is not drafter else 1)


def test_a_draft_of_another_depth_and_family_works():
  draft = models.tiny(4, num_layers=1, width=8, num_heads=2, num_kv_heads=1, qk_norm=True)
  prompts = _prompts(8)
  expected = api.generate(TARGET, prompts, max_new_tokens=NEW, temperature=0,
                          key=jax.random.key(0))
  out = api.speculate(TARGET, draft, prompts, gamma=2, max_new_tokens=NEW, temperature=0,
                      key=jax.random.key(0))
  np.testing.assert_array_equal(out.tokens, expected.tokens)


def test_a_drafter_of_ones_own_drafts_in_place_of_a_model():
  own = api.make_drafter(DRAFT, gamma=6, target_sampling=api.sampling_lib.Sampling(0.0))
  settings = dict(max_new_tokens=NEW, temperature=0, key=jax.random.key(1), prompt_width=16)
  out = api.speculate(TARGET, own, _prompts(256), **settings)
  expected = api.speculate(TARGET, DRAFT, _prompts(256), gamma=6, **settings)
  np.testing.assert_array_equal(out.tokens, expected.tokens)
  with pytest.raises(ValueError, match='gamma is 2 .* is a LMDrafter, which says itself'):
    api.speculate(TARGET, own, _prompts(1), gamma=2, **settings)


def test_calls_share_one_unrolled_copy_of_a_model(monkeypatch):
  target, draft = base.Model(TARGET.module, TARGET.config), base.Model(DRAFT.module, DRAFT.config)
  copies, real = [], type(TARGET.module).unstacked
  def counted(module):
    found = real(module)
    copies.extend([found] * (found is not module))
    return found
  monkeypatch.setattr(type(TARGET.module), 'unstacked', counted)
  for seed in range(2):
    api.speculate(target, draft, [[3] * 9], gamma=5, max_new_tokens=NEW, key=jax.random.key(seed))
    api.generate(target, [[3] * 9], max_new_tokens=NEW, key=jax.random.key(seed))
  assert len(copies) == 2


@pytest.mark.parametrize('change, message', [
    (dict(gamma=0), 'gamma is 0; it must be an integer of at least 1'),
    (dict(epsilon=0.0), r'epsilon is 0.0; it must lie in \(0, 1\]'),
    (dict(epsilon=1.5), r'epsilon is 1.5; it must lie in \(0, 1\]'),
    (dict(epsilon=0.5), "rule 'exact' is lossless and has no leniency"),
    (dict(rule='linear', epsilon=0.5, temperature=0.0), "rule 'linear' with epsilon 0.5 does not"),
    (dict(min_confidence=1.0), r'min_confidence is 1.0; it must lie in \[0, 1\)'),
    (dict(rule='exactly'), "rule is 'exactly'; it must be one of exact"),
    (dict(temperature=-1.0), 'temperature is -1.0; it must be 0'),
    (dict(top_k=0), 'top_k is 0; it must be at least 1'),
    (dict(top_p=1.2), r'top_p is 1.2; it must lie in \(0, 1\]'),
    (dict(draft_sampling='best'), "draft_sampling is 'best'; it must be one of sampled, greedy"),
    (dict(max_new_tokens=0), 'max_new_tokens is 0; it must be at least 1'),
    (dict(prompts=[[2], []]), 'prompt 1 is empty'),
    (dict(prompts=[]), 'prompts is empty'),
    (dict(prompts=[[2, 19]]), 'prompt 0 holds token id 19, outside the vocabulary of 19 tokens'),
    (dict(prompts=[[-1]]), 'prompt 0 holds token id -1'),
    (dict(prompts=['text']), 'prompt 0 is text, but the target has no vocabulary'),
    (dict(tree='eagle1'), "gamma is 2 and tree is 'eagle1'; one of them"),
    (dict(gamma=None), 'gamma is None and tree is None; one of them'),
    (dict(gamma=None, tree='eagle9'), "tree is 'eagle9'; it must be 'eagle1'"),
    (dict(gamma=None, tree='0 1', min_confidence=0.3), 'min_confidence is 0.3, but a tree'),
    (dict(gamma=None, tree='0 1', rule='block'), 'judges whole chains'),
    (dict(prompts='text'), 'prompts is one string'),
    (dict(prompts=[[2] * 9], prompt_width=8),
     'prompt 0 has 9 tokens, more than the prompt buffer of 8'),
    (dict(drafter=models.tiny(0, vocab_size=20)),
     'target has a vocabulary of 19 tokens and draft one of 20'),
    (dict(key=jax.random.split(jax.random.key(0), 3)), r'key has shape \(3,\)'),
])
def test_bad_input_ends_with_one_clear_sentence(change, message):
  settings = dict(target=TARGET, drafter=DRAFT, prompts=[[2, 3]], gamma=2, max_new_tokens=4,
                  key=jax.random.key(0))
  with pytest.raises(ValueError, match=message) as caught:
    api.speculate(**{**settings, **change})
  assert '\n' not in str(caught.value)


def test_vocabularies_of_one_size_but_different_contents_are_refused():
  class Vocabulary:
    def __init__(self, digest):
      self.digest = digest
  target = base.Model(TARGET.module, TARGET.config, Vocabulary('a' * 64))
  draft = base.Model(DRAFT.module, DRAFT.config, Vocabulary('b' * 64))
  with pytest.raises(ValueError, match='different vocabularies'):
    api.speculate(target, draft, [[2]], gamma=1, max_new_tokens=2, key=jax.random.key(0))
