"""Lines of metrics.jsonl over kills; the meter of a run, on a clock that the test moves."""

import itertools
import json
import time

import jax
import pytest

from specdistill_jax.training import preemption
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


@pytest.mark.parametrize('error, is_put', [(ValueError, True), (preemption.Superseded, False)])
def test_a_run_that_another_goes_on_with_puts_nothing_over_its_lines(tmp_path, monkeypatch, error,
                                                                     is_put):
  """A file in a bucket is put as a whole."""
  puts = []
  with pytest.raises(error):
    with writer.Writer(tmp_path, 'target', 'target', first_step=0, steps=9) as out:
      monkeypatch.setattr(out._lines, 'sync', lambda: puts.append('lines'))
      out._open.callback(puts.append, 'events')
      raise error
  assert puts == (['lines', 'events'] if is_put else [])


def test_a_line_that_is_no_json_is_named(tmp_path):
  written(tmp_path, 0, 1)
  with open(tmp_path / 'metrics.jsonl', 'a') as file:
    file.write('what?\n')
  with pytest.raises(ValueError, match='line 3 is not JSON'):
    written(tmp_path, 1, 2)


class Device:
  def memory_stats(self):
    return dict(peak_bytes_in_use=3 * 2**30)


def shown(capsys):
  """Step of each line that was printed, and the rest of it."""
  lines = [line.split(maxsplit=2) for line in capsys.readouterr().out.splitlines()]
  return {int(step.split('/')[0]): rest for _, step, rest in lines}


def test_lines_are_shown_by_time(tmp_path, clock, capsys, monkeypatch):
  """A run of 300,000 steps said nothing before step 30,000."""
  monkeypatch.setattr(jax, 'local_devices', lambda: [Device()])
  with writer.Writer(tmp_path, 'target', 'target', first_step=0, steps=300_000) as out:
    out.write(0, validation_alpha=0.25)
    for step in range(1, 1001):
      clock[0] += 0.5
      (out.tell if step % 100 else out.write)(step, seconds_per_step=0.5, loss=1.0)
  found = shown(capsys)
  assert list(found) == [0, *range(100, 1001, 120)]  # from the first logged one a minute each
  assert found[220] == 'loss 1  0.5 s a step  peak 3.0 GiB a device  1 d 17 h left'
  assert steps(tmp_path) == [0, *range(100, 1001, 100)]
  assert 'seconds_per_step' not in (tmp_path / 'metrics.jsonl').read_text()


def test_a_wait_for_data_is_shown_where_it_matters(tmp_path, clock, capsys):
  with writer.Writer(tmp_path, 'target', 'target', first_step=0, steps=2) as out:
    out.write(1, loss=1.0, data_wait_share=0.002)
    out.write(2, loss=1.0, data_wait_share=0.127)
  assert shown(capsys) == {1: 'loss 1', 2: 'loss 1  13% waiting for data'}


def test_lines_are_seldom_but_for_evaluations(tmp_path, clock, capsys):
  with writer.Writer(tmp_path, 'target', 'target', first_step=0, steps=30) as out:
    for step in range(1, 31):
      clock[0] += 1.0
      out.write(step, loss=1.0, **(dict(validation_alpha=0.5) if step == 13 else {}))
  assert list(shown(capsys)) == [1, 11, 13, 23, 30]


@pytest.mark.parametrize('seconds, words', [
    (59.4, '59 s'), (61, '1 min'), (3599, '1 h 0 min'), (5 * 3600 + 180, '5 h 3 min'),
    (55 * 3600, '2 d 7 h')])
def test_time_left_is_written_in_two_units_at_most(seconds, words):
  assert writer._duration(seconds) == words


def test_speed_is_that_since_the_last_line(clock):
  """A mean since the start hides for days that a run has become slower."""
  meter, data = writer.Meter(), batches(clock, 0.0)
  for step in range(21):
    meter.next_batch(data)
    clock[0] += 1.0 if step <= 10 else 4.0
    meter.add(num_tokens=8)
    if step == 10:
      assert meter.tokens_per_second == pytest.approx(8.0)
      meter.mark()
      assert meter.tokens_per_second is None
  assert meter.tokens_per_second == pytest.approx(2.0)
  assert meter.seconds_per_step == pytest.approx(4.0)
  assert meter.mean_seconds_per_step == pytest.approx(2.5)
