"""Hugging Face's decoder families: their config.json and their keys.

`to_config` and `from_config` are each other's inverse where a family can say what a
`DecoderConfig` says, and refuse where it can't; `table` is the key table of a config.
"""

import dataclasses
import math
from typing import Any

from specdistill_jax.checkpoints.key_tables import Entry
from specdistill_jax.checkpoints.key_tables import Table
from specdistill_jax.models import decoder

CONFIG = decoder.DecoderConfig
init = decoder.init

ARCHITECTURES = {
    'llama': 'LlamaForCausalLM', 'mistral': 'MistralForCausalLM', 'qwen2': 'Qwen2ForCausalLM',
    'qwen3': 'Qwen3ForCausalLM', 'gemma': 'GemmaForCausalLM', 'gemma2': 'Gemma2ForCausalLM',
    'gemma3_text': 'Gemma3ForCausalLM', 'gpt2': 'GPT2LMHeadModel',
}
FAMILIES = tuple(ARCHITECTURES)
GEMMAS = ('gemma', 'gemma2', 'gemma3_text')
ACTIVATIONS = {'silu': 'silu', 'swish': 'silu', 'relu': 'relu', 'gelu': 'gelu',
               'gelu_new': 'gelu_tanh', 'gelu_pytorch_tanh': 'gelu_tanh'}
ACTIVATION_NAMES = {'silu': 'silu', 'relu': 'relu', 'gelu': 'gelu',
                    'gelu_tanh': 'gelu_pytorch_tanh'}
# What a config.json leaves out has these values.
DEFAULTS = dict(
    llama=dict(rms_norm_eps=1e-6, tie_word_embeddings=False),
    mistral=dict(rms_norm_eps=1e-6, tie_word_embeddings=False, sliding_window=4096),
    qwen2=dict(rms_norm_eps=1e-6, tie_word_embeddings=False, max_window_layers=28),
    qwen3=dict(rms_norm_eps=1e-6, tie_word_embeddings=False, max_window_layers=28,
               head_dim=128),
    gemma=dict(rms_norm_eps=1e-6, tie_word_embeddings=True, head_dim=256,
               hidden_act='gelu_pytorch_tanh'),
    gemma2=dict(rms_norm_eps=1e-6, tie_word_embeddings=True, head_dim=256, sliding_window=4096,
                hidden_activation='gelu_pytorch_tanh', query_pre_attn_scalar=256,
                final_logit_softcapping=30.0, attn_logit_softcapping=50.0),
    gemma3_text=dict(rms_norm_eps=1e-6, tie_word_embeddings=True, head_dim=256,
                     sliding_window=4096, hidden_activation='gelu_pytorch_tanh',
                     query_pre_attn_scalar=256, num_attention_heads=8, num_key_value_heads=4,
                     vocab_size=262_208, rope_theta=1e6),
    gpt2=dict(layer_norm_epsilon=1e-5, tie_word_embeddings=True,
              activation_function='gelu_new', n_positions=1024),
)


class _Fields:
  """A config.json with its family's defaults, and a sentence about what is missing."""

  def __init__(self, hub: dict[str, Any], path: Any):
    self.family = hub['model_type']
    self.path = path
    self._hub = DEFAULTS[self.family] | {k: v for k, v in hub.items() if v is not None}
    # An explicit null says 'none' where the default is something.
    self._nulls = {k for k, v in hub.items() if v is None}

  def get(self, name: str, default: Any = None) -> Any:
    return default if name in self._nulls else self._hub.get(name, default)

  def __getitem__(self, name: str) -> Any:
    if name not in self._hub:
      raise ValueError(f'{self.path} has no {name}, which {self.family} needs')
    return self._hub[name]

  def refuse(self, name: str, wish: str) -> None:
    raise ValueError(f'{self.path}: {name} is {self.get(name)!r}; {wish}')

  def activation(self, name: str) -> str:
    value = self[name]
    if self.family in GEMMAS and value == 'gelu':  # of old files, and never meant
      return 'gelu_tanh'
    if value not in ACTIVATIONS:
      self.refuse(name, f'known are {", ".join(ACTIVATIONS)}')
    return ACTIVATIONS[value]


