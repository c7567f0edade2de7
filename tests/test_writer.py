"""The meter of a training run, on a clock that the test moves."""

import itertools
import time

import pytest

from specdistill_jax.training import writer


@pytest.fixture
def clock(monkeypatch):
  """A clock in a list: the time stands still but for what a test adds."""
  now = [0.0]
  monkeypatch.setattr(time, 'perf_counter', lambda: now[0])
  return now


def batches(clock, seconds):
  for index in itertools.count():
    clock[0] += seconds
    yield index


def test_share_of_the_wait_is_counted_over_the_steps_that_are(clock):
  """Steps of 3 s after a wait of 1 s; compilation and evaluation, and waits then, are not."""
  meter, data = writer.Meter(), batches(clock, 1.0)
  assert meter.data_wait_share is None
  for step in range(10):
    assert meter.next_batch(data) == step
    clock[0] += 100.0 if step in (0, 5) else 3.0
    meter.add(num_tokens=8)
    if step == 4:
      clock[0] += 50.0
      meter.pause()
  assert meter.seconds_per_step == pytest.approx(4.0)
  assert meter.tokens_per_second == pytest.approx(2.0)
  assert meter.data_wait_share == pytest.approx(0.25)
