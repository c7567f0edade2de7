"""One run on several real processes: the figures of one process, and an end that all agree on."""

import json
import pathlib
import signal
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
FIGURES = ('loss', 'alpha', 'grad_norm', 'validation_cross_entropy', 'validation_alpha',
           'block_efficiency', 'acceptance_by_position', 'on_policy', 'learning_rate')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """What multihost.py leaves, in a process of its own as in test_kills.py."""
  made = tmp_path_factory.mktemp('runs')
  done = subprocess.run([sys.executable, ROOT / 'tests' / 'multihost.py', made], cwd=ROOT,
                        capture_output=True, text=True)
  outputs = ''.join(f'\n{path}\n{path.read_text()}' for path in sorted(made.glob('*/output*')))
  assert done.returncode == 0, done.stdout + done.stderr + outputs
  return made


@pytest.fixture(scope='module')
def ended(folder):
  return json.loads((folder / 'ended.json').read_text())


def output(workdir, index):
  return (workdir / f'output{index}').read_text()


def lines(workdir):
  return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


@pytest.mark.parametrize('name, count, stages', [
    ('two', 2, ['target', 'draft', 'distill']), ('four', 4, ['target'])])
def test_processes_give_the_figures_of_one(folder, ended, name, count, stages):
  """Rows, dropout keys and rollouts are those of one process; sums are added in another order."""
  assert ended['alone'] == [0], output(folder / 'alone', 0)
  assert ended[name] == [0] * count, output(folder / name, 0)
  ours = lines(folder / name)
  theirs = [row for row in lines(folder / 'alone') if row['stage'] in stages]
  assert [(row['run'], row['step']) for row in ours] == [
      (row['run'], row['step']) for row in theirs]
  for row, other in zip(ours, theirs):
    for figure in FIGURES:
      wanted = other.get(figure)
      assert row.get(figure) == (wanted if wanted is None else pytest.approx(wanted, rel=1e-5)), (
          figure, row['run'], row['step'])
  assert 'target' in output(folder / name, 0)
  for index in range(1, count):  # only the first speaks
    assert '[target]' not in output(folder / name, index)


def test_one_that_is_asked_or_killed_ends_all_and_the_next_run_goes_on(folder, ended):
  """SIGTERM to one of two: both save at one step. SIGKILL of it: the other says so, in time.

  The run then ends in a single process, on another mesh.
  """
  workdir = folder / 'signalled'
  said = output(workdir, 0)
  assert ended['asked'] == [75, 75], said
  assert 'stopped and saved: target at step' in said
  assert 20 <= ended['stopped'] < 240 and ended['saved'] == {'target': ended['stopped']}

  assert ended['killed'] == [75, -signal.SIGKILL], said
  assert ended['seconds'] < 300
  assert 'lost' in said and 'run the same command' in said

  assert ended['finished'] == [0], said
  assert [row['step'] for row in lines(workdir)] == list(range(241))
