"""Users' files, good and bad, and the flags that name them."""

import gzip
import json

from absl import flags
from ml_collections import config_flags
import pytest

from specdistill_jax.data import files
from specdistill_jax.data import splits


def read(*entries, inputs='inputs', targets='targets'):
  return files.examples(entries, inputs_field=inputs, targets_field=targets)


def put(path, text):
  data = text if isinstance(text, bytes) else text.encode()
  path.write_bytes(gzip.compress(data) if path.suffix == '.gz' else data)
  return str(path)


@pytest.mark.parametrize('name', ['a.jsonl', 'a.jsonl.gz'])
def test_json_lines(tmp_path, name):
  path = put(tmp_path / name, '{"q": "é\\n1", "a": "2"}\r\n\n{"a": "4", "q": "3", "x": null}\n')
  assert read(path, inputs='q', targets='a') == [
      splits.Example('é\n1', '2', f'{path}:1'), splits.Example('3', '4', f'{path}:3')]
  assert read(path, inputs='', targets='a') == [
      splits.Example(None, '2', f'{path}:1'), splits.Example(None, '4', f'{path}:3')]


@pytest.mark.parametrize('name', ['a.txt', 'a.txt.gz'])
def test_paragraphs_are_documents(tmp_path, name):
  path = put(tmp_path / name, '\ufeffone\n  two\n\n \n\nthree\n')
  assert read(path) == [splits.Example(None, 'one\n  two', f'{path}:1'),
                        splits.Example(None, 'three', f'{path}:6')]


def test_parallel_files_whatever_their_names(tmp_path):
  german, english = put(tmp_path / 'x.de.gz', 'eins\nzwei\n'), put(tmp_path / 'x.en', 'one\ntwo\n')
  assert read((german, english)) == [splits.Example('eins', 'one', f'{german}:1'),
                                     splits.Example('zwei', 'two', f'{german}:2')]
  assert len(read([german, english], (german, english))) == 4


@pytest.mark.parametrize('name, text, message', [
    ('a.jsonl', '{"inputs": "1", "targets": "2"}\n{"inputs": 1,,}\n',
     "a.jsonl', line 2, is not JSON"),
    ('a.jsonl', '{"inputs": "1"}\n',
     "line 1, has no field 'targets' .task.targets_field.; it has 'inputs'"),
    ('a.jsonl', '{"question": "1", "answer": "2"}\n',
     "no field 'inputs' .task.inputs_field.; it has 'question', 'answer'"),
    ('a.jsonl', '["1", "2"]\n', 'line 1, is a JSON list; it must be an object'),
    ('a.jsonl', '{"inputs": "1", "targets": 2}\n', "'targets' must be a string; it is 2"),
    ('a.jsonl', '{"inputs": "\\ud800", "targets": ""}\n', "'inputs' has a lone surrogate"),
    ('a.txt', b'fine\n\xff\xfe\n', "a.txt', line 2, is not UTF-8"),
    ('a.csv', 'a,b\n', "Cannot tell what '.*a.csv' is from its name: .jsonl"),
])
def test_bad_content_is_named_with_its_line(tmp_path, name, text, message):
  with pytest.raises(ValueError, match=message):
    read(put(tmp_path / name, text))


def test_unreadable_files_are_named(tmp_path):
  with pytest.raises(ValueError, match="Cannot read the data file '.*absent.txt': No such file"):
    read(str(tmp_path / 'absent.txt'))
  (tmp_path / 'plain.txt.gz').write_text('not compressed')
  with pytest.raises(ValueError, match="plain.txt.gz': Not a gzipped file"):
    read(str(tmp_path / 'plain.txt.gz'))
  whole = gzip.compress(b'text\n' * 1000)
  (tmp_path / 'cut.txt.gz').write_bytes(whole[:-20])
  with pytest.raises(ValueError, match="Cannot read the data file '.*cut.txt.gz'"):
    read(str(tmp_path / 'cut.txt.gz'))


def test_parallel_files_of_different_lengths(tmp_path):
  pair = put(tmp_path / 'a.de', 'eins\nzwei\ndrei\n'), put(tmp_path / 'a.en', 'one\ntwo\n')
  with pytest.raises(ValueError, match="'.*a.de' has 3, '.*a.en' has 2"):
    read(pair)
  with pytest.raises(ValueError, match="path or an .inputs, targets. pair of paths, not .'a.de',."):
    read(('a.de',))
  with pytest.raises(ValueError, match="Parallel files are given as a pair"):
    read(*pair)


def test_kinds_do_not_mix(tmp_path):
  text = put(tmp_path / 'a.txt', 'words\n')
  pairs = put(tmp_path / 'a.jsonl', json.dumps({'inputs': 'a', 'targets': 'b'}))
  with pytest.raises(ValueError, match='files of one kind'):
    read(text, pairs)


@pytest.mark.filterwarnings('ignore:the load_module')   # in ml_collections
@pytest.mark.parametrize('arguments, train_files', [
    (['--config.task.train_files=/data/a-1.jsonl.gz'], ('/data/a-1.jsonl.gz',)),
    (["--config.task.train_files=('a.txt', 'b.txt.gz')"], ('a.txt', 'b.txt.gz')),
    (['--config.task.train_files=a.txt', '--config.task.train_files=b.txt'], ('a.txt', 'b.txt')),
    (["--config.task.train_files=(('a.de.gz', 'a.en.gz'),)"], (('a.de.gz', 'a.en.gz'),)),
])
def test_flags_of_the_config(monkeypatch, arguments, train_files):
  """The forms that configs/local_files.py promises reach the config as they are meant."""
  values = flags.FlagValues()
  config = config_flags.DEFINE_config_file('config', flag_values=values, lock_config=True)
  argv = ['test', '--config=configs/local_files.py', '--config.task.inputs_field=',
          '--config.task.metric=bleu', '--config.task.max_examples=7', *arguments]
  monkeypatch.setattr('sys.argv', argv)   # where config_flags looks for what is overridden
  values(argv)
  task = config.value.task
  assert task.train_files == train_files
  assert (task.inputs_field, task.metric, task.max_examples) == ('', 'bleu', 7)
