"""The prepare stage on tiny files: rows, masks, splits, restarts, and what it refuses."""

import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

from configs import common
from specdistill_jax.data import shards
from specdistill_jax.data import vocabulary
from specdistill_jax.stages import prepare
from specdistill_jax.stages import token_rows

WORDS = 'red green blue black white brown grey pink gold lilac'.split()
PAIRS = [(f'Mix {a} and {b}:\n  what comes?', f'It is {b} {a}, {i}.')
         for i, (a, b) in enumerate((a, b) for a in WORDS for b in WORDS)]


def study(**task):
  config = common.study('test')
  config.task.update(name='local_files', vocab_size=330, max_length=48, validation_fraction=0.2)
  config.task.update(task)
  return config


def write_pairs(path, pairs):
  path.write_text(''.join(json.dumps({'inputs': a, 'targets': b}) + '\n' for a, b in pairs))
  return str(path)


@pytest.fixture(scope='module')
def pairs(tmp_path_factory):
  """A prepared workdir of pairs, one of them far too long, one empty; its config."""
  folder = tmp_path_factory.mktemp('pairs')
  extra = [('Too long', 'red green blue ' * 100), ('Nothing', '  ')]
  config = study(train_files=(write_pairs(folder / 'pairs.jsonl', PAIRS + extra),))
  prepare.run(config, folder / 'work')
  return config, folder / 'work'


@pytest.fixture(scope='module')
def text(tmp_path_factory):
  """A prepared workdir of plain text: thirty paragraphs of different lengths; its config."""
  folder = tmp_path_factory.mktemp('text')
  paragraphs = [' '.join(f'{word} {n}' for word in WORDS[:2 + n % 9]) + '\n  end.'
                for n in range(30)]
  (folder / 'a.txt').write_text('\n\n'.join(paragraphs))
  config = study(train_files=(str(folder / 'a.txt'),), max_length=16, prompt_length=4)
  prepare.run(config, folder / 'work')
  return config, folder / 'work', paragraphs


def load(workdir):
  vocab = vocabulary.Vocabulary(workdir / 'data' / 'vocabulary.model')
  return vocab, {split: list(shards.rows(workdir / 'data', split))
                 for split in ('train', 'validation')}


def test_pairs_become_prompt_and_completion(pairs):
  vocab, rows = load(pairs[1])
  known = dict(PAIRS)
  for row in rows['train'] + rows['validation']:
    prompt, completion = row.tokens[:row.prompt_length], row.tokens[row.prompt_length:]
    assert vocab.decode(prompt)[-1] == '\n'
    assert known[vocab.decode(prompt)[:-1]] == vocab.decode(completion) == row.reference
    assert completion[-1] == vocab.eos_id and vocab.eos_id not in row.tokens[:-1]
    np.testing.assert_array_equal(
        row.loss_mask, [0] * row.prompt_length + [1] * len(completion))


def test_every_pair_is_in_one_split_or_counted(pairs):
  _, rows = load(pairs[1])
  metadata = {split: shards.read_metadata(pairs[1] / 'data', split) for split in rows}
  documents = {split: {row.document for row in rows[split]} for split in rows}
  assert not documents['train'] & documents['validation']
  assert sum(len(r) for r in rows.values()) == len(PAIRS)
  assert len(rows['validation']) in (20, 19)   # the long one may be among them
  dropped = [metadata[split]['dropped'] for split in rows]
  assert sum(d['too_long'] for d in dropped) == 1
  assert metadata['train']['dropped']['empty'] == 1


def test_what_is_left_out_is_told_with_the_field_that_would_let_it_in(pairs, tmp_path, caplog):
  with caplog.at_level('INFO'):
    prepare.run(pairs[0], tmp_path)
  told = ' '.join(record.getMessage() for record in caplog.records)
  assert '1 left out as longer than task.max_length, 48' in told and '1 empty' in told
  assert 'task.prompt_length' not in told


def test_metadata_tells_what_later_stages_need(pairs):
  vocab, rows = load(pairs[1])
  metadata = shards.read_metadata(pairs[1] / 'data', 'train')
  assert metadata['vocab_size'] == vocab.size == 330
  assert metadata['vocabulary_digest'] == vocab.digest
  assert metadata['num_rows'] == len(rows['train'])
  assert (metadata['source'], metadata['task'], metadata['max_length']) == (
      'fixed', 'local_files', 48)


