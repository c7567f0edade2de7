"""What is told of each target call: it adds up to the text and the counts of the loop itself."""

import jax
import numpy as np
import pytest

import models
from specdistill_jax import api
from specdistill_jax.evaluation import acceptance
from specdistill_jax.decoding import sampling as sampling_lib
from specdistill_jax.stages import watch

PROMPT, NEW = [3, 5, 7], 20
WAYS = {
    'greedy chain': dict(gamma=3, temperature=0.0),
    'sampled chain that stops': dict(gamma=4, temperature=0.8, min_confidence=0.2),
    'sampled tree': dict(tree='0 1 00 01 10'),
    'dynamic tree': dict(tree='dynamic k2 d3 n5', temperature=0.0),
}


@pytest.fixture(scope='module')
def pair():
  target = models.tiny(scale=2.0)
  return target, models.perturbed(target, 0.2)


@pytest.fixture(scope='module')
def seen(pair):
  """Of each way: the calls, and what the loop makes of the same prompt and key."""
  how = dict(max_new_tokens=NEW, key=jax.random.key(5))
  return {name: (watch.trace(*pair, PROMPT, **way, **how),
                 api.speculate(*pair, [PROMPT], **way, **how)) for name, way in WAYS.items()}


@pytest.mark.parametrize('name', WAYS)
def test_the_calls_add_up_to_the_loop(seen, name):
  calls, loop = seen[name]
  text = [token for call in calls for token in call.emitted]
  assert text == loop.tokens[0, :loop.lengths[0]].tolist()
  assert len(calls) == loop.stats.target_calls_b[0]
  assert sum(len(call.accepted) for call in calls) == loop.stats.accepted_bg.sum()
  assert sum(len(call.tokens) for call in calls) == loop.stats.drafted_b[0]
  roots = [PROMPT[-1]] + [call.emitted[-1] for call in calls[:-1]]
  assert [call.root for call in calls] == roots


@pytest.mark.parametrize('name', WAYS)
def test_a_bonus_follows_a_whole_draft_and_a_correction_a_refusal(seen, name):
  calls, _ = seen[name]
  for call in calls:
    refused = [token for token, parent in zip(call.tokens, call.parents)
               if parent == call.kept[-1]]
    assert call.is_bonus == (call.next_token is not None and not refused)
    if not call.is_bonus and call.next_token is not None and WAYS[name].get('temperature') == 0:
      assert call.next_token not in refused
    assert all(0 <= p <= 1 + 1e-6 for p in call.probabilities or ())
  assert {call.is_bonus for call in calls[:-1]} == {True, False}  # both were looked at


def test_overlap_along_a_text_is_what_alpha_is_the_mean_of(pair, seen):
  _, loop = seen['sampled chain that stops']
  tokens = loop.tokens[0, :loop.lengths[0]].tolist()
  found = watch.overlap(*pair, PROMPT, tokens, temperature=0.8, top_k=5)
  assert found.shape == (len(tokens),) and 0 <= found.min() < found.max() <= 1 + 1e-6
  text = np.array([PROMPT + tokens], np.int32)
  total, count = acceptance.alpha_counts(
      pair[0].module, pair[1].module, text, np.array([3]), np.array([text.shape[1]]),
      sampling=sampling_lib.Sampling(0.8, 5))[0]
  assert count == len(tokens) and found.sum() == pytest.approx(float(total), rel=1e-5)


def test_overlap_at_temperature_zero_says_where_the_models_agree(pair, seen):
  """Along greedy text every call's accepted tokens are agreed on, and corrections are not."""
  calls, _ = seen['greedy chain']
  tokens = [token for call in calls for token in call.emitted]
  agreed = watch.overlap(*pair, PROMPT, tokens, temperature=0.0)
  index = 0
  for call in calls:
    assert (agreed[index:index + len(call.accepted)] == 1).all()
    index += len(call.emitted)
    if call.next_token is not None and not call.is_bonus:
      assert agreed[index - 1] == 0


def test_a_text_needs_tokens(pair):
  with pytest.raises(ValueError, match='tokens is empty'):
    watch.overlap(*pair, PROMPT, [])
