"""launch/tpu_vm.sh, attempt after attempt: errors that may pass, logs that are kept, one commit."""

import os
import shutil
import signal

import pytest

from stubs import cloud as stub
from stubs.cloud import cloud  # noqa: F401  (a fixture)

CONFIG = 'configs/study.py'

pytestmark = stub.NEEDED


def logs(cloud):
  folder = cloud.repository / 'runs/launch/mine/logs'
  return {path.name: path.read_text().split()[-1] for path in folder.glob('attempt-*')}


def test_logs_of_every_attempt_are_kept(cloud):
  cloud.answer('hosts', '3')
  cloud.tell('mine-w-0', '75', '0', '0', '1')
  cloud.tell('mine-w-1', '75', '0', '0')
  cloud.tell('mine-w-2', '75', '1', '0')
  output = cloud.run('tpu_vm.sh', 'up', CONFIG)
  kept = {'attempt-1-mine-w-0.log': '75', 'attempt-2-mine-w-0.log': '0',
          'attempt-2-mine-w-2.log': '1', 'attempt-3-mine-w-0.log': '0'}
  assert logs(cloud) == kept
  assert f'{cloud.repository}/runs/launch/mine/logs/attempt-2-mine-w-2.log' in output

  cloud.run('tpu_vm.sh', 'up', '--max_restarts=0', CONFIG, code=1)
  assert logs(cloud) == kept | {'attempt-4-mine-w-0.log': '1'}


def test_a_log_outlives_its_slice(cloud):
  cloud.tell('mine-w-0', 'hang', 'hang')
  process = cloud.start('tpu_vm.sh', 'up', CONFIG)
  cloud.wait_for_event('study on mine-w-0: hang', file='logs/attempt-1-mine-w-0.log')
  cloud.answer('slices/mine/state', 'SUSPENDED')
  shutil.rmtree(cloud.root / 'slices/mine/mine')
  cloud.wait_for_studies(2)
  cloud.wait_for_event('study on mine-w-0: hang', file='logs/attempt-2-mine-w-0.log')
  cloud.interrupt(process)
  assert logs(cloud) == {f'attempt-{number}-mine-w-0.log': 'hang' for number in (1, 2)}

  shutil.rmtree(cloud.repository / 'runs/launch/mine/logs')
  cloud.run('tpu_vm.sh', 'delete')
  assert logs(cloud) == {'attempt-2-mine-w-0.log': 'hang'}


def test_a_slice_is_given_back_though_its_log_cannot_be_had(cloud):
  cloud.run('tpu_vm.sh', 'up', CONFIG)
  shutil.rmtree(cloud.repository / 'runs/launch/mine/logs')
  cloud.answer('ssh_faults', 'before')
  cloud.run('tpu_vm.sh', 'delete')
  assert not list((cloud.root / 'slices').iterdir()) and not logs(cloud)


@pytest.mark.parametrize('acts, flags, runs, code', [
    (['1', '75', '1', '0'], [], 4, 0),
    (['1', '75', '1', '1', '0'], [], 4, 1),  # three in a row: a pre-emption mends nothing
    (['1', '0'], ['--max_restarts=0'], 1, 1),
    (['2', '0'], [], 1, 2),
])
def test_an_unexpected_error_is_tried_again_but_not_for_ever(cloud, acts, flags, runs, code):
  cloud.tell('mine-w-0', *acts)
  output = cloud.run('tpu_vm.sh', 'up', *flags, CONFIG, code=code)
  assert len(cloud.studies()) == runs
  events = (cloud.repository / 'runs/launch/mine/events.log').read_text()
  for said in (output, events):
    assert said.count('study on mine-w-0: 1\n') == acts[:runs].count('1')
    assert said.count('study on mine-w-0: 2\n') == acts[:runs].count('2')
  assert ('an unexpected error, 1 of at most 3 in a row; restart 1 of' in output) == (runs > 1)


def test_errors_are_counted_anew_when_the_run_got_somewhere(cloud):
  cloud.set(QUICK_SECONDS='0')
  cloud.tell('mine-w-0', '1', '1', '1', '1', '0')
  cloud.run('tpu_vm.sh', 'up', CONFIG)
  assert len(cloud.studies()) == 5


def test_what_one_host_refuses_is_not_tried_again_for_the_error_of_another(cloud):
  cloud.answer('hosts', '2')
  cloud.tell('mine-w-0', '1')
  cloud.tell('mine-w-1', '2')
  cloud.run('tpu_vm.sh', 'up', CONFIG, code=2)
  assert len(cloud.studies()) == 2


@pytest.mark.parametrize('acts', [('3', 'die'), ('die', '3'), ('die', '3', 'die')])
def test_the_host_that_raised_is_named_not_one_that_was_killed(cloud, acts):
  cloud.answer('hosts', str(len(acts)))
  for index, act in enumerate(acts):
    cloud.tell(f'mine-w-{index}', act)
  output = cloud.run('tpu_vm.sh', 'up', CONFIG, code=3)
  assert f'mine-w-{acts.index("3")} ended with code 3; its last lines' in output
  assert 'ended with code 137' not in output


def commit_on_hosts(cloud):
  (path,) = cloud.root.glob('slices/mine/mine/mine-w-0/specdistill/code/launch/COMMIT')
  return path.read_text().strip()


def test_code_does_not_change_when_the_slice_does(cloud):
  first = stub.commit(cloud.repository, 'first')
  cloud.tell('mine-w-0', 'hang', 'reclaim', '0')
  process = cloud.start('tpu_vm.sh', 'up', CONFIG)
  stopped = cloud.hanging()
  stub.commit(cloud.repository, 'second')
  os.kill(stopped, signal.SIGTERM)
  output, _ = process.communicate(timeout=300)
  assert process.returncode == 0, output
  assert cloud.verbs().count('setup') == 2 and commit_on_hosts(cloud) == first
  events = (cloud.repository / 'runs/launch/mine/events.log').read_text()
  assert events.count(f'1 hosts run commit {first}: ') == 3


@pytest.mark.parametrize('flags, taken', [
    ([], 0), (['--new_commit'], 1), (['--commit=HEAD~2'], 2)])
def test_a_run_that_is_taken_up_has_the_commit_it_began_with(cloud, flags, taken):
  before, first = (stub.commit(cloud.repository, name) for name in ('before', 'first'))
  cloud.tell('mine-w-0', '75', '0')
  cloud.run('tpu_vm.sh', 'up', '--max_restarts=0', CONFIG, code=75)
  commits = [first, stub.commit(cloud.repository, 'second'), before]
  output = cloud.run('tpu_vm.sh', 'up', *flags, CONFIG)
  assert commit_on_hosts(cloud) == commits[taken]
  told = (f'goes on with commit {commits[0]}, with which it began, and not with the last one, '
          f'{commits[1]}: --new_commit takes that')
  assert (told in output) == (not flags)

  output = cloud.run('tpu_vm.sh', 'up', CONFIG)  # it had finished: another run
  assert commit_on_hosts(cloud) == commits[1] and 'goes on with' not in output


def test_a_commit_that_is_not_there_is_refused_in_one_sentence(cloud):
  output = cloud.run('tpu_vm.sh', 'up', '--commit=nonsense', CONFIG, code=64)
  assert "--commit is 'nonsense', which is no commit of" in output and output.count('\n') == 1
  assert not cloud.calls()
