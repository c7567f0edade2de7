"""One decoder-only transformer for the GPT, Llama, Qwen and Gemma families, by config fields.

Layers are stacked and scanned in training (one compilation, whatever the depth) and unrolled in
decode loops: `Decoder.unstacked` splits the stack once, outside the loop.
"""

import copy
import dataclasses
from typing import ClassVar

from flax import nnx
import jax
import jax.numpy as jnp

from specdistill_jax import row_sharding
from specdistill_jax import sharding
from specdistill_jax import structs
from specdistill_jax.models import cache as cache_lib
from specdistill_jax.models import decoder_layers
from specdistill_jax.models import layers


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
  """Shape and family of a decoder. Widths are numbers of floats.

  Llama is the default; Qwen3 adds `qk_norm`, Qwen2 `attention_bias`, Gemma `norm_offset`,
  `embedding_scale`, soft-caps and post-norms, Gemma 3 both and `rope_local_theta`, GPT-2 learnt
  positions, LayerNorm and biases.

  Attributes:
    vocab_size: token ids, and logits.
    num_kv_heads: key/value heads; must divide num_heads.
    position: 'rope' or 'learned' (then max_positions rows).
    rope_scaling: how rotary frequencies are stretched by rope_factor: 'none', 'linear' (all of
      them) or 'llama3' (the slow ones: see `layers.rope_frequencies`).
    rope_local_theta: of layers with a window, never stretched (Gemma 3); None: rope_theta.
    embedding_scale: factor on embeddings (Gemma: sqrt(width)).
    query_scale: factor on attention scores; None means head_dim ** -0.5.
    sliding_window: slots that a local layer sees, its own included; None: all layers global.
    global_every: with a window, every global_every-th layer is global (0: none).
    vocab_padding: rows of embedding and head past vocab_size, which no token has: they are
      kept, and never predicted.
    eos_id: the id, or ids, that end a row.
    remat: what the backward pass keeps of a layer, see `layers.rematerialised`.
    dtype: of activations and matrix products, whatever the parameters' own.
  """
  family: ClassVar[str] = 'decoder'
  vocab_size: int
  num_layers: int
  width: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  mlp_width: int
  norm: str = 'rms'
  norm_eps: float = 1e-6
  norm_offset: float = 0.0
  post_norms: bool = False
  activation: str = 'silu'
  gated_mlp: bool = True
  attention_bias: bool = False
  output_bias: bool = False
  mlp_bias: bool = False
  qk_norm: bool = False
  position: str = 'rope'
  rope_theta: float = 10_000.0
  rope_local_theta: float | None = None
  rope_scaling: str = 'none'
  rope_factor: float = 1.0
  rope_low_frequency_factor: float = 1.0
  rope_high_frequency_factor: float = 4.0
  rope_original_positions: int = 8192
  max_positions: int = 0
  tie_embeddings: bool = True
  embedding_scale: float = 1.0
  query_scale: float | None = None
  attention_softcap: float | None = None
  logit_softcap: float | None = None
  sliding_window: int | None = None
  global_every: int = 0
  dropout: float = 0.0
  remat: str = 'none'
  vocab_padding: int = 0
  eos_id: int | tuple[int, ...] = structs.EOS_ID
  dtype: str = 'bfloat16'

  def __post_init__(self):
    if isinstance(self.eos_id, list):  # as JSON gives a tuple back
      object.__setattr__(self, 'eos_id', tuple(self.eos_id))
    for name in ('vocab_size', 'num_layers', 'width', 'num_heads', 'num_kv_heads', 'head_dim',
                 'mlp_width'):
      if getattr(self, name) < 1:
        raise ValueError(f'decoder: {name} is {getattr(self, name)}; it must be at least 1')
    if self.num_heads % self.num_kv_heads:
      raise ValueError(f'decoder: num_heads {self.num_heads} is not a multiple of num_kv_heads '
                       f'{self.num_kv_heads}')
    if self.position == 'rope' and self.head_dim % 2:
      raise ValueError(f'decoder: head_dim {self.head_dim} must be even for rotary positions')
    if self.position == 'learned' and self.max_positions < 1:
      raise ValueError('decoder: learned positions need max_positions of at least 1')
    if self.vocab_padding < 0:
      raise ValueError(f'decoder: vocab_padding is {self.vocab_padding}; it must be at least 0')
    if self.rope_factor < 1.0:
      raise ValueError(f'decoder: rope_factor is {self.rope_factor}; it must be at least 1')
    for name, legal in (('norm', ('rms', 'layer')), ('position', ('rope', 'learned')),
                        ('rope_scaling', layers.ROPE_SCALINGS),
                        ('activation', tuple(layers.ACTIVATIONS)), ('remat', layers.REMAT),
                        ('dtype', ('float32', 'bfloat16'))):
      if getattr(self, name) not in legal:
        raise ValueError(
            f'decoder: {name} is {getattr(self, name)!r}; it must be one of {", ".join(legal)}')
    if not 0.0 <= self.dropout < 1.0:
      raise ValueError(f'decoder: dropout is {self.dropout}; it must lie in [0, 1)')

  @property
  def size(self) -> str:
    """Short and readable: layers x width."""
    return f'{self.num_layers}x{self.width}'


