"""launch/tpu_vm.sh: what it asks of gcloud, what it makes of the answers, and that nothing is lost.

Commands for hosts really run, in bash, in a home of their own: see stubs/.
"""

import os
import pathlib
import re
import shutil
import subprocess

import pytest

from stubs import cloud as stub
from stubs.cloud import cloud  # noqa: F401  (a fixture)

CONFIG = 'configs/study.py'
WORKDIR = '--workdir=gs://bucket/sd/study'
RULES = "--config.evaluate.rules=(('exact', 1.0), ('block', 1.0))"

pytestmark = stub.NEEDED


def test_up_creates_sets_up_and_runs_on_every_host(cloud):
  cloud.answer('create_states', 'WAITING_FOR_RESOURCES', 'PROVISIONING', 'ACTIVE')
  cloud.answer('hosts', '2')
  cloud.set(SPOT='yes', VALID_UNTIL='12h', CREATE_FLAGS='(--internal-ips)',
            SSH_FLAGS='(--internal-ip)', RUN_ENVIRONMENT='("PASSED=a b")')
  output = cloud.run('tpu_vm.sh', 'up', CONFIG)
  assert cloud.verbs() == ['create', 'scp', 'setup', 'start']
  tpus = ['gcloud', 'compute', 'tpus']
  bundle = f'{cloud.repository}/runs/launch/mine/specdistill'
  create, scp, setup, start = [call for call in cloud.calls()
                               if call[4] != 'describe'
                               and not re.search(r'tpu_host.sh (state|log)', call[-4])]
  assert create == [
      *tpus, 'queued-resources', 'create', 'mine', '--accelerator-type=v5litepod-16',
      '--runtime-version=v2-alpha-tpuv5-lite', '--node-id=mine', '--spot',
      '--valid-until-duration=12h', '--internal-ips', *stub.AT]
  assert scp == [*tpus, 'tpu-vm', 'scp', '--recurse', bundle, 'mine:', '--worker=all',
                 '--internal-ip', *stub.AT]
  assert setup == [*tpus, 'tpu-vm', 'ssh', 'mine', '--worker=all', '--internal-ip',
                   '--command=bash specdistill/tpu_host.sh setup', *stub.AT]
  assert start[:7] == [*tpus, 'tpu-vm', 'ssh', 'mine', '--worker=all']
  questions = [call for call in cloud.calls() if call[4] == 'describe']
  assert questions[0] == [*tpus, 'queued-resources', 'describe', 'mine',
                          '--format=value(state.state)', *stub.AT]
  assert questions[-1] == [*tpus, 'tpu-vm', 'describe', 'mine', '--format=value(state)', *stub.AT]
  assert sorted(cloud.studies(), key=lambda study: study['host']) == [
      dict(host=f'mine-w-{index}', argv=[f'--config={CONFIG}', WORKDIR], env='a b')
      for index in range(2)]
  assert 'the slice is WAITING_FOR_RESOURCES' in output and 'results are in gs://' in output
  assert 'costs money' in output
  assert 'finished' in (cloud.repository / 'runs/launch/mine/events.log').read_text()


def test_dry_run_prints_every_command_and_runs_none(cloud):
  output = cloud.run('tpu_vm.sh', 'up', '--dry_run', '--delete', CONFIG, RULES)
  assert not cloud.calls() and not (cloud.repository / 'runs').exists()
  order = ['queued-resources describe', 'queued-resources create', ' archive ', 'tpu-vm scp',
           'tpu_host.sh setup', 'tpu_host.sh start', 'tpu_host.sh state', 'queued-resources delete']
  places = [output.index(words) for words in order]
  assert places == sorted(places)
  # What is printed may be pasted: it does the same.
  start = next(line for line in output.splitlines() if ' start ' in line)
  cloud.run('tpu_vm.sh', 'create')
  cloud.run('tpu_vm.sh', 'setup')
  assert os.waitstatus_to_exitcode(os.system(
      f'PATH={cloud.root}/bin:$PATH STUB_CLOUD={cloud.root} {start} > {cloud.root}/pasted')) == 0
  cloud.wait_for_studies(1)
  assert cloud.studies()[0]['argv'] == [f'--config={CONFIG}', RULES, WORKDIR]


