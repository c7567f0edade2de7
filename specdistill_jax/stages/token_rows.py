"""Rows of tokens from examples: pairs, running text, conversations, prompts alone."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from absl import logging
import numpy as np

from specdistill_jax.data import chat
from specdistill_jax.data import papers
from specdistill_jax.data import records
from specdistill_jax.data import shards
from specdistill_jax.data import splits
from specdistill_jax.stages import sources

Counts = dict[str, int]

_BATCH_SIZE = 512


def from_texts(tokenised: Iterable, settings: Mapping[str, Any], vocabulary: Any,
               counts: Counts, split: str) -> Iterator[shards.Row]:
  """Rows of tokenised examples; counts what gives none, and what was cut, by reason."""
  counts.update(too_long=0, too_short=0, cut_inputs=0, cut_targets=0)
  max_inputs, max_targets = sources.lengths(settings)
  prefix = np.array(vocabulary.prefix_ids, np.int32)
  suffix = np.array(vocabulary.suffix_ids, np.int32)
  tail = _tail(settings, vocabulary, max_inputs)
  is_prompt = split == shards.PROMPTS
  for number, example in enumerate(tokenised):
    _log_progress(split, number)
    if not len(example.inputs):
      rows = list(language_modelling_rows(
          example.targets, settings['max_length'], settings['prompt_length'],
          example.document, vocabulary.decode, prefix))
      width = settings['max_length'] - len(prefix)
      counts['too_short'] += -(-len(example.targets) // width) - len(rows)
      yield from rows
      continue
    inputs, targets = np.concatenate([prefix, example.inputs, suffix]), example.targets
    if max_inputs and len(inputs) > max_inputs:
      inputs = np.concatenate([inputs[:max_inputs - len(tail)], tail])
      counts['cut_inputs'] += 1
    if max_targets and len(targets) > max_targets and not is_prompt:
      # The end token is cut with the rest: the text does not end there.
      targets = targets[:max_targets]
      counts['cut_targets'] += 1
    if is_prompt:
      row = prompt_row(inputs, example.reference, example.document, example.category)
    else:
      row = pair_row(inputs, targets, example.reference, example.document, example.category)
    if len(row.tokens) > settings['max_length']:
      counts['too_long'] += 1
    else:
      yield row


def from_conversations(examples: Sequence[splits.Example], settings: Mapping[str, Any],
                       vocabulary: Any, counts: Counts, split: str) -> Iterator[shards.Row]:
  """Rows of conversations; counts those that are too long, whole or in part.

  A conversation ends after the last answer that fits into `task.max_length`. Its prompt is
  what stands before that answer, of at most `task.max_inputs` tokens; all answers are learnt.
  """
  counts.update(too_long=0, cut_conversations=0)
  template = chat.load(settings['chat_template'])
  for start in range(0, len(examples), _BATCH_SIZE):
    _log_progress(split, start)
    batch = examples[start:start + _BATCH_SIZE]
    rendered = [chat.render(template, example.turns) for example in batch]
    tokenised = chat.tokenise(rendered, vocabulary, settings['max_length'],
                              settings['max_inputs'])
    for example, segments, found in zip(batch, rendered, tokenised, strict=True):
      row = _conversation_row(example, segments, found, settings, counts,
                              is_prompt=split == shards.PROMPTS)
      if row is not None:
        yield row


def _conversation_row(example: splits.Example, segments: Sequence[chat.Segment],
                      found: chat.Tokenised | None, settings: Mapping[str, Any],
                      counts: Counts, is_prompt: bool) -> shards.Row | None:
  answers = [text for role, text in example.turns if role == 'assistant']
  is_cut = found is not None and found.num_answers < len(answers)
  # Cut, a prompt would be an earlier turn's.
  if found is None or is_cut and is_prompt:
    counts['too_long'] += 1
    return None
  counts['cut_conversations'] += is_cut
  chat.check(settings['chat_template'], segments, example.turns, found.loss_mask)
  reference = answers[found.num_answers - 1]
  if is_prompt:
    return prompt_row(found.tokens[:found.prompt_length], reference, example.document,
                      example.category)
  return shards.Row(found.tokens, found.prompt_length, found.loss_mask, reference,
                    example.document, example.category)


def with_sound_masks(rows: Iterable[shards.Row], task: str, kind: str,
                     vocabulary: Any) -> Iterator[shards.Row]:
  """`rows` as they are; a ValueError shows the text of one that would teach nothing, or all."""
  for row in rows:
    if kind != splits.PROMPTS and (fault := records.mask_fault(row, kind)):
      raise ValueError(f"The task '{task}': the row of '{row.document}' {fault}. It reads, "
                       f'{records.rendered(row, vocabulary)}')
    yield row


def language_modelling_rows(tokens: np.ndarray, max_length: int, prompt_length: int,
                            document: str, decode, prefix: Sequence[int] = ()
                            ) -> Iterator[shards.Row]:
  """Cuts a document's int32 `tokens` into rows; all but each row's first token are learnt.

  The last row may be shorter than `max_length`; it is left out where nothing follows its
  prompt, so that every row has something to continue. Each row begins with `prefix`.
  """
  prefix = np.array(prefix, np.int32)
  width = max_length - len(prefix)
  for start in range(0, len(tokens), width):
    row = np.concatenate([prefix, tokens[start:start + width]])
    if len(row) > prompt_length:
      loss_mask = np.ones(len(row), np.uint8)
      loss_mask[0] = 0  # nothing predicts it
      yield shards.Row(row, prompt_length, loss_mask, decode(row[prompt_length:]), document)


def pair_row(inputs: np.ndarray, targets: np.ndarray, reference: str, document: str,
             category: str = '') -> shards.Row:
  """Prompt and completion as one row; only the completion, its end included, is learnt."""
  loss_mask = np.zeros(len(inputs) + len(targets), np.uint8)
  loss_mask[len(inputs):] = 1
  return shards.Row(np.concatenate([inputs, targets]), len(inputs), loss_mask, reference,
                    document, category)


def prompt_row(inputs: np.ndarray, reference: str, document: str, category: str) -> shards.Row:
  """A prompt for evaluation only: nothing follows it, nothing is learnt."""
  return shards.Row(inputs, len(inputs), np.zeros(len(inputs), np.uint8), reference, document,
                    category)


def _tail(settings: Mapping[str, Any], vocabulary: Any, max_inputs: int | None) -> np.ndarray:
  """What a prompt ends in, kept where the prompt is cut: else the task would not be posed."""
  paper = papers.PAPERS.get(settings['name'])
  # A newline is the separator of every task, see data.tasks.
  tail = np.array([*vocabulary.encode((paper.suffix if paper else '') + '\n'),
                   *vocabulary.suffix_ids], np.int32)
  if max_inputs and len(tail) >= max_inputs:
    raise ValueError(f'task.max_inputs is {max_inputs}; the end of the prompt alone takes '
                     f'{len(tail)} tokens, so give more.')
  return tail


def _log_progress(split: str, number: int) -> None:
  if number and not number % _BATCH_SIZE:
    logging.log_every_n_seconds(logging.INFO, '%s: %d examples tokenised', 10, split, number)
