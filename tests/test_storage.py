"""Files on a disk and in a bucket: what is there, also after a kill, is whole in both."""

import dataclasses
import itertools
import json
import os

import jax
import numpy as np
import pytest

import bucket
import chats_config
import models
from specdistill_jax import convert
from specdistill_jax import storage
from specdistill_jax.checkpoints import digests
from specdistill_jax.checkpoints import hf
from specdistill_jax.checkpoints import pretrained
from specdistill_jax.data import chat
from specdistill_jax.data import files
from specdistill_jax.data import prompts
from specdistill_jax.data import shards
from specdistill_jax.data import vocabulary
from specdistill_jax.evaluation import rows
from specdistill_jax.stages import workdirs
from specdistill_jax.training import writer
import studies


@pytest.fixture(scope='module')
def served(tmp_path_factory):
  with pytest.MonkeyPatch.context() as patch, bucket.serve() as (found, port):
    for name, value in bucket.environment(port).items():
      patch.setenv(name, value)
    patch.setenv('XDG_CACHE_HOME', str(tmp_path_factory.mktemp('cache')))
    forget_client()
    yield found
  forget_client()


def forget_client():
  """A client keeps the address that it was made with."""
  import gcsfs
  from etils import epath
  gcsfs.GCSFileSystem.clear_instance_cache()
  storage._client.cache_clear()
  epath.backend.fsspec_backend._get_filesystem.cache_clear()


_numbers = itertools.count()


@pytest.fixture(params=['disk', 'bucket'])
def folder(request, tmp_path):
  """An empty folder of each kind."""
  if request.param == 'disk':
    return tmp_path / 'w'
  request.getfixturevalue('served')
  return storage.path(f'{bucket.ROOT}/{next(_numbers)}/w')


@pytest.fixture
def remote(served):
  return storage.path(f'{bucket.ROOT}/{next(_numbers)}/w')


def test_what_others_write_is_seen(remote, served):
  """Listings must not be kept: the files of a study are written by several processes."""
  assert not remote.exists() and not storage.is_whole(remote)
  storage.write(remote / 'mine', b'')
  assert [path.name for path in remote.iterdir()] == ['mine']
  served.put(str(remote / 'theirs').removeprefix(f'{bucket.ROOT}/'), b'1')
  assert sorted(path.name for path in remote.iterdir()) == ['mine', 'theirs']
  assert (remote / 'theirs').read_bytes() == b'1'


class Killed(BaseException):
  pass


def test_paths_of_both_kinds_read_list_and_join_alike(folder):
  assert not folder.exists()
  storage.write(folder / 'a' / 'b.json', '{"x": "é"}')
  storage.write(folder / 'a' / 'b.json', b'{"x": 1}')
  assert json.loads((folder / 'a' / 'b.json').read_text()) == {'x': 1}
  assert (folder / 'a').is_dir() and (folder / 'a' / 'b.json').is_file()
  assert [path.name for path in folder.iterdir()] == ['a']
  assert list(folder.glob('*/b.json')) == [folder / 'a' / 'b.json']
  assert storage.path(str(folder / 'a')) == folder / 'a' == storage.absolute(folder / 'a')
  assert storage.resolve(folder / 'target', '../a/b.json') == folder / 'a' / 'b.json'
  assert storage.local(folder / 'a' / 'b.json').read_bytes() == b'{"x": 1}'
  assert (storage.free_bytes(folder) is None) == str(folder).startswith('gs://')


def test_what_is_staged_appears_whole(folder):
  with pytest.raises(Killed), storage.staged(folder / 'data') as aside:
    (aside / 'one').write_text('1')
    raise Killed
  assert not storage.is_whole(folder / 'data') and not (folder / 'data').exists()
  with storage.staged(folder / 'data') as aside:
    (aside / 'deep').mkdir()
    (aside / 'deep' / 'two').write_text('2')
    assert not storage.is_whole(folder / 'data')
  assert storage.is_whole(folder / 'data')
  assert [path.name for path in folder.iterdir()] == ['data']
  assert (folder / 'data' / 'deep' / 'two').read_text() == '2'
  with pytest.raises(OSError), storage.staged(folder / 'data') as aside:
    (aside / 'three').write_text('3')
  assert (folder / 'data' / 'deep' / 'two').exists()  # what is there stays


