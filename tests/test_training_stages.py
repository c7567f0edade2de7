"""The loop as users run it: resuming, skipping, arms, data sources, and how it stops."""

import functools
import json
import shutil
import time

import jax
import numpy as np
import pytest

import studies
from specdistill_jax import main
from specdistill_jax import sharding
from specdistill_jax import structs
from specdistill_jax.checkpoints import digests
from specdistill_jax.checkpoints import store
from specdistill_jax.data import shards
from specdistill_jax.models import decoder
from specdistill_jax.stages import checks
from specdistill_jax.stages import distill
from specdistill_jax.stages import evaluate
from specdistill_jax.stages import imports
from specdistill_jax.stages import samples
from specdistill_jax.stages import train
from specdistill_jax.stages import workdirs
from specdistill_jax.training import preemption
from specdistill_jax.training import profiling
from specdistill_jax.training import state as state_lib
from specdistill_jax.training import step as step_lib


@pytest.fixture(scope='module', autouse=True)
def one_device():
  """Compiling for one device is faster; test_step.py is about several."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sharding, 'make_mesh', functools.partial(
        sharding.make_mesh, devices=jax.devices()[:1]))
    yield


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """A workdir with data, target and draft."""
  workdir = tmp_path_factory.mktemp('study')
  studies.write_data(workdir)
  for which in ('target', 'draft'):
    train.run(studies.config(), workdir, which)
  return workdir


@pytest.fixture
def workdir(trained, tmp_path):
  """A copy of it, for one test."""
  for name in ('data', 'target', 'draft'):
    (tmp_path / name).symlink_to(trained / name)
  return tmp_path


def lines(workdir, run=None):
  rows = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  return [row for row in rows if run in (None, row['run'])]


def without_times(rows):
  return [{name: value for name, value in row.items()
           if name not in ('tokens_per_second', 'rollout_share', 'data_wait_share')}
          for row in rows]


def checkpoint(workdir, name, config):
  """Every leaf of the newest checkpoint of an arm, optimizer and data position included."""
  directory = workdir / 'distill' / name
  model_config = store.load_config(directory)
  abstract = jax.eval_shape(lambda: decoder.init(model_config, jax.random.key(0)))
  opt_state = jax.eval_shape(state_lib.optimizer(config.distill.train).init, abstract)
  with store.Store(directory) as checkpoints:
    step = checkpoints.latest_step()
    return (step, *checkpoints.restore(step, abstract, opt_state, sharding.make_mesh()))


def test_training_lowers_the_loss_and_leaves_a_model(trained):
  rows = lines(trained, 'target')
  assert [row['step'] for row in rows] == list(range(7))
  assert rows[-1]['validation_cross_entropy'] < rows[0]['validation_cross_entropy'] - 0.1
  assert {'loss', 'grad_norm', 'learning_rate', 'tokens_per_second'} <= rows[1].keys()
  assert rows[0]['stage'] == 'target' and rows[1]['alpha'] is None
  assert 0 <= rows[-1]['data_wait_share'] < 1
  model = store.load_model(trained / 'target')
  assert model.config.vocab_size == studies.VOCAB_SIZE
  assert list((trained / 'tensorboard' / 'target').glob('events*'))


def test_resumed_run_equals_an_uninterrupted_one_bit_for_bit(workdir, monkeypatch):
  """Optimizer, data position, dropout, rollouts and the draw of the mixture all go on exactly.

  The run is killed past step 5, and goes on from the checkpoint of step 4: step 5 is run
  twice and logged once.
  """
  config = studies.config(dropout=0.2, accumulation=2)
  config.distill.update(data_source='fixed+draft', control=False)
  name, = distill.arm_names(config)
  (workdir / 'whole').mkdir()
  for part in ('data', 'target', 'draft'):
    (workdir / 'whole' / part).symlink_to(workdir / part)
  distill.run(config, workdir / 'whole')

  real = step_lib.check_finite
  def killed(metrics, step):
    real(metrics, step)
    if step == 6:
      raise KeyboardInterrupt
  monkeypatch.setattr(step_lib, 'check_finite', killed)
  with pytest.raises(KeyboardInterrupt):
    distill.run(config, workdir)
  assert [row['step'] for row in lines(workdir)] == [0, 1, 2, 3, 4, 5]
  monkeypatch.setattr(step_lib, 'check_finite', real)
  distill.run(config, workdir)

  assert without_times(lines(workdir)) == without_times(lines(workdir / 'whole'))
  used = {row['on_policy'] for row in lines(workdir)[1:]}
  assert used == {0.0, 1.0}, 'the mixture drew one kind only: the test saw half of it'
  resumed, whole = checkpoint(workdir, name, config), checkpoint(workdir / 'whole', name, config)
  assert resumed[0] == whole[0] == 6 and resumed[3] == whole[3]
  jax.tree.map(np.testing.assert_array_equal, resumed[1:3], whole[1:3])


def test_arms_start_from_the_draft_and_finished_ones_are_skipped(workdir, capsys):
  config = studies.config()
  config.distill.temperature = 0.7  # at which all arms are looked at
  distill.run(config, workdir)
  names = ['forward_kl-draft-seed0', 'cross_entropy-fixed-seed0']
  assert distill.arm_names(config) == names
  first, control = [lines(workdir, name) for name in names]
  measured = lambda row: {key: row[key] for key in row if key not in ('run', 'stage')}
  assert measured(first[0]) == measured(control[0])
  assert len(first) == len(control) == 7
  assert first[1]['on_policy'] == 1 and control[1]['on_policy'] == 0
  assert 0 < first[1]['alpha'] <= 1 and control[1]['alpha'] is None
  last = first[-1]
  assert 0 < last['rollout_share'] and 0 < last['validation_alpha'] <= 1
  assert 1 <= last['block_efficiency'] <= 6 and len(last['acceptance_by_position']) == 5
  assert ' s a step' in capsys.readouterr().out
  before = lines(workdir)
  distill.run(config, workdir)
  assert lines(workdir) == before
  for name in names:
    assert store.load_model(workdir / 'distill' / name).config.num_layers == 1


@pytest.mark.parametrize('source, model', [('target+draft', 'target'), ('draft_stored', 'draft')])
def test_samples_of_a_model_are_stored_once(workdir, source, model):
  (workdir / 'data').unlink()  # not into the data that the tests share
  studies.write_data(workdir)
  config = studies.config(steps=1, warmup_steps=0)
  config.distill.update(data_source=source, objective='tvd', control=False)
  distill.run(config, workdir)
  stored = workdir / 'data' / model
  metadata = shards.read_metadata(stored, 'train')
  assert metadata['source'] == model and metadata['temperature'] == 1.0
  rows, prompts = shards.rows(stored, 'train'), shards.rows(workdir / 'data', 'train')
  assert len(rows) == 8  # steps x batch_size
  for row, prompt in zip(rows, prompts):
    n = row.prompt_length
    np.testing.assert_array_equal(row.tokens[:n], prompt.tokens[:n])
    np.testing.assert_array_equal(np.flatnonzero(row.loss_mask), np.arange(n, len(row.tokens)))
    assert len(row.tokens) == n + 6 or row.tokens[-1] == structs.EOS_ID
  written = (stored / 'train.json').stat().st_mtime_ns
  config.distill.seeds = (1,)
  distill.run(config, workdir)
  assert (stored / 'train.json').stat().st_mtime_ns == written
  config.distill.rollout.temperature = 0.5
  with pytest.raises(ValueError, match='temperature 1.0.*asks for 0.5'):
    distill.run(config, workdir)


@pytest.fixture
def drawing(workdir, monkeypatch):
  """A study whose draft's samples are yet to be drawn, a batch a part."""
  (workdir / 'data').unlink()
  studies.write_data(workdir)
  config = studies.config(steps=3, warmup_steps=0)
  config.distill.update(data_source='draft_stored', control=False)
  monkeypatch.setattr(samples, 'BATCHES_A_PART', 1)
  return config