def test_flags_survive_both_shells(cloud):
  flags = [RULES, "--config.a='quoted \"twice\"'", '--config.a=$HOME `id` $(id) \\n \\',
           '--config.a=a  b', '--config.a=*', '--config.a=é;&|<>!~#{}[]', '--config.a=', '',
           '--config.a=one\ntwo', "--config.a='"]
  cloud.run('tpu_vm.sh', 'up', CONFIG, *flags, '--workdir=gs://other/place')
  assert cloud.studies()[0]['argv'] == [f'--config={CONFIG}', *flags, '--workdir=gs://other/place']


def test_a_spot_slice_that_is_taken_away_is_asked_for_again(cloud):
  cloud.set(SPOT='yes')
  cloud.tell('mine-w-0', 'reclaim', 'reclaim', '0')
  output = cloud.run('tpu_vm.sh', 'up', CONFIG, RULES)
  again = ['delete', 'create', 'scp', 'setup', 'start']
  assert cloud.verbs() == again[1:] + again + again
  assert ['--force' in call for call in cloud.calls() if call[4] == 'delete'] == [True, True]
  argv = [f'--config={CONFIG}', RULES, WORKDIR]
  assert [study['argv'] for study in cloud.studies()] == [argv] * 3
  assert output.count('the slice was taken away; restart') == 2


def test_a_node_that_is_preempted_while_the_request_stays_active(cloud):
  cloud.run('tpu_vm.sh', 'create')
  (cloud.root / 'slices/mine/mine/state').write_text('PREEMPTED')
  cloud.run('tpu_vm.sh', 'up', CONFIG)
  assert cloud.verbs() == ['create', 'delete', 'create', 'scp', 'setup', 'start']


def test_75_is_run_again_where_it_was(cloud):
  cloud.tell('mine-w-0', '75', '75', '0')
  output = cloud.run('tpu_vm.sh', 'up', CONFIG)
  assert cloud.verbs() == ['create', 'scp', 'setup', 'start', 'start', 'start']
  assert len(cloud.studies()) == 3
  assert 'restart 2 of at most 100' in output


def test_restarts_have_a_limit(cloud):
  cloud.tell('mine-w-0', *['75'] * 9)
  output = cloud.run('tpu_vm.sh', 'up', '--max_restarts=2', CONFIG, code=75)
  assert len(cloud.studies()) == 3
  assert 'given up after 2 restarts' in output


def test_an_error_stops_with_its_code_and_the_end_of_the_log(cloud):
  cloud.answer('hosts', '2')
  cloud.tell('mine-w-1', '3')
  output = cloud.run('tpu_vm.sh', 'up', '--delete', CONFIG, code=3)
  assert 'mine-w-1 ended with code 3' in output and 'study on mine-w-1: 3' in output
  assert 'study on mine-w-0' not in output  # the log of the host that failed, alone
  assert cloud.verbs() == ['create', 'scp', 'setup', 'start']  # kept, to be looked at


def test_hosts_that_wait_for_a_dead_one_are_ended(cloud):
  cloud.answer('hosts', '3')
  cloud.tell('mine-w-0', 'hang')
  cloud.tell('mine-w-1', '75')
  cloud.tell('mine-w-2', 'hang')
  output = cloud.run('tpu_vm.sh', 'up', CONFIG)
  assert '2 of 3 hosts run' in output
  assert cloud.verbs() == ['create', 'scp', 'setup', 'start', 'signal', 'start']
  assert len(cloud.studies()) == 6


def test_a_host_that_dies_is_run_again_but_not_for_ever(cloud):
  cloud.tell('mine-w-0', 'die', '75', 'die', 'die', 'die')
  output = cloud.run('tpu_vm.sh', 'up', CONFIG, code=137)
  assert len(cloud.studies()) == 5
  assert 'mine-w-0 died of signal 9' in output


