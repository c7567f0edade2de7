"""From text to shards of token rows: the stage that every other one reads from.

Examples (embedded, or the user's files) are parted by document, a vocabulary is trained on
the training split, a seqio task tokenises both, and the rows are written beside it:

  W/data/vocabulary.model (or tokenizer/, that of an imported model),
  W/data/{train,validation}-*.array_record, W/data/{...}.json

All of it appears at once, by one rename: a run that is killed leaves no `W/data`.
"""

from collections.abc import Iterable, Iterator, Mapping
import contextlib
import itertools
import json
import os
import pathlib
import platform
import random
import shutil
import time
from typing import Any
import uuid

from absl import logging
import numpy as np

from specdistill_jax import structs
from specdistill_jax.data import embedded
from specdistill_jax.data import files
from specdistill_jax.data import quality
from specdistill_jax.data import shards
from specdistill_jax.data import splits
from specdistill_jax.data import tokenizers
from specdistill_jax.data import vocabulary as vocabularies
from specdistill_jax.stages import imports

SPLITS = ('train', 'validation')
VOCABULARY_FILE = 'vocabulary.model'
TOKENIZER_FOLDER = 'tokenizer'
_STAGING = 'data.incomplete-'


def run(config: Any, workdir: pathlib.Path) -> None:
  """Prepares `config.task` in `workdir/data`; returns at once where that is done already.

  Raises:
    ValueError: a setting, a file or the data as a whole is unfit, or `workdir/data` was
      prepared with other settings; what is there stays untouched.
  """
  imported = imports.vocabulary(config)
  settings = _settings(config, imported)
  directory = pathlib.Path(workdir) / 'data'
  if _is_prepared(directory, settings):
    logging.info("The data in '%s' is prepared already.", directory)
    return
  _check(settings)
  start = time.monotonic()
  examples, dropped = load(settings)
  kind = next(iter(splits.kinds(examples['train'])))
  _check_lengths(settings, kind)
  with _staging(directory) as staging:
    if imported is None:
      vocabulary = vocabularies.train(
          (text for e in examples['train'] for text in (e.inputs or '', e.targets)),
          staging / VOCABULARY_FILE, settings['vocab_size'])
    else:
      tokenizers.copy(imported, staging / TOKENIZER_FOLDER)
      vocabulary = tokenizers.load(staging / TOKENIZER_FOLDER)
    logging.info('%s a vocabulary of %d pieces, %.1f s since the start.',
                 'Trained' if imported is None else 'Imported', vocabulary.size,
                 time.monotonic() - start)
    _warn_of_space_symbols(examples)
    _write_splits(staging, examples, dropped, vocabulary, settings, kind)
  logging.info("Prepared '%s' in %.1f s.", directory, time.monotonic() - start)


def load(settings: Mapping[str, Any]) -> tuple[dict[str, list[splits.Example]], dict]:
  """Examples by split, training shuffled, and how many were left out of each and why."""
  if settings['name'] == 'local_files':
    fields = {key: settings[key] for key in ('inputs_field', 'targets_field')}
    train = files.examples(settings['train_files'], **fields)
    validation = files.examples(settings['validation_files'], **fields)
  else:
    train, validation = embedded.examples(settings['name'], settings['seed']), []
  kept = {'train': splits.without_empty(train), 'validation': splits.without_empty(validation)}
  dropped = {'train': {'empty': len(train) - len(kept['train'])},
             'validation': {'empty': len(validation) - len(kept['validation'])}}
  if not kept['train']:
    raise ValueError("The training split is empty: "
                     f"{settings['train_files'] or settings['name']!r} has no example.")
  if not settings['validation_files']:
    kept['train'], kept['validation'] = splits.split(
        kept['train'], settings['validation_fraction'], settings['seed'])
  elif not kept['validation']:
    raise ValueError(f"The validation split is empty: {settings['validation_files']!r} has no "
                     'example.')
  if len(splits.kinds(kept['train'] + kept['validation'])) > 1:
    raise ValueError('task.train_files and task.validation_files must both have prompts with '
                     'completions, or both plain text.')
  train = splits.without_leaks(kept['train'], kept['validation'])
  dropped['train']['also_in_validation'] = len(kept['train']) - len(train)
  if not train:
    raise ValueError('The training split is empty: every example of it also stands in the '
                     'validation split.')
  random.Random(settings['seed']).shuffle(train)
  return {'train': train, 'validation': kept['validation']}, dropped


