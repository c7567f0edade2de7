"""The papers' tasks, read from small data sets in TFDS's own format."""

import json

import pytest

from configs import common
from specdistill_jax.data import papers
from specdistill_jax.data import shards
from specdistill_jax.data import vocabulary
from specdistill_jax.stages import checks
from specdistill_jax.stages import prepare

WORDS = 'red green blue black white brown grey pink gold lilac'.split()


def text(index: int) -> str:
  return f'{WORDS[index % 10]} {WORDS[index // 10 % 10]} and {index} more'


# Task -> (TFDS name, config, an example's fields by the numbers of the example).
FIELDS = {
    'xsum': ('xsum', None, lambda i: dict(document=f'News: {text(i)}.\nMore.', summary=text(i))),
    'cnn_dailymail': ('cnn_dailymail', None, lambda i: dict(
        article=f'Daily {text(i)}', highlights=f'{text(i)} .\nend .', publisher='p', id=str(i))),
    'wmt14_en_de': ('wmt14_translate', 'de-en', lambda i: dict(en=text(i), de=f'Das ist {i}.')),
    'gsm8k': ('gsm8k', None, lambda i: dict(
        question=f'What is {i} + 1?', answer=f'{i} + 1 = {i + 1}\n#### {i + 1}',
        annotation='', short_answer=str(i + 1))),
    'lm1b': ('lm1b', None, lambda i: dict(text=f'The {text(i)} of it all .')),
}


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
  """A folder as TFDS leaves it, with thirty training and six held-out examples of each task."""
  import tensorflow_datasets as tfds
  folder = tmp_path_factory.mktemp('tfds')
  for name, (dataset, config, fields) in FIELDS.items():
    split = papers.PAPERS[name].splits['validation']
    tfds.dataset_builders.store_as_tfds_dataset(
        name=dataset, config=config, version='1.0.0', data_dir=folder,
        features=tfds.features.FeaturesDict({key: tfds.features.Text() for key in fields(0)}),
        split_datasets={'train': [(i, fields(i)) for i in range(30)],
                        split: [(i, fields(i)) for i in range(100, 106)]})
  return folder


def study(name, data_dir, **task):
  config = common.study('test')
  config.task.update(name=name, data_dir=str(data_dir), vocab_size=330, max_length=160,
                     max_inputs=90, max_targets=60)
  if name == 'lm1b':
    config.task.update(max_length=24, prompt_length=3, max_inputs=None, max_targets=None)
    config.distill.rollout.max_new_tokens = config.evaluate.max_new_tokens = 8
  config.task.update(task)
  return config


def prepared(workdir, config):
  checks.check(config)
  prepare.run(config, workdir)
  vocab = vocabulary.Vocabulary(workdir / 'data' / 'vocabulary.model')
  return vocab, {split: list(shards.rows(workdir / 'data', split))
                 for split in ('train', 'validation')}


EXPECTED = {
    'xsum': ('summarize: News: {t}.\nMore.\n', '{t}', 'rouge2'),
    'cnn_dailymail': ('summarize: Daily {t}\n', '{t} .\nend .', 'rouge2'),
    'wmt14_en_de': ('translate English to German: {t}\n', 'Das ist {i}.', 'bleu'),
    'gsm8k': ("Q: What is {i} + 1?\nA: Let's think step by step.\n", '{i} + 1 = {j}\n#### {j}',
              'accuracy'),
}


@pytest.mark.parametrize('name', EXPECTED)
def test_prompts_completions_splits_and_metric(name, data_dir, tmp_path):
  prompt, completion, metric = EXPECTED[name]
  vocab, rows = prepared(tmp_path, study(name, data_dir))
  for split, numbers in (('train', range(30)), ('validation', range(100, 106))):
    expected = {(prompt.format(t=text(i), i=i), completion.format(t=text(i), i=i, j=i + 1))
                for i in numbers}
    found = {(vocab.decode(row.tokens[:row.prompt_length]),
              vocab.decode(row.tokens[row.prompt_length:])) for row in rows[split]}
    assert found == expected and len(rows[split]) == len(numbers)
    assert all(row.tokens[-1] == vocab.eos_id for row in rows[split])
    assert all(row.loss_mask.sum() == len(row.tokens) - row.prompt_length for row in rows[split])
    metadata = shards.read_metadata(tmp_path / 'data', split)
    dataset = papers.PAPERS[name].dataset
    assert (metadata['metric'], metadata['dataset']) == (metric, f'{dataset}/1.0.0')
    prompts = [row.prompt_length for row in rows[split]]
    assert (metadata['shortest_prompt'], metadata['longest_prompt']) == (
        min(prompts), max(prompts))
    assert metadata['longest_completion'] == max(
        len(row.tokens) - row.prompt_length for row in rows[split])


def test_language_modelling(data_dir, tmp_path):
  vocab, rows = prepared(tmp_path, study('lm1b', data_dir))
  assert {vocab.decode(row.tokens) for row in rows['validation']} <= {
      f'The {text(i)} of it all .' for i in range(100, 106)}
  assert rows['train'] and all(row.prompt_length == 3 for row in rows['train'])
  assert shards.read_metadata(tmp_path / 'data', 'train')['metric'] is None