@pytest.mark.parametrize('writer_lives, status', [(True, 'running'), (False, 'lost')])
def test_a_program_that_ended_is_not_lost_while_its_code_is_being_written(
    tmp_path, writer_lives, status):
  ended = subprocess.Popen(['true'])
  ended.wait()
  host = shutil.copy(stub.TESTS.parent / 'launch' / 'tpu_host.sh', tmp_path)
  (tmp_path / 'run' / 'token').mkdir(parents=True)
  (tmp_path / 'run' / 'last').symlink_to('token')
  boot = pathlib.Path('/proc/sys/kernel/random/boot_id')
  (tmp_path / 'run' / 'token' / 'pid').write_text(
      f'{boot.read_text().strip() if boot.exists() else "none"} {ended.pid} '
      f'{os.getpid() if writer_lives else ended.pid}\n')
  said = subprocess.run(['bash', host, 'state'], capture_output=True, text=True, check=True).stdout
  assert said.split()[-2:] == ['token', status]


def test_delete_gives_the_slice_back_at_the_end(cloud):
  cloud.run('tpu_vm.sh', 'up', '--delete', CONFIG)
  assert cloud.verbs()[-1] == 'delete'
  assert not list((cloud.root / 'slices').iterdir())


def test_several_slices_train_one_model(cloud):
  cloud.set(SLICES='2')
  cloud.run('tpu_vm.sh', 'up', CONFIG)
  create = next(call for call in cloud.calls() if call[4] == 'create')
  assert create[8:10] == ['--node-count=2', '--node-prefix=mine']
  assert {study['host'] for study in cloud.studies()} == {'mine-0-w-0', 'mine-1-w-0'}
  assert cloud.verbs() == ['create', 'scp', 'scp', 'setup', 'setup', 'start', 'start']
  assert 'study on mine-0-w-0' in cloud.run('tpu_vm.sh', 'logs', '--follow=no')


def test_a_request_that_fails_three_times_is_given_up(cloud):
  cloud.answer('create_states', 'FAILED')
  output = cloud.run('tpu_vm.sh', 'up', CONFIG, code=69)
  assert cloud.verbs().count('create') == 3
  assert 'the request failed' in output


def test_a_gcloud_that_does_not_answer_is_not_an_absent_slice(cloud):
  cloud.run('tpu_vm.sh', 'create')
  cloud.answer('slices/mine/state', 'UNKNOWN')
  output = cloud.run('tpu_vm.sh', 'up', CONFIG, code=69)
  assert cloud.verbs() == ['create']
  assert 'gcloud does not answer' in output and 'auth tokens' in output
  cloud.answer('slices/mine/state', 'ACTIVE', 'UNKNOWN', 'UNKNOWN', 'UNKNOWN', 'UNKNOWN', 'ACTIVE')
  cloud.tell('mine-w-0', '75', '0')
  cloud.run('tpu_vm.sh', 'up', CONFIG)  # known before: a silence is waited out
  assert cloud.verbs() == ['create', 'scp', 'setup', 'start', 'start']


@pytest.mark.parametrize('faults', [
    ['ok', 'after', 'after'],         # after a question: `start` was heard, and its answer lost
    ['ok', 'before'],                 # it was not heard
    ['ok', 'ok', 'before', 'after'],  # later questions
])
def test_a_connection_that_breaks_starts_nothing_twice(cloud, faults):
  cloud.run('tpu_vm.sh', 'create')
  cloud.run('tpu_vm.sh', 'setup')
  cloud.answer('ssh_faults', *faults)
  cloud.tell('mine-w-0', 'hang')
  process = cloud.start('tpu_vm.sh', 'run', CONFIG)
  cloud.hanging()
  cloud.wait_for_event('hosts run')
  cloud.end()
  output, _ = process.communicate(timeout=300)
  assert 'mine-w-0 died of signal 9' in output  # the one that was started, and no second one's 0
  assert [study['host'] for study in cloud.studies()] == ['mine-w-0'] * 2  # killed, run again


def test_interrupted_taken_up_and_stopped(cloud):
  cloud.tell('mine-w-0', 'hang', '0')
  process = cloud.start('tpu_vm.sh', 'up', CONFIG)
  cloud.wait_for_studies(1)
  cloud.wait_for_event('hosts run')
  assert 'another tpu_vm.sh' in cloud.run('tpu_vm.sh', 'up', CONFIG, code=64)
  output = cloud.interrupt(process)
  assert process.returncode == 130 and 'what runs on the slice goes on' in output
  assert 'running' in cloud.run('tpu_vm.sh', 'status')

  assert 'another command' in cloud.run('tpu_vm.sh', 'run', CONFIG, RULES, code=69)
  assert 'stop it before' in cloud.run('tpu_vm.sh', 'setup', code=69)
  process = cloud.start('tpu_vm.sh', 'up', CONFIG)
  cloud.wait_for_event('following it')
  assert 'stopped:75' in cloud.run('tpu_vm.sh', 'stop')
  output, _ = process.communicate(timeout=300)
  assert process.returncode == 75 and 'stopped' in output  # and not restarted
  assert len(cloud.studies()) == 1
  cloud.run('tpu_vm.sh', 'up', CONFIG)
  assert len(cloud.studies()) == 2


