"""The launch scripts in a repository of their own, before a cloud that gcloud.py plays."""

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest

TESTS = pathlib.Path(__file__).resolve().parents[1]
SETTINGS = dict(
    PROJECT='proj', ZONE='us-west4-a', BUCKET='gs://bucket/sd', NAME='mine',
    ACCELERATOR_TYPE='v5litepod-16', RUNTIME_VERSION='v2-alpha-tpuv5-lite', XPK_CLUSTER='pond',
    DOCKER_IMAGE='image')
# Replaces itself by what it is given: a test before this one may have left the signal ignored or
# blocked in its process, and both are inherited.
_HEARING = """import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
os.execv(sys.argv[1], sys.argv[1:])"""
AT = ['--project=proj', '--zone=us-west4-a', '--quiet']
ENVIRONMENT = f"""mkdir -p "$home/code/.venv/bin"
ln -sf {sys.executable} "$home/code/.venv/bin/python"
"""


def _script(path, text):
  path.write_text(f'#!/bin/sh\n{text}\n')
  path.chmod(0o755)


@dataclasses.dataclass
class Cloud:
  root: pathlib.Path

  @property
  def repository(self):
    return self.root / 'repository'

  def environment(self):
    return dict(
        os.environ, PATH=f'{self.root / "bin"}:{os.environ["PATH"]}', STUB_CLOUD=str(self.root),
        SPECDISTILL_POLL_SECONDS='0.03', SPECDISTILL_UNEVEN_SECONDS='3',
        SPECDISTILL_COPY_SECONDS='2', STUB_HOST='here')

  def start(self, script, *arguments):
    """Begins a script, which hears Ctrl-C even where the tests were begun so as not to."""
    return subprocess.Popen(
        [sys.executable, '-c', _HEARING, self.repository / 'launch' / script, *arguments],
        cwd=self.repository, text=True,
        env=self.environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL, start_new_session=True)

  def interrupt(self, process):
    """Ctrl-C, which its gcloud gets as well; returns what was printed.

    Bash drops an interrupt where the command that it waits for ends of itself, so it is pressed
    again; at last the terminal is closed, which bash never drops.
    """
    for number in (signal.SIGINT, signal.SIGINT, signal.SIGINT, signal.SIGTERM):
      os.killpg(process.pid, number)
      with contextlib.suppress(subprocess.TimeoutExpired):
        return process.communicate(timeout=20)[0]
    left = subprocess.run(['ps', '-s', str(process.pid), '-o', 'pid,ppid,stat,ignored,args'],
                          capture_output=True, text=True, check=False)
    raise AssertionError(f'not heard by {process.pid}, {process.poll()}:\n{left.stdout}')

  def run(self, script, *arguments, code=0):
    """Standard output and error of a script, which must end with `code`."""
    process = self.start(script, *arguments)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == code, output
    return output

  def set(self, **settings):
    lines = [f'{key}={value}\n' for key, value in (SETTINGS | settings).items()]
    (self.repository / 'launch' / 'tpu.env').write_text(''.join(lines))

  def tell(self, host, *acts):
    (self.root / 'acts' / host).write_text('\n'.join(acts))

  def answer(self, name, *lines):
    (self.root / name).write_text('\n'.join(lines))

  def calls(self):
    path = self.root / 'calls.jsonl'
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

  def verbs(self):
    """What was asked of gcloud, briefly: `create`, `scp`, `setup`, `start`, ...; no questions."""
    found = []
    for _, _, _, _, verb, *rest in self.calls():
      if verb == 'ssh':
        command = next(word for word in rest if word.startswith('--command='))
        verb = command.split()[2]
      found.append(verb)
    return [verb for verb in found if verb not in ('describe', 'state', 'log')]

  def studies(self):
    path = self.root / 'studies.jsonl'
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

  def wait_for_studies(self, number):
    self._wait(lambda: len(self.studies()) >= number)

  def hanging(self):
    """The process of the study that was told to hang, once it does."""
    pids = self.root / 'pids'
    self._wait(lambda: pids.exists() and pids.read_text().endswith('\n'))
    return int(pids.read_text().split()[-1])

  def wait_for_event(self, words, name='mine', file='events.log'):
    log = self.repository / 'runs' / 'launch' / name / file
    self._wait(lambda: log.exists() and words in log.read_text())

  def _wait(self, come_true):
    deadline = time.monotonic() + 120
    while not come_true():
      assert time.monotonic() < deadline, self.studies()
      time.sleep(0.05)

  def end(self):
    pids = self.root / 'pids'
    for pid in pids.read_text().split() if pids.exists() else []:
      try:
        os.kill(int(pid), signal.SIGKILL)
      except ProcessLookupError:
        pass


def git(repository, *words):
  return subprocess.run(['git', *words], cwd=repository, check=True, text=True,
                        stdout=subprocess.PIPE).stdout.strip()


def commit(repository, message='all'):
  """Commits all that is there, be it nothing; returns the hash."""
  git(repository, 'add', '-A')
  git(repository, '-c', 'user.name=t', '-c', 'user.email=t@t', 'commit', '-q', '--allow-empty',
      '-m', message)
  return git(repository, 'rev-parse', 'HEAD')


def make(root):
  """A cloud with no slice, and a repository whose last commit has a study that plays along."""
  cloud = Cloud(root)
  (root / 'acts').mkdir(parents=True)
  (root / 'bin').mkdir()
  python = f'{sys.executable} -I -S {TESTS / "stubs"}'
  _script(root / 'bin' / 'gcloud', f'exec {python}/gcloud.py "$@"')
  _script(root / 'bin' / 'xpk', f'exec {python}/record.py xpk "$@"')
  _script(root / 'bin' / 'kubectl', f'exec {python}/record.py kubectl "$@"')
  _script(root / 'bin' / 'hostname', 'echo "$STUB_HOST"')
  _script(root / 'bin' / 'python3.11', 'exit 0')  # what a host finds when it is set up
  repository = cloud.repository
  shutil.copytree(TESTS.parent / 'launch', repository / 'launch',
                  ignore=shutil.ignore_patterns('*.env'))
  shutil.copy(TESTS.parent / '.gitattributes', repository)
  (repository / 'launch' / 'environment.sh').write_text(ENVIRONMENT)
  (repository / '.gitignore').write_text('/launch/*.env\n/runs/\n__pycache__/\n')
  (repository / 'specdistill_jax').mkdir()
  shutil.copy(TESTS / 'stubs' / 'study.py', repository / 'specdistill_jax' / 'main.py')
  (repository / 'configs').mkdir()
  (repository / 'configs' / 'study.py').write_text('def get_sweep():\n  return [{}] * 5\n')
  git(repository, 'init', '-q', '--template=')
  commit(repository)
  cloud.set()
  return cloud


NEEDED = pytest.mark.skipif(
    not all(map(shutil.which, ('git', 'bash', 'setsid'))), reason='needs git, bash and setsid')


@pytest.fixture
def cloud(tmp_path):
  """A cloud of one's own, of which nothing goes on running."""
  found = make(tmp_path / 'cloud')
  yield found
  found.end()
