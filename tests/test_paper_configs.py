"""The papers' tables as configs: every study of each, full scale and twin, holds together."""

import json
import math
import pathlib
import re

import jax
import ml_collections
import pytest

from configs import common
from specdistill_jax.costs import chips
from specdistill_jax.data import embedded
from specdistill_jax.data import shards
from specdistill_jax.drafters import families
from specdistill_jax.stages import checks
from specdistill_jax.stages import config_files
from specdistill_jax.stages import distill
from specdistill_jax.stages import prepare
from specdistill_jax.stages import sources
from test_data_prompts import MT_BENCH
from test_data_tfds import data_dir  # noqa: F401  (a fixture)

ROOT = pathlib.Path(__file__).resolve().parents[1]
NAMES = ('distillspec_speedup', 'distillspec_methods', 'distillspec_recipe',
         'distillspec_transfer', 'distillspec_lossy', 'distillspec_garden', 'fspad_spec_bench',
         'fspad_ablation', 'lk_table1', 'lk_table2')


def module(name):
  return config_files.module(str(ROOT / 'configs' / f'{name}.py'))[0]


def studies(name, scale):
  """Cell -> its study, each by itself."""
  made = module(name)
  return {cell: made.get_config(','.join(filter(None, (scale, cell)))).lock()
          for cell in made.CELLS[scale]}


TABLES = [(name, scale) for name in NAMES for scale in ('', 'small')]
tables = pytest.mark.parametrize('name, scale', TABLES)


@tables
def test_every_study_is_legal_and_named_after_its_cell(name, scale):
  for cell, config in studies(name, scale).items():
    checks.check(config)
    json.dumps(config.to_dict())
    assert config.study == '_'.join(filter(None, (name, scale, cell)))
    seeds = config.distill.seeds if config.distill is not None else ()
    if scale == 'small' and seeds and not cell.startswith('distil_'):
      assert len(seeds) == 3, 'a table that compares methods has three seeds'


@tables
def test_the_sweep_makes_these_studies_but_for_what_they_take_from_earlier_ones(name, scale):
  path = f'{ROOT}/configs/{name}.py' + f':{scale}' * bool(scale)
  single = studies(name, scale)
  cells = list(single)
  assert len(config_files.cells(path)) == len(cells)
  for number, cell in enumerate(cells):
    config = config_files.load(path, str(number))
    if config.distill is not None and config.distill.init_from is not None:
      _check_taken_arms(path, number, config)
    for which in ('target', 'draft'):
      source = config[which].init_from
      if source == single[cell][which].init_from:
        continue
      earlier, folder = re.fullmatch(r'\{sweep\}/cell-(\d+)/(.*)', source).groups()
      assert int(earlier) < number, 'cells run in order'
      origin = config_files.load(path, earlier)
      _check_origin(origin, folder, single[cell][which].model)
      with config.unlocked():
        config[which].init_from = single[cell][which].init_from
        config[which].train.steps = single[cell][which].train.steps
    assert config.to_dict() == single[cell].to_dict()


def _check_taken_arms(path, number, config):
  """The arms will be there, each with as many steps as its row says."""
  earlier, = re.fullmatch(r'\{sweep\}/cell-(\d+)/distill', config.distill.init_from).groups()
  assert int(earlier) < number, 'cells run in order'
  origin = config_files.load(path, earlier)
  assert distill.arm_names(config) == distill.arm_names(origin)
  assert config.distill.train.steps == origin.distill.train.steps
  assert config.draft.model.to_dict() == origin.draft.model.to_dict()


def _check_origin(origin, folder, model):
  """The folder will be there, with a model of the shape that is expected of it."""
  stage, _, arm = folder.partition('/')
  assert origin[stage] is not None
  if arm:
    assert arm in distill.arm_names(origin)
  assert origin['draft' if arm else stage].model.to_dict() == model.to_dict()


@tables
def test_a_page_of_the_lab_book_has_all_of_its_parts(name, scale):
  made = module(name)
  assert all(f'\n{word}' in made.__doc__ for word in ('Cost: ', 'Published: ', 'Ours: '))
  assert f'configs/{name}.py:small' in made.__doc__ and 'specdistill_jax.tables' in made.__doc__
  for cell in made.CELLS[scale]:
    assert isinstance(made.baseline(cell), dict)
  for entry in made.PUBLISHED:
    assert entry['source'] and entry['trust'] and entry['figure']


def test_arguments_that_name_nothing_are_refused():
  made = module('lk_table1')
  assert made.get_config('medusa').study == 'lk_table1_medusa'
  assert made.get_config('small,mlp').study == 'lk_table1_small_mlp'
  for arg in ('large', 'small,eagle', 'eagle3,small', 'small,mlp,mlp'):
    with pytest.raises(ValueError, match="names no study; there are, full scale, eagle3"):
      made.get_config(arg)
  with pytest.raises(ValueError, match='2 values for 1 columns'):
    common.published('x', 'y', 'z', ({},), (({}, (1, 2)),))


