"""Checkpoints: exact, asynchronous beside donation, readable without the optimizer, on any mesh."""

import dataclasses
import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import models
from specdistill_jax import processes
from specdistill_jax import sharding
from specdistill_jax.checkpoints import hf
from specdistill_jax.checkpoints import pretrained
from specdistill_jax.checkpoints import store
from specdistill_jax.models import decoder

CONFIG = decoder.DecoderConfig(
    vocab_size=32, num_layers=2, width=16, num_heads=2, num_kv_heads=2, head_dim=8,
    mlp_width=32, dtype='float32')
INIT = functools.partial(decoder.init, CONFIG, jax.random.key(3))
OPTIMIZER = optax.adamw(1e-3)
COUNT = {'count': jnp.int32(4)}
DATA = {'position': 7, 'nested': {'shuffle': [1, 2]}}


def saved(directory):
  """A checkpoint of step 5, of arrays on eight devices."""
  params = sharding.sharded_init(INIT, sharding.make_mesh(data=2, fsdp=2, tensor=2))
  opt_state = jax.tree.map(lambda x: x + 1, OPTIMIZER.init(params))
  store.write_model_file(directory, CONFIG)
  with store.Store(directory) as checkpoints:
    checkpoints.save(5, params, opt_state, DATA)
  return params, opt_state


def restored(directory, mesh):
  abstract = jax.eval_shape(INIT)
  with store.Store(directory) as checkpoints:
    step = checkpoints.latest_step()
    return (step, *checkpoints.restore(
        step, abstract, jax.eval_shape(OPTIMIZER.init, abstract), mesh))


def assert_equal(first, second):
  assert jax.tree.structure(first) == jax.tree.structure(second)
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(first), jax.device_get(second))


def test_state_saved_on_eight_devices_is_restored_on_one(tmp_path):
  params, opt_state = saved(tmp_path)
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  step, new_params, new_opt_state, data = restored(tmp_path, mesh)
  assert step == 5 and data == DATA
  assert_equal(params, new_params)
  assert_equal(opt_state, new_opt_state)
  assert all(leaf.devices() == {jax.devices()[0]} for leaf in jax.tree.leaves(new_params))


def test_model_is_loaded_without_its_optimizer(tmp_path):
  params, _ = saved(tmp_path)
  (optimizer_folder,) = tmp_path.glob('checkpoints/5/optimizer')
  optimizer_folder.rename(tmp_path / 'gone')
  model = store.load_model(tmp_path)
  assert model.config == CONFIG and model.vocabulary is None
  assert_equal(params, model.module)


def test_other_weights_have_another_digest_and_a_damaged_checkpoint_stops_nobody(tmp_path):
  saved(tmp_path / 'one')
  store.save_model(tmp_path / 'two', models.tiny(1))
  store.save_model(tmp_path / 'other two', models.tiny(2))
  one, two, other = map(store.weights_digest, (
      tmp_path / 'one', tmp_path / 'two', tmp_path / 'other two'))
  assert one != two != other and one == store.weights_digest(tmp_path / 'one')
  shutil.copytree(tmp_path / 'one' / 'checkpoints' / '5', tmp_path / 'one' / 'checkpoints' / '7')
  longer = store.weights_digest(tmp_path / 'one')
  shutil.rmtree(tmp_path / 'one' / 'checkpoints' / '7' / 'digests')
  assert longer != one == store.weights_digest(tmp_path / 'one')
  assert store.load_model(tmp_path / 'one') is not None


def test_load_model_can_change_a_field_of_the_config(tmp_path):
  saved(tmp_path)
  assert store.load_model(tmp_path, dropout=0.5).module.config.dropout == 0.5


