"""T5: encoder-decoders of the T5 v1.0, v1.1, FLAN-T5 and mT5 families, by config fields.

Raffel et al. 2020 (arXiv 1910.10683); v1.1: Shazeer 2020 (arXiv 2002.05202). Positions enter as
a bias on attention scores, by bucketed distance; the first layer's table serves all layers of a
stack. Scores are not scaled: the initialisation of the queries stands for it.

The encoder reads the prompt once (`T5.start`); what each decoder layer sees of it, its keys and
values, is computed there once and travels in the cache. In training the layers of both stacks
are stacked and scanned; for decode loops `T5.unstacked` unrolls the decoder's.
"""

import copy
import dataclasses
from typing import ClassVar

from flax import nnx
from flax import struct
import jax
import jax.numpy as jnp

from specdistill_jax import row_sharding
from specdistill_jax import sharding
from specdistill_jax import structs
from specdistill_jax.models import cache as cache_lib
from specdistill_jax.models import layers
from specdistill_jax.models import t5_layers

START_ID = structs.PAD_ID  # what every T5 decoder is fed first


@dataclasses.dataclass(frozen=True)
class T5Config:
  """Shape of a T5. The defaults are v1.1's; FLAN-T5 and mT5 share them.

  Attributes:
    gated_mlp: v1.1: two input matrices and a tanh-approximated GELU; v1.0: one and a ReLU.
    tie_embeddings: v1.0: the head is the embedding, and logits are scaled by width ** -0.5.
    relative_buckets: of distances, in each stack's table.
    relative_max_distance: tokens beyond which all distances share the last bucket.
    dropout: on embeddings and on what each sublayer adds.
    remat: what the backward pass keeps of a layer, see `layers.rematerialised`.
    dtype: of activations and matrix products, whatever the parameters' own.
  """
  family: ClassVar[str] = 't5'
  max_positions: ClassVar[int] = 0  # relative positions have no end
  vocab_size: int
  width: int
  num_heads: int
  head_dim: int
  mlp_width: int
  num_encoder_layers: int
  num_decoder_layers: int
  gated_mlp: bool = True
  tie_embeddings: bool = False
  relative_buckets: int = 32
  relative_max_distance: int = 128
  norm_eps: float = 1e-6
  dropout: float = 0.0
  remat: str = 'none'
  dtype: str = 'bfloat16'

  def __post_init__(self):
    for name in ('vocab_size', 'width', 'num_heads', 'head_dim', 'mlp_width',
                 'num_encoder_layers', 'num_decoder_layers'):
      if getattr(self, name) < 1:
        raise ValueError(f't5: {name} is {getattr(self, name)}; it must be at least 1')
    if self.relative_buckets < 4 or self.relative_buckets % 4:
      raise ValueError(f't5: relative_buckets is {self.relative_buckets}; it must be a multiple '
                       'of 4: half for each direction, half of those for single distances')
    if self.relative_max_distance <= self.relative_buckets // 2:
      raise ValueError(f't5: relative_max_distance is {self.relative_max_distance}; it must '
                       f'exceed half of relative_buckets, {self.relative_buckets // 2}')
    for name, legal in (('dtype', ('float32', 'bfloat16')), ('remat', layers.REMAT)):
      if getattr(self, name) not in legal:
        raise ValueError(
            f't5: {name} is {getattr(self, name)!r}; it must be one of {", ".join(legal)}')
    if not 0.0 <= self.dropout < 1.0:
      raise ValueError(f't5: dropout is {self.dropout}; it must lie in [0, 1)')

  @property
  def activation(self) -> str:
    return 'gelu_tanh' if self.gated_mlp else 'relu'

  @property
  def mlp_bias(self) -> bool:
    return False

  @property
  def size(self) -> str:
    """Short and readable: encoder + decoder layers x width."""
    return f'{self.num_encoder_layers}+{self.num_decoder_layers}x{self.width}'


@struct.dataclass
class Memory:
  """The encoded prompts as each decoder layer sees them; never changed while decoding.

  Attributes:
    keys_bksh: cross-attention keys, one array a layer.
    values_bksh: likewise.
    mask_bs: bool, the slots that hold a prompt's token.
  """
  keys_bksh: tuple[jax.Array, ...]
  values_bksh: tuple[jax.Array, ...]
  mask_bs: jax.Array


