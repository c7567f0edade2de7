"""specdistill_jax.main in the tests of launch/: records its arguments, then does as it is told.

STUB_CLOUD/acts/HOST (or acts/cell-N) has one act a line and run: an exit code; `hang` until
SIGTERM, then 75; `die` of SIGKILL; `reclaim`: the whole slice is taken away; default: 0.
"""

import json
import os
import pathlib
import shutil
import signal
import sys
import time

CLOUD = pathlib.Path(os.environ['STUB_CLOUD'])
HOST = os.environ['STUB_HOST']


def next_act(path):
  lines = path.read_text().split() if path.exists() else []
  if lines:
    path.write_text('\n'.join(lines[1:]))
  return lines[0] if lines else '0'


def reclaim():
  slice_ = next(iter(CLOUD.glob(f'slices/*/*/{HOST}'))).parents[1]
  for node in slice_.iterdir():
    if node.is_dir():
      shutil.rmtree(node)
  (slice_ / 'state').write_text('SUSPENDING\nSUSPENDED')
  os.kill(os.getpid(), signal.SIGKILL)


def hang():
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
  with open(CLOUD / 'pids', 'a', encoding='utf-8') as pids:
    pids.write(f'{os.getpid()}\n')
  while True:
    time.sleep(0.02)


with open(CLOUD / 'studies.jsonl', 'a', encoding='utf-8') as studies:
  studies.write(json.dumps(dict(host=HOST, argv=sys.argv[1:], env=os.environ.get('PASSED'))) + '\n')
cells = [word.removeprefix('--sweep=') for word in sys.argv if word.startswith('--sweep=')]
act = next_act(CLOUD / 'acts' / (f'cell-{cells[0]}' if cells else HOST))
print(f'study on {HOST}: {act}', flush=True)
match act:
  case 'hang':
    hang()
  case 'die':
    os.kill(os.getpid(), signal.SIGKILL)
  case 'reclaim':
    reclaim()
  case _:
    sys.exit(int(act))