def language_modelling_rows(tokens: np.ndarray, max_length: int, prompt_length: int,
                            document: str, decode) -> Iterator[shards.Row]:
  """Cuts a document's int32 `tokens` into rows; all but each row's first token are learnt.

  The last row may be shorter than `max_length`; it is left out where nothing follows its
  prompt, so that every row has something to continue.
  """
  for start in range(0, len(tokens), max_length):
    row = tokens[start:start + max_length]
    if len(row) > prompt_length:
      loss_mask = np.ones(len(row), np.uint8)
      loss_mask[0] = 0  # nothing predicts it
      yield shards.Row(row, prompt_length, loss_mask, decode(row[prompt_length:]), document)


def pair_row(inputs: np.ndarray, targets: np.ndarray, reference: str,
             document: str) -> shards.Row:
  """Prompt and completion as one row; only the completion, its end included, is learnt."""
  loss_mask = np.zeros(len(inputs) + len(targets), np.uint8)
  loss_mask[len(inputs):] = 1
  return shards.Row(np.concatenate([inputs, targets]), len(inputs), loss_mask, reference,
                    document)


def _settings(config: Any, imported: Any) -> dict[str, Any]:
  """What the data depends on, as JSON gives it back."""
  settings = {**dict(config.task.items()), 'seed': config.seed}
  if imported is not None:
    settings['imported_vocabulary'] = imported.digest
  return json.loads(json.dumps(settings))


def _is_prepared(directory: pathlib.Path, settings: dict[str, Any]) -> bool:
  if not directory.exists() or not any(directory.iterdir()):
    return False
  if missing := [split for split in SPLITS if not shards.exists(directory, split)]:
    raise ValueError(f"'{directory}' is there but has no {missing[0]} split, so this stage did "
                     'not write it; remove the folder, or use another workdir.')
  for split in SPLITS:
    before = shards.read_metadata(directory, split).get('settings', {})
    for key in sorted(set(before) | set(settings)):
      if before.get(key) != settings.get(key):
        name = key if key == 'seed' else f'task.{key}'
        raise ValueError(f"'{directory}' was prepared with {name} = {before.get(key)!r}, and "
                         f'now it is {settings.get(key)!r}; use another workdir.')
  vocabulary = shards.read_metadata(directory, 'train').get('vocabulary', VOCABULARY_FILE)
  if not (directory / vocabulary).exists():
    raise ValueError(f"'{directory}' has lost its {vocabulary}; remove the folder to "
                     'prepare it again.')
  return True


def _check(settings: Mapping[str, Any]) -> None:
  if settings['name'] not in embedded.METRICS and settings['name'] != 'local_files':
    raise ValueError(f"task.name is '{settings['name']}'; there are "
                     f"{', '.join(embedded.METRICS)} and local_files.")
  if settings['name'] == 'local_files' and not settings['train_files']:
    raise ValueError("task.train_files is empty; name the files, for example "
                     "--config.task.train_files=train.jsonl.gz")
  if settings['metric'] is not None:
    quality.metric(settings['metric'])


def _check_lengths(settings: Mapping[str, Any], kind: str) -> None:
  if kind == splits.LANGUAGE_MODELLING and not (
      1 <= settings['prompt_length'] < settings['max_length']):
    raise ValueError(f"task.prompt_length is {settings['prompt_length']}; it must be at least 1 "
                     f"and less than task.max_length, {settings['max_length']}.")


