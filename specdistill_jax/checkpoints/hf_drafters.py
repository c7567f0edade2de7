"""Feature-level drafts in the files that the authors publish and vLLM and SGLang load.

EAGLE-1 and EAGLE-3 as in SafeAILab/EAGLE, FSPAD as in Luc4Gui/FSPAD: config.json and
safetensors, the target's embedding left out. EAGLE-3's vocabulary is `d2t`, int64, the target's
id of each token less its own, and `t2d`, bool, which of the target's tokens it has.
"""

import dataclasses
import pathlib
from typing import Any

import jax
from jax.sharding import Mesh
import numpy as np

from specdistill_jax import sharding
from specdistill_jax import storage
from specdistill_jax.checkpoints import hf
from specdistill_jax.checkpoints import hf_decoder
from specdistill_jax.checkpoints import key_tables
from specdistill_jax.checkpoints import safetensors_io
from specdistill_jax.checkpoints.key_tables import Entry
from specdistill_jax.drafters import eagle3
from specdistill_jax.drafters import families
from specdistill_jax.drafters import feature_config
from specdistill_jax.models import base

# vLLM puts Eagle before what does not begin with it; SGLang has a bias in EAGLE-1, vLLM none.
ARCHITECTURES = {'eagle': 'LlamaForCausalLMEagle', 'fspad': 'LlamaForCausalLMFSPAD',
                 'eagle3': 'LlamaForCausalLMEagle3'}
WITHOUT_BIAS = 'LlamaForCausalLM'
CAPTURED = 'eagle_aux_hidden_state_layer_ids'  # layer j's input, as here
FUSION = ('fc.weight', 'fc.fc.weight')
D2T, T2D = 'd2t', 't2d'
# Copies of the target's, which files may hold.
_SHARED = (r'^embed_tokens\.weight$', r'rotary_emb\.inv_freq$')


def _layer(prefix: str) -> tuple[Entry, ...]:
  attention, mlp = prefix + 'self_attn.', prefix + 'mlp.'
  return (
      Entry(attention + 'q_proj.weight', 'attention/query_nhd', 'nh d'),
      Entry(attention + 'k_proj.weight', 'attention/key_khd', 'kh d'),
      Entry(attention + 'v_proj.weight', 'attention/value_khd', 'kh d'),
      Entry(attention + 'o_proj.weight', 'attention/output_dnh', 'd nh'),
      Entry(mlp + 'gate_proj.weight', 'mlp/gate_fd', 'f d'),
      Entry(mlp + 'up_proj.weight', 'mlp/up_fd', 'f d'),
      Entry(mlp + 'down_proj.weight', 'mlp/down_df', 'd f'),
      Entry(prefix + 'post_attention_layernorm.weight', 'mlp_norm/scale_d', 'd'))


def table(config: feature_config.FeatureConfig, layer: str | None = None) -> key_tables.Table:
  """The key table of a draft; `layer` is what the keys of its layer begin with in a file.

  Raises:
    ValueError: there is no format for drafts of its family.
  """
  if config.family not in ARCHITECTURES:
    raise ValueError(f'there is no file format for drafts of the family {config.family!r}, only '
                     f'for {", ".join(ARCHITECTURES)}')
  if config.family == 'eagle3':
    layer = layer or 'midlayer.'
    entries = (
        Entry('fc.weight', 'fusion_dw', 'd w'), *_layer(layer),
        Entry(layer + 'input_layernorm.weight', 'embedding_norm/scale_d', 'd'),
        Entry(layer + 'hidden_norm.weight', 'carried_norm/scale_d', 'd'),
        Entry('norm.weight', 'final_norm/scale_d', 'd'),
        Entry('lm_head.weight', 'head_vd', 'v d'))
    return key_tables.Table(entries, prefixes=('',), anchor='fc.weight',
                            ignored=(*_SHARED, '^d2t$', '^t2d$'))
  fusion, sampling = 'fc.', ()
  if config.feature_sampling:
    fusion = 'fc.fc.'
    sampling = (
        Entry('fc.post_attention_layernorm.weight', 'sampling/norm/scale_d', 'd'),
        Entry('fc.mlp.gate_proj.weight', 'sampling/gate_fd', 'f d'),
        Entry('fc.mlp.up_proj.weight', 'sampling/up_fd', 'f d'),
        Entry('fc.mlp.down_proj.weight', 'sampling/down_df', 'd f'))
  bias = (Entry(fusion + 'bias', 'fusion_bias_d', 'd'),) * config.fusion_bias
  entries = (Entry(fusion + 'weight', 'fusion_dw', 'd w'), *bias, *sampling, *_layer('layers.0.'))
  return key_tables.Table(entries, prefixes=('',), anchor=fusion + 'weight',
                          ignored=(*_SHARED, r'^lm_head\.weight$'))