def test_seqkd_learns_from_the_targets_text_alone():
  config = module('distillspec_methods').get_config('small,seqkd')
  config.distill.data_source = 'fixed'
  with pytest.raises(ValueError, match=r"'cross_entropy'.*\(SeqKD\).*is 'fixed'"):
    checks.check(config)


def _models():
  """Every model of every table, once, with the size of its vocabulary and its target's config."""
  found = {}
  for name, scale in TABLES:
    for config in studies(name, scale).values():
      target = families.config(config.target.model, vocab_size=config.task.vocab_size)
      found.setdefault(target)
      is_feature = families.is_feature_draft(config.draft.model)
      found.setdefault(families.config(config.draft.model, target) if is_feature else
                       families.config(config.draft.model, vocab_size=config.task.vocab_size))
  return list(found)


def test_every_model_can_be_built_and_the_published_ones_have_their_size():
  sizes = {}
  for config in _models():
    made = jax.eval_shape(lambda key, config=config: families.init(config, key), jax.random.key(0))
    sizes[config] = sum(leaf.size for leaf in jax.tree.leaves(made)) / 1e6
  t5 = sorted(size for config, size in sizes.items() if config.family == 't5'
              and config.vocab_size == 32_128)
  assert t5 == pytest.approx([76.96, 247.6, 783.2, 2849.8, 11135], rel=1e-3)
  fspad = sorted(size for config, size in sizes.items()
                 if config.family == 'fspad' and size > 400 and config.feature_sampling
                 and config.partial_alignment)
  assert fspad == pytest.approx([416, 416, 1101, 1929], rel=5e-3)
  assert min(sizes.values()) > 0.05


# One batch of each task, as its studies ask for it, of a fixture in its format.

CHATS = [dict(messages=[dict(role='user', content=f'Count on from {n}!'),
                        dict(role='assistant', content=f'{n + 1} {n + 2} {n + 3}')])
         for n in range(60)]


def _by_task():
  found = {}
  for name, scale in TABLES:
    for cell, config in studies(name, scale).items():
      key = (config.task.name, config.task.max_length, config.task.chat_template,
             bool(config.task.prompt_files))
      found.setdefault(key, (f'{name}:{scale},{cell}', config))
  return found.values()


@pytest.fixture(scope='module')
def vocabulary_file(data_dir, tmp_path_factory):  # noqa: F811
  """Any, for tasks that have nothing to train one on."""
  config = _small_vocabulary(common.distillspec_t5('x', 'gsm8k'))
  config.task.data_dir = str(data_dir)
  workdir = tmp_path_factory.mktemp('vocabulary')
  prepare.run(config, workdir)
  return str(workdir / 'data' / 'vocabulary.model')


def _small_vocabulary(config):
  made = ml_collections.ConfigDict(config.to_dict())
  made.task.update(vocab_size=330, vocabulary=None)
  if made.distill is not None:
    made.distill.init_from = None
  for which in ('target', 'draft'):
    made[which].init_from = None
    if not families.is_feature_draft(made[which].model):
      made[which].train.update(steps=100, warmup_steps=1)
  return made


@pytest.fixture
def fixtures(data_dir, vocabulary_file, tmp_path, monkeypatch):  # noqa: F811
  """Fills a config's task with files that are there."""
  all_sources, all_examples = embedded._sources, embedded.examples
  monkeypatch.setattr(embedded, '_sources', lambda library: all_sources(library)[:40])
  monkeypatch.setattr(embedded, 'examples', lambda name, seed: all_examples(name, seed)[:300])

  def fill(config):
    made = _small_vocabulary(config)
    task = made.task
    if task.name in embedded.METRICS:
      task.vocab_size = 600
    if task.name == 'bbh':
      (tmp_path / 'bbh').mkdir()
      (tmp_path / 'bbh' / 'snarks.json').write_text(json.dumps(
          dict(examples=[dict(input='2 + 3?', target='5')] * 12)))
      task.update(data_dir=str(tmp_path / 'bbh'), vocabulary=vocabulary_file)
    elif task.data_dir:
      task.data_dir = str(data_dir)
    if task.name == 'conversations':
      path = tmp_path / 'chats.jsonl'
      path.write_text(''.join(json.dumps(one) + '\n' for one in CHATS))
      task.update(train_files=(str(path),), max_examples=None, vocab_size=290,
                  validation_fraction=0.2)
    if task.prompt_files:
      path = tmp_path / 'question.jsonl'
      path.write_text(''.join(json.dumps(one) + '\n' for one in MT_BENCH))
      task.prompt_files = (str(path),)
    return made
  return fill