def to_config(hub: dict[str, Any], path: Any = 'config.json',
              **overrides: Any) -> decoder.DecoderConfig:
  """A config.json of one of `FAMILIES` as ours, with `overrides` of our fields.

  Raises:
    ValueError: it needs something that our decoder does not do.
  """
  f = _Fields(hub, path)
  fields = _gpt2(f) if f.family == 'gpt2' else _llama_like(f)
  return decoder.DecoderConfig(**(dict(dtype='float32') | fields | overrides))


def _llama_like(f: _Fields) -> dict[str, Any]:
  width, heads = f['hidden_size'], f['num_attention_heads']
  is_gemma = f.family in GEMMAS
  for name, wish in (('use_bidirectional_attention', 'only causal models are read'),
                     ('mlp_bias', 'only MLPs without biases are read')):
    if f.get(name):
      f.refuse(name, wish)
  attention_bias = f.family == 'qwen2' or bool(f.get('attention_bias', False))
  return dict(
      vocab_size=f['vocab_size'], num_layers=f['num_hidden_layers'], width=width,
      num_heads=heads, num_kv_heads=f.get('num_key_value_heads', heads),
      head_dim=f.get('head_dim') or width // heads, mlp_width=f['intermediate_size'],
      norm_eps=f['rms_norm_eps'], norm_offset=1.0 if is_gemma else 0.0,
      post_norms=f.family in ('gemma2', 'gemma3_text'),
      activation=f.activation('hidden_act' if f.family not in ('gemma2', 'gemma3_text')
                              else 'hidden_activation'),
      attention_bias=attention_bias, output_bias=attention_bias and f.family != 'qwen2',
      qk_norm=f.family in ('qwen3', 'gemma3_text'),
      tie_embeddings=f['tie_word_embeddings'],
      embedding_scale=math.sqrt(width) if is_gemma else 1.0,
      query_scale=(f['query_pre_attn_scalar'] ** -0.5
                   if f.family in ('gemma2', 'gemma3_text') else None),
      attention_softcap=f.get('attn_logit_softcapping'),
      logit_softcap=f.get('final_logit_softcapping'),
      **_windows(f), **_rope(f))


def _gpt2(f: _Fields) -> dict[str, Any]:
  for name, neutral in (('scale_attn_weights', True), ('add_cross_attention', False),
                        ('scale_attn_by_inverse_layer_idx', False)):
    if f.get(name, neutral) != neutral:
      f.refuse(name, f'only {neutral} is read')
  width, heads = f['n_embd'], f['n_head']
  return dict(
      vocab_size=f['vocab_size'], num_layers=f['n_layer'], width=width, num_heads=heads,
      num_kv_heads=heads, head_dim=width // heads, mlp_width=f.get('n_inner') or 4 * width,
      norm='layer', norm_eps=f['layer_norm_epsilon'], gated_mlp=False,
      activation=f.activation('activation_function'), attention_bias=True, output_bias=True,
      mlp_bias=True, position='learned', max_positions=f['n_positions'],
      tie_embeddings=f['tie_word_embeddings'])


def _layer_types(f: _Fields) -> list[str]:
  """'sliding_attention' or 'full_attention' for each layer, as the family lays them out."""
  count, window = f['num_hidden_layers'], f.get('sliding_window')
  if f.family in ('qwen2', 'qwen3') and not f.get('use_sliding_window', False):
    window = None
  if window is None or f.family in ('llama', 'gemma'):
    return ['full_attention'] * count
  if f.get('layer_types') is not None and f.family != 'mistral':
    return f['layer_types']
  is_full = {
      'mistral': lambda i: False,
      'gemma2': lambda i: (i + 1) % 2 == 0,
      'gemma3_text': lambda i: (i + 1) % f.get('sliding_window_pattern', 6) == 0,
  }.get(f.family, lambda i: i < f['max_window_layers'])
  return ['full_attention' if is_full(i) else 'sliding_attention' for i in range(count)]


def _windows(f: _Fields) -> dict[str, Any]:
  types = _layer_types(f)
  full = [index for index, kind in enumerate(types) if kind == 'full_attention']
  if len(full) == len(types):
    return {}
  every = full[0] + 1 if full else 0
  regular = [index for index in range(len(types)) if every and (index + 1) % every == 0]
  unknown = set(types) - {'full_attention', 'sliding_attention'}
  if full != regular or unknown or len(types) != f['num_hidden_layers']:
    raise ValueError(f'{f.path}: layer_types {types} are not read; each layer must be '
                     'full_attention or sliding_attention, the full ones at every n-th layer')
  return dict(sliding_window=f['sliding_window'], global_every=every)