def test_the_tasks_own_tokens_are_those_of_the_rows(data_dir, tmp_path):
  """The fast path against seqio's, on the task that seqio users would load."""
  import seqio
  from specdistill_jax.data import tasks
  vocab, rows = prepared(tmp_path, study('gsm8k', data_dir))
  task = tasks.paper('gsm8k', data_dir, seqio.SentencePieceVocabulary(str(vocab.path), 0))
  dataset = seqio.get_mixture_or_task(task.name).get_dataset(None, 'validation', shuffle=False)
  own = {(*map(int, e['inputs']), *map(int, e['targets'])) for e in dataset.as_numpy_iterator()}
  assert own == {tuple(row.tokens.tolist()) for row in rows['validation']}
  assert task.metric_fns[0](targets=['#### 3'], predictions=['is 3']) == {'accuracy': 100.0}


def test_long_texts_are_cut_and_counted_and_the_question_stays_posed(data_dir, tmp_path):
  ending = "\nA: Let's think step by step.\n"
  vocab, whole = prepared(tmp_path / 'whole', study('gsm8k', data_dir))
  most = len(vocab.encode(ending)) + 3
  vocab, rows = prepared(tmp_path, study('gsm8k', data_dir, max_inputs=most, max_targets=8))
  dropped = shards.read_metadata(tmp_path / 'data', 'train')['dropped']
  assert dropped['cut_inputs'] == sum(row.prompt_length > most for row in whole['train']) > 0
  assert dropped['cut_targets'] == sum(
      len(row.tokens) - row.prompt_length > 8 for row in whole['train']) > 0
  for row in rows['train']:
    prompt = vocab.decode(row.tokens[:row.prompt_length])
    assert prompt.startswith('Q: ') and prompt.endswith(ending)
    assert row.prompt_length <= most and len(row.tokens) - row.prompt_length <= 8
  cut = [row for row in rows['train'] if len(row.tokens) - row.prompt_length == 8]
  assert any(row.tokens[-1] != vocab.eos_id for row in cut)
  with pytest.raises(ValueError, match='task.max_inputs is 2; the end of the prompt alone'):
    prepare.run(study('gsm8k', data_dir, max_inputs=2), tmp_path / 'other')


def test_max_examples_bounds_what_is_read(data_dir, tmp_path):
  _, rows = prepared(tmp_path, study('xsum', data_dir, max_examples=12))
  assert len(rows['train']) == 12 and len(rows['validation']) == 6
  assert shards.read_metadata(tmp_path / 'data', 'train')['num_examples'] == 12


def test_the_newest_version_is_read(data_dir, tmp_path):
  for version in ('1.2.0', '1.10.0', 'junk'):
    folder = tmp_path / 'xsum' / version
    folder.mkdir(parents=True)
    (folder / 'dataset_info.json').write_text(
        (data_dir / 'xsum' / '1.0.0' / 'dataset_info.json').read_text())
  assert papers.directory('xsum', str(tmp_path)) == str(tmp_path / 'xsum' / '1.10.0')


def test_missing_data_is_told_at_once_and_never_fetched(data_dir, tmp_path, monkeypatch):
  import socket
  def refuse(*args, **kwargs):
    raise AssertionError('tried the network')
  monkeypatch.setattr(socket.socket, 'connect', refuse)
  with pytest.raises(ValueError, match="task.data_dir '.*absent' is not a folder; .*'xsum'"):
    prepare.run(study('xsum', tmp_path / 'absent'), tmp_path / 'work')
  empty = tmp_path / 'empty'
  (empty / 'wmt14_translate' / 'de-en').mkdir(parents=True)
  with pytest.raises(ValueError, match=r"TFDS data set '.*empty/wmt14_translate/de-en/<version>/'"):
    prepare.run(study('wmt14_en_de', empty), tmp_path / 'work')
  info = json.loads((data_dir / 'gsm8k' / '1.0.0' / 'dataset_info.json').read_text())
  info['splits'] = [split for split in info['splits'] if split['name'] != 'test']
  (empty / 'gsm8k' / '1.0.0').mkdir(parents=True)
  (empty / 'gsm8k' / '1.0.0' / 'dataset_info.json').write_text(json.dumps(info))
  with pytest.raises(ValueError, match="has no split 'test'; it has train"):
    prepare.run(study('gsm8k', empty), tmp_path / 'work')
  assert not (tmp_path / 'work').exists()


@pytest.mark.parametrize('task, words', [
    (dict(name='xsum'), ('task.data_dir is None', "'xsum'", '--config.task.data_dir')),
    (dict(name='xsum', data_dir='/d'), ('task.max_length is 96', '1024', '64', '1088')),
    (dict(name='cnn_dailymail', data_dir='/d', max_length=2000), ('2048', '128', '2176')),
    (dict(name='gsm8k', data_dir='/d', max_inputs=50, max_targets=50), ('96', '100')),
    (dict(data_dir='/d'), ("task.data_dir is '/d'", 'stdlib_docs', "'lm1b'")),
    (dict(name='lm1b', data_dir='/d', max_targets=5), ('max_targets is 5', 'plain text')),
    (dict(name='lm1b', data_dir='/d', prompt_length=96), ('prompt_length is 96',)),
])
def test_settings_that_cannot_work_are_refused_in_one_sentence(task, words):
  config = common.study('test')
  config.task.update(task)
  with pytest.raises(ValueError) as caught:
    checks.check(config)
  assert all(word in str(caught.value) for word in words) and '\n' not in str(caught.value)


@pytest.mark.parametrize('name', papers.PAPERS)
def test_the_config_of_each_task_is_legal_and_of_the_papers_lengths(name):
  from configs import tfds_tasks
  config = tfds_tasks.get_config(name)
  config.task.data_dir = 'gs://bucket/tfds'
  config.lock()
  checks.check(config)
  paper = papers.PAPERS[name]
  if paper.max_inputs:
    assert config.task.max_length == paper.max_inputs + paper.max_targets
