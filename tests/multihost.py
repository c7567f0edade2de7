"""Runs the command on several processes, for test_multihost.py to look at what they leave.

  python tests/multihost.py FOLDER

Each study has a folder in FOLDER; FOLDER/ended.json says how the processes of each run ended.
Runs are forks of this process (forks.py).
"""

import json
import os
import pathlib
import signal
import sys
import time

import forks
import kills

_TESTS = pathlib.Path(__file__).resolve().parent
# count of processes, devices of each, stages
STUDIES = dict(alone=(1, 4, 'target,draft,distill'), two=(2, 2, 'target,draft,distill'),
               four=(4, 1, 'target'))
LONG = 'steps=240,checkpoint_every=20,eval_every=240,log_every=1'


def start(workdir: pathlib.Path, count: int, devices: int, stages: str,
          fields: str = 'steps=6', heartbeat_seconds: int = 60) -> list[int]:
  """Starts the command on `count` processes of `devices` devices each.

  A process that a busy machine leaves standing is not to be taken for dead.
  """
  return [forks.start(workdir / f'output{index}', workdir.with_name('cache'),
                      f'--config={_TESTS / "tiny_config.py"}:{fields}', f'--workdir={workdir}',
                      f'--stages={stages}', f'--heartbeat_seconds={heartbeat_seconds}', *own,
                      devices=devices)
          for index, own in enumerate(forks.joined(count))]


def statuses(started: list[int], seconds: float = 900.0) -> list[int]:
  """How each ended; those that hang are killed."""
  found, deadline = {}, time.monotonic() + seconds
  while len(found) < len(started):
    for process in set(started) - set(found):
      if time.monotonic() > deadline:
        os.kill(process, signal.SIGKILL)
      if (status := forks.ended(process)) is not None:
        found[process] = status
    time.sleep(0.02)
  return [found[process] for process in started]


def signalled(workdir: pathlib.Path, step: int, number: int) -> tuple[list[int], float]:
  """Two processes, of which one gets a signal when a checkpoint of `step` or later is there.

  Returns:
    How they ended, and the seconds that took.
  """
  started = start(workdir, 2, 1, 'target', LONG, heartbeat_seconds=10)
  gone = lambda: any(os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT)
                     for process in started)
  while kills.newest(workdir).get('target', 0) < step and not gone():
    time.sleep(0.02)
  begun = time.monotonic()
  os.kill(started[1], number)
  return statuses(started), time.monotonic() - begun


def run(folder: pathlib.Path) -> dict:
  kills.prepare(folder)
  found = {name: statuses(start(kills.study(folder / name), *how))
           for name, how in STUDIES.items()}
  workdir = kills.study(folder / 'signalled')
  found['asked'], _ = signalled(workdir, 20, signal.SIGTERM)
  found['stopped'], found['saved'] = kills.lines(workdir)[-1]['step'], kills.newest(workdir)
  found['killed'], found['seconds'] = signalled(
      workdir, found['stopped'] // 20 * 20 + 20, signal.SIGKILL)
  found['finished'] = statuses(start(workdir, 1, 2, 'target', LONG))
  return found


if __name__ == '__main__':
  ended = run(pathlib.Path(sys.argv[1]))
  (pathlib.Path(sys.argv[1]) / 'ended.json').write_text(json.dumps(ended))
