"""Prompts for evaluation only: MT-bench and HumanEval files, and BIG-bench-hard."""

import json

import pytest

from configs import common
from specdistill_jax.data import chat
from specdistill_jax.data import prompts
from specdistill_jax.data import quality
from specdistill_jax.data import shards
from specdistill_jax.data import vocabulary
from specdistill_jax.stages import checks
from specdistill_jax.stages import prepare

MT_BENCH = [
    {'question_id': 81, 'category': 'writing', 'turns': ['Compose a post.', 'Rewrite it.']},
    {'question_id': 111, 'category': 'math', 'turns': ['What is 1 + 1?', 'And 2 more?'],
     'reference': ['It is 2.', 'It is 4.']},
    {'question_id': 1, 'category': 'qa', 'turns': ['Who?'], 'reference': None},
]
HUMAN_EVAL = [{'task_id': 'HumanEval/0', 'prompt': 'def f(x):\n  """Adds one."""\n',
               'canonical_solution': '  return x + 1\n', 'entry_point': 'f', 'test': '...'}]


def put(path, records):
  path.write_text(''.join(json.dumps(record) + '\n' for record in records))
  return str(path)


@pytest.fixture(scope='module')
def model(tmp_path_factory):
  """A vocabulary, as the models of an evaluation bring it."""
  text = 'Compose a post. Rewrite it. What is 1 + 1? def f(x): return. Q: True or False.'
  return vocabulary.train([text, text.swapcase()], tmp_path_factory.mktemp('v') / 'v.model', 310,
                          chat.TEMPLATES['chatml'].special)


def study(model, **task):
  config = common.study('test')
  config.task.update(name='prompts', vocabulary=str(model.path), vocab_size=model.size,
                     max_length=256)
  config.task.update(task)
  return config


def rows_of(workdir, config):
  checks.check(config)
  prepare.run(config, workdir)
  assert not shards.exists(workdir / 'data', 'train')
  assert not shards.exists(workdir / 'data', 'validation')
  return (list(shards.rows(workdir / 'data', shards.PROMPTS)),
          shards.read_metadata(workdir / 'data', shards.PROMPTS))


def test_prompt_files_become_rows_without_completions(model, tmp_path):
  files = (put(tmp_path / 'question.jsonl', MT_BENCH), put(tmp_path / 'he.jsonl', HUMAN_EVAL))
  rows, metadata = rows_of(tmp_path, study(model, prompt_files=files))
  texts = [model.decode(row.tokens) for row in rows]
  assert texts == ['Compose a post.\n', 'What is 1 + 1?\n',
                   'What is 1 + 1?\nIt is 2.\nAnd 2 more?\n', 'Who?\n',
                   'def f(x):\n  """Adds one."""\n\n']
  assert [row.category for row in rows] == ['MT-bench', 'MT-bench', 'MT-bench', 'qa', 'HumanEval']
  assert [row.reference for row in rows] == ['', 'It is 2.', 'It is 4.', '', '  return x + 1\n']
  assert all(row.prompt_length == len(row.tokens) and not row.loss_mask.any() for row in rows)
  # The post's rewriting needs the post.
  assert metadata['dropped']['later_turn_without_answer'] == 1
  assert (metadata['kind'], metadata['metric']) == ('prompts', None)
  drawn = shards.evaluation_rows(tmp_path / 'data', None, seed=0)
  assert sorted(model.decode(row.tokens) for row in drawn) == sorted(texts)
  assert {row.category for row in drawn} == {'MT-bench', 'qa', 'HumanEval'}


def test_prompts_are_written_as_the_template_writes_them(model, tmp_path):
  path = put(tmp_path / 'question.jsonl', MT_BENCH)
  rows, _ = rows_of(tmp_path, study(model, prompt_files=(path,), chat_template='chatml'))
  assert [model.decode(row.tokens) for row in rows][2] == (
      '<|im_start|>user\nWhat is 1 + 1?<|im_end|>\n<|im_start|>assistant\nIt is 2.<|im_end|>\n'
      '<|im_start|>user\nAnd 2 more?<|im_end|>\n<|im_start|>assistant\n')
  assert [row.category for row in rows] == ['MT-bench', 'MT-bench', 'MT-bench', 'qa']
  assert not any(row.loss_mask.any() for row in rows)


