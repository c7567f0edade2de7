"""Where files lie: on a disk, or in a bucket of Google Cloud Storage (`gs://bucket/folder`).

`path` gives a path that reads, lists and joins alike in both places (`etils.epath`). A bucket is
no file system, though, and the rest of this file is what differs:

               on a disk                        in a bucket
  write        a file beside, then a rename     one request: the object is whole, or not there
  Lines        appended to the file             put anew, seconds apart and at `sync`
  made         a file beside, then a rename     made on this machine, then put there
  staged       a folder beside, then a rename   the same, under a mark that it isn't whole yet
  filled       the folder itself                made on this machine, then put there
  move         a rename                         object by object, within the bucket
  digests      SHA-256 of what is read          what the bucket says of its objects; none is read
  local        the file itself                  a copy, for libraries that read files only
  free_bytes   of the disk                      no bound

Every request takes some 50 ms, so none is made at every step of a training.
"""

from collections.abc import Iterable, Iterator
import concurrent.futures
import contextlib
import errno
import functools
import hashlib
import os
import pathlib
import posixpath
import shutil
import tempfile
import time
from typing import Any
import uuid

SCHEME = 'gs://'
_PUT_SECONDS = 10.0   # between two puts of an object that grows,
_PUT_SHARE = 0.02     # or more, so that puts take no larger share of the time
_THREADS = 4
_STAGING = '.incomplete-'

# Orbax and epath take TensorFlow's client where TensorFlow is installed: seconds to import, and
# another one than on machines without it.
os.environ.setdefault('EPATH_USE_TF', 'false')
# The plain interface, which serves every kind of bucket without asking which kind it is.
os.environ.setdefault('GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT', 'false')


def path(name: str | os.PathLike) -> pathlib.Path:
  """A file or folder by its name: of a bucket if it begins with `gs://`, else of a disk."""
  if not _is_in_bucket(name):
    return pathlib.Path(name)
  _client()
  from etils import epath  # pylint: disable=g-import-not-at-top
  return epath.Path(name)


def _is_in_bucket(name: str | os.PathLike) -> bool:
  return os.fspath(name).startswith(SCHEME)


@functools.cache
def _client() -> Any:
  """The one client of this process. Listings are not kept: other processes write as well."""
  try:
    import fsspec  # pylint: disable=g-import-not-at-top
    import gcsfs  # pylint: disable=g-import-not-at-top,unused-import
  except ImportError as error:
    raise ValueError(f'files in buckets ({SCHEME}) need the package gcsfs ({error}); install '
                     'requirements.txt, or name a path of a disk') from error
  fsspec.config.conf.setdefault('gcs', {})['use_listings_cache'] = False
  return fsspec.filesystem('gcs', finalize_on_close=True)  # as epath asks for it: the same one


def absolute(place: pathlib.Path) -> pathlib.Path:
  return place if _is_in_bucket(place) else place.absolute()


def resolve(folder: pathlib.Path, relative: str) -> pathlib.Path:
  """What `relative`, as `os.path.relpath` writes it, is from `folder`."""
  if not _is_in_bucket(folder):
    return (folder / relative).resolve()
  return path(SCHEME + posixpath.normpath(f'{str(folder)[len(SCHEME):]}/{relative}'))


def check_writable(folder: pathlib.Path) -> None:
  """Makes `folder`, writes a file, waits until it is safe, and removes it.

  Raises:
    OSError: if that can't be done; `str` of it says why.
  """
  probe = folder / f'.probe-{os.getpid()}'
  try:
    if not _is_in_bucket(folder):
      folder.mkdir(parents=True, exist_ok=True)
    write(probe, bytes(4096))
    probe.unlink()
  except OSError as error:
    raise OSError(error.strerror or _words(error)) from error
  except Exception as error:  # of the libraries that sign in and speak to the bucket
    raise OSError(_words(error)) from error


def check_readable(folder: pathlib.Path) -> None:
  """Asks a bucket whether it can be read, before anything is looked for in it.

  Raises:
    OSError: one sentence, if it can't.
  """
  if not _is_in_bucket(folder):
    return
  try:
    _client().find(folder, maxdepth=1)
  except Exception as error:  # as above
    raise OSError(f'{folder} can\'t be read: {_words(error)}; is the name right, and may this '
                  'account read and write objects there?') from error


def _words(error: BaseException) -> str:
  return ' '.join(f'{type(error).__name__}: {error}'.split())[:300]