@contextlib.contextmanager
def _staging(directory: pathlib.Path) -> Iterator[pathlib.Path]:
  """A folder that becomes `directory` when the block ends well and vanishes when it fails."""
  directory.parent.mkdir(parents=True, exist_ok=True)
  for stale in directory.parent.glob(f'{_STAGING}*'):
    logging.info("Removing '%s', which an interrupted run left.", stale)
    shutil.rmtree(stale)
  # A new name each time: seqio keeps vocabularies by their path.
  staging = directory.with_name(f'{_STAGING}{uuid.uuid4().hex}')
  staging.mkdir()
  try:
    yield staging
    os.rename(staging, directory)
  except BaseException:
    shutil.rmtree(staging, ignore_errors=True)
    raise


def _write_splits(directory, examples, dropped, vocabulary, settings, kind) -> None:
  # Imported here, so that bad settings and files are told without seconds of TensorFlow.
  from specdistill_jax.data import tasks  # pylint: disable=g-import-not-at-top
  metric = settings['metric'] or embedded.METRICS.get(settings['name'])
  task = tasks.make(settings['name'], examples, vocabulary, metric)
  for split in SPLITS:
    metadata = {
        'task': settings['name'], 'kind': kind, 'metric': metric, 'source': 'fixed',
        'vocab_size': vocabulary.size, 'vocabulary_digest': vocabulary.digest,
        'vocabulary': vocabulary.path.relative_to(directory).parts[0],
        'max_length': settings['max_length'],
        'prompt_length': settings['prompt_length'] if kind == splits.LANGUAGE_MODELLING else None,
        'num_examples': len(examples[split]),
        'dropped': dropped[split],  # filled while the rows are written
        'python_version': platform.python_version(), 'settings': settings}
    rows = _rows(tasks.tokenised(task, split), settings, vocabulary, dropped[split], split)
    if split == 'train':
      rows = itertools.islice(rows, settings['max_examples'])
    first = next(rows, None)
    if first is None:
      raise ValueError(
          f"The {split} split is empty: none of its {len(examples[split])} examples gives a row "
          f"within task.max_length {settings['max_length']} and task.prompt_length "
          f"{settings['prompt_length']} ({dropped[split]} dropped); raise task.max_length.")
    shards.write(directory, split, itertools.chain([first], rows), metadata)
    logging.info('%s: %d rows of %d examples; dropped %s.', split,
                 shards.read_metadata(directory, split)['num_rows'], len(examples[split]),
                 {reason: n for reason, n in dropped[split].items() if n} or 'nothing')


def _rows(tokenised: Iterable, settings: Mapping[str, Any],
          vocabulary: Any, dropped: dict[str, int],
          split: str) -> Iterator[shards.Row]:
  """Rows of a split; counts in `dropped` what gives none, by reason."""
  dropped.update(too_long=0, too_short=0)
  prefix = np.array(vocabulary.prefix_ids, np.int32)
  for number, example in enumerate(tokenised):
    first = 'inputs' if len(example.inputs) else 'targets'
    example = example._replace(**{first: np.concatenate([prefix, getattr(example, first)])})
    logging.log_every_n_seconds(logging.INFO, '%s: %d examples tokenised', 10, split, number)
    if not len(example.inputs):
      rows = list(language_modelling_rows(
          example.targets, settings['max_length'], settings['prompt_length'],
          example.document, vocabulary.decode))
      dropped['too_short'] += -(-len(example.targets) // settings['max_length']) - len(rows)
      yield from rows
    elif len(example.inputs) + len(example.targets) > settings['max_length']:
      dropped['too_long'] += 1
    else:
      yield pair_row(example.inputs, example.targets, example.reference, example.document)


def _warn_of_space_symbols(examples: Mapping[str, list[splits.Example]]) -> None:
  symbol = vocabularies.SPACE_SYMBOL
  count = sum(symbol in e.targets or symbol in (e.inputs or '')
              for split in examples.values() for e in split)
  if count:
    logging.warning('%d examples hold U+2581, which SentencePiece reads as a space.', count)