def _rope(f: _Fields) -> dict[str, Any]:
  """Rotary fields, from `rope_parameters` (transformers 5) or `rope_theta`, `rope_scaling`."""
  given = f.get('rope_parameters') or {}
  local = {}
  if f.family == 'gemma3_text':
    theta = given.get('sliding_attention', {}).get(
        'rope_theta', f.get('rope_local_base_freq', 10_000.0))
    if any(kind == 'sliding_attention' for kind in _layer_types(f)):
      local = dict(rope_local_theta=float(theta))
    given = given.get('full_attention', {})
  given = given or f.get('rope_scaling') or {}
  kind = given.get('rope_type', given.get('type', 'default'))
  theta = given.get('rope_theta', f.get('rope_theta', 10_000.0))
  fields = dict(rope_theta=float(theta), **local)
  if given.get('partial_rotary_factor', 1.0) != 1.0 or kind not in (
      'default', 'linear', 'llama3'):
    raise ValueError(f'{f.path}: rotary positions {given} are not read; rope_type must be '
                     'default, linear or llama3, on whole heads')
  if kind != 'default':
    fields.update(rope_scaling=kind, rope_factor=float(given['factor']))
  if kind == 'llama3':
    fields.update(
        rope_low_frequency_factor=float(given['low_freq_factor']),
        rope_high_frequency_factor=float(given['high_freq_factor']),
        rope_original_positions=given['original_max_position_embeddings'])
  return fields


def family(c: decoder.DecoderConfig) -> str:
  """The family whose files can say what a config says; see `from_config`."""
  if c.norm == 'layer':
    return 'gpt2'
  if c.norm_offset:
    return {(False, False): 'gemma', (True, False): 'gemma2', (True, True): 'gemma3_text'}.get(
        (c.post_norms, c.qk_norm), 'gemma2')
  if c.qk_norm:
    return 'qwen3'
  if c.attention_bias and not c.output_bias:
    return 'qwen2'
  return 'mistral' if c.sliding_window is not None else 'llama'


def from_config(c: decoder.DecoderConfig, hub: dict[str, Any] | None = None) -> dict[str, Any]:
  """Our config as a config.json.

  Args:
    hub: the config.json that the model came from; what ours does not hold is kept from it.

  Raises:
    ValueError: no family says what the config says.
  """
  name = family(c)
  hub = dict(hub or {}) if (hub or {}).get('model_type') == name else {}
  for stale in ('torch_dtype', 'rope_theta', 'rope_scaling', 'rope_local_base_freq',
                'quantization_config', 'transformers_version', 'sliding_window_pattern'):
    hub.pop(stale, None)
  made = hub | _written(name, c) | dict(model_type=name, architectures=[ARCHITECTURES[name]])
  if c.width % c.num_heads:
    raise ValueError(f'transformers wants a width that its heads divide; the width is {c.width} '
                     f'and there are {c.num_heads} heads')
  _check_same(name, _comparable(to_config(made)), _comparable(c))
  return made


def _comparable(c: decoder.DecoderConfig) -> dict[str, Any]:
  """What a config.json must say: not how we run the model, nor what it leaves unused."""
  fields = dataclasses.asdict(c)
  fields['vocab_size'] += fields['vocab_padding']
  if c.query_scale is None:
    fields['query_scale'] = c.head_dim ** -0.5
  for name in ('dtype', 'dropout', 'eos_id', 'vocab_padding'):
    fields.pop(name)
  if c.position == 'rope':
    fields.pop('max_positions')
  return fields


def _check_same(name: str, found: dict[str, Any], wanted: dict[str, Any]) -> None:
  for field, value in wanted.items():
    both = value, found[field]
    are_numbers = all(isinstance(x, float) for x in both)
    if not (math.isclose(*both, rel_tol=1e-6) if are_numbers else both[0] == both[1]):
      raise ValueError(f'no Hugging Face family has this decoder: in {name}, the nearest one, '
                       f'{field} would be {found[field]!r}, and it is {value!r}')


