"""Lines of metrics.jsonl over kills; the meter of a run, on a clock that the test moves."""

import itertools
import json
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


def written(workdir, first, steps):
  """Lines of steps after `first`, as the loop writes them; step 0 too where it starts anew."""
  with writer.Writer(workdir, 'target', 'target', first_step=first, steps=9) as out:
    for step in range(first + 1 if first else 0, steps + 1):
      out.write(step, loss=float(step))


def steps(workdir):
  return [json.loads(line)['step'] for line in (workdir / 'metrics.jsonl').open()]


def test_a_run_that_starts_anew_has_its_step_0_once(tmp_path):
  """It was killed before its first checkpoint, and had the line of step 0 twice."""
  written(tmp_path, 0, 2)
  written(tmp_path, 0, 3)
  assert steps(tmp_path) == [0, 1, 2, 3]


def test_a_line_that_a_kill_cut_is_dropped(tmp_path):
  written(tmp_path, 0, 4)
  path = tmp_path / 'metrics.jsonl'
  whole = path.read_bytes()
  for length in range(len(whole) - 30, len(whole)):
    path.write_bytes(whole[:length])
    written(tmp_path, 3, 5)
    assert steps(tmp_path) == [0, 1, 2, 3, 4, 5]


def test_lines_of_other_runs_stay(tmp_path):
  written(tmp_path, 0, 3)
  with writer.Writer(tmp_path, 'draft', 'draft', first_step=0, steps=9) as out:
    out.write(0, loss=1.0)
  written(tmp_path, 1, 2)
  assert steps(tmp_path) == [0, 1, 0, 2]


def test_a_line_that_is_no_json_is_named(tmp_path):
  written(tmp_path, 0, 1)
  with open(tmp_path / 'metrics.jsonl', 'a') as file:
    file.write('what?\n')
  with pytest.raises(ValueError, match='line 3 is not JSON'):
    written(tmp_path, 1, 2)
