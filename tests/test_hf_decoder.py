"""Hugging Face's decoders: the same logits and text as `transformers`, in and out again."""

import os

os.environ.setdefault('HF_HUB_OFFLINE', '1')

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specdistill_jax import api
from specdistill_jax import sharding
from specdistill_jax.checkpoints import hf
from specdistill_jax.checkpoints import key_tables
from specdistill_jax.checkpoints import pretrained
from specdistill_jax.checkpoints import safetensors_io
import hub

LENGTHS_B = np.array([13, 4, 9])
TOKENS_BT = np.random.default_rng(0).integers(0, hub.VOCAB, (3, 13))
IS_REAL_BT = np.arange(13) < LENGTHS_B[:, None]
SLOTS, NEW = 20, 8


def assert_same_parameters(first, second):
  first, second = (key_tables.by_path(module) for module in (first, second))
  assert first.keys() == second.keys()
  for name, leaf in first.items():
    assert leaf.dtype == second[name].dtype, name
    np.testing.assert_array_equal(leaf, second[name], err_msg=name)


@pytest.mark.parametrize('family', hub.FAMILIES)
def test_logits_and_greedy_text_are_those_of_transformers(family, tmp_path):
  """Full, in blocks through the cache, and decoded; then exported and imported again."""
  reference, directory = hub.saved(family)
  model = pretrained.load(directory)
  assert model.config.dtype == 'float32'
  wanted = hub.logits(reference, TOKENS_BT, LENGTHS_B)
  assert np.abs(wanted[IS_REAL_BT]).max() > 1, 'flat logits would agree with anything'

  found = jax.jit(lambda module, t: module.causal(t).logits_btv)(model.module, TOKENS_BT)
  np.testing.assert_allclose(np.asarray(found)[IS_REAL_BT], wanted[IS_REAL_BT], atol=1e-4)

  unrolled = model.module.unstacked()
  found = hub.blockwise_logits(unrolled, unrolled.init_cache(3, SLOTS), TOKENS_BT, LENGTHS_B,
                               block=5, slots=SLOTS)
  np.testing.assert_allclose(found[IS_REAL_BT], wanted[IS_REAL_BT], atol=1e-4)

  prompts = [row[:n].tolist() for row, n in zip(TOKENS_BT, LENGTHS_B)]
  generation = api.generate(model, prompts, max_new_tokens=NEW, temperature=0.0,
                            key=jax.random.key(0))
  assert generation.tokens.tolist() == [hub.greedy(reference, p, NEW) for p in prompts]

  hf.save(model, tmp_path / 'out')
  again = type(reference).from_pretrained(tmp_path / 'out', attn_implementation='eager').eval()
  np.testing.assert_array_equal(hub.logits(again, TOKENS_BT, LENGTHS_B)[IS_REAL_BT],
                                wanted[IS_REAL_BT])
  back = pretrained.load(tmp_path / 'out')
  assert back.config == model.config
  assert_same_parameters(model.module, back.module)


def test_generation_stops_at_any_of_the_end_tokens(tmp_path):
  reference, directory = hub.saved('llama')
  prompt = TOKENS_BT[0].tolist()
  text = hub.greedy(reference, prompt, NEW)
  ends = [text[3], text[5]]
  shutil.copytree(directory, tmp_path / 'model')
  (tmp_path / 'model' / 'generation_config.json').write_text(json.dumps({'eos_token_id': ends}))
  model = pretrained.load(tmp_path / 'model')
  assert model.config.eos_id == tuple(ends)
  found = api.generate(model, [prompt], max_new_tokens=NEW, temperature=0.0,
                       key=jax.random.key(0))
  wanted = hub.greedy(reference, prompt, NEW, eos_token_id=ends)
  assert found.tokens[0, :int(found.lengths[0])].tolist() == wanted
  assert len(wanted) == 1 + min(text.index(end) for end in ends)


@pytest.mark.parametrize('family', ['llama3_tied', 'llama_biases', 'gemma3_text', 'qwen2'])
def test_config_in_the_words_of_earlier_transformers(family, tmp_path):
  """`rope_theta`, `rope_scaling` with `type`, `torch_dtype`, `sliding_window_pattern`."""
  directory = hub.saved(family)[1]
  new = json.loads((directory / 'config.json').read_text())
  old = dict(new, torch_dtype=new.pop('dtype'))
  rope = old.pop('rope_parameters')
  if family == 'gemma3_text':
    old['rope_local_base_freq'] = rope['sliding_attention']['rope_theta']
    rope, old['sliding_window_pattern'] = rope['full_attention'], 3
    old.pop('layer_types')
  old['rope_theta'] = rope.pop('rope_theta')
  rope['type'] = rope.pop('rope_type')
  old['rope_scaling'] = None if rope['type'] == 'default' else rope
  (tmp_path / 'config.json').write_text(json.dumps(old))
  assert hf.load_config(tmp_path) == hf.load_config(directory)