@pytest.mark.parametrize('label, config', _by_task(), ids=lambda value: (
    value if isinstance(value, str) else ''))
def test_a_batch_of_every_task_is_prepared(label, config, fixtures, tmp_path):
  made = fixtures(config)
  checks.check(made)
  prepare.run(made, tmp_path / 'w')
  data = tmp_path / 'w' / 'data'
  if shards.PROMPTS in sources.split_names(made.task):
    row = shards.evaluation_rows(data, 1, made.seed)[0]
    assert 0 < row.prompt_length <= made.task.max_length
    if made.task.name in sources.EVALUATION_ONLY:
      return
  batch = next(shards.batches(data, 'train', batch_size=4, max_length=made.task.max_length,
                              seed=0))
  assert batch.tokens_bt.shape == (4, made.task.max_length)
  assert (batch.loss_mask_bt.sum(1) > 0).all()


# Slices.

PROGRAM = ('topology', 'mesh', 'evaluate.topology', 'evaluate.mesh', 'evaluate.max_new_tokens',
           'evaluate.batch_size', 'task.max_length', 'task.prompt_length', 'task.vocab_size',
           'distill.rollout.max_new_tokens', 'distill.train.batch_size', 'distill.train.optimizer',
           'distill.train.weights_dtype', 'distill.train.remat', 'distill.train.head_chunk',
           'distill.train.accumulation')


def _run_by(config, fields):
  """Of such fields those of the programs that this study runs."""
  left = ('evaluate',) if config.evaluate is None else ()
  if not _distils(config):  # it takes models from earlier cells
    left += ('distill',) if config.evaluate is None else ('distill', 'topology', 'mesh')
  return {name: value for name, value in fields.items() if not name.startswith(left)}


def _distils(config):
  return config.distill is not None and config.distill.init_from is None


def _program(config):
  """What decides the shapes of a study's programs, whatever it minimises."""
  def field(name):
    value = config
    for word in name.split('.'):
      value = value if value is None else value[word]
    return value.to_dict() if isinstance(value, ml_collections.ConfigDict) else value
  found = {name: field(name) for name in PROGRAM}
  for which in ('target', 'draft'):
    found |= {f'{which}.{name}': field(f'{which}.{name}') for name in ('model', 'layout')}
  return found


def _recorded():
  """Programs of the studies of which docs/tpu_slices.md says that they fit."""
  lines = (ROOT / 'docs' / 'tpu_slices.md').read_text(encoding='utf-8').splitlines()
  rows = [[word.strip() for word in line.split('|')] for line in lines if line.startswith('| ')]
  fit = {(row[1], row[2], row[3]) for row in rows if len(row) > 6 and row[6] == 'yes'}
  found = []
  for study in (line.removeprefix('## ') for line in lines if re.match('## [a-z]', line)):
    name, colon, argument = study.partition(':')
    config = config_files.load(str(ROOT / 'configs' / f'{name}.py') + colon + argument)
    if _largest(config) <= fit:
      found.append(_run_by(config, _program(config)))
  return found


def _largest(config):
  """Of the programs that a study runs, with their slices, those that hold most of its memory."""
  found = set()
  if _distils(config):
    is_feature = families.is_feature_draft(config.draft.model)
    found.add((config.study, 'train' if is_feature else 'on_policy', config.topology))
  if config.evaluate is not None:
    found.add((config.study, 'speculate', config.evaluate.topology))
  return found or {(config.study, 'target', config.topology)}


@pytest.mark.parametrize('name', NAMES)
def test_batches_at_full_scale_divide_over_their_slice(name):
  for cell, config in studies(name, '').items():
    sizes = config.mesh.to_dict()
    taken = math.prod(size for size in sizes.values() if size != -1)
    count = math.prod(map(int, chips.split(config.topology)[1].split('x')))
    rows = math.prod(count // taken if size == -1 else size
                     for axis, size in sizes.items() if axis != 'tensor')
    for section in (config.target, config.draft, config.distill):
      if section is not None:
        train = section.train
        assert train.batch_size % (train.accumulation * rows) == 0, (cell, rows)


@pytest.mark.parametrize('name', NAMES)
def test_a_study_at_full_scale_names_a_slice_that_took_it(name):
  recorded, unknown = _recorded(), set()
  for cell, config in studies(name, '').items():
    for topology in filter(None, (config.topology, config.evaluate and config.evaluate.topology)):
      kind, shape = chips.split(topology)
      assert shape in chips.SLICES[kind] or topology == 'v4:2x2x1'
    if _run_by(config, _program(config)) not in [_run_by(config, one) for one in recorded]:
      unknown.add(cell)
  assert not unknown, 'docs/tpu_slices.md has no program of these shapes: launch/tpu_slices.sh'
