"""Shards of token rows: written once in ArrayRecord, read with Grain, without TensorFlow.

A directory holds, for each split, `<split>-00000.array_record`, ... and `<split>.json`. The
latter is written last and whole: a split without it is not there. From a bucket they are copied
once to every machine that reads them, since Grain reads at random. Fixed, target-generated and
stored draft-generated rows differ in their metadata's `source` only.
"""

from collections.abc import Iterable, Mapping, Sequence
import itertools
import json
import os
from typing import Any

from array_record.python import array_record_module
import grain
import numpy as np

from specdistill_jax import storage
from specdistill_jax import structs
from specdistill_jax.data import records
from specdistill_jax.data import splits as splits_lib

PROMPTS = splits_lib.PROMPTS  # the split that is decoded in place of the validation split
SOURCES = ('fixed', 'target', 'draft')
ROWS_PER_FILE = 1 << 17
_FORMAT = 2  # 2: lengths of prompts in the metadata, categories in the rows

Row = records.Row


def write(directory: str | os.PathLike, split: str, rows: Iterable[Row],
          metadata: Mapping[str, Any]) -> None:
  """Writes a split: all of it or, where anything fails or is killed, nothing.

  Args:
    directory: made if need be.
    split: `train`, `validation`, ...
    rows: at least one.
    metadata: at least vocab_size, vocabulary_digest, max_length and source (fixed | target |
      draft); what JSON can hold. Added here: num_rows, num_tokens, num_loss_tokens,
      longest_row, longest_prompt, shortest_prompt, longest_completion
      (in tokens), files.

  Raises:
    ValueError: the split is there already, there is no row, or a row is unfit.
  """
  directory = storage.path(directory)
  _check_metadata(metadata)
  if exists(directory, split):
    raise ValueError(f"'{directory}' already holds the split '{split}'; it is not overwritten. "
                     'Remove it, or write elsewhere.')
  directory.mkdir(parents=True, exist_ok=True)
  counts = dict(num_rows=0, num_tokens=0, num_loss_tokens=0, longest_row=0, longest_prompt=0,
                shortest_prompt=metadata['max_length'], longest_completion=0)
  files, numbered = [], enumerate(rows)
  for first in numbered:
    path = directory / f'{split}-{len(files):05d}.array_record'
    with storage.made(path) as made:
      # Grain reads single rows at random, hence groups of one.
      writer = array_record_module.ArrayRecordWriter(str(made), 'group_size:1')
      try:
        for index, row in itertools.chain(
            [first], itertools.islice(numbered, ROWS_PER_FILE - 1)):
          records.check(row, split, index, metadata)
          writer.write(records.pack(row))
          _count(counts, row)
      finally:
        writer.close()
    files.append(path.name)
  if not files:
    raise ValueError(f"The split '{split}' is empty: there is no row to write in '{directory}'.")
  storage.write(directory / f'{split}.json', json.dumps(
      {**metadata, **counts, 'split': split, 'files': files, 'format': _FORMAT},
      indent=2) + '\n')


def _count(counts: dict[str, int], row: Row) -> None:
  counts['num_rows'] += 1
  counts['num_tokens'] += len(row.tokens)
  counts['num_loss_tokens'] += int(np.count_nonzero(row.loss_mask[1:]))
  counts['longest_row'] = max(counts['longest_row'], len(row.tokens))
  counts['longest_prompt'] = max(counts['longest_prompt'], row.prompt_length)
  counts['shortest_prompt'] = min(counts['shortest_prompt'], row.prompt_length)
  counts['longest_completion'] = max(counts['longest_completion'],
                                     len(row.tokens) - row.prompt_length)


def exists(directory: str | os.PathLike, split: str) -> bool:
  """Whether the split is there, complete."""
  return (storage.path(directory) / f'{split}.json').is_file()


def splits(directory: str | os.PathLike) -> list[str]:
  """The splits that are there, complete."""
  return [split for split in ('train', 'validation', PROMPTS) if exists(directory, split)]


def read_metadata(directory: str | os.PathLike, split: str) -> dict[str, Any]:
  """What `write` was told and what it counted. Raises ValueError where there is no split."""
  path = storage.path(directory) / f'{split}.json'
  try:
    metadata = json.loads(path.read_text())
  except FileNotFoundError as error:
    raise ValueError(f"There is no split '{split}' in '{directory}'; "
                     'the prepare stage writes it.') from error
  except (OSError, ValueError) as error:
    raise ValueError(f"Cannot read '{path}': {error}.") from error
  if metadata.get('format') != _FORMAT:
    raise ValueError(f"'{path}' has format {metadata.get('format')}; this version reads "
                     f'{_FORMAT}. Prepare the data again in a new workdir.')
  return metadata


class _Rows(Sequence):
  """Random access to the rows of a split; Grain takes it as a source."""

  def __init__(self, directory: str | os.PathLike, split: str):
    metadata = read_metadata(directory, split)
    directory = storage.local(directory, metadata['files'])
    paths = [str(directory / name) for name in metadata['files']]
    if missing := [path for path in paths if not os.path.exists(path)]:
      raise ValueError(f"The shard '{missing[0]}' of the split '{split}' is missing.")
    self._source = grain.sources.ArrayRecordDataSource(paths)
    if len(self._source) != metadata['num_rows']:
      raise ValueError(f"The split '{split}' in '{directory}' has {len(self._source)} rows; "
                       f"its metadata says {metadata['num_rows']}.")

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> Row:
    if not -len(self) <= index < len(self):
      raise IndexError(index)
    return records.unpack(self._source[index % len(self)])


