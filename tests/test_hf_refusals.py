"""What can't be read is refused in one sentence that names it; nothing is ever unpickled."""

import os

os.environ.setdefault('HF_HUB_OFFLINE', '1')

import json
import pickle
import shutil

import numpy as np
import pytest
import safetensors.numpy

from specdistill_jax import convert
from specdistill_jax.checkpoints import pretrained
import hub


@pytest.fixture
def directory(tmp_path):
  """A good llama, to be spoilt."""
  shutil.copytree(hub.saved('llama')[1], tmp_path / 'model')
  return tmp_path / 'model'


def refused(directory) -> str:
  with pytest.raises(ValueError) as caught:
    pretrained.load(directory)
  sentence = str(caught.value)
  assert '\n' not in sentence and str(directory) in sentence
  return sentence


def change(directory, **fields):
  path = directory / 'config.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def rewrite(directory, edit):
  path = directory / 'model.safetensors'
  tensors = safetensors.numpy.load_file(path)
  edit(tensors)
  safetensors.numpy.save_file(tensors, path)


class Bomb:
  exploded = False

  def __reduce__(self):
    return setattr, (Bomb, 'exploded', True)


def test_no_directory_and_empty_directory(tmp_path):
  assert 'is no directory' in refused(tmp_path / 'nowhere')
  assert 'holds no model' in refused(tmp_path)


def test_the_workdir_of_a_study_is_no_model(tmp_path):
  (tmp_path / 'config.json').write_text(json.dumps(dict(study='quickstart', seed=0)))
  with pytest.raises(ValueError, match=f'workdir of a study.*its models are {tmp_path}/target'):
    pretrained.load(tmp_path)


def test_directory_without_weights(directory):
  (directory / 'model.safetensors').unlink()
  assert 'has no weights' in refused(directory)


def test_pickled_weights_are_refused_and_not_unpickled(directory):
  (directory / 'model.safetensors').unlink()
  (directory / 'pytorch_model.bin').write_bytes(pickle.dumps(Bomb()))
  assert 'pickled weights only (pytorch_model.bin)' in refused(directory)
  assert not Bomb.exploded


@pytest.mark.parametrize('kept', [6, 100, -1])
def test_truncated_file(directory, kept):
  path = directory / 'model.safetensors'
  path.write_bytes(path.read_bytes()[:kept])
  assert 'truncated' in refused(directory)


def test_shards_and_their_index(tmp_path):
  hub.build('llama').save_pretrained(tmp_path, max_shard_size='15KB')
  first, second, *_ = sorted(tmp_path.glob('model-*'))
  saved = first.read_bytes()
  first.write_bytes(second.read_bytes())
  assert 'is doubled, in model-00001' in refused(tmp_path)
  first.unlink()
  assert 'model-00001' in (sentence := refused(tmp_path)) and 'is missing' in sentence
  first.write_bytes(saved)
  index = json.loads((tmp_path / 'model.safetensors.index.json').read_text())
  index['weight_map']['lm_heed.weight'] = first.name
  (tmp_path / 'model.safetensors.index.json').write_text(json.dumps(index))
  assert 'lm_heed.weight is in model-00001' in (sentence := refused(tmp_path))
  assert 'it is nowhere' in sentence
  (tmp_path / 'model.safetensors.index.json').write_text('{}')
  assert 'no index' in refused(tmp_path)


def test_config(directory):
  change(directory, model_type='mamba')
  assert "'mamba'" in (sentence := refused(directory)) and 'llama, mistral, qwen2' in sentence
  (directory / 'config.json').write_text('{')
  assert 'is not JSON' in refused(directory)
  (directory / 'config.json').unlink()
  assert 'config.json is missing' in refused(directory)


@pytest.mark.parametrize('fields, told', [
    (dict(hidden_act='mish'), "hidden_act is 'mish'; known are silu"),
    (dict(mlp_bias=True), 'mlp_bias is True; only'),
    (dict(rope_parameters=dict(rope_type='yarn', rope_theta=1e4, factor=2.0)), 'yarn.*llama3'),
    (dict(model_type='gemma3_text', hidden_activation='silu', sliding_window=3,
          layer_types=['full_attention', 'sliding_attention']), 'layer_types.*are not read'),
    (dict(num_hidden_layers=None), 'has no num_hidden_layers, which llama needs')])
def test_config_that_our_decoder_does_not_do(directory, fields, told):
  change(directory, **fields)
  with pytest.raises(ValueError, match=told):
    pretrained.load(directory)


def test_tensors_that_do_not_fit_are_named_with_their_shapes(directory):
  norm, query = 'model.norm.weight', 'model.layers.1.self_attn.q_proj.weight'
  def spoil(tensors):
    tensors['model.nrom.weight'] = tensors.pop(norm)
    tensors[query] = tensors[query][:-1].copy()
  rewrite(directory, spoil)
  sentence = refused(directory)
  assert f'missing: {norm} [30]' in sentence and 'unknown: model.nrom.weight [30]' in sentence
  assert f'misshapen: {query} is [59, 30] and must be [60, 30]' in sentence


def test_untied_head_of_a_tied_config_and_the_other_way_round(directory):
  change(directory, tie_word_embeddings=True)
  assert 'but they differ' in refused(directory)
  change(directory, tie_word_embeddings=False)
  rewrite(directory, lambda tensors: tensors.pop('lm_head.weight'))
  assert f'missing: lm_head.weight [{hub.VOCAB}, 30]' in refused(directory)


def test_weights_of_another_architecture(directory):
  rewrite(directory, lambda tensors: [tensors.pop(key) for key in list(tensors)] and
          tensors.update({'visual.weight': np.zeros((2, 2), np.float32)}))
  assert 'no tensor model.embed_tokens.weight' in refused(directory)


def test_quantised_weights(directory):
  def quantise(tensors):
    key = 'model.layers.0.mlp.up_proj.weight'
    tensors[key] = tensors[key].astype(np.int8)
  rewrite(directory, quantise)
  assert 'dtype I8' in refused(directory)


@pytest.mark.parametrize('arguments, told', [
    ([], '--source is missing'), (['--source=x'], '--destination is missing'),
    (['--sorce=x'], "Unknown command line flag 'sorce'"), (['x'], "'x' is no flag"),
    (['--source=nowhere', '--destination=new'], 'nowhere is no directory'),
    (['--source=nowhere', '--destination=.'], 'destination . is there already')])
def test_convert_answers_in_one_line(arguments, told, capsys):
  assert convert.main(['convert', *arguments]) == 2
  line = capsys.readouterr().err
  assert line.startswith('error: ') and line.count('\n') == 1 and told in line