def test_samples_go_on_after_the_last_whole_part(workdir, drawing, monkeypatch):
  draft, mesh = store.load_model(workdir / 'draft'), sharding.make_mesh()
  (workdir / 'other' / 'data').mkdir(parents=True)
  studies.write_data(workdir / 'other')
  whole = samples.stored(drawing, workdir / 'other', mesh, 'draft', draft)
  assert not (workdir / 'other' / 'data' / 'draft-parts').exists()

  real, drawn = samples._batch, []
  def killed(*arguments):
    drawn.append(0)
    if len(drawn) == 3:
      raise KeyboardInterrupt
    return real(*arguments)
  monkeypatch.setattr(samples, '_batch', killed)
  with pytest.raises(KeyboardInterrupt):
    samples.stored(drawing, workdir, mesh, 'draft', draft)
  found = samples.stored(drawing, workdir, mesh, 'draft', draft)
  assert len(drawn) == 4, 'two batches, one that was killed, and it again'
  for row, expected in zip(shards.rows(found, 'train'), shards.rows(whole, 'train'), strict=True):
    np.testing.assert_array_equal(row.tokens, expected.tokens)


def test_samples_that_another_launch_draws_are_left_to_it(workdir, drawing, monkeypatch):
  real, drawn = samples._batch, []
  def begun_elsewhere(*arguments):
    drawn.append(0)
    if len(drawn) == 2:
      workdirs.write_atomically(workdirs.attempts_path(workdir, 'distill'), dict(
          stage='distill', seconds=[None, None], launch='other'))
    return real(*arguments)
  monkeypatch.setattr(samples, '_batch', begun_elsewhere)
  with pytest.raises(preemption.Superseded), workdirs.attempt(workdir, 'distill'):
    samples.stored(drawing, workdir, sharding.make_mesh(), 'draft',
                   store.load_model(workdir / 'draft'))
  assert len(drawn) == 2 and shards.exists(workdir / 'data' / 'draft-parts', 'part-00000')
  assert len(list((workdir / 'data' / 'draft-parts').glob('*.json'))) == 1


