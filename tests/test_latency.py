"""Timing is warm, blocked and interleaved; what is timed decodes what it should."""

import time

import jax
import numpy as np
import pytest

import models
from specdistill_jax import api
from specdistill_jax import structs
from specdistill_jax.decoding import engine
from specdistill_jax.decoding import rules
from specdistill_jax.decoding import sampling as sampling_lib
from specdistill_jax.evaluation import batch_files
from specdistill_jax.evaluation import latency
from specdistill_jax.evaluation import step_costs

GREEDY = sampling_lib.Sampling(0.0)
NEW_TOKENS = 6


def settings(target, drafts, gammas, sampling=GREEDY):
  rule = rules.for_sampling('exact', 1.0, sampling)
  return {(name, gamma): step_costs.Setting(
      api.make_drafter(draft, gamma=gamma, target_sampling=sampling), rule)
          for name, draft in drafts.items() for gamma in gammas}


def batches(count):
  rng = np.random.default_rng(0)
  return [(rng.integers(2, models.VOCAB, size=(1, 8)).astype(np.int32),
           np.array([3 + i % 5], np.int32)) for i in range(count)]


def test_clock_waits_for_the_device():
  """JAX returns before the work is done; a clock that doesn't block measures the dispatch."""
  class StillComputing:
    def block_until_ready(self):
      time.sleep(0.05)
      return self

  pending = StillComputing()
  seconds, value = step_costs.timed(lambda: {'state': pending})
  assert seconds >= 0.05 and value == {'state': pending}


@pytest.fixture
def calls(monkeypatch):
  """What `measure` does, in order: the target alone, a chain by its length, a timing of steps."""
  calls = []
  generation = structs.Generation(np.zeros((1, 1), int), np.ones((1,), int), None)

  def fake_alone(module, prompts_bt, *args, **kwargs):
    calls.append('alone')
    return latency.Run(float(len(calls)), 0.0, generation)

  def fake_speculative(module, setting, prompts_bt, *args, **kwargs):
    calls.append(setting.drafter.gamma)
    return latency.Run(1.0, 0.0, generation)

  class FakeClock:
    def __init__(self, module, settings, **kwargs):
      self.settings = settings

    def __call__(self, *inputs):
      calls.append('clock')
      return {name: step_costs.StepSeconds(1.0, (1.0, 1.0), (1.0, 1.0)) for name in self.settings}

  monkeypatch.setattr(latency, 'alone', fake_alone)
  monkeypatch.setattr(latency, 'speculative', fake_speculative)
  monkeypatch.setattr(step_costs, 'Clock', FakeClock)
  monkeypatch.setattr(latency, 'CLOCK_EVERY', 2)
  return calls


def test_noise_does_not_make_steps_dearer():
  """Alone and after a pass cost the same here; the larger of each call would cost half more."""
  steps = [step_costs.StepSeconds(4.0, (1.0, 3.0), (2.0, -1.0)),
           step_costs.StepSeconds(6.0, (3.0, 1.0), (2.0, 1.0))]
  assert step_costs.mean(steps) == (5.0, 2.0, 2.0)


def test_measurements_are_interleaved_and_warm(calls):
  """By batch, then by setting, so that noise hits all alike; every kind is compiled before."""
  target = models.tiny(0, num_layers=1)
  chosen = settings(target, dict(a=target, b=target), (2, 3))
  told = []
  def progress(items, what):
    for item in items:
      yield item
      told.append(what)
  found = latency.measure(target.module, chosen, batches(3), jax.random.key(0), sampling=GREEDY,
                          max_new_tokens=NEW_TOKENS, progress=progress)
  assert told == ['settings compiled'] * 2 + ['batches'] * 3
  one_batch = ['alone', 2, 3, 2, 'alone', 3]
  assert calls[:4] == ['alone', 2, 3, 'clock']  # warm-up: one of each kind that compiles
  assert calls[4:] == one_batch + ['clock'] + one_batch + one_batch + ['clock']
  # The target alone ran as calls 5 and 9 of the first batch: their mean.
  assert found.alone[0].seconds == 7.0
  assert len(found.alone) == 3 and all(len(runs) == 3 for runs in found.runs.values())
  assert all(len(steps) == 2 for steps in found.steps.values())


