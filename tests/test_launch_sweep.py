"""launch/tpu_sweep.sh: every cell runs once, on one of the slices, in a workdir of its own."""

import os
import signal

import pytest

from stubs import cloud as stub
from stubs.cloud import cloud  # noqa: F401  (a fixture)

CONFIG = 'configs/study.py'  # get_sweep() has five cells

pytestmark = stub.NEEDED


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
  os.kill(cloud.hanging(), signal.SIGTERM)  # it saves, and ends with 75
  output, _ = process.communicate(timeout=300)
  assert process.returncode == 0, output
  assert cells(cloud.studies()) == ['3', '3', '4']


def test_a_slice_on_which_two_cells_in_a_row_fail_soon_takes_no_more(cloud):
  for cell, act in enumerate(['4', '0', '4', '4', '0']):
    cloud.tell(f'cell-{cell}', act)
  command = ['tpu_sweep.sh', '--slices=1', '--delete', CONFIG]
  output = cloud.run(*command, code=1)
  assert cells(cloud.studies()) == ['0', '1', '2', '3']
  assert '2 cells in a row failed within 1800 s each, so this slice takes no more' in output
  assert output.count('FAILED') == 3 and 'cell 4 has not run' in output
  assert (cloud.root / 'slices' / 'mine-s0').exists()  # kept, to be looked at

  cloud.set(QUICK_SECONDS='0')
  for cell in (0, 2, 3):
    cloud.tell(f'cell-{cell}', '4')
  cloud.run(*command, code=1)
  assert cells(cloud.studies()[4:]) == ['0', '2', '3', '4']


def test_an_edit_in_the_midst_of_a_sweep_fails_no_cell(cloud):
  cloud.tell('cell-0', 'hang', '0')
  process = cloud.start('tpu_sweep.sh', '--slices=1', '--cells=0-2', CONFIG)
  cloud.wait_for_studies(1)
  cloud.wait_for_event('hosts run', 'mine-s0')
  (cloud.repository / CONFIG).write_text('edited\n')
  os.kill(cloud.hanging(), signal.SIGTERM)
  output, _ = process.communicate(timeout=300)
  assert process.returncode == 0, output
  assert cells(cloud.studies()) == ['0', '0', '1', '2']


def test_all_cells_run_the_commit_with_which_the_sweep_began(cloud):
  first = stub.commit(cloud.repository, 'first')
  cloud.tell('cell-1', '4')
  cloud.run('tpu_sweep.sh', '--slices=1', '--cells=0,1', CONFIG, code=1)
  (cloud.repository / CONFIG).write_text('def get_sweep():\n  return [{}] * 2\n')
  second = stub.commit(cloud.repository, 'second')
  events = cloud.repository / 'runs/launch/mine-s0/events.log'
  events.unlink()
  output = cloud.run('tpu_sweep.sh', '--slices=1', CONFIG)
  assert output.count(f'goes on with commit {first}, with which it began') == 1
  assert cells(cloud.studies()) == ['0', '1', '1', '2', '3', '4']  # of the first commit
  assert events.read_text().count(f'hosts run commit {first}') == 4

  cloud.run('tpu_sweep.sh', '--slices=1', '--new_commit', '--cells=5', CONFIG)
  assert f'hosts run commit {second}' in events.read_text()


@pytest.mark.parametrize('fault', ['refuses', 'breaks'])
def test_an_error_of_the_launcher_is_no_failure_of_a_cell(cloud, fault):
  cloud.tell('cell-0', 'hang', '0')
  command = ['tpu_sweep.sh', '--slices=1', '--cells=0-2', CONFIG]
  process = cloud.start(*command)
  cloud.wait_for_studies(1)
  cloud.wait_for_event('hosts run', 'mine-s0')
  if fault == 'refuses':
    cloud.set(SPOT='true')
  else:
    broken = cloud.repository / 'launch' / 'tpu_watch.sh'
    script = broken.read_text()
    broken.write_text('if\n' + script)
  os.kill(cloud.hanging(), signal.SIGTERM)
  output, _ = process.communicate(timeout=300)
  assert process.returncode == 1
  assert output.count('not the study but its launcher failed') == 1
  assert ("SPOT is 'true'" if fault == 'refuses' else 'syntax error') in output
  assert 'FAILED' not in output and 'cell 2 has not run' in output
  assert cells(cloud.studies()) == ['0', '0']

  if fault == 'refuses':
    cloud.set()
  else:
    broken.write_text(script)
  cloud.run(*command)
  assert cells(cloud.studies()) == ['0', '0', '1', '2']


def test_a_cell_that_may_run_on_its_slice_is_not_given_to_another(cloud):
  cloud.tell('cell-3', 'hang')
  process = cloud.start('tpu_sweep.sh', '--slices=1', '--cells=3', CONFIG)
  cloud.wait_for_studies(1)
  os.kill(process.pid, signal.SIGINT)
  process.communicate(timeout=300)
  cloud.answer('slices/mine-s0/state', 'UNKNOWN')
  output = cloud.run('tpu_sweep.sh', '--slices=2', '--cells=3,4', CONFIG, code=1)
  assert 'cell 3 stays with it, since it may still run there' in output
  assert 'cell 3 is unfinished on mine-s0' in output
  assert cells(cloud.studies()) == ['3', '4']


def test_fewer_slices_take_what_the_others_left(cloud):
  cloud.tell('cell-0', 'hang', '0')
  cloud.tell('cell-1', 'hang', '0')
  process = cloud.start('tpu_sweep.sh', '--slices=2', '--cells=0,1', CONFIG)
  cloud.wait_for_studies(2)
  for slice_ in ('mine-s0', 'mine-s1'):
    cloud.wait_for_event('hosts run', slice_)
  os.kill(process.pid, signal.SIGINT)
  process.communicate(timeout=300)

  (cell,) = cells(study for study in cloud.studies() if study['host'] == 'mine-s1-w-0')
  fewer = ['tpu_sweep.sh', '--slices=1', f'--cells={cell}', CONFIG]
  output = cloud.run(*fewer, code=1)
  assert (f'cell {cell} may still run on mine-s1, which --slices=1 leaves out: --slices=2 takes it '
          'up; once launch/tpu_vm.sh delete --name=mine-s1 has given it back') in output
  assert len(cloud.studies()) == 2  # it was left alone

  cloud.run('tpu_vm.sh', 'stop', '--name=mine-s0')
  cloud.run('tpu_vm.sh', 'delete', '--name=mine-s1')
  output = cloud.run(*fewer)
  assert f'cell {cell} is for all slices: mine-s1, which began it, has no part' in output
  assert cells(cloud.studies()[2:]) == [cell] and cloud.studies()[2]['host'] == 'mine-s0-w-0'


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
  output = cloud.run('tpu_sweep.sh', *arguments, code=64)
  assert sentence in output and output.count('\n') == 1
  assert not cloud.calls()