def test_parameters_of_both_kinds_of_directory_are_read_in_the_dtype_that_is_asked_for(tmp_path):
  model = models.tiny()
  store.save_model(tmp_path / 'ours', model)
  hf.save(model, tmp_path / 'hub')
  def dtypes(name, **asked):
    found = pretrained.load(tmp_path / name, **asked).module
    return {str(leaf.dtype) for leaf in jax.tree.leaves(found) if leaf.ndim > 2}
  for name in ('ours', 'hub'):
    assert dtypes(name) == dtypes(name, parameter_dtype=None) == {'float32'}
    assert dtypes(name, parameter_dtype='bfloat16') == {'bfloat16'}
    with pytest.raises(ValueError, match="parameter_dtype is 'half'; it must be one of float32"):
      pretrained.load(tmp_path / name, parameter_dtype='half')
    with pytest.raises(ValueError, match='no field weight_dtype; its fields are vocab_size'):
      pretrained.load(tmp_path / name, weight_dtype='bfloat16')
  half = dataclasses.replace(model, module=sharding.matrices_in(model.module, 'bfloat16'))
  store.save_model(tmp_path / 'half', half)
  assert dtypes('half') == {'float32'} and dtypes('half', parameter_dtype=None) == {'bfloat16'}


def test_buffers_donated_during_an_asynchronous_save_do_not_reach_it(tmp_path):
  """Saving returns before the disk has the state; the next step overwrites its buffers."""
  state = {f'weight{i}_dd': jnp.full((256, 256), float(i)) for i in range(8)}
  expected = jax.device_get(jax.tree.map(jnp.copy, state))
  step = jax.jit(lambda tree: jax.tree.map(lambda x: x - 1000, tree), donate_argnums=0)
  step(jax.tree.map(jnp.copy, state))  # compiled before, so that the donation comes at once
  with store.Store(tmp_path) as checkpoints:
    checkpoints.save(1, state, COUNT, {})
    for _ in range(3):
      state = step(state)
    checkpoints.wait()
    params, _, _ = checkpoints.restore(1, expected, COUNT, sharding.make_mesh())
  assert_equal(expected, params)


def test_only_the_newest_checkpoints_are_kept(tmp_path):
  with store.Store(tmp_path, keep=2) as checkpoints:
    for step in (1, 2, 3):
      checkpoints.save(step, {'bias_d': jnp.ones(2)}, COUNT, {})
      checkpoints.wait()
    assert checkpoints.latest_step() == 3
  kept = sorted(path.name for path in (tmp_path / 'checkpoints').iterdir() if path.is_dir())
  assert kept == ['2', '3']


def test_incomplete_checkpoint_is_ignored(tmp_path):
  saved(tmp_path)
  (tmp_path / 'checkpoints' / '9.orbax-checkpoint-tmp').mkdir()
  with store.Store(tmp_path) as checkpoints:
    assert checkpoints.latest_step() == 5


def test_missing_model_is_named(tmp_path):
  with pytest.raises(ValueError, match='model.json is missing'):
    store.load_model(tmp_path)
  store.write_model_file(tmp_path, CONFIG)
  with pytest.raises(ValueError, match='no complete checkpoint'):
    store.load_model(tmp_path)


def test_changed_vocabulary_is_refused(tmp_path):
  (tmp_path / 'vocabulary.model').write_bytes(b'one')
  saved(tmp_path / 'model')
  store.write_model_file(tmp_path / 'model', CONFIG, tmp_path / 'vocabulary.model')
  (tmp_path / 'vocabulary.model').write_bytes(b'another')
  with pytest.raises(ValueError, match='token ids mean something else'):
    store.load_model(tmp_path / 'model')
  (tmp_path / 'vocabulary.model').unlink()
  with pytest.raises(ValueError, match='is missing'):
    store.load_model(tmp_path / 'model')


@pytest.fixture(scope='module')
def two_checkpoints(tmp_path_factory):
  """Steps 1 and 2: where, the state of step 1, and the files of step 2 to restore from, by name."""
  directory = tmp_path_factory.mktemp('two')
  params, opt_state = saved_step(directory, 1)
  saved_step(directory, 2)
  newest = directory / 'checkpoints' / '2'
  marker = newest / 'digests' / 'commit_success.txt'  # beside the digests, so none covers it
  return directory, params, opt_state, [
      path.relative_to(directory) for path in sorted(newest.rglob('*'))
      if path.is_file() and path.parent != newest and path != marker]