def test_eight_devices_read_their_own_slices_of_shards(tmp_path, monkeypatch):
  """The same parameters as on one device, from many files, and no read of a whole matrix."""
  reference = hub.build('qwen3', vocab_size=64, hidden_size=32, num_attention_heads=4,
                        num_key_value_heads=2, head_dim=10, intermediate_size=48)
  reference.save_pretrained(tmp_path, max_shard_size='20KB')
  assert len(list(tmp_path.glob('model-*.safetensors'))) > 2
  single = pretrained.load(tmp_path)
  read, largest = safetensors_io.Reader.read, {}
  def recorded(self, key, index):
    array = read(self, key, index)
    largest[key] = max(largest.get(key, 0), array.size)
    return array
  monkeypatch.setattr(safetensors_io.Reader, 'read', recorded)
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  sharded = pretrained.load(tmp_path, mesh)
  assert_same_parameters(single.module, sharded.module)
  layouts = key_tables.by_path(sharding.parameter_shardings(sharded.module, mesh))
  for name, leaf in key_tables.by_path(sharded.module).items():
    assert leaf.sharding.is_equivalent_to(layouts[name], leaf.ndim), name
  sizes = {name: parameter.numel() for name, parameter in reference.named_parameters()}
  matrices = [name for name in sizes if name.endswith(('proj.weight', 'lm_head.weight'))]
  assert all(largest[name] * 4 <= sizes[name] for name in matrices), largest


def test_export_in_shards_is_read_by_transformers(tmp_path):
  reference, directory = hub.saved('qwen3')
  model = pretrained.load(directory)
  hf.save(model, tmp_path / 'out', max_shard_bytes=20_000)
  files = sorted(path.name for path in (tmp_path / 'out').glob('*.safetensors'))
  assert len(files) > 2 and files[0] == f'model-00001-of-{len(files):05d}.safetensors'
  again = type(reference).from_pretrained(tmp_path / 'out', attn_implementation='eager').eval()
  for (name, first), second in zip(reference.named_parameters(), again.parameters()):
    assert hub.torch.equal(first, second), name
  assert_same_parameters(model.module, pretrained.load(tmp_path / 'out').module)


def test_dtype_is_kept_or_cast(tmp_path):
  reference = hub.build('llama').bfloat16()
  reference.save_pretrained(tmp_path / 'in')
  dtypes = lambda model: {str(leaf.dtype) for leaf in jax.tree.leaves(model.module)}
  masters = pretrained.load(tmp_path / 'in')
  assert dtypes(masters) == {'float32'} and masters.config.dtype == 'bfloat16'
  kept = hf.load(tmp_path / 'in', parameter_dtype=None)
  assert dtypes(kept) == {'bfloat16'}
  assert_same_parameters(kept.module, jax.tree.map(
      lambda leaf: leaf.astype(jnp.bfloat16), masters.module))
  hf.save(kept, tmp_path / 'out')
  assert json.loads((tmp_path / 'out' / 'config.json').read_text())['dtype'] == 'bfloat16'
  again = type(reference).from_pretrained(tmp_path / 'out', dtype='auto')
  for first, second in zip(reference.parameters(), again.parameters()):
    assert first.dtype == second.dtype and hub.torch.equal(first, second)


def test_decoder_that_no_family_has_is_not_exported(tmp_path):
  model = pretrained.load(hub.saved('llama')[1])
  odd = dataclasses.replace(model, config=dataclasses.replace(
      model.config, logit_softcap=3.0), hub_config=None)
  with pytest.raises(ValueError, match='no Hugging Face family.*llama.*logit_softcap.*3.0'):
    hf.save(odd, tmp_path / 'out')
  assert not (tmp_path / 'out').exists()


def test_tied_head_may_be_repeated_but_not_differ(tmp_path):
  import safetensors.numpy
  directory = hub.saved('qwen2')[1]
  shutil.copytree(directory, tmp_path / 'model')
  path = tmp_path / 'model' / 'model.safetensors'
  tensors = safetensors.numpy.load_file(path)
  head = tensors['model.embed_tokens.weight'].copy()
  safetensors.numpy.save_file(tensors | {'lm_head.weight': head}, path)
  assert_same_parameters(pretrained.load(tmp_path / 'model').module,
                         pretrained.load(directory).module)
  head[3, 4] += 1
  safetensors.numpy.save_file(tensors | {'lm_head.weight': head}, path)
  with pytest.raises(ValueError, match='ties lm_head.weight .*embed_tokens.*differ'):
    pretrained.load(tmp_path / 'model')