def test_batches_that_are_kept_are_not_measured_again(calls):
  target = models.tiny(0, num_layers=1)
  kept = type('Kept', (dict,), dict(read=dict.get, write=dict.__setitem__))()
  measure = lambda: latency.measure(
      target.module, settings(target, dict(a=target), (2,)), batches(3), jax.random.key(0),
      sampling=GREEDY, max_new_tokens=NEW_TOKENS, kept=kept)
  whole = measure()
  del kept[1]
  calls.clear()
  again = measure()
  assert calls == ['alone', 2, 'clock', 'alone', 2]  # warm-up, then the one that is left
  assert (again.alone[0], again.alone[2]) == (whole.alone[0], whole.alone[2])
  assert again.steps == whole.steps and len(again.alone) == len(again.runs['a', 2]) == 3
  calls.clear()
  measure()
  assert not calls


@pytest.fixture(scope='module')
def measured():
  target = models.tiny(0, scale=2.0, num_layers=1)
  drafts = dict(near=models.perturbed(target, 0.1), far=models.perturbed(target, 1.0))
  chosen = settings(target, drafts, (2,))
  module = target.module.unstacked()
  before = engine.decode_speculative._cache_size()
  found = latency.measure(module, chosen, batches(2), jax.random.key(0), sampling=GREEDY,
                          max_new_tokens=NEW_TOKENS)
  return found, engine.decode_speculative._cache_size() - before


def test_every_setting_decodes_what_the_target_alone_does(measured):
  """At temperature 0, token for token: a speed-up over other text would mean nothing."""
  found, _ = measured
  for runs in found.runs.values():
    for alone, run in zip(found.alone, runs, strict=True):
      np.testing.assert_array_equal(run.generation.tokens, alone.generation.tokens)
      np.testing.assert_array_equal(run.generation.lengths, alone.generation.lengths)
      assert run.generation.stats.target_calls_b.sum() <= alone.generation.lengths.sum()


def test_drafts_of_one_shape_share_a_compilation(measured):
  assert measured[1] == 1


def test_times_are_positive_and_steps_shared(measured):
  found, _ = measured
  for run in found.alone + [run for runs in found.runs.values() for run in runs]:
    assert run.seconds > 0 and run.prefill_seconds > 0
  for name, steps in found.steps.items():
    for step in steps:
      assert min(step.target, step.draft[0], step.verify[0]) > 0
  # Both drafts have one shape: one timing serves both.
  assert found.steps['near', 2] == found.steps['far', 2]


def test_batches_come_back_from_their_files(measured, tmp_path):
  found, _ = measured
  said = {name: dict(seed=index) for index, name in enumerate(found.runs)}
  files = lambda said: batch_files.BatchFiles(tmp_path / 'parts', said)
  batch = latency.Batch(found.alone[1], {name: runs[1] for name, runs in found.runs.items()},
                        {name: steps[0] for name, steps in found.steps.items()})
  files(said).write(1, batch)
  back = files(said).read(1)
  assert jax.tree.map(type, back.alone.generation) == jax.tree.map(type, batch.alone.generation)
  for ours, theirs in ((back.alone, batch.alone), *((back.runs[name], batch.runs[name])
                                                    for name in said)):
    assert (ours.seconds, ours.prefill_seconds) == (theirs.seconds, theirs.prefill_seconds)
    jax.tree.map(np.testing.assert_array_equal, ours.generation, theirs.generation)
  assert back.steps == batch.steps
  assert files(said).read(0) is None
  first, *_ = said
  assert list(files({first: said[first]}).read(1).runs) == [first]  # the other has its line
  assert files(said | {first: dict(seed=7)}).read(1) is None


def test_families():
  target = models.tiny(0, num_layers=1)
  wide = models.tiny(0, num_layers=1, mlp_width=32)
  drafter = lambda model, gamma: api.make_drafter(model, gamma=gamma, target_sampling=GREEDY)
  family = step_costs.family
  assert family(drafter(target, 2)) == family(drafter(models.perturbed(target, 1.0), 5))
  assert family(drafter(target, 2)) != family(drafter(wide, 2))
