"""From text to shards of token rows: the stage that every other one reads from.

Examples (embedded, the user's files, or TFDS data sets) are parted by document, a vocabulary
is trained on the training split or copied, a seqio task tokenises both, and the rows are
written beside it:

  W/data/vocabulary.model (or tokenizer/, that of an imported model),
  W/data/{train,validation,prompts}-*.array_record, W/data/{...}.json

All of it appears at once: a run that is killed leaves no `W/data`.
"""

from collections.abc import Mapping
import itertools
import json
import pathlib
import platform
import shutil
import time
from typing import Any

from absl import logging

from specdistill_jax import storage
from specdistill_jax.data import chat
from specdistill_jax.data import quality
from specdistill_jax.data import shards
from specdistill_jax.data import splits
from specdistill_jax.data import tokenizers
from specdistill_jax.data import vocabulary as vocabularies
from specdistill_jax.stages import imports
from specdistill_jax.stages import sources
from specdistill_jax.stages import token_rows

VOCABULARY_FILE = 'vocabulary.model'
TOKENIZER_FOLDER = 'tokenizer'
# Why an example gave no row, or a shorter one, and what would change that.
_REASONS = dict(
    too_long='{} left out as longer than task.max_length, {max_length}',
    too_short='{} pieces left out, of no more tokens than task.prompt_length, {prompt_length}',
    cut_inputs='{} with a prompt cut to its limit (task.max_inputs)',
    cut_targets='{} with a completion cut to its limit (task.max_targets)',
    cut_conversations='{} cut after the last answer within task.max_length, {max_length}')


def run(config: Any, workdir: pathlib.Path) -> None:
  """Prepares `config.task` in `workdir/data`; returns at once where that is done already.

  Raises:
    ValueError: a setting, a file or the data as a whole is unfit, or `workdir/data` was
      prepared with other settings; what is there stays untouched.
  """
  imported = imports.vocabulary(config)
  settings = _settings(config, imported)
  directory = storage.path(workdir) / 'data'
  if _is_prepared(directory, settings):
    logging.info("The data in '%s' is prepared already.", directory)
    return
  _check(settings)
  start = time.monotonic()
  examples, dropped = sources.load(settings)
  kinds = {split: sources.kind(examples, split) for split in examples}
  _check_lengths(settings, next(iter(kinds.values())))
  with storage.staged(directory) as staging:
    vocabulary = _vocabulary(staging, examples, settings, imported)
    logging.info('A vocabulary of %d pieces, %.1f s after the start.',
                 vocabulary.size, time.monotonic() - start)
    _warn_of_space_symbols(examples)
    _write_splits(staging, examples, dropped, vocabulary, settings, kinds)
  logging.info("Prepared '%s' in %.1f s.", directory, time.monotonic() - start)


def _settings(config: Any, imported: Any) -> dict[str, Any]:
  """What the data depends on, as JSON gives it back."""
  settings = {**dict(config.task.items()), 'seed': config.seed}
  if imported is not None:
    settings['imported_vocabulary'] = imported.digest
  return json.loads(json.dumps(settings))


def _is_prepared(directory: pathlib.Path, settings: dict[str, Any]) -> bool:
  if not storage.is_whole(directory):
    return False
  wanted = sources.split_names(settings)
  if missing := [split for split in wanted if not shards.exists(directory, split)]:
    raise ValueError(f"'{directory}' is there but has no {missing[0]} split, so this stage did "
                     'not write it; remove the folder, or use another workdir.')
  for split in wanted:
    before = shards.read_metadata(directory, split).get('settings', {})
    for key in sorted(set(before) | set(settings)):
      if before.get(key) != settings.get(key):
        name = key if key == 'seed' else f'task.{key}'
        raise ValueError(f"'{directory}' was prepared with {name} = {before.get(key)!r}, and "
                         f'now it is {settings.get(key)!r}; use another workdir.')
  vocabulary = shards.read_metadata(directory, wanted[0]).get('vocabulary', VOCABULARY_FILE)
  if not (directory / vocabulary).exists():
    raise ValueError(f"'{directory}' has lost its {vocabulary}; remove the folder to "
                     'prepare it again.')
  return True


def _check(settings: Mapping[str, Any]) -> None:
  sources.check(settings)
  if settings['metric'] is not None:
    quality.metric(settings['metric'])
  if settings['chat_template']:
    chat.load(settings['chat_template'])


def _check_lengths(settings: Mapping[str, Any], kind: str) -> None:
  if kind == splits.LANGUAGE_MODELLING and not (
      1 <= settings['prompt_length'] < settings['max_length']):
    raise ValueError(f"task.prompt_length is {settings['prompt_length']}; it must be at least 1 "
                     f"and less than task.max_length, {settings['max_length']}.")


