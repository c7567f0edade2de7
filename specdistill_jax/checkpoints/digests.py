"""Digests of a checkpoint's files: what no format below checks.

OCDBT guards its own tree, and compressed chunks often fail to decompress; but a flipped bit in
a weight can be restored without a word. So a list of digests is written into every checkpoint
before it is committed, and read before anything is restored from it.
"""

from collections.abc import Iterable
import concurrent.futures
import hashlib
import json
import pathlib

FOLDER = 'digests'
_FILE = 'files.json'
_THREADS = 4


def write(step_directory: pathlib.Path, folder: pathlib.Path) -> None:
  """Digests of all items of a checkpoint that is complete, into `folder` beside them."""
  items = [path for path in step_directory.iterdir() if path.is_dir() and path != folder]
  names = [str(path.relative_to(step_directory)) for item in items for path in _files(item)]
  found = dict(zip(names, _digests(step_directory, names)))
  (folder / _FILE).write_text(json.dumps(found, indent=0, sort_keys=True))


def fault(step_directory: pathlib.Path, items: Iterable[str] | None = None) -> str | None:
  """What is wrong with a checkpoint, in a few words; None if its files are as written.

  Args:
    items: only these are looked at; None: all.
  """
  folder = step_directory / FOLDER
  if not folder.exists():
    return None  # written before there were digests
  try:
    listed = json.loads((folder / _FILE).read_text())
  except (OSError, ValueError) as error:
    return f'its list of digests can\'t be read ({error})'
  wanted = {name: digest for name, digest in listed.items()
            if items is None or name.split('/')[0] in items}
  missing = [name for name in wanted if not (step_directory / name).is_file()]
  if missing:
    return f'{missing[0]} is missing'
  for name, digest in zip(wanted, _digests(step_directory, wanted)):
    if digest != wanted[name]:
      return f'{name} is damaged'
  return None


def _files(directory):
  for path in sorted(directory.iterdir()):
    yield from _files(path) if path.is_dir() else [path]


def _digests(directory, names):
  def digest(name):
    with open(directory / name, 'rb') as file:
      return hashlib.file_digest(file, 'sha256').hexdigest()
  with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
    return list(pool.map(digest, names))