class Block(nnx.Module):
  """One layer: attention and MLP, each behind a norm, optionally with a norm after it."""

  def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
    norm = lambda: layers.Norm(config.width, kind=config.norm, eps=config.norm_eps,
                               offset=config.norm_offset)
    self.config = config
    self.attention_norm = norm()
    self.attention = decoder_layers.Attention(config, rngs=rngs)
    self.mlp_norm = norm()
    self.mlp = decoder_layers.MLP(config, rngs=rngs)
    self.post_attention_norm = norm() if config.post_norms else None
    self.post_mlp_norm = norm() if config.post_norms else None

  def __call__(self, x_btd, positions_bt, mask_bts, buffers=None, offset_b=None,
               dropout_key=None, frequencies=None):
    keys = (None, None) if dropout_key is None else jax.random.split(dropout_key)
    rate = self.config.dropout
    out, buffers = self.attention(
        self.attention_norm(x_btd), positions_bt, mask_bts, buffers, offset_b, frequencies)
    if self.post_attention_norm is not None:
      out = self.post_attention_norm(out)
    x_btd = x_btd + layers.dropout(out, rate, keys[0])
    out = self.mlp(self.mlp_norm(x_btd))
    if self.post_mlp_norm is not None:
      out = self.post_mlp_norm(out)
    return x_btd + layers.dropout(out, rate, keys[1]), buffers