def test_models_that_only_decode_need_no_data_to_train_on(trained, tmp_path):
  kept = shards.read_metadata(trained / 'data', 'validation')
  shards.write(tmp_path / 'data', shards.PROMPTS, studies.rows(4, 2), kept)
  config = studies.config()
  for which in ('target', 'draft'):
    config[which].init_from, config[which].train.steps = str(trained / which), 0
    train.run(config, tmp_path, which)
    assert store.load_model(tmp_path / which).config == store.load_config(trained / which)


def _finished_study(workdir, config):
  """What a study whose arms `config` takes would have left beside them."""
  origin = config.copy_and_resolve_references()
  origin.distill.init_from = None
  workdirs.write_atomically(workdir / 'config.json', workdirs.to_json(origin))
  for stage in ('draft', 'distill'):
    workdirs.write_done(workdir, stage)


def test_arms_of_another_study_are_taken_as_they_are(workdir, trained, tmp_path_factory):
  config, other = studies.config(), tmp_path_factory.mktemp('other')
  config.distill.update(data_source='fixed', seeds=(0, 3))
  config.evaluate.max_new_tokens = 6
  distill.run(config, workdir)
  for name in ('data', 'target', 'draft'):
    (other / name).symlink_to(trained / name)
  config.distill.init_from = str(workdir / 'distill')
  checks.check(config)
  distill.run(config, other)
  written = {path: path.stat().st_mtime_ns for path in other.glob('distill/*/model.json')}
  distill.run(config, other)
  assert len(written) == 4, 'what is there is left as it is'
  assert all(path.stat().st_mtime_ns == when for path, when in written.items())
  assert {store.newest_step(path.parent) for path in written} == {config.distill.train.steps}
  assert not (other / 'metrics.jsonl').exists(), 'nothing is trained'
  drafts = evaluate.load_drafts(config, other)
  assert [(draft.objective, draft.seed, draft.train_steps) for draft in drafts[1:]] == [
      (objective, seed, config.distill.train.steps)
      for seed in (0, 3) for objective in ('forward_kl', 'cross_entropy')]
  leaves = [jax.tree.leaves(draft.model.module) for draft in drafts]
  for found, wanted in zip(drafts, evaluate.load_drafts(config, workdir), strict=True):
    jax.tree.map(np.testing.assert_array_equal, found.model.module, wanted.model.module)
  assert any((a != b).any() for a, b in zip(leaves[1], leaves[3])), 'seeds differ'

  (workdir / 'config.json').write_text('{}')
  with pytest.raises(ValueError, match="distill.init_from is .*'distill' of the study.*not finish"):
    checks.check(config)
  _finished_study(workdir, config)
  with pytest.raises(ValueError, match='arms began as .*draft.init_from must be that .* is None'):
    checks.check(config)
  config.draft.init_from, config.draft.train.steps = str(workdir / 'draft'), 0
  checks.check(config)
  config.distill.normalisation = 'token'
  with pytest.raises(ValueError, match="trained otherwise .*normalisation is 'sequence' there and"):
    checks.check(config)
  config.distill.normalisation = 'sequence'
  config.distill.train.steps += 1
  with pytest.raises(ValueError, match=f'train.steps is {config.distill.train.steps}; the arm '
                     f'forward_kl-fixed-seed0 .* has {config.distill.train.steps - 1} steps'):
    checks.check(config)
  config.distill.seeds = (0, 1)
  with pytest.raises(ValueError, match='it lacks forward_kl-fixed-seed1, cross_entropy-fixed-seed1 '
                     'and has cross_entropy-fixed-seed0, cross_entropy-fixed-seed3, forward_kl-'):
    checks.check(config)


