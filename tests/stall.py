"""What saving costs the step loop, in one run on this machine: a JSON line.

  PYTHONPATH=. python tests/stall.py [pairs] [batch_size]

A target of the default size trains, and saves after every other block of 50 steps. A block that
begins with a save, which is then written beside it, is compared with the one after, which has
none: so the machine's drift cancels. `stall` is what the former take longer, as a share.
"""

import json
import pathlib
import sys
import tempfile
import time

import numpy as np

from configs import common
from specdistill_jax.checkpoints import store
from specdistill_jax.data import records
from specdistill_jax.data import shards
from specdistill_jax.stages import train
from specdistill_jax.training import profiling

BLOCK, LENGTH, VOCAB_SIZE = 50, 96, 1000


def write_data(directory: pathlib.Path) -> None:
  rng = np.random.default_rng(0)
  metadata = dict(vocab_size=VOCAB_SIZE, vocabulary_digest='none', max_length=LENGTH,
                  source='fixed', task='noise', metric=None)
  for split, count in (('train', 512), ('validation', 16)):
    shards.write(directory, split, [
        records.Row(rng.integers(3, VOCAB_SIZE, LENGTH).astype(np.int32), 16,
                    (np.arange(LENGTH) >= 16).astype(np.uint8), '', f'{split}-{index}')
        for index in range(count)], metadata)


def measure(workdir: pathlib.Path, pairs: int, batch_size: int) -> dict[str, float]:
  write_data(workdir / 'data')
  config = common.study('stall')
  config.target.train.update(steps=2 * BLOCK * (pairs + 1), batch_size=batch_size,
                             checkpoint_every=2 * BLOCK, eval_every=10 ** 6, log_every=BLOCK)
  starts, blocked = [], []
  profiling.before = lambda *_: starts.append(time.perf_counter())
  save = store.Store.save

  def timed(*args, **kwargs):
    started = time.perf_counter()
    save(*args, **kwargs)
    blocked.append(time.perf_counter() - started)
  store.Store.save = timed
  train.run(config, workdir, 'target')
  # From the step that ends with the first save.
  with_save, without = np.diff(starts[2 * BLOCK - 1::BLOCK]).reshape(pairs, 2).T
  size = sum(path.stat().st_size for path in (workdir / 'target' / 'checkpoints').rglob('*')
             if path.is_file())
  return dict(stall=with_save.mean() / without.mean() - 1,
              stalls=(with_save / without - 1).round(4).tolist(),
              step_seconds=float(np.median(without)) / BLOCK,
              blocked_seconds=float(np.mean(blocked)), bytes_on_disk=size)


def main(pairs: int = 6, batch_size: int = 8) -> None:
  with tempfile.TemporaryDirectory() as workdir:
    print(json.dumps(measure(pathlib.Path(workdir), pairs, batch_size)), flush=True)


if __name__ == '__main__':
  main(*map(int, sys.argv[1:]))
