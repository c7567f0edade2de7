"""Kills training at random moments and resumes it, many times, and compares with a run left alone.

  python tests/kills.py [--kills=50] [--asks=0] [--seed=0] [--stages=target,draft,distill]

Every study ends when a run of its command ends by itself. Its parameters, optimizer states and
data positions must then be those of the study that nobody killed, bit for bit, and metrics.jsonl
must have the same lines, none missing, none twice.

Other studies are asked to stop (SIGTERM), --asks times, and must save and exit with status 75.

Runs are forks of this process (forks.py) and share a compilation cache.
"""

import argparse
import json
import os
import pathlib
import random
import shutil
import signal
import tempfile
import time

import forks  # first: it sets the environment of JAX

import jax
import numpy as np

import studies
from specdistill_jax import sharding
from specdistill_jax.checkpoints import store
from specdistill_jax.models import families
from specdistill_jax.training import state as state_lib

_TESTS = pathlib.Path(__file__).resolve().parent
TIMES = ('tokens_per_second', 'rollout_share', 'data_wait_share')
ARGUMENTS = 'steps=24,checkpoint_every=2,eval_every=12,log_every=1,dropout=0.1'


def start(workdir: pathlib.Path, stages: str, cache: pathlib.Path) -> int:
  return forks.start(workdir / 'output', cache, f'--config={_TESTS / "tiny_config.py"}:{ARGUMENTS}',
                     f'--workdir={workdir}', f'--stages={stages}')


def prepare(folder: pathlib.Path) -> None:
  """What every study begins with. In a fork: its threads would not survive later forks."""
  child = os.fork()
  if child == 0:
    studies.write_data(folder / 'prepared')
    os._exit(0)
  assert os.waitpid(child, 0)[1] == 0
  (folder / 'prepared' / 'done').mkdir()
  (folder / 'prepared' / 'done' / 'prepare.json').write_text('{}')


def study(workdir: pathlib.Path) -> pathlib.Path:
  """A workdir with prepared data."""
  return shutil.copytree(workdir.with_name('prepared'), workdir)


def alone(folder: pathlib.Path, stages: str, cache: pathlib.Path) -> tuple[pathlib.Path, float]:
  """The study that nobody kills, and the seconds it takes once everything is compiled."""
  for name in ('first', 'alone'):
    workdir = study(folder / name)
    begun = time.monotonic()
    _, status = os.waitpid(start(workdir, stages, cache), 0)
    if status:
      raise RuntimeError(f'status {status}\n' + (workdir / 'output').read_text())
  return workdir, time.monotonic() - begun


def killed(folder: pathlib.Path, stages: str, cache: pathlib.Path, seconds: float, kills: int,
           rng: random.Random, ask: bool, say=print) -> list[pathlib.Path]:
  """Studies that were killed, or asked to stop, `kills` times in all, each then finished."""
  kind, workdirs, done, fresh = 'ask' if ask else 'kill', [], 0, True
  while done < kills or not fresh:
    if fresh:
      workdirs.append(study(folder / f'{kind}-{len(workdirs)}'))
    workdir = workdirs[-1]
    child, seen = start(workdir, stages, cache), written(workdir)
    # In one of five runs while it starts; else some lines later, whatever the machine's load.
    early, wanted = rng.random() < 0.2, seen + rng.randrange(1, 16)
    deadline, status = time.monotonic() + rng.uniform(0.0, 0.5) * seconds, None
    while status is None and (done >= kills or (
        time.monotonic() < deadline if early else written(workdir) < wanted)):
      time.sleep(0.002)
      status = forks.ended(child)
    if status is None and not early:
      time.sleep(rng.uniform(0.0, 0.1))  # into the midst of what follows a line
    if status is None:
      os.kill(child, signal.SIGTERM if ask else signal.SIGKILL)
      status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
      # Before the command has taken over SIGTERM, it ends as any process does.
      assert status in ((0, 75, -signal.SIGTERM) if ask else (0, -signal.SIGKILL)), status
    fresh = status == 0
    if status > 0 and status != 75:
      raise RuntimeError((workdir / 'output').read_text())
    if not fresh:
      done += 1
      if status == 75 and written(workdir):
        last = lines(workdir)[-1]
        assert newest(workdir)[last['run']] == last['step'], (newest(workdir), last)
      saving = any('orbax-checkpoint-tmp' in path.name for path in checkpoints(workdir))
      say(f'{kind} {done}: status {status}, study {len(workdirs)}, newest step {newest(workdir)}'
          f'{", while saving" if saving else ""}')
  return workdirs


def written(workdir: pathlib.Path) -> int:
  """Lines of metrics.jsonl so far."""
  path = workdir / 'metrics.jsonl'
  return path.read_bytes().count(b'\n') if path.exists() else 0


def checkpoints(workdir: pathlib.Path) -> list[pathlib.Path]:
  """Every checkpoint of every run, half-written ones too; what vanishes meanwhile is no error."""
  found = []
  for folder, names, _ in os.walk(workdir):
    if pathlib.Path(folder).name == 'checkpoints':
      found += [pathlib.Path(folder, name) for name in names]
      names.clear()
  return found


def newest(workdir: pathlib.Path) -> dict[str, int]:
  """The newest checkpoint of each run."""
  steps = {}
  for path in checkpoints(workdir):
    if path.name.isdecimal():
      name = path.parts[-3]
      steps[name] = max(steps.get(name, 0), int(path.name))
  return steps


def lines(workdir: pathlib.Path) -> list[dict]:
  """What metrics.jsonl says but for times; raises where a line is torn."""
  text = (workdir / 'metrics.jsonl').read_text()
  assert text.endswith('\n')
  return [{name: value for name, value in json.loads(line).items() if name not in TIMES}
          for line in text.splitlines()]


def state(workdir: pathlib.Path, run: str) -> tuple:
  """Step, parameters, optimizer and data position of a run's newest checkpoint."""
  directory, settings = workdir / run, studies.config().target.train
  abstract = jax.eval_shape(
      lambda: families.init(store.load_config(directory), jax.random.key(0)))
  opt_state = jax.eval_shape(state_lib.optimizer(settings).init, abstract)
  with store.Store(directory) as checkpoints:
    step = checkpoints.latest_step()
    return (step, *checkpoints.restore(step, abstract, opt_state, sharding.make_mesh()))


def assert_same(workdir: pathlib.Path, other: pathlib.Path) -> None:
  runs = sorted(str(path.parent.relative_to(other)) for path in other.glob('**/checkpoints'))
  assert runs and lines(workdir) == lines(other), workdir.name
  for run in runs:
    ours, theirs = state(workdir, run), state(other, run)
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def _main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--kills', type=int, default=50)
  parser.add_argument('--asks', type=int, default=0)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--stages', default='target,draft,distill')
  asked = parser.parse_args()
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    prepare(folder)
    reference, seconds = alone(folder, asked.stages, folder / 'cache')
    say = lambda text: print(text, flush=True)
    say(f'a study takes {seconds:.1f} s')
    kinds = dict(kills=asked.kills, asks=asked.asks)
    workdirs = {kind: killed(folder, asked.stages, folder / 'cache', seconds, count,
                             random.Random(asked.seed), kind == 'asks', say)
                for kind, count in kinds.items() if count}
    for kind, found in workdirs.items():  # starts a backend, so no forks from here on
      for workdir in found:
        assert_same(workdir, reference)
      say(f'{kinds[kind]} {kind} in {len(found)} studies: all equal to the one left alone')


if __name__ == '__main__':
  _main()