def test_arms_are_taken_whatever_else_that_study_minimised(workdir, trained):
  """Lines of one's own function count where its arm is taken, and not where others are."""
  config = studies.config()
  config.distill.update(data_source='fixed', control=False, also=('my_losses.sharp_kl',))
  config.draft.init_from, config.draft.train.steps = str(workdir / 'draft'), 0
  steps = config.distill.train.steps
  for name in distill.arm_names(config):
    (workdir / 'distill' / name / 'checkpoints' / str(steps)).mkdir(parents=True)
    shutil.copy(trained / 'draft' / 'model.json', workdir / 'distill' / name)
  _finished_study(workdir, config)
  stored = workdirs.stored_config(workdir)
  stored['distill']['functions']['my_losses.sharp_kl'] = {'1': 'def sharp_kl(a, b): return a'}
  workdirs.write_atomically(workdir / 'config.json', stored)
  config.distill.init_from, config.distill.also = str(workdir / 'distill'), ()
  imports.check_arms(config)
  config.distill.also = ('my_losses.sharp_kl',)
  with pytest.raises(ValueError, match='trained otherwise .*functions.my_losses.sharp_kl'):
    imports.check_arms(config)


def test_non_finite_loss_stops_with_its_step_and_keeps_the_last_checkpoint(workdir):
  config = studies.config(learning_rate=1e30, checkpoint_every=1, clip_norm=None)
  config.distill.update(data_source='fixed', control=False)
  with pytest.raises(FloatingPointError, match=r'is (nan|inf) at step [2-6], and must be finite'):
    distill.run(config, workdir)
  name, = distill.arm_names(config)
  with store.Store(workdir / 'distill' / name) as checkpoints:
    assert checkpoints.latest_step() == lines(workdir)[-1]['step']


def test_step_that_is_not_finite_is_looked_at_row_by_row(workdir, capsys):
  """The step before it left huge parameters; the replay reaches them from the last checkpoint."""
  config = studies.config(learning_rate=1e30, checkpoint_every=3, clip_norm=None, batch_size=4)
  config.evaluate = None
  config.distill.update(data_source='fixed', control=False)
  with pytest.raises(FloatingPointError, match=r'--replay=.*step_\d\.npz'):
    distill.run(config, workdir)
  kept, = (workdir / 'replay').glob('*/*.npz')
  capsys.readouterr()
  main.replay(config, workdir, kept.stem)
  told = capsys.readouterr().out
  assert f'to step {kept.stem.removeprefix("step_")}' in told and 'the kept one' not in told
  assert all(f'row {row}: loss' in told for row in range(4))
  assert 'not finite first: row 0' in told or 'parameters before the step: all finite' not in told
  assert 'loss nan' in told or 'loss inf' in told or 'grad_norm nan' in told
  with pytest.raises(ValueError, match='--replay=step_999 names no kept steps; there are .*step_'):
    main.replay(config, workdir, 'step_999')


def test_one_bad_row_is_found(workdir, capsys, monkeypatch):
  """Its loss mask is infinite: the row is named, and the others are finite."""
  read = shards.batches
  def poisoned(*args, **kwargs):
    class Data:
      def __init__(self):
        self._data, self._count = read(*args, **kwargs), 0
      def __next__(self):
        self._count += 1
        batch = next(self._data)
        if self._count == 3:
          batch.loss_mask_bt[5, 3:] = np.inf
        return batch
      def get_state(self):
        return dict(self._data.get_state(), count=self._count)
      def set_state(self, state):
        self._count = state.pop('count')
        self._data.set_state(state)
    return Data()
  monkeypatch.setattr(shards, 'batches', poisoned)
  config = studies.config()
  config.evaluate = None
  config.distill.update(data_source='fixed', control=False)
  with pytest.raises(FloatingPointError, match='step 3'):
    distill.run(config, workdir)
  capsys.readouterr()
  main.replay(config, workdir, 'step_3')
  told = capsys.readouterr().out
  assert 'from step 2 to step 3' in told
  assert 'parameters before the step: all finite' in told
  assert 'not finite first: row 5' in told and told.count('gradient not finite') == 1


