"""A row of tokens: what makes it fit to train on, its bytes in a shard, its place in a batch."""

from collections.abc import Mapping, Sequence
import dataclasses
import struct
from typing import Any

import numpy as np

from specdistill_jax import structs

_HEADER = struct.Struct('<4I')


@dataclasses.dataclass(frozen=True)
class Row:
  """A prompt and its completion, end token included.

  Attributes:
    tokens: int32 `[n]`.
    prompt_length: leading tokens that are the prompt, 0 < prompt_length < n.
    loss_mask: uint8 `[n]`, 1 where predicting the token is to be learnt.
    reference: text of the completion.
    document: id of the document it comes from.
  """
  tokens: np.ndarray
  prompt_length: int
  loss_mask: np.ndarray
  reference: str
  document: str


def check(row: Row, split: str, index: int, metadata: Mapping[str, Any]) -> None:
  """Raises a ValueError that names the row where it is unfit for a shard."""
  place = f"Row {index} of the split '{split}' (document '{row.document}')"
  length = len(row.tokens)
  if length > metadata['max_length']:
    raise ValueError(f"{place} has {length} tokens; max_length is {metadata['max_length']}.")
  if not 0 < row.prompt_length < length:
    raise ValueError(f'{place} has a prompt of {row.prompt_length} of its {length} tokens; '
                     'prompt and completion need at least one each.')
  outside = (row.tokens < 0) | (row.tokens >= metadata['vocab_size'])
  if outside.any():
    raise ValueError(f'{place} has the token id {row.tokens[outside][0]}, outside the '
                     f"vocabulary of {metadata['vocab_size']}.")
  if row.loss_mask.shape != row.tokens.shape or not np.isin(row.loss_mask, (0, 1)).all():
    raise ValueError(f'{place} needs a loss mask of {length} zeros and ones, '
                     f'not {row.loss_mask}.')
  if not row.loss_mask[1:].any():
    raise ValueError(f'{place} has no token to learn: its loss mask is 0 throughout. '
                     '(The first token counts for nothing, it is never predicted.)')


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
  if not loss_mask_bt[:, 1:].any():
    raise ValueError(f"A batch of the split '{split}' has no token to learn: the loss mask of "
                     f"all its {len(batch)} rows is 0, from document '{batch[0].document}' on.")
  return structs.Batch(
      tokens_bt=tokens_bt, loss_mask_bt=loss_mask_bt,
      prompt_lengths_b=np.array([row.prompt_length for row in batch], np.int32),
      lengths_b=np.array([len(row.tokens) for row in batch], np.int32), widths=widths)


def widths(rows: Sequence[Row]) -> structs.Widths:
  """The longest prompt and the longest completion among `rows`."""
  return structs.Widths(max(row.prompt_length for row in rows),
                        max(len(row.tokens) - row.prompt_length for row in rows))


def pack(row: Row) -> bytes:
  """The record of a row: a header of four sizes, tokens, mask, reference, document."""
  reference, document = row.reference.encode(), row.document.encode()
  header = _HEADER.pack(len(row.tokens), row.prompt_length, len(reference), len(document))
  return b''.join((header, row.tokens.astype('<i4').tobytes(),
                   row.loss_mask.astype(np.uint8).tobytes(), reference, document))


def unpack(record: bytes) -> Row:
  """The row of a record."""
  length, prompt_length, reference_size, _ = _HEADER.unpack_from(record)
  mask_at = _HEADER.size + 4 * length
  text_at = mask_at + length
  return Row(
      np.frombuffer(record, '<i4', length, _HEADER.size).astype(np.int32), prompt_length,
      np.frombuffer(record, np.uint8, length, mask_at),
      record[text_at:text_at + reference_size].decode(),
      record[text_at + reference_size:].decode())
