"""launch/tpu_sweep.sh: every cell runs once, on one of the slices, in a workdir of its own."""

import os
import shutil
import signal

import pytest

from stubs import cloud as stub

CONFIG = 'configs/study.py'  # get_sweep() has five cells

pytestmark = pytest.mark.skipif(
    not all(map(shutil.which, ('git', 'bash', 'setsid'))), reason='needs git, bash and setsid')


@pytest.fixture
def cloud(tmp_path):
  made = stub.make(tmp_path / 'cloud')
  yield made
  made.end()


def cells(studies):
  return sorted(word.removeprefix('--sweep=') for study in studies for word in study['argv']
                if word.startswith('--sweep='))


def test_cells_are_spread_and_a_failure_is_named(cloud):
  cloud.tell('cell-1', '4')
  cloud.tell('cell-2', '75')
  output = cloud.run('tpu_sweep.sh', '--slices=2', '--delete', CONFIG, '--config.a=b c', code=1)
  studies = cloud.studies()
  assert cells(studies) == ['0', '1', '2', '2', '3', '4']  # cell 2 was interrupted once
  assert {study['host'] for study in studies} == {'mine-s0-w-0', 'mine-s1-w-0'}
  for study in studies:
    (cell,) = cells([study])
    assert study['argv'] == [f'--config={CONFIG}', '--config.a=b c', f'--sweep={cell}',
                             f'--workdir=gs://bucket/sd/study/cell-{cell}']
  assert 'cell 1 FAILED with code 4: gs://bucket/sd/study/cell-1' in output
  assert output.count('FAILED') == 1
  assert not list((cloud.root / 'slices').iterdir())

  output = cloud.run('tpu_sweep.sh', '--slices=1', CONFIG, '--config.a=b c')
  assert cells(cloud.studies()[len(studies):]) == ['1']
  assert 'all cells have finished' in output


def test_a_slice_that_cannot_be_had_leaves_its_cells_to_the_others(cloud):
  (cloud.root / 'slices' / 'mine-s1').mkdir(parents=True)
  cloud.answer('slices/mine-s1/state', 'UNKNOWN')
  cloud.tell('cell-0', *['75'] * 3)
  cloud.run('tpu_sweep.sh', '--slices=2', '--cells=0,2-3', CONFIG)
  assert sorted(set(cells(cloud.studies()))) == ['0', '2', '3']
  assert {study['host'] for study in cloud.studies()} == {'mine-s0-w-0'}


def test_interrupted_and_taken_up(cloud):
  cloud.tell('cell-3', 'hang', '0')
  command = ['tpu_sweep.sh', '--slices=1', '--cells=3,4', CONFIG]
  process = cloud.start(*command)
  cloud.wait_for_studies(1)
  os.kill(process.pid, signal.SIGINT)
  output, _ = process.communicate(timeout=300)
  assert process.returncode == 130 and 'what runs on the slices goes on' in output
  assert 'running' in cloud.run('tpu_vm.sh', 'status', '--name=mine-s0')

  process = cloud.start(*command)
  cloud.wait_for_event('following it', 'mine-s0')
  os.kill(int((cloud.root / 'pids').read_text()), signal.SIGTERM)  # it saves, and ends with 75
  output, _ = process.communicate(timeout=300)
  assert process.returncode == 0, output
  assert cells(cloud.studies()) == ['3', '3', '4']


def test_dry_run_prints_every_cell_and_runs_none(cloud):
  output = cloud.run('tpu_sweep.sh', '--dry_run', '--slices=2', CONFIG)
  starts = [line for line in output.splitlines() if 'tpu_host.sh start' in line]
  assert [f'--sweep={cell}' in line and f'mine-s{cell % 2} ' in line
          for cell, line in enumerate(starts)] == [True] * 5
  assert not cloud.calls() and not (cloud.repository / 'runs').exists()


@pytest.mark.parametrize('arguments, sentence', [
    ([CONFIG], "--slices is ''; it must be 1 or more"),
    (['--slices=2', '--cells=a', CONFIG], "--cells is 'a'; it must be as in 0-11"),
    (['--slices=2', 'configs/plain.py'], 'give --cells=0-11'),
])
def test_arguments_are_refused_in_one_sentence(cloud, arguments, sentence):
  (cloud.repository / 'configs' / 'plain.py').write_text('def get_config():\n  pass\n')
  stub.commit(cloud.repository)
  output = cloud.run('tpu_sweep.sh', *arguments, code=2)
  assert sentence in output and output.count('\n') == 1
  assert not cloud.calls()