def test_a_full_disk_is_reported_before_the_first_step(workdir, monkeypatch):
  usage = shutil.disk_usage(workdir)._replace(free=10_000)
  monkeypatch.setattr(shutil, 'disk_usage', lambda _: usage)
  with pytest.raises(OSError, match=r'needs .* GB more for 2 \+ 1 checkpoints .* 1e-05 GB free'):
    distill.run(studies.config(), workdir)
  assert not (workdir / 'metrics.jsonl').exists()


def test_a_save_that_failed_is_told_at_the_next_logged_step(workdir, monkeypatch):
  """Not only when the next one begins, which may be hours later."""
  def full(*_):
    raise OSError('No space left on device')
  save = store.Store.save
  def saved(checkpoints, *args):
    save(checkpoints, *args)
    while checkpoints._manager.is_saving_in_progress():
      time.sleep(0.01)
  monkeypatch.setattr(store.Store, 'save', saved)
  monkeypatch.setattr(digests, 'write', full)
  config = studies.config(checkpoint_every=2, eval_every=6, log_every=1)
  config.distill.update(data_source='fixed', control=False)
  with pytest.raises(OSError, match='checkpoint 2 of .* was not written .*No space left on dev'):
    distill.run(config, workdir)
  assert lines(workdir)[-1]['step'] == 3


def test_of_two_launches_on_a_workdir_the_later_one_goes_on(workdir, monkeypatch):
  path, save = workdirs.attempts_path(workdir, 'distill'), store.Store.save
  def saved(*args):
    save(*args)
    workdirs.write_atomically(path, dict(stage='distill', seconds=[None, None], launch='other'))
  monkeypatch.setattr(store.Store, 'save', saved)
  config = studies.config(checkpoint_every=2, eval_every=6, log_every=1)
  config.distill.update(data_source='fixed', control=False)
  with pytest.raises(ValueError, match="another launch has begun the stage 'distill' in .* since"):
    with workdirs.attempt(workdir, 'distill'):
      distill.run(config, workdir)
  first, second = workdirs.attempts(workdir, 'distill')
  assert first > 0 and second is None
  assert lines(workdir)[-1]['step'] == 3
  with store.Store(workdir / 'distill' / distill.arm_names(config)[0]) as checkpoints:
    assert checkpoints.latest_step() == 2


def test_steps_are_traced(workdir):
  profiling.request(2, 3)
  config = studies.config()
  config.distill.update(data_source='fixed', control=False)
  distill.run(config, workdir)
  traces = list((workdir / 'profile').rglob('*.xplane.pb'))
  assert len(traces) == 1 and traces[0].stat().st_size > 1000
  with pytest.raises(ValueError, match='--profile_steps is 3,2'):
    profiling.request(3, 2)


def test_a_trace_ends_with_its_run(workdir, capsys):
  """A run that was over before the trace's last step left it on, and the next one crashed."""
  profiling.request(2, 9)
  config = studies.config(steps=2, eval_every=2)
  config.distill.update(data_source='fixed', control=False, seeds=(0, 1))
  distill.run(config, workdir)
  assert len(list((workdir / 'profile').rglob('*.xplane.pb'))) == 1
  assert 'ended before step 9: the trace is of the steps from 2 on' in capsys.readouterr().out


def test_impossible_settings_stop_before_anything_is_written(workdir):
  with pytest.raises(ValueError, match='train.batch_size is 7'):
    distill.run(studies.config(batch_size=7, accumulation=2), workdir)
  config = studies.config()
  config.distill.data_source = 'teacher'
  with pytest.raises(ValueError, match="'teacher'.*target.draft"):
    distill.run(config, workdir)
  assert not (workdir / 'distill').exists() and not (workdir / 'metrics.jsonl').exists()


def test_draft_with_another_vocabulary_is_refused(workdir):
  (workdir / 'draft').unlink()
  path = workdir / 'draft'
  path.mkdir()
  described = json.loads((workdir / 'target' / 'model.json').read_text())
  other = decoder.DecoderConfig(**described['config'] | dict(vocab_size=20))
  params = decoder.init(other, jax.random.key(0))
  store.write_model_file(path, other)
  with store.Store(path) as checkpoints:
    checkpoints.save(1, params, {'count': np.int32(1)}, {})
  with pytest.raises(ValueError, match='vocabulary of 16 tokens and draft one of 20'):
    distill.run(studies.config(), workdir)
