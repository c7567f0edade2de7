"""Shards: what is written is read, whole or not at all, in a known order, resumed exactly."""

import json

import jax
import numpy as np
import pytest

from specdistill_jax import structs
from specdistill_jax.data import shards

METADATA = dict(vocab_size=100, vocabulary_digest='d', max_length=8, source='fixed', task='toy')


def make_row(i, length=None):
  """Row i has its number as first token, so that batches tell which rows they hold."""
  length = length or 3 + i % 5
  tokens = np.full(length, 2 + i, np.int32)
  mask = np.ones(length, np.uint8)
  mask[:2] = 0
  return shards.Row(tokens, 2, mask, f'réf {i}', f'doc/{i}')


def put(directory, num_rows=10, split='train', **metadata):
  shards.write(directory, split, [make_row(i) for i in range(num_rows)], {**METADATA, **metadata})
  return directory


def read(directory, **arguments):
  arguments = dict(batch_size=3, max_length=8, seed=0) | arguments
  return shards.batches(directory, arguments.pop('split', 'train'), **arguments)


def numbers(batch):
  return (batch.tokens_bt[:, 0] - 2).tolist()


def test_rows_come_back_as_written(tmp_path, monkeypatch):
  monkeypatch.setattr(shards, 'ROWS_PER_FILE', 4)   # three files
  found = shards.rows(put(tmp_path), 'train')
  assert len(found) == 10
  for i, row in enumerate(found):
    expected = make_row(i)
    np.testing.assert_array_equal(row.tokens, expected.tokens)
    np.testing.assert_array_equal(row.loss_mask, expected.loss_mask)
    assert row.tokens.dtype == np.int32 and row.loss_mask.dtype == np.uint8
    assert (row.prompt_length, row.reference, row.document) == (2, f'réf {i}', f'doc/{i}')
  assert found[-1].document == 'doc/9'
  metadata = shards.read_metadata(tmp_path, 'train')
  assert (metadata['num_rows'], metadata['task'], metadata['longest_row']) == (10, 'toy', 7)
  assert len(metadata['files']) == 3
  assert metadata['num_tokens'] == sum(len(row.tokens) for row in found)


def test_batches_are_padded_and_typed(tmp_path):
  batch = next(read(put(tmp_path), shuffle=False))
  assert isinstance(batch, structs.Batch)
  assert batch.widths == structs.Widths(2, 5)  # of all the data
  np.testing.assert_array_equal(batch.tokens_bt, [
      [2, 2, 2, 0, 0, 0, 0, 0], [3, 3, 3, 3, 0, 0, 0, 0], [4, 4, 4, 4, 4, 0, 0, 0]])
  np.testing.assert_array_equal(batch.loss_mask_bt, [
      [0, 0, 1, 0, 0, 0, 0, 0], [0, 0, 1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 1, 0, 0, 0]])
  np.testing.assert_array_equal(batch.lengths_b, [3, 4, 5])
  np.testing.assert_array_equal(batch.prompt_lengths_b, [2, 2, 2])
  assert [leaf.dtype.name for leaf in jax.tree.leaves(batch)] == [
      'int32', 'float32', 'int32', 'int32']
  assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(batch))


def test_every_epoch_is_another_permutation(tmp_path):
  iterator = read(put(tmp_path, 12))
  epochs = [[n for _ in range(4) for n in numbers(next(iterator))] for _ in range(3)]
  assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
  assert len({tuple(epoch) for epoch in epochs}) == 3
  again = read(tmp_path)
  assert [n for _ in range(4) for n in numbers(next(again))] == epochs[0]
  other = read(tmp_path, seed=1)
  assert [n for _ in range(4) for n in numbers(next(other))] != epochs[0]


def test_partial_batches(tmp_path):
  """Ten rows by three: training drops one an epoch, evaluation may have them all."""
  put(tmp_path)
  assert [len(numbers(b)) for b in read(tmp_path, num_epochs=2)] == [3] * 6
  everything = read(tmp_path, num_epochs=1, shuffle=False, drop_remainder=False)
  assert [numbers(b) for b in everything] == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]