def is_draft(directory: pathlib.Path) -> bool:
  """Whether a Hugging Face directory holds a feature-level draft: it has a fusing matrix."""
  if not any((directory / name).is_file() for name in (safetensors_io.SINGLE_FILE,
                                                       safetensors_io.INDEX_FILE)):
    return False
  with safetensors_io.Reader(storage.local(directory)) as reader:
    return any(key in reader.shapes for key in FUSION)


def _config(directory: pathlib.Path, reader: safetensors_io.Reader, target: Any,
            overrides: dict[str, Any]) -> feature_config.FeatureConfig:
  """What config.json says, and what only the weights show: kind, biases, vocabulary."""
  path = directory / hf.CONFIG_FILE
  hub = hf.read_config(directory)
  plain = hf_decoder.to_config(hub | dict(model_type='llama', num_hidden_layers=1), path)
  fields = {name: getattr(plain, name) for name in feature_config.FROM_TARGET}
  fields['dtype'] = 'float32' if hf.dtype(hub) == 'float32' else 'bfloat16'
  if target is not None:
    fields['eos_id'] = target.eos_id
  shapes = reader.shapes
  if 'lm_head.weight' in shapes and 'norm.weight' in shapes:
    captured = hub.get(CAPTURED) or (hub.get('eagle_config') or {}).get(CAPTURED)
    if captured is None and target is not None:
      captured = eagle3.captured_layers(target.num_layers)
    if captured is None and 'captured_layers' not in overrides:
      raise ValueError(f'{path} has no {CAPTURED}: give captured_layers, the layers of the target '
                       'whose inputs are fused, or the target, which convert takes as --target')
    fields |= dict(captured_layers=captured, **_vocabulary(reader, fields['vocab_size']))
    base.check_fields(eagle3.Eagle3Config, overrides)
    return eagle3.Eagle3Config(**(fields | overrides))
  sampling = FUSION[1] in shapes
  width = fields['width']
  partial = shapes.get('layers.0.mlp.down_proj.weight', (width,))[0] == 2 * width
  fields |= dict(fusion_bias=('fc.fc.bias' if sampling else 'fc.bias') in shapes)
  if sampling or partial:
    fields |= dict(feature_sampling=sampling, partial_alignment=partial)
  kind = 'fspad' if sampling or partial else 'eagle'
  config_class = families.FEATURE_DRAFTS[kind][0]
  base.check_fields(config_class, overrides)
  return config_class(**(fields | overrides))


