"""Starting as one process or many: flags, detection, and how a child's end is told."""

import io
import os
import signal
import subprocess
import sys
import time

import pytest

from specdistill_jax import processes
from specdistill_jax.training import preemption

NAMED = dict(coordinator_address='host:1234', num_processes=4, process_id=3)


@pytest.fixture
def environment(monkeypatch):
  """No cluster, whatever the machine that tests run on."""
  for name in list(os.environ):
    if name.startswith(('SLURM', 'OMPI', 'TPU', 'KUBERNETES', 'MEGASCALE')):
      monkeypatch.delenv(name)
  return monkeypatch


def test_a_machine_alone_joins_nothing(environment):
  assert processes.cluster('auto', processes.Cluster()) is None
  assert processes.cluster('off', processes.Cluster()) is None


def slurm(environment, tasks):
  for name, value in dict(SLURM_JOB_ID='77', SLURM_STEP_NODELIST='node[001-002]',
                          SLURM_NTASKS=str(tasks), SLURM_PROCID='1', SLURM_LOCALID='0').items():
    environment.setenv(name, value)


def test_a_slurm_step_of_several_tasks_is_joined(environment):
  slurm(environment, tasks=2)
  assert processes.cluster('auto', processes.Cluster()) == processes.Cluster()
  assert processes.cluster('off', processes.Cluster()) is None


def test_a_slurm_step_of_one_task_is_a_machine_alone(environment):
  slurm(environment, tasks=1)
  assert processes.cluster('auto', processes.Cluster()) is None


def test_flags_name_the_processes(environment):
  slurm(environment, tasks=2)
  given = processes.Cluster(**NAMED)
  assert processes.cluster('auto', given) == processes.cluster('explicit', given) == given
  assert processes.cluster('auto', processes.Cluster('host:1', 1, 0)) is None


@pytest.mark.parametrize('mode, changed, message', [
    ('explicit', dict(coordinator_address=None), '--coordinator_address is missing'),
    ('auto', dict(process_id=None), '--process_id is missing'),
    ('auto', dict(process_id=4), '--process_id is 4; .* from 0 to 3'),
    ('auto', dict(coordinator_address='host'), "'host'; give HOST:PORT"),
    ('auto', dict(heartbeat_seconds=0), '--heartbeat_seconds is 0'),
    ('off', {}, '--distributed=off takes no coordinator_address'),
    ('on', {}, "--distributed is 'on', and must be one of auto, off, explicit"),
])
def test_flags_that_contradict_one_another_are_refused(environment, mode, changed, message):
  with pytest.raises(ValueError, match=message):
    processes.cluster(mode, processes.Cluster(**NAMED | changed))


def test_alone_there_is_nobody_to_wait_for():
  processes.meet('here')
  assert processes.agree('what', lambda: [1, 'a']) == [1, 'a']
  assert processes.is_first() and processes.count() == 1