@pytest.mark.parametrize('steps_before', [0, 1, 5, 7])
def test_a_restored_iterator_continues_exactly(tmp_path, steps_before):
  """Also across an epoch's end (3 steps), and although the reader runs ahead."""
  iterator = read(put(tmp_path))
  for _ in range(steps_before):
    next(iterator)
  state = json.loads(json.dumps(iterator.get_state()))
  expected = [next(iterator) for _ in range(7)]
  fresh = read(tmp_path)
  fresh.set_state(state)
  for batch in expected:
    jax.tree.map(np.testing.assert_array_equal, batch, next(fresh))
  # And back again in a used one.
  iterator.set_state(state)
  jax.tree.map(np.testing.assert_array_equal, expected[0], next(iterator))


def test_processes_share_out_the_batches_of_one(tmp_path):
  """Also where the rows do not divide: nobody gets a batch more than another."""
  put(tmp_path, 11)
  whole = [numbers(b) for b in read(tmp_path, batch_size=4, num_epochs=3)]
  for places in ([0, 1], [2, 3]), ([0, 3], [1, 2]):
    parts = [list(read(tmp_path, batch_size=4, num_epochs=3, batch_rows=part))
             for part in places]
    assert [len(part) for part in parts] == [len(whole)] * 2 == [6, 6]
    for batch, *held in zip(whole, *parts):
      assert [numbers(part) for part in held] == [[batch[i] for i in part] for part in places]


def test_writing_is_all_or_nothing(tmp_path):
  def failing():
    yield make_row(0)
    raise RuntimeError('killed')
  with pytest.raises(RuntimeError, match='killed'):
    shards.write(tmp_path, 'train', failing(), METADATA)
  assert not shards.exists(tmp_path, 'train')
  with pytest.raises(ValueError, match="no split 'train'.*prepare"):
    shards.rows(tmp_path, 'train')
  put(tmp_path, 4)   # what is left over does not stand in the way
  assert len(shards.rows(tmp_path, 'train')) == 4
  with pytest.raises(ValueError, match="already holds the split 'train'"):
    put(tmp_path, 5)
  assert len(shards.rows(tmp_path, 'train')) == 4


def test_lost_or_foreign_shards_are_refused(tmp_path):
  put(tmp_path)
  metadata = json.loads((tmp_path / 'train.json').read_text())
  (tmp_path / 'train.json').write_text(json.dumps(metadata | {'num_rows': 9}))
  with pytest.raises(ValueError, match='has 10 rows; its metadata says 9'):
    shards.rows(tmp_path, 'train')
  (tmp_path / 'train.json').write_text(json.dumps(metadata | {'format': 0}))
  with pytest.raises(ValueError, match='has format 0'):
    shards.rows(tmp_path, 'train')
  (tmp_path / 'train.json').write_text(json.dumps(metadata))
  (tmp_path / 'train-00000.array_record').unlink()
  with pytest.raises(ValueError, match='train-00000.array_record.* is missing'):
    shards.rows(tmp_path, 'train')


def unfit(**changes):
  row = make_row(3)
  return shards.Row(**(dict(tokens=row.tokens, prompt_length=2, loss_mask=row.loss_mask,
                            reference='', document='doc/3') | changes))


@pytest.mark.parametrize('row, message', [
    (make_row(3, length=9), 'has 9 tokens; max_length is 8'),
    (unfit(tokens=np.full(6, 100, np.int32)), 'token id 100, outside the vocabulary of 100'),
    (unfit(tokens=np.full(6, -1, np.int32)), 'token id -1, outside'),
    (unfit(prompt_length=0), 'a prompt of 0 of its 6 tokens'),
    (unfit(prompt_length=6), 'a prompt of 6 of its 6 tokens'),
    (unfit(loss_mask=np.ones(5, np.uint8)), 'needs a loss mask of 6 zeros and ones'),
    (unfit(loss_mask=np.full(6, 2, np.uint8)), 'needs a loss mask of 6 zeros and ones'),
    (unfit(loss_mask=np.eye(1, 6, dtype=np.uint8)[0]), 'no token to learn'),
    # All of the mask lies in the prompt, of which an encoder-decoder learns nothing.
    (unfit(loss_mask=np.eye(2, 6, dtype=np.uint8)[1]), 'no token to learn'),
    (unfit(loss_mask=np.ones(6, np.uint8)), 'all ones: the prompt would be learnt'),
])
def test_unfit_rows_are_named(tmp_path, row, message):
  place = "Row 1 of the split 'train' .document 'doc/3'."
  with pytest.raises(ValueError, match=f'{place} .*{message}'):
    shards.write(tmp_path, 'train', [make_row(0), row], METADATA | dict(kind='pairs'))