def _vocabulary(reader, vocab_size) -> dict[str, Any]:
  """The draft vocabulary; raises ValueError where `d2t` and `t2d` contradict each other."""
  size = reader.shapes['lm_head.weight'][0]
  if D2T not in reader.shapes:
    if size != vocab_size:
      raise ValueError(f'{reader.directory}: lm_head.weight has {size} rows for {vocab_size} '
                       f'tokens, and there is no {D2T} to say which')
    return dict(draft_vocab_size=size)
  ids = np.arange(size) + reader.read(D2T, [])
  known = reader.read(T2D, []) if T2D in reader.shapes else None
  if (len(ids) != size or np.any(np.diff(ids) <= 0) or ids[0] < 0 or ids[-1] >= vocab_size
      or known is not None and not np.array_equal(np.flatnonzero(known), ids)):
    raise ValueError(f'{reader.directory}: {D2T} must name {size} ascending tokens below '
                     f'{vocab_size}, those of {T2D}')
  return dict(draft_vocab_size=size,
              draft_vocabulary=eagle3.vocabulary_bits(ids, vocab_size))


def load_config(directory: pathlib.Path | str, target: Any = None,
                **overrides: Any) -> feature_config.FeatureConfig:
  """The config that `load` would give the draft; reads its vocabulary, but no weights."""
  directory = storage.local(directory)
  with safetensors_io.Reader(directory) as reader:
    return _config(directory, reader, target, overrides)


def load(directory: pathlib.Path | str, mesh: Mesh | None = None, *, target: Any = None,
         layout: str = sharding.DEFAULT_LAYOUT, parameter_dtype: str | None = 'float32',
         **overrides: Any) -> base.Model:
  """A draft from a directory, each device reading its own slices; arguments as of `hf.load`.

  Args:
    target: config of the target, for the layers that EAGLE-3 reads where its files, like the
      authors', don't say.

  Raises:
    ValueError: one sentence about what is missing, unknown or does not fit.
  """
  hf.check_dtype(parameter_dtype)
  directory = storage.local(directory)
  mesh = mesh or sharding.make_mesh(devices=jax.devices()[:1])
  with safetensors_io.Reader(directory) as reader:
    config = _config(directory, reader, target, overrides)
    abstract = jax.eval_shape(lambda: families.init(config, jax.random.key(0)))
    layer = 'midlayer.' if 'midlayer.self_attn.q_proj.weight' in reader.shapes else 'layers.0.'
    module = key_tables.load(table(config, layer), reader, abstract,
                             sharding.parameter_shardings(abstract, mesh, layout),
                             dtype=parameter_dtype)
  return base.Model(module=module, config=config, hub_config=hf.read_config(directory))


def save(model: base.Model, directory: pathlib.Path | str, *, dtype: str | None = None,
         max_shard_bytes: int = safetensors_io.MAX_SHARD_BYTES) -> None:
  """Writes a draft as its authors do; arguments and errors as of `hf.save`."""
  config = model.config
  tensors = list(key_tables.tensors(table(config), model.module, dtype))
  hub = hf_decoder.from_config(dataclasses.replace(
      config.layer(), tie_embeddings=False, remat='none'))
  # As older readers want it, beside transformers' rope_parameters.
  hub |= dict(rope_theta=config.rope_theta, architectures=[ARCHITECTURES[config.family]],
              dtype=str(tensors[0].dtype), torch_dtype=str(tensors[0].dtype), bias=False)
  if config.family == 'eagle3':
    ids = config.draft_ids().astype(np.int64)
    hub |= {'draft_vocab_size': config.draft_vocab_size,
            CAPTURED: list(config.captured_layers)}
    known = np.zeros(config.vocab_size, bool)
    known[ids] = True
    tensors += [_constant(D2T, ids - np.arange(len(ids))), _constant(T2D, known)]
  else:
    hub |= dict(bias=config.fusion_bias)
    if config.family == 'eagle' and not config.fusion_bias:
      hub |= dict(architectures=[WITHOUT_BIAS])
  ends = config.eos_id
  hub['eos_token_id'] = list(ends) if isinstance(ends, tuple) else ends
  hf.write_directory(storage.path(directory), hub, tensors, max_shard_bytes=max_shard_bytes)


def _constant(key: str, array: np.ndarray) -> safetensors_io.Tensor:
  return safetensors_io.Tensor(key, array.shape, array.dtype, lambda: array)
