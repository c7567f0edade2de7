"""A row of tokens: what makes it fit to train on, its bytes in a shard, its place in a batch."""

from collections.abc import Mapping, Sequence
import dataclasses
import itertools
import struct
from typing import Any

import numpy as np

from specdistill_jax import structs
from specdistill_jax.data import chat
from specdistill_jax.data import splits


_HEADER = struct.Struct('<4I')


@dataclasses.dataclass(frozen=True)
class Row:
  """A prompt and its completion, end token included.

  Attributes:
    tokens: int32 `[n]`.
    prompt_length: leading tokens that are the prompt, 0 < prompt_length < n; n in a row for
      evaluation only.
    loss_mask: uint8 `[n]`, 1 where predicting the token is to be learnt; 0 in a row for
      evaluation only.
    reference: text of the completion, '' where none is known.
    document: id of the document it comes from.
    category: that its file gives it, so that reports can group by it; or ''.
  """
  tokens: np.ndarray
  prompt_length: int
  loss_mask: np.ndarray
  reference: str
  document: str
  category: str = ''


def check(row: Row, split: str, index: int, metadata: Mapping[str, Any]) -> None:
  """Raises a ValueError that names the row where it is unfit for a shard."""
  place = f"Row {index} of the split '{split}' (document '{row.document}')"
  length = len(row.tokens)
  if length > metadata['max_length']:
    raise ValueError(f"{place} has {length} tokens; max_length is {metadata['max_length']}.")
  if not 0 < row.prompt_length <= length:
    raise ValueError(f'{place} has a prompt of {row.prompt_length} of its {length} tokens; '
                     'a prompt needs at least one.')
  low, high = row.tokens.min(), row.tokens.max()
  if low < 0 or high >= metadata['vocab_size']:
    raise ValueError(f'{place} has the token id {low if low < 0 else high}, outside the '
                     f"vocabulary of {metadata['vocab_size']}.")
  if row.loss_mask.shape != row.tokens.shape or row.loss_mask.max() > 1:
    raise ValueError(f'{place} needs a loss mask of {length} zeros and ones, '
                     f'not {row.loss_mask}.')
  if metadata.get('kind') == splits.PROMPTS:
    if row.prompt_length < length or row.loss_mask.any():
      raise ValueError(f'{place} is for evaluation only: all its {length} tokens must be its '
                       f'prompt, not {row.prompt_length}, and none may be learnt.')
    return
  if row.prompt_length == length:
    raise ValueError(f'{place} has a prompt of {row.prompt_length} of its {length} tokens; '
                     'prompt and completion need at least one each.')
  if fault := mask_fault(row, metadata.get('kind')):
    raise ValueError(f'{place} {fault}.')


def mask_fault(row: Row, kind: str | None) -> str | None:
  """What is wrong with the loss mask of a row to train on, of a `splits` kind; or None.

  The completion decides: an encoder-decoder learns nothing else. The first token counts for
  nothing, it is never predicted.
  """
  if not row.loss_mask[row.prompt_length:].any():
    return 'has no token to learn: the loss mask of its completion is all zeros'
  if kind == splits.PAIRS and row.prompt_length > 1 and row.loss_mask[1:].all():
    return 'has a loss mask of all ones: the prompt would be learnt too'
  return None


def rendered(row: Row, vocabulary: Any) -> str:
  """`marked` text of a row's tokens."""
  runs = itertools.groupby(zip(row.tokens.tolist(), row.loss_mask), lambda pair: bool(pair[1]))
  return chat.marked((vocabulary.decode([token for token, _ in run]), is_learnt)
                for is_learnt, run in runs)


def collate(batch: Sequence[Row], max_length: int, split: str,
            widths: structs.Widths | None = None) -> structs.Batch:
  """Pads rows to `[b, max_length]`. Raises ValueError where no token of any is to be learnt.

  `widths` are those of all the data, so that batches share a compilation; None: unknown.
  """
  shape = (len(batch), max_length)
  tokens_bt = np.full(shape, structs.PAD_ID, np.int32)
  loss_mask_bt = np.zeros(shape, np.float32)
  for b, row in enumerate(batch):
    tokens_bt[b, :len(row.tokens)] = row.tokens
    loss_mask_bt[b, :len(row.tokens)] = row.loss_mask
  prompt_lengths_b = np.array([row.prompt_length for row in batch], np.int32)
  if not (loss_mask_bt * (np.arange(max_length) >= prompt_lengths_b[:, None])).any():
    raise ValueError(f"A batch of the split '{split}' has no token to learn: the loss mask of "
                     f"all its {len(batch)} rows is 0 after the prompt, from document "
                     f"'{batch[0].document}' on.")
  return structs.Batch(
      tokens_bt=tokens_bt, loss_mask_bt=loss_mask_bt, prompt_lengths_b=prompt_lengths_b,
      lengths_b=np.array([len(row.tokens) for row in batch], np.int32), widths=widths)


def widths(rows: Sequence[Row]) -> structs.Widths:
  """The longest prompt and the longest completion among `rows`."""
  return structs.Widths(max(row.prompt_length for row in rows),
                        max(len(row.tokens) - row.prompt_length for row in rows))


def pack(row: Row) -> bytes:
  """The record of a row: a header of four sizes, tokens, mask, and three texts."""
  reference, document = row.reference.encode(), row.document.encode()
  header = _HEADER.pack(len(row.tokens), row.prompt_length, len(reference), len(document))
  return b''.join((header, row.tokens.astype('<i4').tobytes(),
                   row.loss_mask.astype(np.uint8).tobytes(), reference, document,
                   row.category.encode()))


def unpack(record: bytes) -> Row:
  """The row of a record."""
  length, prompt_length, reference_size, document_size = _HEADER.unpack_from(record)
  mask_at = _HEADER.size + 4 * length
  text_at = mask_at + length
  document_at = text_at + reference_size
  category_at = document_at + document_size
  return Row(
      np.frombuffer(record, '<i4', length, _HEADER.size).astype(np.int32), prompt_length,
      np.frombuffer(record, np.uint8, length, mask_at),
      record[text_at:document_at].decode(), record[document_at:category_at].decode(),
      record[category_at:].decode())