def test_what_is_made_is_there_whole_or_not_at_all(folder):
  storage.write(folder / 'plot.png', b'old')
  with pytest.raises(Killed), storage.made(folder / 'plot.png') as aside:
    aside.write_bytes(b'ne')
    raise Killed
  with pytest.raises(Killed), storage.made(folder / 'other.png') as aside:
    raise Killed
  assert [path.name for path in folder.iterdir()] == ['plot.png']
  assert (folder / 'plot.png').read_bytes() == b'old'
  with storage.made(folder / 'plot.png') as aside:
    aside.write_bytes(b'new')
  assert (folder / 'plot.png').read_bytes() == b'new'


def test_an_upload_that_was_interrupted_is_not_whole_and_is_done_again(remote, monkeypatch):
  """Some of the objects are there, and no rename hides them."""
  def fill(aside, *names):
    for name in names:
      (aside / name).write_text(name)
  original = storage.put
  def half(source, folder):
    (source / 'b.txt').unlink()
    original(source, folder)
    raise Killed
  monkeypatch.setattr(storage, 'put', half)
  with pytest.raises(Killed), storage.staged(remote / 'data') as aside:
    fill(aside, 'a.txt', 'b.txt')
  monkeypatch.undo()
  assert (remote / 'data' / 'a.txt').exists() and not storage.is_whole(remote / 'data')
  with storage.staged(remote / 'data') as aside:
    fill(aside, 'b.txt', 'c.txt')
  assert storage.is_whole(remote / 'data')
  assert sorted(storage.digests(remote / 'data')) == ['b.txt', 'c.txt']


def test_lines_are_safe_when_sync_returns_and_never_torn(remote, served):
  """A bucket gets them seldom: each put is the whole object."""
  path = remote / 'metrics.jsonl'
  lines = storage.Lines(path)
  lines._next_put = float('inf')  # the time of the next put, on a machine however slow
  before = len(served.log)
  for step in range(50):
    lines.append(f'{{"step": {step}}}\n')
  assert len(served.log) == before and not path.exists()
  lines.sync()
  lines.sync()
  assert path.read_bytes().count(b'\n') == 50
  puts = [method for _, method, name in served.log[before:] if method == 'POST']
  assert len(puts) == 1
  more = storage.Lines(path)  # of the run that goes on
  more.append('{"step": 50}\n')
  more._next_put = 0.0
  more.append('{"step": 51}\n')  # seconds later
  assert path.read_bytes().count(b'\n') == 52


def write_steps(workdir, first, steps):
  with writer.Writer(workdir, 'target', 'target', first_step=first, steps=9) as written:
    for step in steps:
      written.write(step, loss=1.0 / (1 + step))
    written.sync()


def test_a_resumed_run_loses_and_doubles_no_line(folder):
  storage.write(folder / 'config.json', '{}')
  write_steps(folder, 0, range(6))
  write_steps(folder, 3, range(4, 10))  # its checkpoint was that of step 3
  found = [json.loads(line)['step'] for line in (
      folder / 'metrics.jsonl').read_text().splitlines()]
  assert found == list(range(10))
  assert len(list((folder / 'tensorboard' / 'target').iterdir())) in (1, 2)  # same second: one


def test_results_are_appended_and_repaired(folder):
  path = folder / 'results.jsonl'
  storage.write(folder / 'config.json', '{}')
  assert rows.read(path) == []
  rows.append(path, rows.make(seed=1, category='maths'), rows.make(seed=1))
  rows.append(path, rows.make(seed=2, category='maths'))
  rows.repair(path)
  rows.append(path, rows.make(seed=2))
  assert [(row['seed'], row['category']) for row in rows.read(path)] == [
      (1, 'maths'), (1, None), (2, None)]


def test_shards_of_both_kinds_hold_the_same_rows(folder, tmp_path):
  """A bucket's are copied to this machine once."""
  metadata = dict(vocab_size=16, vocabulary_digest='none', max_length=12, source='fixed')
  shards.write(folder / 'data', 'train', studies.rows(20, 0), metadata)
  shards.write(tmp_path / 'reference', 'train', studies.rows(20, 0), metadata)
  assert sorted(path.name for path in (folder / 'data').iterdir()) == [
      'train-00000.array_record', 'train.json']
  batch = next(shards.batches(folder / 'data', 'train', batch_size=4, max_length=12, seed=3))
  wanted = next(shards.batches(
      tmp_path / 'reference', 'train', batch_size=4, max_length=12, seed=3))
  assert (batch.tokens_bt == wanted.tokens_bt).all()
  with pytest.raises(ValueError, match='already holds'):
    shards.write(folder / 'data', 'train', studies.rows(20, 0), metadata)