def free_bytes(folder: pathlib.Path) -> int | None:
  """Room for files in `folder`; None where there is no bound."""
  return None if _is_in_bucket(folder) else shutil.disk_usage(folder).free


def write(place: pathlib.Path, content: str | bytes) -> None:
  """Replaces a file, so that a kill leaves the old one or the new one, never half of one."""
  content = content.encode('utf-8') if isinstance(content, str) else content
  if _is_in_bucket(place):
    _client().pipe_file(str(place), content)
    return
  place.parent.mkdir(parents=True, exist_ok=True)
  aside = place.with_name(place.name + '.tmp')
  with open(aside, 'wb') as file:
    file.write(content)
    file.flush()
    os.fsync(file.fileno())
  aside.replace(place)


class Lines:
  """A file that grows line by line, while this process alone writes it.

  On a disk `append` writes at once, in one piece, and `sync` waits for the disk. In a bucket
  lines may be lost by a kill until `sync` returns, and are never torn.
  """

  def __init__(self, place: pathlib.Path):
    self._path = place
    self._content = None
    if _is_in_bucket(place):
      self._content = bytearray(place.read_bytes() if place.exists() else b'')
      self._is_put, self._next_put = True, time.monotonic() + _PUT_SECONDS

  def append(self, lines: str) -> None:
    """Adds text that ends in a line break."""
    if self._content is None:
      with open(self._path, 'ab', buffering=0) as file:  # one write: whole, or cut at its end
        file.write(lines.encode('utf-8'))
      return
    self._content += lines.encode('utf-8')
    self._is_put = False
    if time.monotonic() >= self._next_put:
      self.sync()

  def sync(self) -> None:
    """Returns when all lines are safe."""
    if self._content is None:
      if self._path.exists():
        with open(self._path, 'rb') as file:
          os.fsync(file.fileno())
    elif not self._is_put:
      begun = time.monotonic()
      write(self._path, bytes(self._content))
      now = time.monotonic()
      self._is_put, self._next_put = True, now + max(_PUT_SECONDS, (now - begun) / _PUT_SHARE)


@contextlib.contextmanager
def made(place: pathlib.Path) -> Iterator[pathlib.Path]:
  """A file on a disk to be written, which becomes `place` if the block ends well, or vanishes."""
  if not _is_in_bucket(place):
    aside = place.with_name(f'incomplete-{place.name}')  # the end of a name may say the format
    try:
      yield aside
      os.replace(aside, place)
    except BaseException:
      aside.unlink(missing_ok=True)
      raise
    return
  with tempfile.TemporaryDirectory() as folder:
    aside = pathlib.Path(folder) / place.name
    yield aside
    _client().put_file(str(aside), str(place))


@contextlib.contextmanager
def staged(folder: pathlib.Path) -> Iterator[pathlib.Path]:
  """A folder on a disk that becomes `folder` if the block ends well, and vanishes if it fails.

  It has a new name each time: seqio keeps vocabularies by their path. What an interrupted one
  left is removed. In a bucket, where no folder appears at once, an object beside it says so
  while it isn't whole: see `is_whole`.
  """
  if _is_in_bucket(folder):
    with tempfile.TemporaryDirectory(prefix=folder.name + _STAGING) as aside:
      yield pathlib.Path(aside)
      if is_whole(folder):
        raise OSError(f'{folder} is there already; remove it, or name another folder')
      write(_marker(folder), b'')
      folder.rmtree(missing_ok=True)  # of an upload that was interrupted
      put(pathlib.Path(aside), folder)
      _marker(folder).unlink()
    return
  folder.parent.mkdir(parents=True, exist_ok=True)
  for stale in folder.parent.glob(f'{folder.name}{_STAGING}*'):
    shutil.rmtree(stale)
  aside = folder.with_name(f'{folder.name}{_STAGING}{uuid.uuid4().hex}')
  aside.mkdir()
  try:
    yield aside
    os.rename(aside, folder)
  except BaseException:
    shutil.rmtree(aside, ignore_errors=True)
    raise


def _marker(folder):
  return folder.with_name(f'{folder.name}{_STAGING}upload')


def is_whole(folder: pathlib.Path) -> bool:
  """Whether a folder is there, with something in it, and not half of what was `staged`."""
  if not folder.exists() or not any(folder.iterdir()):
    return False
  return not (_is_in_bucket(folder) and _marker(folder).exists())


@contextlib.contextmanager
def filled(folder: pathlib.Path) -> Iterator[pathlib.Path]:
  """`folder`, or one on this machine, whose files are in `folder` when the block has ended."""
  if not _is_in_bucket(folder):
    yield folder
    return
  with tempfile.TemporaryDirectory() as aside:
    yield pathlib.Path(aside)
    put(pathlib.Path(aside), folder)


