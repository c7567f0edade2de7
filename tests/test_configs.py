"""Every config file loads, locks, is legal, and states nothing that no one reads."""

import importlib.util
import json
import pathlib
import re
import shlex

import ml_collections
import pytest

from configs import common
from specdistill_jax import main
from specdistill_jax.stages import checks
from specdistill_jax.stages import places

CONFIGS = pathlib.Path(__file__).resolve().parents[1] / 'configs'
FILES = sorted(path for path in CONFIGS.glob('*.py')
               if path.name not in ('common.py', '__init__.py'))
# What a config leaves to its user.
LEFT_TO_USER = {'local_files': {'task.train_files': ('train.jsonl',)},
                'conversations': {'task.train_files': ('chats.jsonl',)},
                'multi30k_t5': {'task.train_files': (('train.de', 'train.en'),)},
                'tfds_tasks': {'task.data_dir': 'gs://bucket/tfds'}}


def load(path: pathlib.Path):
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def tuples_only(value, path='config'):
  """A list in a config can't be overridden from the command line, a tuple can."""
  if isinstance(value, ml_collections.ConfigDict):
    for name in value:
      tuples_only(value[name], f'{path}.{name}')
  else:
    assert not isinstance(value, list), f'{path} is a list'


@pytest.mark.parametrize('path', FILES, ids=lambda path: path.stem)
def test_config_is_legal(path):
  module = load(path)
  config = module.get_config()
  config.update_from_flattened_dict(LEFT_TO_USER.get(path.stem, {}))
  config.lock()
  with pytest.raises(AttributeError):
    config.no_such_field = 1
  checks.check(config)
  tuples_only(config)
  json.dumps(config.to_dict())
  assert config.study, 'a study has a name'
  assert module.__doc__ and len(module.__doc__) > 40, 'a config is a page of a lab book'


def test_the_sweep_of_feature_drafts_is_a_study_each():
  module = load(CONFIGS / 'feature_drafts.py')
  for draft, cell in zip(module.DRAFTS, module.get_sweep(), strict=True):
    config = module.get_config().lock()
    config.update_from_flattened_dict(cell)
    assert config.to_dict() == module.get_config(draft).to_dict()


def test_there_are_configs():
  assert {'quickstart', 'local_files'} <= {path.stem for path in FILES}


def test_table_of_legal_fields_is_that_of_the_defaults():
  def names(section):
    return {name: names(section[name]) if isinstance(
        section[name], ml_collections.ConfigDict) else None for name in section}

  def legal(table):
    return {name: legal(rule) if isinstance(rule, dict) else None
            for name, rule in table.items()}

  defaults = names(common.study('x'))
  for model in ('target', 'draft'):
    defaults[model]['model'] = None  # the fields of DecoderConfig
  assert defaults == legal(checks.LEGAL)


# Every argument that a file takes; those of tables are in tests/test_paper_configs.py.
DRAFTS = ('eagle', 'fspad', 'eagle3')
ARGUMENTS = {
    'quickstart': ('stdlib_docs', 'arithmetic', 'tiny'), 'lossy': ('fspad',),
    'lk_losses': tuple(f'{draft}{more}' for draft in (
        'eagle3', 'mtp', 'medusa', 'mlp', 'standalone') for more in ('', ',more')),
    'feature_drafts': ('standalone', 'eagle', 'fspad', 'fspad_no_sampling', 'fspad_no_alignment',
                       'eagle3'),
    'pod_feature_vicuna': tuple(f'{size}-{draft}' for size in ('7b', '33b') for draft in DRAFTS),
    'pod_feature_llama3': tuple(f'{size}-{draft}' for size in ('8b', '70b') for draft in DRAFTS),
}


@pytest.mark.parametrize('name, arg', [(name, arg) for name, args in ARGUMENTS.items()
                                       for arg in args])
def test_every_argument_makes_a_legal_study(name, arg):
  config = load(CONFIGS / f'{name}.py').get_config(arg).lock()
  checks.check(config)
  assert config.study.startswith(name)


def _commands():
  """(file, words) of every command of `main` in a page of the lab book."""
  for path in FILES:
    text = load(path).__doc__.replace('\\\n', ' ')
    for line in text.splitlines():
      if line.strip().startswith('python -m specdistill_jax.main '):
        command = re.split(r'  +\(', line.strip())[0]
        yield path.stem, shlex.split(command.replace('...', 'bucket/x'))[2:]


@pytest.mark.parametrize('name, words', list(_commands()))
def test_commands_in_the_lab_book_are_taken(name, words):
  """Their flags exist and go together; a model that a command names need not be there."""
  words = [word for word in words if word != '--sweep=all']
  values = main._parse(words)
  assert values.workdir
  config = places.resolved(values.config, pathlib.Path('/runs/w'))
  config.update_from_flattened_dict(
      {key: value for key, value in LEFT_TO_USER.get(name, {}).items()
       if not config[key.split('.')[0]][key.split('.')[1]]})
  for which in ('target', 'draft'):
    if config[which].init_from is not None:
      config[which].init_from = '{bucket}/unseen'
  checks.check(config)