def test_conversations_are_learnt_and_other_prompts_decoded(model, tmp_path):
  talk = [dict(role='user', content='Compose.'), dict(role='assistant', content='A post.')]
  chats = put(tmp_path / 'chats.jsonl', [dict(messages=talk)] * 4 + [
      dict(messages=[dict(role='user', content=f'What is {n} + 1?'), talk[1]]) for n in range(9)])
  path = put(tmp_path / 'question.jsonl', MT_BENCH)
  config = study(model, name='conversations', train_files=(chats,), prompt_files=(path,),
                 chat_template='chatml', validation_fraction=0.3)
  checks.check(config)
  prepare.run(config, tmp_path / 'w')
  prepare.run(config, tmp_path / 'w')  # is prepared already
  data = tmp_path / 'w' / 'data'
  rows = shards.evaluation_rows(data, None, seed=0)
  assert sorted(row.category for row in rows) == ['MT-bench', 'MT-bench', 'MT-bench', 'qa']
  assert not any(row.loss_mask.any() for row in rows)
  for split in ('train', 'validation'):
    assert shards.read_metadata(data, split)['kind'] == 'pairs'
    assert all(row.loss_mask.any() for row in shards.rows(data, split))
  alone = study(model, prompt_files=(path,), chat_template='chatml')
  assert ([row.tokens.tolist() for row in rows_of(tmp_path / 'alone', alone)[0]]
          == [row.tokens.tolist() for row in shards.rows(data, shards.PROMPTS)])
  config.task.prompt_files = ()
  with pytest.raises(ValueError, match='was prepared with task.prompt_files'):
    prepare.run(config, tmp_path / 'w')


def test_all_prompts_cannot_be_taken_in_batches(model):
  config = study(model, prompt_files=('question.jsonl',))
  config.evaluate.num_prompts = None
  checks.check(config)
  config.evaluate.batch_size = 2
  with pytest.raises(ValueError, match='num_prompts is None, and evaluate.batch_size is 2'):
    checks.check(config)


def test_a_prompt_that_does_not_fit_is_left_out_and_not_cut_to_an_earlier_turn(model, tmp_path):
  path = put(tmp_path / 'question.jsonl', MT_BENCH)
  for name, template, length in (('plain', None, 24), ('chat', 'chatml', 46)):
    config = study(model, prompt_files=(path,), chat_template=template, max_length=length)
    config.distill.rollout.max_new_tokens = config.evaluate.max_new_tokens = 8
    rows, metadata = rows_of(tmp_path / name, config)
    assert metadata['dropped']['too_long'] >= 1
    assert all('more' not in model.decode(row.tokens) for row in rows)
    assert len({row.tokens.tobytes() for row in rows}) == len(rows)


def test_a_metric_needs_references(model, tmp_path):
  path = put(tmp_path / 'question.jsonl', MT_BENCH)
  with pytest.raises(ValueError, match="metric is 'accuracy', but 2 of 4 prompts have no ref"):
    prepare.run(study(model, prompt_files=(path,), metric='accuracy'), tmp_path / 'work')


@pytest.mark.parametrize('record, message', [
    ({'question': 'a'}, "line 1, has neither 'turns' .* nor 'prompt' .*; it has 'question'"),
    ({'turns': 'a'}, "'turns' must be a list of strings; it is 'a'"),
    ({'turns': []}, "'turns' is empty"),
    ({'turns': [1]}, "'turns' must be a string; it is 1"),
    ({'prompt': None}, "'prompt' must be a string; it is None"),
])
def test_bad_prompt_files_are_named_with_their_line(tmp_path, record, message):
  with pytest.raises(ValueError, match=message):
    prompts.read((put(tmp_path / 'a.jsonl', [record]),))


def put_bbh(folder, name, examples):
  folder.mkdir(exist_ok=True)
  (folder / f'{name}.json').write_text(json.dumps({
      'canary': 'do not train', 'examples': [{'input': i, 'target': t} for i, t in examples]}))


def test_bbh(model, tmp_path):
  folder = tmp_path / 'bbh'
  put_bbh(folder, 'boolean_expressions', [('not True is', 'False'), ('True is', 'True')])
  put_bbh(folder, 'word_sorting', [('Sort: b a', 'a b')])
  rows, metadata = rows_of(tmp_path, study(model, name='bbh', data_dir=str(folder)))
  assert [model.decode(row.tokens) for row in rows] == [
      f"Q: {q}\nA: Let's think step by step.\n" for q in ('not True is', 'True is', 'Sort: b a')]
  assert [row.category for row in rows] == ['boolean_expressions'] * 2 + ['word_sorting']
  assert [row.reference for row in rows] == ['False', 'True', 'a b']
  assert (metadata['kind'], metadata['metric']) == ('prompts', 'exact_answer')