class Decoder(nnx.Module):
  """The transformer; an instance is a `structs.TargetFn`, and a pytree of its parameters."""

  def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
    c = config
    self.config = c
    # Width^-1/2, so that a tied head starts with logits of unit scale.
    rows = c.vocab_size + c.vocab_padding
    self.embedding_vd = layers.normal(rngs.params(), (rows, c.width), c.width)
    self.positions_sd = (layers.normal(rngs.params(), (c.max_positions, c.width), c.width)
                         if c.position == 'learned' else None)
    keys = jax.random.split(rngs.params(), c.num_layers)
    self.layers = jax.vmap(lambda key: Block(c, rngs=nnx.Rngs(params=key)))(keys)
    self.final_norm = layers.Norm(c.width, kind=c.norm, eps=c.norm_eps, offset=c.norm_offset)
    self.head_vd = (None if c.tie_embeddings
                    else layers.normal(rngs.params(), (rows, c.width), c.width))
    self.captured = ()  # layers whose inputs are features, see `capturing`

  @property
  def eos_id(self) -> int | tuple[int, ...]:
    return self.config.eos_id

  def __call__(self, tokens_bt, positions_bt, mask_bts, cache=None, *,
               dropout_key=None) -> structs.TargetOutput:
    """See `structs.TargetFn`; `dropout_key` turns dropout on (training only)."""
    x_btd = self.embed(tokens_bt, positions_bt)
    if isinstance(self.layers, Block):
      if cache is not None:
        raise ValueError('a cache needs unrolled layers: call Decoder.unstacked() first')
      x_btd, captured = self._scanned(x_btd, positions_bt, mask_bts, dropout_key)
    else:
      x_btd, captured, cache = self._unrolled(x_btd, positions_bt, mask_bts, cache)
    features = {'final_btd': self.final_norm(x_btd)}
    if captured:
      features['captured_btw'] = jnp.concatenate(captured, axis=-1)
    return structs.TargetOutput(
        logits_btv=self.logits(features['final_btd']), features=features, cache=cache)

  def causal(self, tokens_bt, *, dropout_key=None) -> structs.TargetOutput:
    """Full causal forward of right-padded rows; padding never reaches earlier positions."""
    b, t = tokens_bt.shape
    positions_bt = jnp.broadcast_to(jnp.arange(t), (b, t))
    mask_bts = positions_bt[:, :, None] >= jnp.arange(t)[None, None, :]
    return self(tokens_bt, positions_bt, mask_bts, dropout_key=dropout_key)

  def supervise(self, batch: structs.Batch, *, first: int = 0,
                dropout_key=None) -> structs.Supervision:
    """Features and labels of whole rows, prompt included, from position `first` on."""
    features_btd = self.causal(batch.tokens_bt, dropout_key=dropout_key).features['final_btd']
    labels_bt, mask_bt = structs.labels_and_mask(batch.tokens_bt, batch.loss_mask_bt)
    return structs.Supervision(features_btd[:, first:], labels_bt[:, first:],
                               mask_bt[:, first:])

  def embed(self, tokens_bt, positions_bt):
    dtype = jnp.dtype(self.config.dtype)
    x_btd = self.embedding_vd[...][tokens_bt].astype(dtype)
    x_btd = x_btd * jnp.asarray(self.config.embedding_scale, dtype)
    if self.positions_sd is not None:
      x_btd = x_btd + self.positions_sd[...][positions_bt].astype(dtype)
    return sharding.constrain(x_btd, 'btd')

  def logits(self, final_btd):
    """Next-token logits in float32 from the features that the final norm put out."""
    head_vd = self.embedding_vd if self.head_vd is None else self.head_vd
    logits = layers.linear(row_sharding.for_head(final_btd), head_vd[...],
                           result_dtype=jnp.float32)
    logits = sharding.constrain(logits, 'btv')
    return layers.soft_cap(logits[..., :self.config.vocab_size], self.config.logit_softcap)

  def _layer_inputs(self, index, positions_bt, mask_bts, offset_b=None):
    """Mask and rotary frequencies of layer `index`; `offset_b` is where a cache is written.

    Local layers see a window that ends at the query, and may rotate by another base.
    """
    c = self.config
    stretch = dict(scaling=c.rope_scaling, factor=c.rope_factor,
                   low=c.rope_low_frequency_factor, high=c.rope_high_frequency_factor,
                   original_positions=c.rope_original_positions)
    frequencies = layers.rope_frequencies(c.rope_theta, c.head_dim, **stretch)
    if c.sliding_window is None:
      return mask_bts, frequencies
    is_global = (index + 1) % c.global_every == 0 if c.global_every else False
    if c.rope_local_theta is not None:
      local = layers.rope_frequencies(c.rope_local_theta, c.head_dim)
      frequencies = jnp.where(is_global, frequencies, local)
    slot_bs = (jnp.arange(mask_bts.shape[-1])[None] if offset_b is None else
               cache_lib.slot_positions(positions_bt, offset_b, mask_bts.shape[-1]))
    distance_bts = positions_bt[:, :, None] - slot_bs[:, None, :]
    return mask_bts & ((distance_bts < c.sliding_window) | is_global), frequencies

  def _scanned(self, x_btd, positions_bt, mask_bts, dropout_key):
    def body(carry, scanned):
      x_btd, captured = carry
      index, block, key = scanned
      captured = tuple(jnp.where(index == layer, x_btd, held)
                       for layer, held in zip(self.captured, captured, strict=True))
      mask, frequencies = self._layer_inputs(index, positions_bt, mask_bts)
      x_btd = block(x_btd, positions_bt, mask, dropout_key=key, frequencies=frequencies)[0]
      return (x_btd, captured), None

    count = self.config.num_layers
    keys = None if dropout_key is None else jax.random.split(dropout_key, count)
    body = layers.rematerialised(body, self.config.remat)
    carry = x_btd, (jnp.zeros_like(x_btd),) * len(self.captured)
    return jax.lax.scan(body, carry, (jnp.arange(count), self.layers, keys))[0]

  def _unrolled(self, x_btd, positions_bt, mask_bts, cache):
    buffers, inputs = [], []
    for index, block in enumerate(self.layers):
      inputs.append(x_btd)
      offset_b = None if cache is None else cache.length_b
      mask, frequencies = self._layer_inputs(index, positions_bt, mask_bts, offset_b)
      held = None if cache is None else (cache.keys_bksh[index], cache.values_bksh[index])
      x_btd, held = block(x_btd, positions_bt, mask, held, offset_b, frequencies=frequencies)
      buffers.append(held)
    if cache is not None:
      keys, values = zip(*buffers)
      cache = cache.replace(keys_bksh=keys, values_bksh=values,
                            length_b=cache.length_b + positions_bt.shape[1])
    return x_btd, tuple(inputs[layer] for layer in self.captured), cache

  def start(self, prompts_bt: jax.Array, prompt_lengths_b: jax.Array) -> structs.Start:
    """A decoder is fed the prompts themselves."""
    return structs.Start(prompts_bt, prompt_lengths_b)

  def init_cache(self, batch: int, num_slots: int, memory=None) -> cache_lib.KVCache:
    c = self.config
    return cache_lib.init_cache(c.num_layers, batch, num_slots, c.num_kv_heads, c.head_dim,
                                jnp.dtype(c.dtype), memory)

  def narrowed(self, vocab_size: int) -> 'Decoder':
    """The same decoder over its first `vocab_size` tokens; the rows past them are kept."""
    rows = self.config.vocab_size + self.config.vocab_padding
    narrow = copy.copy(self)
    narrow.config = dataclasses.replace(self.config, vocab_size=vocab_size,
                                        vocab_padding=rows - vocab_size)
    return narrow

  def capturing(self, layer_indices: tuple[int, ...]) -> 'Decoder':
    """The same decoder, which also gives the inputs of these layers, side by side.

    They are `features['captured_btw']`: the residual stream before layer 0, 1, ..., no norm.
    """
    if any(not 0 <= index < self.config.num_layers for index in layer_indices):
      raise ValueError(f'layers {layer_indices} can\'t be captured: the decoder has layers 0 to '
                       f'{self.config.num_layers - 1}')
    copied = jax.tree.map(lambda x: x, self)  # made in this trace, so that it may be changed
    copied.captured = tuple(layer_indices)
    return copied

  def without_layers(self) -> 'Decoder':
    """Embedding and head alone, as a draft shares them: `embed` and `logits` work."""
    ends = copy.copy(self)
    ends.layers = nnx.List([])
    return ends

  def unstacked(self, *, release: bool = False) -> 'Decoder':
    """The same decoder with one module a layer; itself when it is unrolled already.

    `release` as in `layers.unstacked`.
    """
    if not isinstance(self.layers, Block):
      return self
    unrolled = copy.copy(self)
    unrolled.layers = nnx.List(
        layers.unstacked(self.layers, self.config.num_layers, release=release))
    return unrolled


def init(config: DecoderConfig, key: jax.Array) -> Decoder:
  """A freshly initialised decoder; trace it under `sharding.sharded_init` to lay it out."""
  # XLA's own generator: a dozen threefry draws take ten times as long to compile.
  generator = jax.random.key(jax.random.bits(key, dtype=jnp.uint32), impl='rbg')
  return Decoder(config, rngs=nnx.Rngs(params=generator))
