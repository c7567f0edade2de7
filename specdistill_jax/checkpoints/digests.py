"""Digests of a checkpoint's files: what no format below checks.

OCDBT guards its own tree, and compressed chunks often fail to decompress; but a flipped bit in
a weight can be restored without a word. So a list of digests is written into every checkpoint
before it is committed, and read before anything is restored from it. A bucket digests what
it holds by itself, and is asked for that.
"""

from collections.abc import Iterable
import json
import pathlib

from specdistill_jax import storage

FOLDER = 'digests'
_FILE = 'files.json'


def write(step_directory: pathlib.Path, folder: pathlib.Path) -> None:
  """Digests of all items of a checkpoint that is complete, into `folder` beside them."""
  found = {name: digest for name, digest in storage.digests(step_directory).items()
           if '/' in name and not name.startswith(f'{folder.name}/')}
  (folder / _FILE).write_text(json.dumps(found, indent=0, sort_keys=True))


def read(step_directory: pathlib.Path) -> bytes | None:
  """The list of digests, as it is written; None if it is missing."""
  path = step_directory / FOLDER / _FILE
  return path.read_bytes() if path.exists() else None


def fault(step_directory: pathlib.Path, items: Iterable[str] | None = None) -> str | None:
  """What is wrong with a checkpoint, in a few words; None if its files are as written.

  Args:
    items: only these are looked at; None: all.
  """
  folder = step_directory / FOLDER
  if not folder.exists():
    return 'its list of digests is missing'
  try:
    listed = json.loads((folder / _FILE).read_text())
  except (OSError, ValueError) as error:
    return f'its list of digests can\'t be read ({error})'
  wanted = {name: digest for name, digest in listed.items()
            if items is None or name.split('/')[0] in items}
  found = storage.digests(step_directory, wanted)
  for name, digest in wanted.items():
    if name not in found:
      return f'{name} is missing'
    if found[name] != digest:
      return f'{name} is damaged'
  return None
