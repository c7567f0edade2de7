"""One run on several real processes: the figures of one process, and an end that all agree on."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest

import compiler
import studies

ROOT = pathlib.Path(__file__).resolve().parents[1]
FIGURES = ('loss', 'alpha', 'grad_norm', 'validation_cross_entropy', 'validation_alpha',
           'block_efficiency', 'acceptance_by_position', 'on_policy', 'learning_rate')


@pytest.fixture(scope='module')
def cache(tmp_path_factory):
  return tmp_path_factory.mktemp('compiled')


def study(workdir):
  studies.write_data(workdir)
  (workdir / 'done').mkdir()
  (workdir / 'done' / 'prepare.json').write_text('{}')
  return workdir


def start(workdir, cache, *, count, devices, stages, fields='steps=6'):
  """Starts the command on `count` processes of `devices` devices each."""
  with socket.socket() as free:
    free.bind(('localhost', 0))
    port = free.getsockname()[1]
  environment = os.environ | dict(
      JAX_PLATFORMS='cpu',
      XLA_FLAGS=f'--xla_force_host_platform_device_count={devices} {compiler.QUICK}',
      JAX_COMPILATION_CACHE_DIR=str(cache), JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS='0')
  def process(index):
    with open(workdir / f'output{index}', 'ab') as output:
      return subprocess.Popen(
          [sys.executable, '-m', 'specdistill_jax.main',
           f'--config={ROOT / "tests" / "tiny_config.py"}:{fields}', f'--workdir={workdir}',
           f'--stages={stages}', f'--coordinator_address=localhost:{port}',
           f'--num_processes={count}', f'--process_id={index}', '--heartbeat_seconds=10'],
          cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
  return [process(index) for index in range(count)]


def statuses(started):
  try:
    return [process.wait(timeout=900) for process in started]
  finally:
    for process in started:  # none outlives a test that fails
      process.kill()


def output(workdir, index):
  return (workdir / f'output{index}').read_text()


def lines(workdir):
  return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


def wait_for_step(workdir, step, started):
  """Returns when a checkpoint of the target past `step` is there."""
  while not any(int(path.name) >= step for path in workdir.glob('target/checkpoints/*')
                if path.name.isdecimal()):
    assert all(process.poll() is None for process in started), output(workdir, 0)
    time.sleep(0.02)


@pytest.fixture(scope='module')
def alone(tmp_path_factory, cache):
  """Target, draft and distillation with rollouts, in one process of four devices."""
  workdir = study(tmp_path_factory.mktemp('alone'))
  assert statuses(start(workdir, cache, count=1, devices=4, stages='target,draft,distill')) == [0]
  return workdir


@pytest.mark.parametrize('count, devices, stages', [
    (2, 2, 'target,draft,distill'), (4, 1, 'target')])
def test_processes_give_the_figures_of_one(alone, cache, tmp_path, count, devices, stages):
  """Rows, dropout keys and rollouts are those of one process; sums are added in another order."""
  study(tmp_path)
  started = start(tmp_path, cache, count=count, devices=devices, stages=stages)
  assert statuses(started) == [0] * count, output(tmp_path, 0)
  ours = lines(tmp_path)
  theirs = [row for row in lines(alone) if row['stage'] in stages.split(',')]
  assert [(row['run'], row['step']) for row in ours] == [
      (row['run'], row['step']) for row in theirs]
  for row, other in zip(ours, theirs):
    for name in FIGURES:
      figure, wanted = row.get(name), other.get(name)
      assert figure == (wanted if wanted is None else pytest.approx(wanted, rel=1e-5)), (
          name, row['run'], row['step'])
  assert 'target' in output(tmp_path, 0)
  for index in range(1, count):  # only the first speaks
    assert '[target]' not in output(tmp_path, index)


def test_one_that_is_asked_or_killed_ends_all_and_the_next_run_goes_on(cache, tmp_path):
  """SIGTERM to one of two: both save at one step. SIGKILL of it: the other says so, in time.

  The run then ends in a single process, on another mesh.
  """
  study(tmp_path)
  run = dict(stages='target', fields='steps=400,checkpoint_every=100,eval_every=400,log_every=1')
  started = start(tmp_path, cache, count=2, devices=1, **run)
  wait_for_step(tmp_path, 100, started)
  started[1].send_signal(signal.SIGTERM)
  assert statuses(started) == [75, 75]
  assert 'stopped and saved: target at step' in output(tmp_path, 0)
  stopped = lines(tmp_path)[-1]['step']
  assert 100 <= stopped < 400 and (tmp_path / 'target' / 'checkpoints' / str(stopped)).exists()

  started = start(tmp_path, cache, count=2, devices=1, **run)
  wait_for_step(tmp_path, stopped // 100 * 100 + 100, started)
  started[1].kill()
  begun = time.monotonic()
  assert statuses(started) == [75, -signal.SIGKILL]
  assert time.monotonic() - begun < 60
  assert 'lost' in output(tmp_path, 0) and 'run the same command' in output(tmp_path, 0)

  assert statuses(start(tmp_path, cache, count=1, devices=2, **run)) == [0]
  assert [row['step'] for row in lines(tmp_path)] == list(range(401))