def rows(directory: str | os.PathLike, split: str) -> Sequence[Row]:
  """The rows of a split, read when indexed."""
  return _Rows(directory, split)


class _Places(grain.MapDataset):
  """The rows at certain places of each batch; the others are never read."""

  def __init__(self, parent: grain.MapDataset, batch_size: int, places: Sequence[int]):
    super().__init__(parent)
    self._batch_size, self._places = batch_size, [int(place) for place in places]

  def __len__(self) -> int:
    return len(self._parent) // self._batch_size * len(self._places)

  def __getitem__(self, index: int) -> Row:
    batch, place = divmod(index, len(self._places))
    return self._parent[batch * self._batch_size + self._places[place]]


def batches(directory: str | os.PathLike, split: str, *, batch_size: int, max_length: int,
            seed: int, shuffle: bool = True, num_epochs: int | None = None,
            batch_rows: Sequence[int] | None = None, drop_remainder: bool = True
            ) -> grain.DatasetIterator:
  """Iterates over `structs.Batch` of numpy arrays, deterministically.

  What a process reads of a batch depends on `batch_rows` alone: the rows of all processes
  together are the batch of one process, in its order, however many processes there are.

  Args:
    directory: of the shards.
    split: to read.
    batch_size: rows a batch, over all processes.
    max_length: tokens to which rows are padded.
    seed: of the order; every epoch has its own.
    shuffle: False keeps the order of the shards.
    num_epochs: None repeats without end.
    batch_rows: places in the batch that are wanted here, ascending; None: all of them.
    drop_remainder: leave out the rows of an epoch that do not fill a batch; False makes the
      last batch of an epoch smaller (whole batches only).

  Returns:
    An iterator with `get_state()` and `set_state()`; the state fits into JSON, and a fresh
    iterator of the same arguments continues from it exactly.

  Raises:
    ValueError: arguments that cannot be met; while iterating, a batch without any token to
      learn.
  """
  source, metadata = rows(directory, split), read_metadata(directory, split)
  _check_batching(source, batch_size, max_length, metadata, batch_rows, drop_remainder)
  widths = structs.Widths(metadata['longest_prompt'], metadata['longest_completion'])
  dataset = grain.MapDataset.source(source).seed(seed)
  if shuffle:
    dataset = dataset.shuffle()
  if drop_remainder:
    # Before places are picked, or an epoch's last batch could be short of some of them.
    dataset = dataset[:len(source) // batch_size * batch_size]
  if batch_rows is not None and len(batch_rows) < batch_size:
    dataset = _Places(dataset, batch_size, batch_rows)
  dataset = dataset.batch(
      batch_size if batch_rows is None else len(batch_rows), drop_remainder=drop_remainder,
      batch_fn=lambda batch: records.collate(batch, max_length, split, widths))
  dataset = dataset.repeat(num_epochs)
  return iter(dataset.to_iter_dataset(
      grain.ReadOptions(num_threads=1, prefetch_buffer_size=8)))


def evaluation_split(directory: str | os.PathLike) -> str:
  """The split that is decoded: that of prompts where there is one, else the held-out rows."""
  return PROMPTS if exists(directory, PROMPTS) else 'validation'


def evaluation_rows(directory: str | os.PathLike, num_prompts: int | None,
                    seed: int) -> list[Row]:
  """Rows to decode, drawn without replacement; their categories are in them.

  More rows under the same seed begin with the fewer ones; None are all.

  Raises:
    ValueError: there are fewer rows than `num_prompts`.
  """
  split = evaluation_split(directory)
  found = rows(directory, split)
  if num_prompts is not None and not 1 <= num_prompts <= len(found):
    raise ValueError(f'evaluate.num_prompts is {num_prompts}; the {split} split in '
                     f"'{directory}' has {len(found)} rows, so give 1 to {len(found)}.")
  order = np.random.default_rng(seed).permutation(len(found))[:num_prompts]
  return [found[int(index)] for index in order]


def _check_metadata(metadata: Mapping[str, Any]) -> None:
  required = ('vocab_size', 'vocabulary_digest', 'max_length', 'source')
  if missing := [key for key in required if key not in metadata]:
    raise ValueError(f"The metadata of a split must have {', '.join(required)}; "
                     f"{', '.join(missing)} is missing.")
  if metadata['source'] not in SOURCES:
    raise ValueError(f"The source of a split is one of {', '.join(SOURCES)}, "
                     f"not '{metadata['source']}'.")


def _check_batching(source, batch_size, max_length, metadata, batch_rows,
                    drop_remainder) -> None:
  split, num_rows = metadata['split'], len(source)
  if max_length < metadata['longest_row']:
    raise ValueError(f"max_length {max_length} is shorter than the longest row of the split "
                     f"'{split}', {metadata['longest_row']} tokens.")
  if batch_size < 1:
    raise ValueError(f'batch_size is {batch_size}, and must be at least 1.')
  if batch_rows is not None and not (
      len(batch_rows) and 0 <= min(batch_rows) and max(batch_rows) < batch_size):
    raise ValueError(f'batch_rows {list(batch_rows)} must name places from 0 to '
                     f'{batch_size - 1}, at least one.')
  if drop_remainder and batch_size > num_rows:
    raise ValueError(f"batch_size {batch_size} exceeds the {num_rows} rows of the split "
                     f"'{split}': an epoch would be empty. Lower it, or give more data.")
  if not drop_remainder and batch_rows is not None:
    raise ValueError('drop_remainder=False is for whole batches, and batch_rows names '
                     f'{len(batch_rows)} of {batch_size} places.')