def test_text_is_cut_into_rows_that_join_again(text):
  _, workdir, paragraphs = text
  vocab, rows = load(workdir)
  lost = sum(shards.read_metadata(workdir / 'data', s)['dropped']['too_short'] for s in rows)
  documents = {}
  for row in rows['train'] + rows['validation']:
    assert row.prompt_length == 4 < len(row.tokens) <= 16
    assert row.loss_mask.tolist() == [0] + [1] * (len(row.tokens) - 1)
    assert row.reference == vocab.decode(row.tokens[4:])
    documents.setdefault(row.document, []).append(row)
  whole = 0
  for parts in documents.values():
    # The order of the training rows is shuffled by document, inside one it is the text's.
    joined = vocab.decode(np.concatenate([row.tokens for row in parts]))
    assert any(p.startswith(joined) for p in paragraphs)
    whole += joined in paragraphs
    assert parts[-1].tokens[-1] != vocab.eos_id or joined in paragraphs
    assert all(len(row.tokens) == 16 for row in parts[:-1])
  assert whole >= len(paragraphs) - lost > 0
  assert not {r.document for r in rows['train']} & {r.document for r in rows['validation']}


def test_the_held_out_text_does_not_shape_the_vocabulary(tmp_path, pairs):
  config, workdir = pairs
  validation = write_pairs(tmp_path / 'v.jsonl', [('zzz zzz', 'qqq qqq')])
  other = write_pairs(tmp_path / 'w.jsonl', [('xxx xxx', 'yyy yyy')])
  digests = []
  for i, held_out in enumerate((validation, other)):
    config = study(train_files=config.task.train_files, validation_files=(held_out,))
    prepare.run(config, tmp_path / str(i))
    digests.append(load(tmp_path / str(i))[0].digest)
  assert digests[0] == digests[1]
  assert digests[0] != load(workdir)[0].digest   # this one had fewer training texts


def test_the_same_settings_give_the_same_data(tmp_path, pairs):
  """And a second vocabulary in the same process is not mistaken for the first."""
  config, workdir = pairs
  prepare.run(config, tmp_path / 'again')
  for path in (workdir / 'data').iterdir():
    assert (tmp_path / 'again' / 'data' / path.name).read_bytes() == path.read_bytes()


def test_a_workdir_prepared_anew_gets_its_own_vocabulary(tmp_path):
  """seqio keeps vocabularies by path: the second text was once split by the first one's pieces."""
  source = tmp_path / 'a.jsonl'
  for pairs in (PAIRS, [(a.upper(), b.upper()) for a, b in PAIRS]):
    shutil.rmtree(tmp_path / 'data', ignore_errors=True)
    prepare.run(study(train_files=(write_pairs(source, pairs),)), tmp_path)
    vocab, rows = load(tmp_path)
    assert all(vocab.decode(row.tokens[row.prompt_length:]) == row.reference
               for row in rows['train'])


def test_max_examples_bounds_the_training_rows_only(tmp_path, pairs):
  config, _ = pairs
  prepare.run(study(train_files=config.task.train_files, max_examples=7), tmp_path)
  _, rows = load(tmp_path)
  assert len(rows['train']) == 7
  assert len(rows['validation']) >= 19


def test_prepared_data_is_kept_and_another_config_refused(pairs):
  config, workdir = pairs
  before = {p.name: p.stat().st_mtime_ns for p in (workdir / 'data').iterdir()}
  prepare.run(config, workdir)
  other = study(train_files=config.task.train_files, max_length=32)
  with pytest.raises(ValueError, match='prepared with task.max_length = 48, and now it is 32'):
    prepare.run(other, workdir)
  other = study(train_files=config.task.train_files)
  other.seed = 5
  with pytest.raises(ValueError, match='prepared with seed = 0, and now it is 5'):
    prepare.run(other, workdir)
  assert {p.name: p.stat().st_mtime_ns for p in (workdir / 'data').iterdir()} == before


def test_a_killed_run_leaves_nothing_that_looks_finished(tmp_path, pairs):
  """Killed for good, when half of the files are there; the next run clears up and finishes."""
  config, workdir = pairs
  script = f'''
import os, pathlib, signal
from specdistill_jax.stages import prepare
import test_data_prepare
prepare._write_splits = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
prepare.run(test_data_prepare.study(train_files={config.task.train_files!r}),
            pathlib.Path({str(tmp_path)!r}))'''
  tests = pathlib.Path(__file__).parent
  killed = subprocess.run([sys.executable, '-c', script], cwd=tests.parent, check=False, env={
      **os.environ, 'PYTHONPATH': f'{tests.parent}{os.pathsep}{tests}'})
  assert killed.returncode == -signal.SIGKILL
  left, = tmp_path.iterdir()
  assert left.name.startswith('data.incomplete-') and (left / 'vocabulary.model').exists()
  prepare.run(config, tmp_path)
  assert [p.name for p in tmp_path.iterdir()] == ['data']
  assert load(tmp_path)[0].digest == load(workdir)[0].digest