def test_running_text_and_prompts_of_one_token_may_be_learnt_throughout(tmp_path):
  everything = dict(loss_mask=np.ones(6, np.uint8))
  shards.write(tmp_path, 'train', [unfit(**everything)], METADATA | {'kind': 'language modelling'})
  shards.write(tmp_path, 'validation', [unfit(prompt_length=1, **everything)],
               METADATA | {'kind': 'pairs'})
  for split in ('train', 'validation'):
    assert shards.read_metadata(tmp_path, split)['num_rows'] == 1


def test_unfit_metadata_and_empty_splits_are_refused(tmp_path):
  with pytest.raises(ValueError, match="split 'train' is empty"):
    shards.write(tmp_path, 'train', [], METADATA)
  with pytest.raises(ValueError, match='max_length, source is missing'):
    shards.write(tmp_path, 'train', [make_row(0)], dict(vocab_size=9, vocabulary_digest=''))
  with pytest.raises(ValueError, match="fixed, target, draft, not 'teacher'"):
    put(tmp_path, source='teacher')


@pytest.mark.parametrize('mask', [np.zeros(6, np.uint8), np.eye(2, 6, dtype=np.uint8)[1]])
def test_an_all_masked_batch_is_refused(mask, tmp_path, monkeypatch):
  """Such rows are refused when written; a shard from elsewhere must not train silently."""
  monkeypatch.setattr(shards.records, 'check', lambda *args: None)
  masked = [unfit(loss_mask=mask) for _ in range(4)]
  shards.write(tmp_path, 'train', masked, METADATA)
  with pytest.raises(ValueError, match="split 'train' has no token to learn.*'doc/3'"):
    next(read(tmp_path))


@pytest.mark.parametrize('arguments, message', [
    (dict(batch_size=11), "batch_size 11 exceeds the 10 rows of the split 'train'"),
    (dict(batch_size=0), 'batch_size is 0, and must be at least 1'),
    (dict(batch_size=3, batch_rows=[2, 3]), r'batch_rows \[2, 3\] must name places from 0 to 2'),
    (dict(batch_rows=[]), 'at least one'),
    (dict(max_length=6), "max_length 6 is shorter than the longest row of the split 'train', 7"),
    (dict(batch_size=4, batch_rows=[0], drop_remainder=False), 'is for whole batches'),
    (dict(split='test'), "no split 'test'"),
])
def test_batching_that_cannot_be_met_is_refused(tmp_path, arguments, message):
  put(tmp_path)
  with pytest.raises(ValueError, match=message):
    read(tmp_path, **arguments)


def test_rows_to_decode_are_held_out_ones_or_the_prompts_that_are_there(tmp_path):
  drawn = lambda count, seed: [(row.tokens[:row.prompt_length].tolist(), row.reference)
                               for row in shards.evaluation_rows(tmp_path, count, seed)]
  put(tmp_path, 10, 'validation')
  prompts = drawn(10, 3)
  assert sorted(prompts) == [([2 + i, 2 + i], f'réf {i}') for i in range(10)]
  assert drawn(4, 3) == prompts[:4] and drawn(None, 3) == prompts
  assert drawn(10, 4) != prompts
  for count in (0, 11):
    with pytest.raises(ValueError, match=f'num_prompts is {count}; the validation .* has 10 rows'):
      drawn(count, 3)
  put(tmp_path, 3, shards.PROMPTS)
  assert sorted(drawn(None, 3)) == sorted(prompts)[:3]
  with pytest.raises(ValueError, match='num_prompts is 4; the prompts split .* has 3 rows'):
    drawn(4, 3)