def supervised(program):
  """A Python of its own that exits as `supervised` says of `program`, source text."""
  return subprocess.Popen(
      [sys.executable, '-c', f'import os, pathlib, signal, sys, time\n'
       f'from specdistill_jax import processes\n{program}\n'
       'sys.exit(processes.supervised(program))'], stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize('program, expected', [
    ('program = lambda: 0', 0), ('program = lambda: 2', 2), ('program = lambda: 75', 75),
    ('program = lambda: {}["a bug"]', 1),
    ('program = os.abort', 75),  # what JAX does to a process whose peers are gone
    ('program = lambda: os.kill(os.getpid(), signal.SIGKILL)', 137),
])
def test_the_end_of_a_child_becomes_an_exit_status(program, expected):
  process = supervised(program)
  _, errors = process.communicate()
  assert process.returncode == expected
  if 'abort' in program:
    assert 'lost the other processes' in errors


def test_a_first_sigterm_is_passed_on_and_a_second_ends_at_once(tmp_path):
  process = supervised(f"""
path = pathlib.Path({str(tmp_path)!r})
def program():
  signal.signal(signal.SIGTERM, lambda *_: (path / 'told').touch())
  (path / 'ready').touch()
  time.sleep(60)
  return 0
""")
  for name in ('ready', 'told'):
    while not (tmp_path / name).exists():
      assert process.poll() is None
      time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
  process.communicate()
  assert process.returncode == 143


def interrupted(tmp_path, body, *, ignored=False):
  """A Python of its own that watches for signals and does `body`; it is up when this returns."""
  process = subprocess.Popen(
      [sys.executable, '-c', 'import pathlib, signal, sys, time\n'
       f'path = pathlib.Path({str(tmp_path)!r})\n'
       f'signal.signal(signal.SIGINT, signal.{"SIG_IGN" if ignored else "default_int_handler"})\n'
       'signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])\n'
       'from specdistill_jax.training import preemption\n'
       'preemption.watch(second_ends=True)\n'
       f'{body}'], stderr=subprocess.PIPE, text=True)
  while not (tmp_path / 'ready').exists():
    assert process.poll() is None
    time.sleep(0.01)
  return process


TRAINING = """
with preemption.training():
  (path / 'ready').touch()
  while not preemption.asked():
    time.sleep(0.01)
  (path / 'saved').touch()
  while not (path / 'end').exists():
    time.sleep(0.01)
"""
WAITING = "(path / 'ready').touch()\ntime.sleep(60)"


def test_ctrl_c_ends_at_once_where_nothing_is_lost(tmp_path):
  process = interrupted(tmp_path, WAITING)
  process.send_signal(signal.SIGINT)
  _, errors = process.communicate()
  assert process.returncode == processes.EXIT_AGAIN
  assert errors == 'Ctrl-C: nothing to save here, then exit status 75\n'


def test_ctrl_c_lets_training_save_and_a_second_one_does_not(tmp_path):
  process = interrupted(tmp_path, TRAINING)
  process.send_signal(signal.SIGINT)
  while not (tmp_path / 'saved').exists():
    assert process.poll() is None
    time.sleep(0.01)
  process.send_signal(signal.SIGINT)
  _, errors = process.communicate()
  assert process.returncode == 128 + signal.SIGINT
  assert errors == 'Ctrl-C: saving after this step, then exit status 75\n'


def test_ctrl_c_stays_ignored_where_it_was(tmp_path):
  process = interrupted(tmp_path, WAITING, ignored=True)
  process.send_signal(signal.SIGINT)
  time.sleep(0.3)  # sent at once, the second may be heard first
  process.send_signal(signal.SIGTERM)
  _, errors = process.communicate()
  assert process.returncode == processes.EXIT_AGAIN and 'Ctrl-C' not in errors


@pytest.mark.parametrize('answers, told', [
    (['NONE', 'NONE', 'TERMINATE_ON_HOST_MAINTENANCE'], 3),
    (['TERMINATE_ON_HOST_MAINTENANCE'] * 2 + ['NONE', 'TERMINATE_ON_HOST_MAINTENANCE'], 4)])
def test_a_notice_that_stood_before_the_start_stops_nothing(answers, told, monkeypatch):
  """It has stopped the attempt before, and would stop each of the next ones at once."""
  asked, heard = [], []
  def answer(request, timeout):
    del timeout
    if 'preempted' in request.full_url:
      return io.BytesIO(b'FALSE')
    asked.append(request.full_url)
    return io.BytesIO(answers[len(asked) - 1].encode())
  monkeypatch.setattr(preemption.urllib.request, 'urlopen', answer)
  monkeypatch.setattr(preemption, '_METADATA_SECONDS', 0)
  monkeypatch.setattr(preemption, '_notice', heard.append)
  preemption._poll_metadata('metadata.test')
  assert len(asked) == told
  assert heard == ['instance/maintenance-event TERMINATE_ON_HOST_MAINTENANCE']