def saved_step(directory, step):
  params = jax.tree.map(lambda x: x + step, INIT())
  opt_state = OPTIMIZER.init(params)
  store.write_model_file(directory, CONFIG)
  with store.Store(directory, keep=2) as checkpoints:
    checkpoints.save(step, params, opt_state, DATA)
  return params, opt_state


def flip(path):
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)


def truncate(path):
  path.write_bytes(path.read_bytes()[:-1])


def delete(path):
  path.unlink()


@pytest.mark.parametrize('harm', [flip, truncate, delete])
def test_damaged_newest_checkpoint_is_named_and_the_one_before_it_restored(
    two_checkpoints, tmp_path, harm, caplog):
  """Whichever of its files: what restoring alone let pass, a flipped bit in a weight."""
  whole, params, opt_state, files = two_checkpoints
  assert len(files) > 10
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  chosen = [name for name in files if harm is flip or str(name).endswith(
      ('digests/files.json', 'params/_METADATA'))]
  assert len(chosen) == (len(files) if harm is flip else 2)
  for number, name in enumerate(chosen):
    copy = shutil.copytree(whole, tmp_path / f'copy{number}')
    harm(copy / name)
    caplog.clear()
    step, new_params, new_opt_state, _ = restored(copy, mesh)
    assert step == 1, name
    assert 'checkpoint 2' in caplog.text and 'damaged' in caplog.text
    assert_equal(params, new_params)
    assert_equal(opt_state, new_opt_state)
    assert (copy / 'damaged' / '2').exists()


def test_model_is_loaded_from_the_newest_checkpoint_whose_parameters_are_sound(
    two_checkpoints, tmp_path):
  whole, _, _, files = two_checkpoints
  shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
  flip(tmp_path / next(name for name in files if 'optimizer' in name.parts))
  newest = store.load_model(tmp_path)
  flip(tmp_path / next(name for name in files if 'params' in name.parts))
  older = store.load_model(tmp_path)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x - y, 1.0, atol=1e-6), newest.module,
               older.module)


def test_checkpoint_without_digests_is_not_taken_for_sound(two_checkpoints, tmp_path, caplog):
  shutil.copytree(two_checkpoints[0], tmp_path, dirs_exist_ok=True)
  shutil.rmtree(tmp_path / 'checkpoints' / '2' / 'digests')
  store.load_model(tmp_path)
  assert 'checkpoint 2' in caplog.text and 'its list of digests is missing' in caplog.text
  with store.Store(tmp_path) as checkpoints:
    assert checkpoints.latest_step() == 1


def test_process_0_says_for_all_whether_a_save_has_failed(tmp_path, monkeypatch):
  """They end a save at different times; to raise at different steps would leave some behind."""
  said = ['null', '""', 'null', '"ValueError: boiled over"']
  monkeypatch.setattr(processes, 'count', lambda: 2)
  monkeypatch.setattr(processes, 'is_first', lambda: False)
  monkeypatch.setattr(processes, 'wait_for', lambda key: said.pop(0))
  with store.Store(tmp_path) as checkpoints:
    checkpoints.check()
    for step in (1, 2):
      checkpoints.save(step, {'bias_d': jnp.ones(2)}, COUNT, {})
      checkpoints.wait()
      checkpoints.check()
      if step == 1:
        checkpoints.check()
        checkpoints.check()
    assert len(said) == 1
    with pytest.raises(OSError, match='checkpoint 2 of .* was not written .*boiled over'):
      checkpoints.check()
    checkpoints.check()


def test_damaged_step_can_be_saved_again(two_checkpoints, tmp_path):
  whole, _, _, files = two_checkpoints
  shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
  truncate(tmp_path / files[0])
  with store.Store(tmp_path) as checkpoints:
    assert checkpoints.latest_step() == 1
    checkpoints.save(2, {'bias_d': jnp.ones(2)}, COUNT, {})
    checkpoints.wait()
    assert checkpoints.latest_step() == 2
