"""A study of each feature-level draft, through the stages, and drafts that a config can't have."""

import functools
import json

import jax
import numpy as np
import pytest

import studies
from configs import common
from specdistill_jax import processes
from specdistill_jax import sharding
from specdistill_jax.checkpoints import store
from specdistill_jax.data import shards
from specdistill_jax.drafters import eagle3
from specdistill_jax.drafters import families
from specdistill_jax.evaluation import rows
from specdistill_jax.stages import checks
from specdistill_jax.stages import distill
from specdistill_jax.stages import evaluate
from specdistill_jax.stages import feature_drafts
from specdistill_jax.stages import heldout
from specdistill_jax.stages import report
from specdistill_jax.stages import train

DRAFT_VOCAB = 12


@pytest.fixture(scope='module', autouse=True)
def one_device():
  """Compiling for one device, and short drafts, is faster."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sharding, 'make_mesh', functools.partial(
        sharding.make_mesh, devices=jax.devices()[:1]))
    patch.setattr(heldout, 'GAMMA', 2)
    yield


def study(family, **train_settings):
  config = studies.config()
  config.study = family
  config.target.train.update(steps=120, eval_every=120, checkpoint_every=120, log_every=60)
  config.draft.model = common.feature_draft(family)
  config.draft.train.steps = 0
  if family == 'eagle3':
    config.draft.model.update(draft_vocab_size=DRAFT_VOCAB, unrolled_steps=2)
    config.evaluate.trees = ('dynamic k3 d2 n6',)
  config.distill.update(objective='feature', data_source='fixed', control=False, seeds=(0,))
  config.distill.train.update(dict(steps=60, eval_every=60, checkpoint_every=30, log_every=1,
                                   clip_norm=None, clip_value=0.5) | train_settings)
  config.evaluate.update(temperatures=(1.0,), gammas=(2,), num_prompts=6, max_new_tokens=6,
                         bootstrap_samples=20)
  return config


@pytest.fixture(scope='module')
def target(tmp_path_factory):
  """A workdir with data and a trained target."""
  workdir = tmp_path_factory.mktemp('study')
  studies.write_data(workdir)
  train.run(study('eagle'), workdir, 'target')
  return workdir


def start(target, path, config):
  for name in ('data', 'target'):
    (path / name).symlink_to(target / name)
  checks.check(config)
  train.run(config, path, 'draft')
  return path


def lines(workdir, run):
  found = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  return [row for row in found if row['run'] == run]


def test_a_study_from_end_to_end(target, tmp_path):
  """The loss falls and alpha rises; a draft that has learnt nothing is not evaluated."""
  config = study('eagle3')
  workdir = start(target, tmp_path, config)
  distill.run(config, workdir)
  name, = distill.arm_names(config)
  assert name == 'feature-fixed-seed0'
  training = lines(workdir, name)
  losses = [row['loss'] for row in training[1:]]
  assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:5])
  assert training[-1]['alpha'] > training[1]['alpha'] + 0.05
  assert training[-1]['validation_alpha'] > training[0]['validation_alpha'] + 0.05
  evaluate.run(config, workdir)
  trained, along_tree = rows.read(workdir / 'results.jsonl')
  assert trained['objective'] == along_tree['objective'] == 'feature'
  assert trained['alpha'] > training[0]['validation_alpha'] + 0.05
  assert trained['draft'].startswith('eagle3 1x16') and trained['cost_ratio'] > 0
  assert along_tree['tree'] == 'dynamic k3 d2 n6'
  untrained = training[0]['block_efficiency']
  assert min(along_tree['block_efficiency'], trained['block_efficiency']) > untrained
  report.run(config, workdir)
  written = (workdir / 'report.md').read_text()
  assert 'draft: eagle3 1x16' in written and 'feature-level draft (fixed)' in written
  assert 'distilled from scratch' in written and 'standard SD' not in written.partition('T is')[0]
  assert 'tree_1.png' in written


def test_only_the_first_process_writes_the_model_file(tmp_path, monkeypatch):
  """Each writes a file beside it first, all of one name, and renames that."""
  config = study('eagle')
  store.write_model_file(tmp_path / 'target', families.config(
      config.target.model, vocab_size=studies.VOCAB_SIZE))
  monkeypatch.setattr(processes, 'is_first', lambda: False)
  feature_drafts.start(config, tmp_path)
  assert list((tmp_path / 'draft' / 'checkpoints').iterdir())
  assert not (tmp_path / 'draft' / 'model.json').exists()


@pytest.fixture
def unmeasured(monkeypatch):
  """What isn't measured while it trains isn't compiled."""
  monkeypatch.setattr(heldout.HeldOut, 'measure', lambda *_: {})


def test_an_interrupted_run_resumes_bit_for_bit(target, tmp_path, unmeasured):
  """Noise is drawn from the step, so that a resumed run draws the same."""
  config = study('fspad', steps=4, checkpoint_every=2, eval_every=4)
  config.draft.model.num_heads = 1
  config.draft.model.num_kv_heads = 1
  (tmp_path / 'whole').mkdir()
  (tmp_path / 'parts').mkdir()
  whole = start(target, tmp_path / 'whole', config)
  parts = start(target, tmp_path / 'parts', config)
  distill.run(config, whole)
  real = store.Store.save

  def killed(self, step, *rest):
    real(self, step, *rest)
    if step == 2:
      raise KeyboardInterrupt

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(store.Store, 'save', killed)
    with pytest.raises(KeyboardInterrupt):
      distill.run(config, parts)
  distill.run(config, parts)
  name, = distill.arm_names(config)
  first, second = (store.load_model(path / 'distill' / name).module for path in (whole, parts))
  jax.tree.map(np.testing.assert_array_equal, first, second)
  assert store.load_model(parts / 'draft').config.num_heads == 1


def test_the_draft_vocabulary_holds_the_most_frequent_tokens(target, tmp_path):
  workdir = start(target, tmp_path, study('eagle3'))
  found = store.load_config(workdir / 'draft')
  counts = np.zeros(studies.VOCAB_SIZE, int)
  for row in shards.rows(workdir / 'data', 'train'):
    for token, learnt in zip(row.tokens, row.loss_mask):
      counts[token] += learnt
  ids = found.draft_ids()
  assert len(ids) == DRAFT_VOCAB and np.all(np.diff(ids) > 0)
  assert counts[ids].min() >= np.delete(counts, ids).max()
  assert found.captured_layers == eagle3.captured_layers(2)
  written = (workdir / 'draft' / 'model.json').stat().st_mtime_ns
  feature_drafts.start(study('eagle3'), workdir)
  assert (workdir / 'draft' / 'model.json').stat().st_mtime_ns == written


def test_responses_of_the_target_are_one_field_away(target, tmp_path, unmeasured):
  config = study('eagle', steps=1, warmup_steps=0)
  config.distill.data_source = 'target'
  (tmp_path / 'data').mkdir()
  studies.write_data(tmp_path)
  (tmp_path / 'target').symlink_to(target / 'target')
  checks.check(config)
  train.run(config, tmp_path, 'draft')
  distill.run(config, tmp_path)
  assert shards.read_metadata(tmp_path / 'data' / 'target', 'train')['source'] == 'target'
  assert (tmp_path / 'distill' / 'feature-target-seed0').exists()


@pytest.mark.parametrize('change, message', [
    ({'draft.train.steps': 5}, r"draft.train.steps is 5; it must be 0: 'eagle' is trained by"),
    ({'distill.data_source': 'draft'}, "data_source is 'draft'; it must be one of fixed, target"),
    ({'distill.control': True}, 'distill.control is True; it must be False'),
    ({'distill.train.dropout': 0.1}, 'distill.train.dropout is 0.1; it must be 0'),
    ({'draft.model.num_heads': 3}, 'config.draft.model is wrong: decoder: num_heads 3 is not'),
    ({'distill.train.clip_value': -1.0}, 'clip_value is -1.0; it must be a number above 0'),
])
def test_impossible_studies_are_refused(change, message):
  config = study('eagle')
  config.update_from_flattened_dict(change)
  with pytest.raises(ValueError, match=message):
    checks.check(config)


def test_misspelt_fields_and_families_are_refused():
  config = study('fspad')
  config.draft.model.feature_sampler = True
  with pytest.raises(ValueError, match='draft.model.feature_sampler; did you mean feature_samp'):
    checks.check(config)
  config = study('fspad')
  config.target.model.family = 'fspad'
  with pytest.raises(ValueError, match="target.model.family is 'fspad', which is a draft's"):
    checks.check(config)
  config = study('eagle')
  config.draft = common.model_stage()
  with pytest.raises(ValueError, match="distill.objective is 'feature', which holds a draft to"):
    checks.check(config)