def _written(name: str, c: decoder.DecoderConfig) -> dict[str, Any]:
  common = dict(vocab_size=c.vocab_size + c.vocab_padding, tie_word_embeddings=c.tie_embeddings)
  activation = ACTIVATION_NAMES[c.activation]
  if name == 'gpt2':
    # Its tanh is computed in another order than Gemma's; the last bits differ.
    activation = {'gelu_pytorch_tanh': 'gelu_new'}.get(activation, activation)
    return common | dict(
        n_embd=c.width, n_layer=c.num_layers, n_head=c.num_heads, n_inner=c.mlp_width,
        n_positions=c.max_positions, layer_norm_epsilon=c.norm_eps,
        activation_function=activation)
  common |= dict(
      hidden_size=c.width, num_hidden_layers=c.num_layers, num_attention_heads=c.num_heads,
      num_key_value_heads=c.num_kv_heads, head_dim=c.head_dim, intermediate_size=c.mlp_width,
      rms_norm_eps=c.norm_eps)
  if name in ('llama', 'qwen3') or name in GEMMAS:
    common |= dict(attention_bias=c.attention_bias)
  common['hidden_activation' if name in ('gemma2', 'gemma3_text') else 'hidden_act'] = activation
  if name in ('gemma2', 'gemma3_text'):
    scale = c.head_dim ** -0.5 if c.query_scale is None else c.query_scale
    scalar = scale ** -2
    common |= dict(
        query_pre_attn_scalar=round(scalar) if math.isclose(scalar, round(scalar)) else scalar,
        attn_logit_softcapping=c.attention_softcap, final_logit_softcapping=c.logit_softcap)
  return common | _written_windows(name, c) | _written_rope(name, c)


def _written_windows(name: str, c: decoder.DecoderConfig) -> dict[str, Any]:
  if name in ('llama', 'gemma'):
    return {}
  if name == 'mistral':
    return dict(sliding_window=c.sliding_window)
  local = c.sliding_window is not None
  is_full = lambda i: not local or (c.global_every and (i + 1) % c.global_every == 0)
  types = ['full_attention' if is_full(i) else 'sliding_attention' for i in range(c.num_layers)]
  written = dict(layer_types=types)
  if local:
    written |= dict(sliding_window=c.sliding_window)
  if name in ('qwen2', 'qwen3'):
    written |= dict(use_sliding_window=local)
  return written


def _written_rope(name: str, c: decoder.DecoderConfig) -> dict[str, Any]:
  kind = 'default' if c.rope_scaling == 'none' else c.rope_scaling
  rope = dict(rope_type=kind, rope_theta=c.rope_theta)
  if kind != 'default':
    rope |= dict(factor=c.rope_factor)
  if kind == 'llama3':
    rope |= dict(low_freq_factor=c.rope_low_frequency_factor,
                 high_freq_factor=c.rope_high_frequency_factor,
                 original_max_position_embeddings=c.rope_original_positions)
  if name != 'gemma3_text':
    return dict(rope_parameters=rope)
  local = c.rope_theta if c.rope_local_theta is None else c.rope_local_theta
  return dict(rope_parameters=dict(
      full_attention=rope, sliding_attention=dict(rope_type='default', rope_theta=local)))


# Keys of a layer without biases and norms; the families' own follow below.
_LAYER = 'layers.{l}.'
_PROJECTIONS = (
    Entry(_LAYER + 'self_attn.q_proj.weight', 'layers/attention/query_nhd', 'nh d'),
    Entry(_LAYER + 'self_attn.k_proj.weight', 'layers/attention/key_khd', 'kh d'),
    Entry(_LAYER + 'self_attn.v_proj.weight', 'layers/attention/value_khd', 'kh d'),
    Entry(_LAYER + 'self_attn.o_proj.weight', 'layers/attention/output_dnh', 'd nh'),
    Entry(_LAYER + 'mlp.gate_proj.weight', 'layers/mlp/gate_fd', 'f d'),
    Entry(_LAYER + 'mlp.up_proj.weight', 'layers/mlp/up_fd', 'f d'),
    Entry(_LAYER + 'mlp.down_proj.weight', 'layers/mlp/down_df', 'd f'),
    Entry(_LAYER + 'input_layernorm.weight', 'layers/attention_norm/scale_d', 'd'),
    Entry('embed_tokens.weight', 'embedding_vd', 'v d'),
    Entry('norm.weight', 'final_norm/scale_d', 'd'),
)
_PLAIN_NORMS = (
    Entry(_LAYER + 'post_attention_layernorm.weight', 'layers/mlp_norm/scale_d', 'd'),)
