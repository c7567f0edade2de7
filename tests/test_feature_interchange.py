"""Feature-level drafts in files: the authors' keys, there and back, and what is refused."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import drafts
from configs import common
from specdistill_jax import convert
from specdistill_jax import sharding
from specdistill_jax.checkpoints import hf_drafters
from specdistill_jax.checkpoints import key_tables
from specdistill_jax.checkpoints import pretrained
from specdistill_jax.checkpoints import store
from specdistill_jax.stages import feature_drafts

# A target whose widths fit transformers' config.json: heads x head width = width.
TARGET = drafts.target(num_heads=2, num_kv_heads=1, head_dim=8, rope_theta=5e5, norm_eps=1e-5,
                       rope_scaling='llama3', rope_factor=8.0)
ATTENTION = ['self_attn.q_proj.weight', 'self_attn.k_proj.weight', 'self_attn.v_proj.weight',
             'self_attn.o_proj.weight', 'mlp.gate_proj.weight', 'mlp.up_proj.weight',
             'mlp.down_proj.weight', 'post_attention_layernorm.weight']
# As in the published files: SafeAILab/EAGLE (cnets1.py, cnets.py), Luc4Gui/FSPAD.
KEYS = {
    'eagle': {'fc.weight', 'fc.bias', *(f'layers.0.{key}' for key in ATTENTION)},
    'eagle without bias': {'fc.weight', *(f'layers.0.{key}' for key in ATTENTION)},
    'fspad': {'fc.fc.weight', 'fc.fc.bias', 'fc.mlp.gate_proj.weight', 'fc.mlp.up_proj.weight',
              'fc.mlp.down_proj.weight', 'fc.post_attention_layernorm.weight',
              *(f'layers.0.{key}' for key in ATTENTION)},
    'eagle3': {'fc.weight', 'norm.weight', 'lm_head.weight', 'd2t', 't2d',
               'midlayer.hidden_norm.weight', 'midlayer.input_layernorm.weight',
               *(f'midlayer.{key}' for key in ATTENTION)},
}
ARCHITECTURES = {'eagle': 'LlamaForCausalLMEagle', 'eagle without bias': 'LlamaForCausalLM',
                 'fspad': 'LlamaForCausalLMFSPAD', 'eagle3': 'LlamaForCausalLMEagle3'}


def saved(kind, path):
  model = drafts.tiny(kind, TARGET)
  hf_drafters.save(model, path)
  return model, safetensors.numpy.load_file(path / 'model.safetensors')


def rewrite(path, tensors):
  safetensors.numpy.save_file(tensors, path / 'model.safetensors')


@pytest.mark.parametrize('kind', KEYS)
def test_a_draft_comes_back_from_the_authors_layout(kind, tmp_path):
  model, tensors = saved(kind, tmp_path / 'out')
  assert set(tensors) == KEYS[kind]
  hub = json.loads((tmp_path / 'out' / 'config.json').read_text())
  assert hub['architectures'] == [ARCHITECTURES[kind]] and hub['model_type'] == 'llama'
  assert hub['num_hidden_layers'] == 1 and hub['rope_theta'] == 5e5
  again = pretrained.load(tmp_path / 'out', target=TARGET.config)
  assert type(again.config) is type(model.config)
  for name in vars(model.config):
    if name != 'unrolled_steps':  # of training: no file says it
      assert getattr(again.config, name) == getattr(model.config, name), name
  first, second = (key_tables.by_path(one.module) for one in (model, again))
  assert first.keys() == second.keys()
  for name, leaf in first.items():
    np.testing.assert_array_equal(leaf, second[name], err_msg=name)


def test_weights_are_stored_as_the_authors_multiply_by_them(tmp_path):
  """fc takes [embedding; feature]; FSPAD's down projection has the logit half first."""
  model, tensors = saved('fspad', tmp_path / 'out')
  d = TARGET.config.width
  embedded, features = np.random.default_rng(0).normal(size=(2, 1, 1, d)).astype(np.float32)
  module = model.module
  fused = np.concatenate([embedded, features], -1) @ tensors['fc.fc.weight'].T
  fused = fused + tensors['fc.fc.bias']
  silu = lambda x: x / (1 + np.exp(-x))
  normed = drafts.rms(fused, tensors['fc.post_attention_layernorm.weight'], 1e-5)
  x = fused + (silu(embedded @ tensors['fc.mlp.gate_proj.weight'].T)
               * (normed @ tensors['fc.mlp.up_proj.weight'].T)
               ) @ tensors['fc.mlp.down_proj.weight'].T
  # One token attends to itself alone: its value, through the output projection.
  value = x @ tensors['layers.0.self_attn.v_proj.weight'].T  # one key head, two query heads
  x = x + np.concatenate([value, value], -1) @ tensors['layers.0.self_attn.o_proj.weight'].T
  y = drafts.rms(x, tensors['layers.0.post_attention_layernorm.weight'], 1e-5)
  y = (silu(y @ tensors['layers.0.mlp.gate_proj.weight'].T)
       * (y @ tensors['layers.0.mlp.up_proj.weight'].T)
       ) @ tensors['layers.0.mlp.down_proj.weight'].T
  read, carried, _ = module(jnp.asarray(embedded), jnp.asarray(features), jnp.array([[4]]),
                            jnp.ones((1, 1, 1), bool))
  np.testing.assert_allclose(read, x + y[..., :d], rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(carried, x + y[..., d:], rtol=1e-4, atol=1e-4)


def test_the_draft_vocabulary_is_stored_as_differences(tmp_path):
  _, tensors = saved('eagle3', tmp_path / 'out')
  assert tensors['d2t'].dtype == np.int64 and tensors['t2d'].dtype == bool
  ids = list(drafts.DRAFT_IDS)
  assert (tensors['d2t'] + np.arange(len(ids))).tolist() == ids
  assert np.flatnonzero(tensors['t2d']).tolist() == ids and tensors['t2d'].shape == (19,)
  assert tensors['fc.weight'].shape == (16, 48)
  assert tensors['midlayer.self_attn.q_proj.weight'].shape == (16, 32)


def test_what_other_writers_do_is_read(tmp_path):
  """A layer called layers.0, the target's embedding beside it, no word of the fused layers."""
  model, tensors = saved('eagle3', tmp_path / 'out')
  renamed = {key.replace('midlayer.', 'layers.0.'): value for key, value in tensors.items()}
  rewrite(tmp_path / 'out', renamed | {'embed_tokens.weight': np.zeros((19, 16), np.float32)})
  path = tmp_path / 'out' / 'config.json'
  hub = json.loads(path.read_text())
  del hub['eagle_aux_hidden_state_layer_ids']
  path.write_text(json.dumps(hub))
  with pytest.raises(ValueError, match='has no eagle_aux_hidden_state_layer_ids: give captured'):
    pretrained.load(tmp_path / 'out')
  again = pretrained.load(tmp_path / 'out', target=TARGET.config)
  assert again.config.captured_layers == (2, 3, 3)
  np.testing.assert_array_equal(again.module.head_vd[...], model.module.head_vd[...])


@pytest.mark.parametrize('kind, change, message', [
    ('eagle', lambda t: t.pop('layers.0.mlp.up_proj.weight'), 'missing: layers.0.mlp.up_proj'),
    ('eagle', lambda t: t.update(extra=np.zeros(3, np.float32)), r'unknown: extra \[3\]'),
    ('fspad', lambda t: t.update({'fc.fc.weight': np.zeros((16, 8), np.float32)}),
     r'fc.fc.weight is \[16, 8\] and must be \[16, 32\]'),
    ('eagle3', lambda t: t.pop('d2t'), 'lm_head.weight has 11 rows for 19 tokens, and there is no'),
    ('eagle3', lambda t: t.update(d2t=t['d2t'] + 5), 'd2t must name 11 ascending tokens below 19'),
    ('eagle3', lambda t: t.update(t2d=~t['t2d']), 'd2t must name 11 ascending tokens below 19'),
])
def test_files_that_do_not_fit_are_refused(kind, change, message, tmp_path):
  _, tensors = saved(kind, tmp_path / 'out')
  change(tensors)
  rewrite(tmp_path / 'out', tensors)
  with pytest.raises(ValueError, match=message):
    pretrained.load(tmp_path / 'out', target=TARGET.config)


def test_convert_goes_both_ways(tmp_path):
  model, tensors = saved('eagle3', tmp_path / 'hub')
  convert.convert(tmp_path / 'hub', tmp_path / 'ours')
  ours = store.load_model(tmp_path / 'ours')
  assert ours.config.draft_ids().tolist() == list(drafts.DRAFT_IDS)
  convert.convert(tmp_path / 'ours', tmp_path / 'back')
  back = safetensors.numpy.load_file(tmp_path / 'back' / 'model.safetensors')
  assert back.keys() == tensors.keys()
  for key, tensor in tensors.items():
    np.testing.assert_array_equal(back[key], tensor, err_msg=key)
  jax.tree.map(np.testing.assert_array_equal, ours.module, jax.tree.unflatten(
      jax.tree.structure(ours.module), jax.tree.leaves(model.module)))


def test_a_draft_that_a_study_takes_keeps_its_dtype(tmp_path):
  store.save_model(tmp_path / 'w' / 'target', TARGET)
  model = drafts.tiny('eagle3', TARGET)
  half = dataclasses.replace(model, module=sharding.matrices_in(model.module, 'bfloat16'))
  store.save_model(tmp_path / 'half', half)
  config = common.study('x')
  config.draft.init_from = str(tmp_path / 'half')
  feature_drafts.start(config, tmp_path / 'w')
  taken = store.load_model(tmp_path / 'w' / 'draft', weights_dtype=None)
  jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(half.module),
               jax.tree.leaves(taken.module))
  dtypes = [leaf.dtype for leaf in jax.tree.leaves(half.module)]
  assert dtypes == [leaf.dtype for leaf in jax.tree.leaves(taken.module)]
  assert jnp.bfloat16 in dtypes


def test_convert_asks_the_target_what_a_file_does_not_say(tmp_path, capsys):
  saved('eagle3', tmp_path / 'hub')
  path = tmp_path / 'hub' / 'config.json'
  hub = json.loads(path.read_text())
  del hub['eagle_aux_hidden_state_layer_ids']
  path.write_text(json.dumps(hub))
  flags = ['convert', f'--source={tmp_path / "hub"}', f'--destination={tmp_path / "ours"}']
  assert convert.main(flags) == 2 and 'takes as --target' in capsys.readouterr().err
  store.save_model(tmp_path / 'target', TARGET)
  assert convert.main([*flags, f'--target={tmp_path / "target"}']) == 0
  assert store.load_config(tmp_path / 'ours').captured_layers == (2, 3, 3)


def test_a_draft_without_a_format_is_refused(tmp_path, capsys):
  store.save_model(tmp_path / 'ours', drafts.tiny('medusa', TARGET))
  assert convert.main(['convert', f'--source={tmp_path / "ours"}',
                       f'--destination={tmp_path / "hub"}']) == 2
  assert "no file format for drafts of the family 'medusa'" in capsys.readouterr().err