def test_run_needs_a_slice(cloud):
  assert 'tpu_vm.sh up asks for one' in cloud.run('tpu_vm.sh', 'run', CONFIG, code=69)
  assert cloud.verbs() == []


def test_status_logs_and_delete(cloud):
  assert 'slice mine: ABSENT' in cloud.run('tpu_vm.sh', 'status')
  cloud.run('tpu_vm.sh', 'up', CONFIG)
  assert re.search(r'READY\nmine-w-0 \S+ exit:0', cloud.run('tpu_vm.sh', 'status'))
  assert 'study on mine-w-0: 0' in cloud.run('tpu_vm.sh', 'logs', '--follow=no', '--lines=5')
  cloud.run('tpu_vm.sh', 'delete')
  assert 'slice mine: ABSENT' in cloud.run('tpu_vm.sh', 'status')


@pytest.mark.parametrize('settings, words', [
    (dict(ZONE=''), ['ZONE is missing in ', 'launch/tpu.env; set it (such as us-west4-a)']),
    (dict(BUCKET=''), ['BUCKET is missing', 'gs://my-bucket/specdistill']),
    (dict(RUNTIME_VERSION=''), ['RUNTIME_VERSION is missing', 'v2-alpha-tpuv5-lite']),
    (dict(BUCKET='/home/me'), ["BUCKET is '/home/me'", 'gs://bucket']),
    (dict(NAME='Mine_1'), ["NAME is 'Mine_1'", 'small letters']),
    (dict(SPOT='true'), ["SPOT is 'true'", 'yes or no']),
    (dict(SLICES='0'), ["SLICES is '0'", 'a number from 1']),
])
def test_settings_are_refused_in_one_sentence(cloud, monkeypatch, settings, words):
  monkeypatch.setenv('ZONE', 'exported-by-chance')
  cloud.set(**settings)
  output = cloud.run('tpu_vm.sh', 'create', code=64)
  assert output.startswith('error: ') and output.count('\n') == 1
  assert all(word in output for word in words), output
  assert not cloud.calls()


def test_missing_settings_file(cloud):
  (cloud.repository / 'launch' / 'tpu.env').unlink()
  output = cloud.run('tpu_vm.sh', 'create', code=64)
  assert 'tpu.env is missing; copy launch/tpu.env.example there' in output


@pytest.mark.parametrize('arguments, sentence', [
    (['up'], 'name a config'),
    (['up', 'configs/missing.py'], 'configs/missing.py is not in commit '),
    (['up', '--dryrun', CONFIG], '--dryrun is no flag'),
    (['up', CONFIG, '--workdir=runs/x'], 'every host must see the workdir'),
    (['up', '--max_restarts=many', CONFIG], "--max_restarts is 'many'"),
    (['create', CONFIG], f"'{CONFIG}' is one word too many"),
])
def test_arguments_are_refused_in_one_sentence(cloud, arguments, sentence):
  output = cloud.run('tpu_vm.sh', *arguments, code=64)
  assert sentence in output and output.count('\n') == 1
  assert not cloud.calls()


def test_what_is_not_committed_is_refused_or_left_out(cloud):
  (cloud.repository / 'configs' / 'new.py').write_text('')
  output = cloud.run('tpu_vm.sh', 'up', CONFIG, code=64)
  assert 'configs/new.py; commit' in output and not cloud.calls()
  output = cloud.run('tpu_vm.sh', 'up', '--allow_uncommitted', CONFIG)
  assert 'warning: left out, since not committed: configs/new.py' in output
  homes = list(cloud.root.glob('slices/mine/mine/*/specdistill/code/configs'))
  assert [path.name for path in homes[0].iterdir()] == ['study.py']