@pytest.mark.parametrize('task, message', [
    (dict(max_length=6), 'train split is empty: none of its .* raise task.max_length'),
    (dict(vocab_size=4000), 'task.vocab_size 4000 is too large'),
    (dict(vocab_size=100), 'task.vocab_size 100 is too small'),
    (dict(train_files=()), 'task.train_files is empty'),
    (dict(train_files=('absent.txt',)), "'absent.txt': No such file"),
    (dict(validation_fraction=1.5), 'validation_fraction is 1.5'),
    (dict(metric='rouge'), "no quality metric 'rouge'"),
    (dict(name='stdlib'), "task.name is 'stdlib'; there are stdlib_docs"),
    (dict(inputs_field='', prompt_length=48),
     'prompt_length is 48; .* less than task.max_length, 48'),
])
def test_unfit_settings_are_refused_and_leave_nothing(tmp_path, pairs, task, message):
  with pytest.raises(ValueError, match=message):
    prepare.run(study(**({'train_files': pairs[0].task.train_files} | task)), tmp_path)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('fill, fault', [(0, 'all zeros'), (1, 'all ones')])
def test_a_wrong_mask_of_a_pair_stops_the_run_and_shows_the_text(
    fill, fault, tmp_path, pairs, monkeypatch):
  """Whatever a task does to its rows, one that would teach nothing, or all, is not written."""
  right = token_rows.pair_row
  def wrong(*args):
    row = right(*args)
    return dataclasses.replace(row, loss_mask=np.full_like(row.loss_mask, fill))
  monkeypatch.setattr(token_rows, 'pair_row', wrong)
  with pytest.raises(ValueError, match=f"task 'local_files'.*{fault}") as caught:
    prepare.run(pairs[0], tmp_path)
  prompt, completion = next(
      (a, b) for a, b in PAIRS if f'{a!r}'[1:-1] in str(caught.value))
  begin, end = ('⟦', '⟧') if fill else ('', '')
  assert f'{begin + prompt}\n{completion + end}'.replace('\n', '\\n') in str(caught.value)
  assert not list(tmp_path.iterdir())


def test_empty_and_leaking_splits_are_refused(tmp_path, pairs):
  empty, same = tmp_path / 'empty.jsonl', tmp_path / 'same.jsonl'
  empty.write_text('\n')
  write_pairs(same, PAIRS)
  with pytest.raises(ValueError, match='training split is empty: .*empty.jsonl.* has no example'):
    prepare.run(study(train_files=(str(empty),)), tmp_path / 'work')
  with pytest.raises(ValueError, match='validation split is empty: .*empty.jsonl'):
    prepare.run(study(train_files=(str(same),), validation_files=(str(empty),)), tmp_path / 'work')
  with pytest.raises(ValueError, match='every example of it also stands in the validation'):
    prepare.run(study(train_files=(str(same),), validation_files=(str(same),)), tmp_path / 'work')


def test_a_data_folder_of_something_else_is_left_alone(tmp_path, pairs):
  (tmp_path / 'data').mkdir()
  (tmp_path / 'data' / 'mine.txt').write_text('precious')
  with pytest.raises(ValueError, match='has no train split, so this stage did not write it'):
    prepare.run(pairs[0], tmp_path)
  assert (tmp_path / 'data' / 'mine.txt').read_text() == 'precious'


def test_in_graph_tokens_are_the_vocabularys(pairs):
  """seqio's tokenizer and ours agree, else prompts of users would not match the training."""
  from specdistill_jax.data import splits, tasks   # TensorFlow
  vocab = load(pairs[1])[0]
  texts = ['Mix  red\n\n  and\tblue ', 'naïve 日本語 😀', '<pad> </s> 12345', 'x' * 500]
  task = tasks.make('agreement', {'train': [splits.Example(t, t[::-1], 'd') for t in texts]},
                    str(vocab.path), 'accuracy')
  for text, example in zip(texts, tasks.tokenised(task, 'train', vocab)):
    assert example.inputs.tolist() == vocab.encode(text + '\n')
    assert example.targets.tolist() == vocab.encode(text[::-1]) + [vocab.eos_id]
    assert example.reference == text[::-1]
  assert task.metric_fns[0](targets=['1'], predictions=['1']) == {'accuracy': 100.0}