class T5(nnx.Module):
  """The model; a `structs.Decodable`, and a pytree of its parameters."""

  def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
    c = config
    self.config = c
    self.embedding_vd = layers.normal(rngs.params(), (c.vocab_size, c.width), 1)
    stack = lambda block, count: jax.vmap(lambda key: block(c, rngs=nnx.Rngs(params=key)))(
        jax.random.split(rngs.params(), count))
    table = lambda: layers.normal(rngs.params(), (c.relative_buckets, c.num_heads), c.width)
    self.encoder_layers = stack(t5_layers.EncoderBlock, c.num_encoder_layers)
    self.encoder_bias_rn, self.encoder_norm = table(), t5_layers.norm(c)
    self.decoder_layers = stack(t5_layers.DecoderBlock, c.num_decoder_layers)
    self.decoder_bias_rn, self.decoder_norm = table(), t5_layers.norm(c)
    self.head_vd = (None if c.tie_embeddings
                    else layers.normal(rngs.params(), (c.vocab_size, c.width), c.width))

  def start(self, prompts_bt: jax.Array, prompt_lengths_b: jax.Array) -> structs.Start:
    """Reads the prompts. The decoder's layers must be unrolled, as for every cache."""
    self._check_unrolled()
    encoded_bsd, mask_bs = self.encode(prompts_bt, prompt_lengths_b)
    keys, values = zip(*(t5_layers.heads_first(block.cross.read(encoded_bsd))
                         for block in self.decoder_layers))
    b = prompts_bt.shape[0]
    return structs.Start(
        tokens_bt=jnp.full((b, 1), START_ID, jnp.int32), lengths_b=jnp.ones((b,), jnp.int32),
        memory=Memory(keys, values, mask_bs))

  def __call__(self, tokens_bt, positions_bt, mask_bts, cache) -> structs.TargetOutput:
    """See `structs.TargetFn`; the cache holds the prompts' memory, as `init_cache` put it."""
    self._check_unrolled()
    memory = cache.memory
    bias_bnts = self._decoder_bias(positions_bt, cache_lib.slot_positions(
        positions_bt, cache.length_b, mask_bts.shape[-1]))
    x_btd, buffers = self._embed(tokens_bt), []
    for index, block in enumerate(self.decoder_layers):
      x_btd, held = block(
          x_btd, mask_bts, bias_bnts, (memory.keys_bksh[index], memory.values_bksh[index]),
          memory.mask_bs[:, None], (cache.keys_bksh[index], cache.values_bksh[index]),
          cache.length_b)
      buffers.append(held)
    keys, values = zip(*buffers)
    cache = cache.replace(keys_bksh=keys, values_bksh=values,
                          length_b=cache.length_b + tokens_bt.shape[1])
    final_btd = self.decoder_norm(x_btd)
    return structs.TargetOutput(logits_btv=self.logits(final_btd),
                                features={'final_btd': final_btd}, cache=cache)

  def supervise(self, batch: structs.Batch, *, first: int = 0,
                dropout_key=None) -> structs.Supervision:
    """The encoder reads the prompts, the decoder writes the completions; prompts carry no loss.

    `first` promises prompts of more than `first` tokens: completions are that much shorter.
    """
    width = batch.tokens_bt.shape[1]
    widths = batch.widths or structs.Widths(width, width)
    longest = max(1, min(widths.completion, width - first - 1))
    index_bt = batch.prompt_lengths_b[:, None] + jnp.arange(longest)[None]
    take = lambda x_bt: jnp.take_along_axis(x_bt, jnp.minimum(index_bt, width - 1), axis=1)
    labels_bt = take(batch.tokens_bt)
    mask_bt = jnp.where(index_bt < width, take(batch.loss_mask_bt), 0).astype(jnp.float32)
    fed_bt = jnp.pad(labels_bt, ((0, 0), (1, 0)), constant_values=START_ID)[:, :-1]
    keys = t5_layers.split_key(dropout_key, 2)
    encoded = self.encode(batch.tokens_bt[:, :min(widths.prompt, width)],
                          batch.prompt_lengths_b, dropout_key=keys[0])
    return structs.Supervision(self.decode(fed_bt, *encoded, dropout_key=keys[1]), labels_bt,
                               mask_bt)

  def encode(self, prompts_bs, prompt_lengths_b, *, dropout_key=None):
    """The encoder's features `[b, s, d]`, and which of them hold a token, bool `[b, s]`."""
    c = self.config
    slot_s = jnp.arange(prompts_bs.shape[1])
    mask_bs = slot_s[None] < prompt_lengths_b[:, None]
    bias_bnts = t5_layers.relative_bias(
        self.encoder_bias_rn[...], (slot_s[None] - slot_s[:, None])[None], bidirectional=True,
        max_distance=c.relative_max_distance)
    keys = t5_layers.split_key(dropout_key, 2)

    def body(x_bsd, scanned):
      block, key = scanned
      return block(x_bsd, mask_bs[:, None], bias_bnts, key), None

    x_bsd = self._embed(prompts_bs, keys[0])
    by_layer = None if dropout_key is None else jax.random.split(keys[1], c.num_encoder_layers)
    body = layers.rematerialised(body, c.remat)
    x_bsd = jax.lax.scan(body, x_bsd, (self.encoder_layers, by_layer))[0]
    return self.encoder_norm(x_bsd), mask_bs

  def decode(self, tokens_bt, encoded_bsd, prompt_mask_bs, *, dropout_key=None):
    """The decoder's features over whole completions, `[b, t, d]`; no cache (training)."""
    c = self.config
    position_t = jnp.arange(tokens_bt.shape[1])
    mask_bts = (position_t[None] <= position_t[:, None])[None]
    bias_bnts = self._decoder_bias(position_t[None], position_t[None])
    keys = t5_layers.split_key(dropout_key, 2)

    def body(x_btd, scanned):
      block, key = scanned
      prompt = t5_layers.heads_first(block.cross.read(encoded_bsd))
      return block(x_btd, mask_bts, bias_bnts, prompt, prompt_mask_bs[:, None],
                   dropout_key=key)

    x_btd = self._embed(tokens_bt, keys[0])
    by_layer = None if dropout_key is None else jax.random.split(keys[1], c.num_decoder_layers)
    if isinstance(self.decoder_layers, t5_layers.DecoderBlock):
      body = layers.rematerialised(body, c.remat)
      x_btd = jax.lax.scan(body, x_btd, (self.decoder_layers, by_layer))[0]
    else:
      for index, block in enumerate(self.decoder_layers):
        x_btd = body(x_btd, (block, by_layer if by_layer is None else by_layer[index]))[0]
    return self.decoder_norm(x_btd)

  def logits(self, final_btd):
    """Next-token logits in float32 from the features that the decoder's last norm put out."""
    final_btd = row_sharding.for_head(final_btd)
    if self.head_vd is not None:
      logits = layers.linear(final_btd, self.head_vd[...], result_dtype=jnp.float32)
    else:
      logits = self.config.width ** -0.5 * layers.linear(
          final_btd, self.embedding_vd[...], result_dtype=jnp.float32)
    return sharding.constrain(logits, 'btv')

  def _embed(self, tokens_bt, dropout_key=None):
    x_btd = self.embedding_vd[...][tokens_bt].astype(jnp.dtype(self.config.dtype))
    return layers.dropout(sharding.constrain(x_btd, 'btd'), self.config.dropout, dropout_key)

  def _decoder_bias(self, positions_bt, slot_positions_bs):
    distance_bts = slot_positions_bs[:, None] - positions_bt[:, :, None]
    return t5_layers.relative_bias(
        self.decoder_bias_rn[...], distance_bts, bidirectional=False,
        max_distance=self.config.relative_max_distance)

  def init_cache(self, batch: int, num_slots: int, memory: Memory) -> cache_lib.KVCache:
    c = self.config
    return cache_lib.init_cache(c.num_decoder_layers, batch, num_slots, c.num_heads, c.head_dim,
                                jnp.dtype(c.dtype), memory)

  def unstacked(self, *, release: bool = False) -> 'T5':
    """The same model with one module a decoder layer; itself when it is unrolled already.

    The encoder runs once a prompt, outside of every loop: it stays scanned. `release` as in
    `layers.unstacked`.
    """
    if not isinstance(self.decoder_layers, t5_layers.DecoderBlock):
      return self
    unrolled = copy.copy(self)
    unrolled.decoder_layers = nnx.List(layers.unstacked(
        self.decoder_layers, self.config.num_decoder_layers, release=release))
    return unrolled

  def _check_unrolled(self):
    if isinstance(self.decoder_layers, t5_layers.DecoderBlock):
      raise ValueError('a cache needs unrolled layers: call T5.unstacked() first')


def init(config: T5Config, key: jax.Array) -> T5:
  """A freshly initialised T5; trace it under `sharding.sharded_init` to lay it out."""
  # XLA's own generator, as in decoder.init: it compiles in a fifth of the time.
  generator = jax.random.key(jax.random.bits(key, dtype=jnp.uint32), impl='rbg')
  return T5(config, rngs=nnx.Rngs(params=generator))