def test_copies_are_made_once_for_each_version(remote, served):
  storage.write(remote / 'model' / 'weights', b'1' * 1000)
  storage.write(remote / 'model' / 'config.json', '{}')
  some = storage.local(remote / 'model', ('config.json', 'absent'))
  assert [path.name for path in some.iterdir()] == ['config.json'] and some.name == 'model'
  first = storage.local(remote / 'model')
  before = len(served.log)
  assert storage.local(remote / 'model') == first
  assert not any(name.endswith('weights') for _, _, name in served.log[before:])
  storage.write(remote / 'model' / 'weights', b'2' * 1000)  # as long as before
  assert (storage.local(remote / 'model') / 'weights').read_bytes() == b'2' * 1000
  with pytest.raises(FileNotFoundError, match='absent'):
    storage.local(remote / 'absent')


def test_a_damaged_checkpoint_is_seen_and_put_aside(folder):
  step = folder / 'checkpoints' / '3'
  storage.write(step / 'params' / 'd' / 'x', b'weights')
  storage.write(step / 'data' / 'y', b'position')
  storage.write(step / 'digests' / 'placeholder', b'')
  digests.write(step, step / 'digests')
  assert digests.fault(step) is None
  storage.write(step / 'params' / 'd' / 'x', b'weighty')
  assert 'x is damaged' in digests.fault(step) and digests.fault(step, ['data']) is None
  (step / 'params' / 'd' / 'x').unlink()
  assert 'x is missing' in digests.fault(step)
  storage.write(folder / 'damaged' / '3' / 'older', b'')
  storage.move(step, folder / 'damaged' / '3')
  assert not step.exists() and sorted(storage.digests(folder / 'damaged' / '3')) == [
      'data/y', 'digests/files.json', 'digests/placeholder']


def test_data_are_read_from_a_bucket(remote, tmp_path):
  (tmp_path / 'talk.jsonl').write_text('{"messages": []}\n')
  storage.write(remote / 'talk.jsonl', (tmp_path / 'talk.jsonl').read_bytes())
  assert list(files.json_objects(str(remote / 'talk.jsonl'))) == [(1, {'messages': []})]
  with pytest.raises(ValueError, match="gs://.*absent.jsonl': No such file"):
    list(files.json_objects(str(remote / 'absent.jsonl')))
  storage.write(remote / 'mine.json', '{"user": "{content}", "answer": "{content}", "end": "."}')
  assert chat.load(str(remote / 'mine.json')).end == '.'
  task = {'canary': '', 'examples': [{'input': 'True and False is', 'target': 'False'}]}
  storage.write(remote / 'bbh' / 'boolean_expressions.json', json.dumps(task))
  assert [example.targets for example in prompts.bbh(str(remote / 'bbh'))] == ['False']


def test_models_are_read_converted_and_written_there(remote, tmp_path):
  """Hugging Face's directory to ours, both in the bucket, tokenizer and all."""
  talks = map(json.loads, chats_config.chats().splitlines())
  pieces = vocabulary.train((turn['content'] for talk in talks for turn in talk['messages']),
                            tmp_path / 'vocabulary.model', 290)
  model = dataclasses.replace(models.tiny(vocab_size=290, num_layers=1), vocabulary=pieces)
  hf.save(model, remote / 'hub')
  convert.convert(str(remote / 'hub'), str(remote / 'ours'))
  for name in ('hub', 'ours'):
    found = pretrained.load(str(remote / name))
    jax.tree.map(np.testing.assert_array_equal, found.module, model.module)
    assert found.vocabulary.digest == model.vocabulary.digest
    assert pretrained.load_config(str(remote / name)).num_layers == 1
  with pytest.raises(ValueError, match='is there already'):
    convert.convert(str(remote / 'hub'), str(remote / 'ours'))
  with pytest.raises(ValueError, match='gs://.* is no directory'):
    pretrained.load(str(remote / 'absent'))


def test_a_bucket_that_cannot_be_used_is_told_in_a_sentence(remote, served):
  with pytest.raises(OSError, match='gs://absent/w can\'t be read.*is the name right'):
    workdirs.check({}, storage.path('gs://absent/w'))
  served.refuse = lambda method, name: method != 'GET'
  try:
    with pytest.raises(OSError, match='workdir gs://.* can\'t be written: .*not have access'):
      workdirs.check_writable(remote)
  finally:
    served.refuse = lambda method, name: False
  workdirs.check_writable(remote)
  assert not any(name.startswith(str(remote).removeprefix(f'{bucket.ROOT}/'))
                 for name in served.objects)
  workdirs.check_room(remote, {'x': os}, 1)  # no bound: not even looked at
