"""Hugging Face's encoder-decoders: T5 v1.0, v1.1 and FLAN-T5, mT5. See `hf_decoder`."""

from typing import Any

from specdistill_jax import structs
from specdistill_jax.checkpoints.key_tables import Entry
from specdistill_jax.checkpoints.key_tables import Table
from specdistill_jax.models import t5

CONFIG = t5.T5Config
init = t5.init
ARCHITECTURES = {'t5': 'T5ForConditionalGeneration', 'mt5': 'MT5ForConditionalGeneration'}
FAMILIES = tuple(ARCHITECTURES)
NEEDED = ('vocab_size', 'd_model', 'num_heads', 'd_kv', 'd_ff', 'num_layers')
MLPS = {'relu': False, 'gated-gelu': True}  # whether there are two input matrices


def to_config(hub: dict[str, Any], path: Any = 'config.json', **overrides: Any) -> t5.T5Config:
  """A config.json of one of `FAMILIES` as ours, with `overrides` of our fields.

  Raises:
    ValueError: it needs something that our T5 does not do.
  """
  get = lambda name, default: default if hub.get(name) is None else hub[name]
  for name in NEEDED:
    if hub.get(name) is None:
      raise ValueError(f'{path} has no {name}, which {hub["model_type"]} needs')
  mlp = get('feed_forward_proj', 'relu' if hub['model_type'] == 't5' else 'gated-gelu')
  if mlp not in MLPS:
    raise ValueError(f'{path}: feed_forward_proj is {mlp!r}; known are {", ".join(MLPS)}')
  start = get('decoder_start_token_id', t5.START_ID)
  if start != t5.START_ID:
    raise ValueError(f'{path}: decoder_start_token_id is {start}; only {t5.START_ID} is read')
  # v1.0 scales what its tied head reads. transformers 5 writes that under a name of its own.
  tied = get('scale_decoder_outputs', get('tie_word_embeddings', True))
  fields = dict(
      vocab_size=hub['vocab_size'], width=hub['d_model'], num_heads=hub['num_heads'],
      head_dim=hub['d_kv'], mlp_width=hub['d_ff'], num_encoder_layers=hub['num_layers'],
      num_decoder_layers=get('num_decoder_layers', hub['num_layers']), gated_mlp=MLPS[mlp],
      tie_embeddings=tied and hub['model_type'] == 't5',
      relative_buckets=get('relative_attention_num_buckets', 32),
      relative_max_distance=get('relative_attention_max_distance', 128),
      norm_eps=get('layer_norm_epsilon', 1e-6), dtype='float32')
  return t5.T5Config(**(fields | overrides))


def from_config(c: t5.T5Config, hub: dict[str, Any] | None = None) -> dict[str, Any]:
  """Our config as a config.json; `hub` is the one that the model came with."""
  hub = {name: value for name, value in (hub or {}).items()
         if name not in ('torch_dtype', 'transformers_version', 'scale_decoder_outputs')}
  name = hub.get('model_type', 't5')
  return hub | dict(
      model_type=name, architectures=[ARCHITECTURES[name]], vocab_size=c.vocab_size,
      d_model=c.width, num_heads=c.num_heads, d_kv=c.head_dim, d_ff=c.mlp_width,
      num_layers=c.num_encoder_layers, num_decoder_layers=c.num_decoder_layers,
      feed_forward_proj='gated-gelu' if c.gated_mlp else 'relu',
      tie_word_embeddings=c.tie_embeddings, scale_decoder_outputs=c.tie_embeddings,
      relative_attention_num_buckets=c.relative_buckets,
      relative_attention_max_distance=c.relative_max_distance, layer_norm_epsilon=c.norm_eps,
      is_encoder_decoder=True, decoder_start_token_id=t5.START_ID, pad_token_id=structs.PAD_ID)


def _attention(layer: str, kind: str, norm: str, ours: str) -> tuple[Entry, ...]:
  projections = (('q', 'query_nhd', 'nh d'), ('k', 'key_khd', 'kh d'), ('v', 'value_khd', 'kh d'),
                 ('o', 'output_dnh', 'd nh'))
  return tuple(Entry(f'{layer}.{kind}.{key}.weight', f'{ours}/{name}', axes)
               for key, name, axes in projections) + (
      Entry(f'{layer}.layer_norm.weight', f'{norm}/scale_d', 'd'),)


def _mlp(layer: str, stack: str, gated: bool) -> tuple[Entry, ...]:
  inputs = (('wi_0', 'gate_fd'), ('wi_1', 'up_fd')) if gated else (('wi', 'up_fd'),)
  dense = f'{layer}.DenseReluDense'
  return tuple(Entry(f'{dense}.{key}.weight', f'{stack}/mlp/{name}', 'f d')
               for key, name in inputs) + (
      Entry(f'{dense}.wo.weight', f'{stack}/mlp/down_df', 'd f'),
      Entry(f'{layer}.layer_norm.weight', f'{stack}/mlp_norm/scale_d', 'd'))


def _stack(name: str) -> tuple[Entry, ...]:
  """Self-attention of a stack, the table of its relative positions, and its last norm."""
  layer, ours = f'{name}.block.{{l}}.layer.0', f'{name}_layers'
  return _attention(layer, 'SelfAttention', f'{ours}/attention_norm', f'{ours}/attention') + (
      Entry(f'{name}.block.0.layer.0.SelfAttention.relative_attention_bias.weight',
            f'{name}_bias_rn', 'r n'),
      Entry(f'{name}.final_layer_norm.weight', f'{name}_norm/scale_d', 'd'))


def table(c: t5.T5Config) -> Table:
  """The key table of a T5."""
  entries = (
      Entry('shared.weight', 'embedding_vd', 'v d'),
      *_stack('encoder'), *_mlp('encoder.block.{l}.layer.1', 'encoder_layers', c.gated_mlp),
      *_stack('decoder'),
      *_attention('decoder.block.{l}.layer.1', 'EncDecAttention', 'decoder_layers/cross_norm',
                  'decoder_layers/cross'),
      *_mlp('decoder.block.{l}.layer.2', 'decoder_layers', c.gated_mlp))
  copies = [('encoder.embed_tokens.weight', 'shared.weight'),
            ('decoder.embed_tokens.weight', 'shared.weight')]
  if c.tie_embeddings:
    copies.append(('lm_head.weight', 'shared.weight'))
  else:
    entries += (Entry('lm_head.weight', 'head_vd', 'v d'),)
  return Table(entries, prefixes=('',), anchor='shared.weight', copies=tuple(copies),
               # transformers 5 leaves out a head that equals the embedding.
               fallbacks=(('lm_head.weight', 'shared.weight'),),
               # A table that the first checkpoints stored and never read.
               ignored=(r'EncDecAttention\.relative_attention_bias\.weight$',))