def _vocabulary(staging: pathlib.Path, examples: sources.Examples,
                settings: Mapping[str, Any], imported: Any) -> Any:
  """That of the imported models or of the settings, copied, or one trained on the examples."""
  template = settings['chat_template'] and chat.load(settings['chat_template'])
  if imported is not None:
    _warn_of_split_marks(imported, template, settings)
    tokenizers.copy(imported, staging / TOKENIZER_FOLDER)
    return tokenizers.load(staging / TOKENIZER_FOLDER)
  if not settings['vocabulary']:
    texts = (text for e in examples['train'] for text in (e.inputs or '', e.targets))
    return vocabularies.train(texts, staging / VOCABULARY_FILE, settings['vocab_size'],
                              template.special if template else ())
  given = vocabularies.Vocabulary(settings['vocabulary'])
  if given.size != settings['vocab_size']:
    raise ValueError(f"task.vocab_size is {settings['vocab_size']}; the vocabulary "
                     f"'{given.path}' has {given.size} ids: set it to that.")
  _warn_of_split_marks(given, template, settings)
  shutil.copyfile(given.path, staging / VOCABULARY_FILE)
  return vocabularies.Vocabulary(staging / VOCABULARY_FILE)


def _warn_of_split_marks(vocabulary: Any, template: chat.Template | None,
                         settings: Mapping[str, Any]) -> None:
  for piece in template.special if template else ():
    if (num_tokens := len(vocabulary.encode(piece))) > 1:
      logging.warning("The vocabulary '%s' has no piece for %r of the chat template '%s'; it "
                      'takes %d tokens.', vocabulary.path, piece, settings['chat_template'],
                      num_tokens)


def _write_splits(directory, examples, dropped, vocabulary, settings, kinds) -> None:
  metric = sources.metric(settings)
  tokenised = None
  if not settings['chat_template']:
    # Imported here, so that bad settings and files are told without seconds of TensorFlow.
    from specdistill_jax.data import tasks  # pylint: disable=g-import-not-at-top
    task = tasks.make(settings['name'], examples, vocabulary, metric)
    tokenised = lambda split: tasks.tokenised(task, split, vocabulary)
  for split in examples:
    metadata = {
        'task': settings['name'], 'dataset': sources.dataset(settings), 'kind': kinds[split],
        'metric': metric, 'source': 'fixed',
        'vocab_size': vocabulary.size, 'vocabulary_digest': vocabulary.digest,
        'vocabulary': vocabulary.path.relative_to(directory).parts[0],
        'max_length': settings['max_length'],
        'prompt_length': (
            settings['prompt_length'] if kinds[split] == splits.LANGUAGE_MODELLING else None),
        'num_examples': len(examples[split]),
        'dropped': dropped[split],  # filled while the rows are written
        'python_version': platform.python_version(), 'settings': settings}
    if tokenised:
      rows = token_rows.from_texts(tokenised(split), settings, vocabulary, dropped[split], split)
    else:
      rows = token_rows.from_conversations(examples[split], settings, vocabulary,
                                           dropped[split], split)
    rows = token_rows.with_sound_masks(rows, settings['name'], kinds[split], vocabulary)
    if split == 'train':
      rows = itertools.islice(rows, settings['max_examples'])
    _write_split(directory, split, rows, metadata)


def _write_split(directory, split: str, rows, metadata: dict[str, Any]) -> None:
  settings, dropped = metadata['settings'], metadata['dropped']
  first = next(rows, None)
  if first is None:
    raise ValueError(
        f"The {split} split is empty: none of its {metadata['num_examples']} examples gives a "
        f"row within task.max_length {settings['max_length']} and task.prompt_length "
        f"{settings['prompt_length']} ({dropped} dropped); raise task.max_length.")
  shards.write(directory, split, itertools.chain([first], rows), metadata)
  told = [_REASONS.get(reason, f'{{}} {reason.replace("_", " ")}').format(n, **settings)
          for reason, n in dropped.items() if n]
  logging.info('%s: %d rows of %d examples%s.', split,
               shards.read_metadata(directory, split)['num_rows'], metadata['num_examples'],
               ''.join(f'; {reason}' for reason in told))


def _warn_of_space_symbols(examples: Mapping[str, list[splits.Example]]) -> None:
  symbol = vocabularies.SPACE_SYMBOL
  count = sum(symbol in e.targets or symbol in (e.inputs or '')
              for split in examples.values() for e in split)
  if count:
    logging.warning('%d examples hold U+2581, which SentencePiece reads as a space.', count)
