"""The user's own files as examples: JSON lines, plain text, parallel files; gzipped or not."""

from collections.abc import Iterable, Iterator, Sequence
import gzip
import json
import os
import zlib

from specdistill_jax import storage
from specdistill_jax.data import splits

_JSON = ('.jsonl', '.jsonl.gz')
_TEXT = ('.txt', '.txt.gz')


def examples(files: Iterable[str | Sequence[str]], *, inputs_field: str,
             targets_field: str) -> list[splits.Example]:
  """All examples of `files`, in order.

  Args:
    files: each a path or an (inputs, targets) pair of parallel paths. `.jsonl[.gz]` has one
      object a line; `.txt[.gz]` has paragraphs parted by blank lines, each a document for
      language modelling; the lines of parallel files correspond, whatever their names end in.
    inputs_field: of a JSON object; '' is language modelling on `targets_field`.
    targets_field: of a JSON object.

  Raises:
    ValueError: a file that is missing, unreadable or of another kind, a line that is bad
      (with its number), parallel files of different lengths, or a mixture of kinds.
  """
  found = []
  for entry in files:
    found.extend(_entry(entry, inputs_field, targets_field))
  if len(kinds := splits.kinds(found)) > 1:
    raise ValueError('The data files mix prompts with completions and plain text '
                     f'({dict(kinds)} examples); give files of one kind.')
  return found


def _entry(entry, inputs_field: str, targets_field: str) -> Iterator[splits.Example]:
  if not isinstance(entry, (str, os.PathLike)):
    if len(entry) != 2 or not all(isinstance(path, (str, os.PathLike)) for path in entry):
      raise ValueError(f'A data file is a path or an (inputs, targets) pair of paths, '
                       f'not {tuple(entry)!r}.')
    return _parallel(*entry)
  path = os.fspath(entry)
  if path.endswith(_JSON):
    return _json_lines(path, inputs_field, targets_field)
  if path.endswith(_TEXT):
    return _paragraphs(path)
  raise ValueError(
      f"Cannot tell what '{path}' is from its name: {', '.join(_JSON + _TEXT)} are known. "
      "Parallel files are given as a pair inside the tuple: (('a.de', 'a.en'),).")


def _lines(path: str) -> Iterator[tuple[int, str]]:
  """(number from 1, line without its end) of a UTF-8 file, gzipped where the name says so."""
  number = 0
  try:
    with (gzip.open if path.endswith('.gz') else open)(storage.local(path), 'rb') as file:
      for number, line in enumerate(file, 1):
        text = line.decode('utf-8-sig' if number == 1 else 'utf-8')
        yield number, text.rstrip('\r\n')
  except UnicodeDecodeError as error:
    raise ValueError(f"'{path}', line {number}, is not UTF-8: {error.reason} "
                     f'at byte {error.start}.') from error
  except (OSError, EOFError, zlib.error) as error:
    reason = getattr(error, 'strerror', None) or str(error)
    raise ValueError(f"Cannot read the data file '{path}': {reason}.") from error


def _json_lines(path: str, inputs_field: str, targets_field: str) -> Iterator[splits.Example]:
  if not targets_field:
    raise ValueError("task.targets_field is empty; it names the text to learn, for example "
                     "'answer'.")
  for number, record in json_objects(path):
    place = f"'{path}', line {number}"
    inputs = _field(record, inputs_field, place, 'inputs_field') if inputs_field else None
    targets = _field(record, targets_field, place, 'targets_field')
    yield splits.Example(inputs, targets, f'{path}:{number}')


def json_objects(path: str) -> Iterator[tuple[int, dict]]:
  """(line number, object) of a `.jsonl[.gz]` file. Raises ValueError on a line without one."""
  for number, line in _lines(path):
    if not line.strip():
      continue
    place = f"'{path}', line {number}"
    try:
      record = json.loads(line)
    except ValueError as error:
      raise ValueError(f'{place}, is not JSON: {error}.') from error
    if not isinstance(record, dict):
      raise ValueError(f'{place}, is a JSON {type(record).__name__}; it must be an object with '
                       'named fields.')
    yield number, record


def check_text(value: object, name: str, place: str) -> str:
  """`value` where it is a string that UTF-8 can hold; else a ValueError that names it."""
  if not isinstance(value, str):
    raise ValueError(f"{place}: the field '{name}' must be a string; it is {value!r:.60}.")
  try:
    value.encode()
  except UnicodeEncodeError as error:
    raise ValueError(f"{place}: the field '{name}' has a lone surrogate at character "
                     f'{error.start}, which is no text.') from error
  return value


def _field(record: dict, field: str, place: str, setting: str) -> str:
  if field not in record:
    raise ValueError(f"{place}, has no field '{field}' (task.{setting}); it has "
                     f'{", ".join(map(repr, record)) or "none"}.')
  return check_text(record[field], field, place)


def _paragraphs(path: str) -> Iterator[splits.Example]:
  start, paragraph = 1, []
  for number, line in _lines(path):
    if line.strip():
      start = start if paragraph else number
      paragraph.append(line)
    elif paragraph:
      yield splits.Example(None, '\n'.join(paragraph), f'{path}:{start}')
      paragraph = []
  if paragraph:
    yield splits.Example(None, '\n'.join(paragraph), f'{path}:{start}')


def _parallel(inputs_path: str, targets_path: str) -> Iterator[splits.Example]:
  inputs = [line for _, line in _lines(os.fspath(inputs_path))]
  targets = [line for _, line in _lines(os.fspath(targets_path))]
  if len(inputs) != len(targets):
    raise ValueError(f"Parallel files must have equally many lines: '{inputs_path}' has "
                     f"{len(inputs)}, '{targets_path}' has {len(targets)}.")
  for number, (source, target) in enumerate(zip(inputs, targets), 1):
    yield splits.Example(source, target, f'{inputs_path}:{number}')