def put(source: pathlib.Path, folder: pathlib.Path) -> None:
  """Copies what lies in `source`, on a disk, into `folder`, unless that is the same folder."""
  if source == folder:
    return
  files = [file for file in sorted(source.rglob('*')) if file.is_file()]
  _client().put([str(file) for file in files],
                [f'{folder}/{file.relative_to(source).as_posix()}' for file in files])


def remove(folder: pathlib.Path) -> None:
  """Removes a folder with all that is in it, if it is there."""
  if _is_in_bucket(folder):
    folder.rmtree(missing_ok=True)
  else:
    shutil.rmtree(folder, ignore_errors=True)


def move(folder: pathlib.Path, destination: pathlib.Path) -> None:
  """Moves a folder to where there may be one, which goes."""
  if _is_in_bucket(folder):
    destination.rmtree(missing_ok=True)
    names = _objects(folder)
    _client().copy([f'{folder}/{name}' for name in names],
                   [f'{destination}/{name}' for name in names])
    folder.rmtree(missing_ok=True)
    return
  destination.parent.mkdir(exist_ok=True)
  shutil.rmtree(destination, ignore_errors=True)
  folder.rename(destination)


def digests(folder: pathlib.Path, names: Iterable[str] | None = None) -> dict[str, str]:
  """Digests of files by their names below `folder`: of all, or of `names`, where they are there."""
  if _is_in_bucket(folder):
    found = {name: f'crc32c:{about["crc32c"]}' for name, about in _objects(folder).items()}
    return found if names is None else {
        name: found[name] for name in names if name in found}
  folder = pathlib.Path(folder)  # Orbax names disks in its own kind of path
  if names is None:
    names = [str(file.relative_to(folder)) for file in sorted(folder.rglob('*'))]
  names = [name for name in names if (folder / name).is_file()]
  def digest(name):
    with open(folder / name, 'rb') as file:
      return hashlib.file_digest(file, 'sha256').hexdigest()
  with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
    return dict(zip(names, pool.map(digest, names)))


def _objects(folder) -> dict[str, dict[str, Any]]:
  """What a bucket says of the objects below `folder`, by the rest of their names."""
  prefix = str(folder)[len(SCHEME):] + '/'
  return {name[len(prefix):]: about for name, about in _client().find(
      str(folder), detail=True).items() if name.startswith(prefix) and name != prefix}


def local(name: str | os.PathLike, only: Iterable[str] | None = None) -> pathlib.Path:
  """A file or folder, or a copy of it in this machine's cache, for what reads real files only.

  A copy is made once: its place follows from the versions of the objects.

  Args:
    name: of a file or folder.
    only: names of files: of a folder, the others are not needed.

  Raises:
    FileNotFoundError: there is no such thing in the bucket.
    OSError: this machine has no room for it.
  """
  if not _is_in_bucket(name):
    return pathlib.Path(name)
  source = path(name)
  try:
    found = _objects(source) or {'': _client().info(str(source))}
  except FileNotFoundError:
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(source)) from None
  if only is not None and '' not in found:
    found = {one: about for one, about in found.items() if one in set(only)}
  versions = sorted((one, about['generation']) for one, about in found.items())
  cache = pathlib.Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache').expanduser()
  cache /= 'specdistill_jax'
  cache.mkdir(parents=True, exist_ok=True)
  place = cache / hashlib.sha256(f'{source} {versions}'.encode()).hexdigest()[:16]
  if not (place / source.name).exists():
    _fetch(source, found, place)
  return place / source.name


def _fetch(source, found, place) -> None:
  size, free = sum(about['size'] for about in found.values()), free_bytes(place.parent)
  if size > free:
    raise OSError(f'{source} has {size / 1e9:.3g} GB, and the disk of {place.parent} has '
                  f'{free / 1e9:.3g} GB free for a copy; free some room, or name another disk with '
                  'XDG_CACHE_HOME')
  with tempfile.TemporaryDirectory(dir=place.parent) as aside:
    copy = pathlib.Path(aside) / 'whole' / source.name
    copy.parent.mkdir()
    if '' in found:
      _client().get_file(str(source), str(copy))
    else:
      copy.mkdir()
      _client().get([f'{source}/{one}' for one in found], [str(copy / one) for one in found])
    with contextlib.suppress(OSError):  # another process was first
      copy.parent.rename(place)