def test_bbh_has_23_tasks_in_27_files():
  assert len(set(prompts.BBH_FILES)) == 27
  sizes = ('three', 'five', 'seven')
  merged = {name.replace(f'_{size}_objects', '') for name in prompts.BBH_FILES for size in sizes
            if not any(f'_{other}_' in name for other in sizes) or f'_{size}_' in name}
  assert len(merged) == 23


def test_bad_bbh_folders_are_refused(tmp_path):
  with pytest.raises(ValueError, match="'.*absent' is not a folder; the task 'bbh' expects"):
    prompts.bbh(str(tmp_path / 'absent'))
  with pytest.raises(ValueError, match='has no JSON file'):
    prompts.bbh(str(tmp_path))
  put_bbh(tmp_path, 'navigate', [('a', 'b')])
  put_bbh(tmp_path, 'navigation', [('a', 'b')])
  put_bbh(tmp_path, 'mine', [('a', 'b')])
  with pytest.raises(ValueError, match='BIG-bench-hard: mine.json, navigation.json; the tasks'):
    prompts.bbh(str(tmp_path))
  for name in ('navigation', 'mine'):
    (tmp_path / f'{name}.json').unlink()
  (tmp_path / 'navigate.json').write_text('{"examples": [{"input": "a"}]}')
  with pytest.raises(ValueError, match="navigate.json' is not in the layout .*KeyError 'target'"):
    prompts.bbh(str(tmp_path))


@pytest.mark.parametrize('reference, prediction, right', [
    ('(B)', 'First, 1 < 2. So the answer is (B).', True),
    ('(B)', 'So the answer is (B) red.', True),
    ('(B)', 'the answer is (A). No: the answer is (B)', True),
    ('(B)', 'So the answer is (A).', False),
    ('True', 'Not False is True.\nSo the answer is True.', True),
    ('True', 'the answer is: true', True),
    ('True', 'True or False.\nFalse', False),      # nothing stated: the last line
    ('] >', 'We need ] >\n] >', True),
    ('a b c', 'the answer is a  b c', True),
    ('a b c', 'the answer is a c b', False),
    ('12', 'So the answer is 2', False),
    ('No', '', False),
])
def test_exact_answers(reference, prediction, right):
  assert quality.metric('exact_answer')([reference], [prediction]) == 100.0 * right


@pytest.mark.parametrize('task, words', [
    (dict(), ('task.prompt_files is ()', "'prompts'", '--config.task.prompt_files')),
    (dict(prompt_files=('a.jsonl',)), ('task.vocabulary is None', 'SentencePiece')),
    (dict(name='bbh'), ('task.data_dir is None', "'bbh'")),
    (dict(name='stdlib_docs', prompt_files=('a.jsonl',)), ("('a.jsonl',)", "'prompts'")),
])
def test_settings_that_cannot_work_are_refused_in_one_sentence(task, words):
  config = common.study('test')
  config.task.update(dict(name='prompts') | task)
  with pytest.raises(ValueError) as caught:
    checks.check(config)
  assert all(word in str(caught.value) for word in words) and '\n' not in str(caught.value)


def test_a_given_vocabulary_must_have_the_size_of_the_config(model, tmp_path):
  path = put(tmp_path / 'question.jsonl', MT_BENCH)
  config = study(model, prompt_files=(path,), vocab_size=500)
  with pytest.raises(ValueError, match="vocab_size is 500; the vocabulary '.*v.model' has 310"):
    prepare.run(config, tmp_path / 'work')
  config = study(model, prompt_files=(path,), vocabulary=str(tmp_path / 'absent.model'))
  with pytest.raises(ValueError, match="Cannot read the vocabulary '.*absent.model'"):
    prepare.run(config, tmp_path / 'work')


def test_categories_of_mt_bench_are_their_own_in_its_own_file(tmp_path):
  found, _ = prompts.read([put(tmp_path / 'mt_bench.jsonl', MT_BENCH[:2])])
  assert [one.category for one in found] == ['writing', 'math', 'math']