_FOUR_NORMS = (
    Entry(_LAYER + 'post_attention_layernorm.weight', 'layers/post_attention_norm/scale_d', 'd'),
    Entry(_LAYER + 'pre_feedforward_layernorm.weight', 'layers/mlp_norm/scale_d', 'd'),
    Entry(_LAYER + 'post_feedforward_layernorm.weight', 'layers/post_mlp_norm/scale_d', 'd'),
)
_QK_NORMS = (
    Entry(_LAYER + 'self_attn.q_norm.weight', 'layers/attention/query_norm/scale_d', 'd'),
    Entry(_LAYER + 'self_attn.k_norm.weight', 'layers/attention/key_norm/scale_d', 'd'),
)
_BIASES = (
    Entry(_LAYER + 'self_attn.q_proj.bias', 'layers/attention/query_bias_nh', 'nh'),
    Entry(_LAYER + 'self_attn.k_proj.bias', 'layers/attention/key_bias_kh', 'kh'),
    Entry(_LAYER + 'self_attn.v_proj.bias', 'layers/attention/value_bias_kh', 'kh'),
)
_OUTPUT_BIAS = (Entry(_LAYER + 'self_attn.o_proj.bias', 'layers/attention/output_bias_d', 'd'),)
_GPT2 = (
    Entry('wte.weight', 'embedding_vd', 'v d'),
    Entry('wpe.weight', 'positions_sd', 's d'),
    *(Entry('h.{l}.attn.c_attn.weight', f'layers/attention/{name}', 'd *' + name[-3:-1], (part, 3))
      for part, name in enumerate(('query_nhd', 'key_khd', 'value_khd'))),
    *(Entry('h.{l}.attn.c_attn.bias', f'layers/attention/{name}', '*' + name[-2:], (part, 3))
      for part, name in enumerate(('query_bias_nh', 'key_bias_kh', 'value_bias_kh'))),
    Entry('h.{l}.attn.c_proj.weight', 'layers/attention/output_dnh', 'nh d'),
    Entry('h.{l}.attn.c_proj.bias', 'layers/attention/output_bias_d', 'd'),
    Entry('h.{l}.mlp.c_fc.weight', 'layers/mlp/up_fd', 'd f'),
    Entry('h.{l}.mlp.c_fc.bias', 'layers/mlp/up_bias_f', 'f'),
    Entry('h.{l}.mlp.c_proj.weight', 'layers/mlp/down_df', 'f d'),
    Entry('h.{l}.mlp.c_proj.bias', 'layers/mlp/down_bias_d', 'd'),
    Entry('h.{l}.ln_1.weight', 'layers/attention_norm/scale_d', 'd'),
    Entry('h.{l}.ln_1.bias', 'layers/attention_norm/bias_d', 'd'),
    Entry('h.{l}.ln_2.weight', 'layers/mlp_norm/scale_d', 'd'),
    Entry('h.{l}.ln_2.bias', 'layers/mlp_norm/bias_d', 'd'),
    Entry('ln_f.weight', 'final_norm/scale_d', 'd'),
    Entry('ln_f.bias', 'final_norm/bias_d', 'd'),
)
_HEAD = (Entry('/lm_head.weight', 'head_vd', 'v d'),)


def table(c: decoder.DecoderConfig) -> Table:
  """The key table of a decoder."""
  head = () if c.tie_embeddings else _HEAD
  if family(c) == 'gpt2':
    return Table(_GPT2 + head, prefixes=('transformer.', ''), anchor='wte.weight',
                 copies=(('/lm_head.weight', 'wte.weight'),) * c.tie_embeddings,
                 ignored=(r'h\.\d+\.attn\.(masked_)?bias$',))
  entries = (_PROJECTIONS + (_FOUR_NORMS if c.post_norms else _PLAIN_NORMS)
             + _QK_NORMS * c.qk_norm + _BIASES * c.attention_bias + _OUTPUT_BIAS * c.output_bias
             + head)
  return Table(entries, prefixes=('model.', ''), anchor='embed_tokens.weight',
               copies=(('/lm_head.weight', 'embed_tokens.weight'),) * c.tie_embeddings,
               ignored=(r'rotary_emb\.inv_freq$',))
