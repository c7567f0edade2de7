"""A study in a bucket, killed while it saves and resumed, and the same study on a disk.

  python tests/buckets.py [--more] [--latency=0.05]

Both must end with the same lines in metrics.jsonl and results.jsonl, times apart. With --more it
is distilled as well and killed in other places too, and another one is begun by one process,
killed, and finished by two.

The bucket is `bucket.py`, in a process of its own. Runs are forks of this one (forks.py).
"""

import argparse
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

import forks  # first: it sets the environment of JAX

import bucket
import chats_config
import numpy as np

from specdistill_jax.evaluation import rows

_TESTS = pathlib.Path(__file__).resolve().parent
TIMES = ('tokens_per_second', 'rollout_share', 'data_wait_share')
MEASURED = ('alpha', 'block_efficiency', 'acceptance_by_position', 'num_prompts',
            'reached_by_position')
CHATS = f'{bucket.ROOT}/chats.jsonl'
ARM = 'forward_kl-fixed-seed0'


class Studies:
  """Starts runs of the command, with one cache of compilations and their output in a folder."""

  def __init__(self, folder: pathlib.Path, port: int, argument: str):
    self.folder, self.port, self.argument, self.count = folder, port, argument, 0

  def start(self, workdir: str, *flags: str) -> int:
    """Forks a process that runs the command; returns its number."""
    self.count += 1
    return forks.start(
        self.folder / f'output{self.count}', self.folder / 'compiled',
        f'--config={_TESTS / "chats_config.py"}:{self.argument}', f'--workdir={workdir}', *flags)

  def finish(self, *children: int) -> None:
    for child in children:
      _, status, used = os.wait4(child, 0)
      if status:
        self.fail(f'status {os.waitstatus_to_exitcode(status)}')
      print(f'finished, {used.ru_utime + used.ru_stime:.0f} s of processors', flush=True)

  def fail(self, what: str) -> None:
    outputs = sorted(self.folder.glob('output*'))
    raise RuntimeError('\n'.join([what] + [path.read_text() for path in outputs]))

  def killed(self, workdir: str, awaited: str, *flags: str) -> None:
    """A run that is killed once the object `awaited` is there."""
    child = self.start(f'{bucket.ROOT}/{workdir}', *flags)
    while self.read(f'{workdir}/{awaited}') is None:
      if os.waitpid(child, os.WNOHANG)[0]:
        self.fail(f'ended before {awaited} was there')
      time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    print(f'{workdir}: killed when {awaited} was there', flush=True)

  def read(self, name: str) -> bytes | None:
    return bucket.request(self.port, name)

  def two(self, workdir: str, *flags: str) -> None:
    self.finish(*[self.start(workdir, *flags, *own) for own in forks.joined(2)])


def lines(content: bytes) -> list[dict]:
  """What a file of JSON lines says but for times; raises where a line is torn."""
  assert content.endswith(b'\n')
  return [{name: value for name, value in json.loads(line).items() if name not in TIMES}
          for line in content.splitlines()]


def results(content: bytes) -> list[tuple]:
  return [(rows.identity(row), *(row[name] for name in MEASURED)) for row in map(
      json.loads, content.splitlines())]


def assert_close(ours: list[dict], theirs: list[dict]) -> None:
  assert [(row['run'], row['step']) for row in ours] == [
      (row['run'], row['step']) for row in theirs]
  for row, other in zip(ours, theirs):
    np.testing.assert_allclose(row['loss'] if row['step'] else 0, other.get('loss') or 0, rtol=1e-4)


def compare(studies: Studies, folder: pathlib.Path, more: bool) -> None:
  disk, made = folder / 'disk', f'{bucket.ROOT}/made'
  stages = 'prepare,target,draft,distill,evaluate' if more else 'prepare,target,draft,evaluate'
  studies.finish(studies.start(str(disk), f'--stages={stages}'))
  if more:
    studies.killed('made', 'data/train-00000.array_record')  # while prepare uploads, or soon after
  studies.killed('made', 'target/checkpoints/4/params/_METADATA')  # while saving, or soon after
  if more:
    studies.killed('made', f'distill/{ARM}/checkpoints/2/commit_success.txt')
  studies.finish(studies.start(made))
  assert lines(studies.read('made/metrics.jsonl')) == lines((disk / 'metrics.jsonl').read_bytes())
  found = results(studies.read('made/results.jsonl'))
  assert found == results((disk / 'results.jsonl').read_bytes()) and len(found) == 1 + more
  for name in ('report.md', 'report.html', 'speedup.png', 'done/report.json'):
    assert studies.read(f'made/{name}'), name
  assert (bucket.request(studies.port, 'made/data/vocabulary.model')
          == (disk / 'data' / 'vocabulary.model').read_bytes())
  print('all rows and metrics as on a disk', flush=True)
  if more:
    go_on_by_two(studies, disk)


def go_on_by_two(studies: Studies, disk: pathlib.Path) -> None:
  stages = '--stages=prepare,target'
  studies.killed('two', 'target/checkpoints/2/commit_success.txt', stages)
  studies.two(f'{bucket.ROOT}/two', stages)
  of_disk = [row for row in lines((disk / 'metrics.jsonl').read_bytes())
             if row['stage'] == 'target']
  assert_close(lines(studies.read('two/metrics.jsonl')), of_disk)
  print('two processes go on where one was killed', flush=True)


def _main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--more', action='store_true')
  parser.add_argument('--latency', type=float, default=0.0, help='seconds of a request')
  asked = parser.parse_args()
  server = subprocess.Popen([sys.executable, _TESTS / 'bucket.py', str(asked.latency)],
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE)
  with server, tempfile.TemporaryDirectory() as name:
    port = int(server.stdout.readline())
    os.environ.update(bucket.environment(port), XDG_CACHE_HOME=f'{name}/cache')
    bucket.upload(port, 'chats.jsonl', chats_config.chats().encode())
    begun = time.monotonic()
    folder, argument = pathlib.Path(name), CHATS if asked.more else f'{CHATS},short'
    compare(Studies(folder, port, argument), folder, asked.more)
    spent = os.times()
    print(f'{time.monotonic() - begun:.0f} s, '
          f'{sum(spent[:4]):.0f} s of processors', flush=True)
    server.stdin.close()


if __name__ == '__main__':
  _main()
