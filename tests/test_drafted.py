"""Where the tokens of a text came from: held against drafting by hand, and against the counts."""

import jax
import numpy as np
import pytest

import tables
from specdistill_jax import structs
from specdistill_jax.decoding import engine
from specdistill_jax.decoding import rules
from specdistill_jax.decoding import sampling as sampling_lib
from specdistill_jax.drafters import lm
from specdistill_jax.evaluation import drafted
from specdistill_jax.evaluation import step_costs

VOCAB, GAMMA, NEW, ROWS = 7, 3, 14, 12
TARGET = tables.random_table(0, VOCAB)
NEAR = tables.TableModel(TARGET.logits_vvv + 0.7 * tables.random_table(5, VOCAB).logits_vvv)
LENGTHS = 1 + np.arange(ROWS) % 3
PROMPTS = np.where(np.arange(3) < LENGTHS[:, None],
                   np.random.default_rng(0).integers(2, VOCAB, (ROWS, 3)), 0)


def look(temperature):
  """(texts, what the loop decodes from the same key)."""
  sampling = sampling_lib.Sampling(temperature)
  setting = step_costs.Setting(lm.LMDrafter(NEAR, GAMMA, sampling),
                               rules.for_sampling('exact', 1.0, sampling))
  inputs = PROMPTS, LENGTHS, jax.random.key(3)
  texts = drafted.watch(TARGET, setting, *inputs, sampling=sampling, max_new_tokens=NEW)
  state = engine.prefill_speculative(TARGET, setting.drafter, *inputs, max_new_tokens=NEW)
  state = engine.decode_speculative(TARGET, setting.drafter, state, rule=setting.rule,
                                    sampling=sampling)
  return texts, jax.device_get(engine.generation(state, max_new_tokens=NEW))


def drafted_by_hand(prompt, tokens):
  """Of each token of a greedy text, whether a draft of the most probable ones had it."""
  table, origins = np.asarray(NEAR.logits_vvv), []
  while len(origins) < len(tokens):
    context, kept = [0, *prompt, *tokens[:len(origins)]], 0
    for token in tokens[len(origins):len(origins) + GAMMA]:
      if table[context[-2], context[-1]].argmax() != token:
        break
      context, kept = [*context, token], kept + 1
      if token == structs.EOS_ID:
        break
    origins += [True] * kept + [False]
  return origins[:len(tokens)]


@pytest.mark.parametrize('temperature', [0.0, 1.0])
def test_texts_and_counts_are_the_loops(temperature):
  texts, generation = look(temperature)
  stats = generation.stats
  for row, text in enumerate(texts):
    assert text.tokens == generation.tokens[row, :generation.lengths[row]].tolist()
    assert (len(text.drafted), sum(text.drafted), text.target_calls) == (
        generation.lengths[row], stats.accepted_bg[row].sum(), stats.target_calls_b[row])
  assert len({len(text.tokens) for text in texts}) > 1  # some end early
  assert {origin for text in texts for origin in text.drafted} == {True, False}


def test_greedy_origins_are_those_found_by_hand():
  texts, _ = look(0.0)
  for prompt, length, text in zip(PROMPTS, LENGTHS, texts):
    assert text.drafted == drafted_by_hand(prompt[:length], text.tokens)
