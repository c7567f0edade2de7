"""Tiny models of `transformers`, random in every parameter, as directories on disk."""

import atexit
import functools
import pathlib
import shutil
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specdistill_jax.decoding import state as state_lib

torch = pytest.importorskip('torch', reason='torch is the reference of these tests')
transformers = pytest.importorskip('transformers', reason='transformers is their reference')

VOCAB = 67
_COMMON = dict(vocab_size=VOCAB, hidden_size=30, num_hidden_layers=2, num_attention_heads=6,
               num_key_value_heads=2, head_dim=10, intermediate_size=52,
               max_position_embeddings=128, tie_word_embeddings=False,
               bos_token_id=None, eos_token_id=None, pad_token_id=None)
_ROPE = dict(rope_type='default', rope_theta=500.0)
_LLAMA3 = dict(rope_type='llama3', rope_theta=100.0, factor=4.0, low_freq_factor=1.0,
               high_freq_factor=4.0, original_max_position_embeddings=32)
_LINEAR = dict(rope_type='linear', rope_theta=500.0, factor=2.0)
# Family -> its class and the fields of its config. Each line differs in what the others lack.
FAMILIES = {
    'llama': ('Llama', dict(rope_parameters=_ROPE)),  # Vicuna too
    'llama3_tied': ('Llama', dict(rope_parameters=_LLAMA3, tie_word_embeddings=True)),
    'llama_biases': ('Llama', dict(attention_bias=True, rope_parameters=_LINEAR)),
    'mistral': ('Mistral', dict(sliding_window=5, rope_parameters=_ROPE)),
    'qwen2': ('Qwen2', dict(rope_parameters=_ROPE, tie_word_embeddings=True)),
    'qwen3': ('Qwen3', dict(rope_parameters=_ROPE)),
    'gemma': ('Gemma', dict(rope_parameters=_ROPE, tie_word_embeddings=True)),
    'gemma2': ('Gemma2', dict(
        rope_parameters=_ROPE, sliding_window=5, query_pre_attn_scalar=7,
        attn_logit_softcapping=3.0, final_logit_softcapping=4.0, tie_word_embeddings=True)),
    'gemma3_text': ('Gemma3', dict(
        rope_parameters=dict(full_attention=_LINEAR,
                             sliding_attention=dict(rope_type='default', rope_theta=50.0)),
        layer_types=['sliding_attention', 'sliding_attention', 'full_attention'],
        num_hidden_layers=3, sliding_window=5, query_pre_attn_scalar=7,
        tie_word_embeddings=True)),
    'gpt2': ('GPT2', dict()),
}
_GPT2 = dict(vocab_size=VOCAB, n_embd=30, n_head=3, n_layer=2, n_inner=52, n_positions=64,
             bos_token_id=None, eos_token_id=None)


def build(family: str, seed: int = 0, **fields):
  """A model in evaluation mode; every parameter is random, norms and biases too."""
  name, own = FAMILIES[family]
  config = getattr(transformers, name + {'Gemma3': 'TextConfig'}.get(name, 'Config'))
  head = getattr(transformers, name + ('LMHeadModel' if name == 'GPT2' else 'ForCausalLM'))
  torch.manual_seed(seed)
  model = head(config(**((_GPT2 if name == 'GPT2' else _COMMON) | own | fields),
                      attn_implementation='eager')).eval()
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.add_(0.25 * torch.randn_like(parameter))
  return model


@functools.cache
def saved(family: str) -> tuple[object, pathlib.Path]:
  """A model and the directory that it was saved to; shared, so never to be changed."""
  model = build(family)
  directory = pathlib.Path(tempfile.mkdtemp(prefix=f'hub-{family}-'))
  atexit.register(shutil.rmtree, directory)
  model.save_pretrained(directory)
  return model, directory


def logits(model, tokens_bt: np.ndarray, lengths_b: np.ndarray) -> np.ndarray:
  """Of right-padded rows; what stands past a row's length means nothing."""
  mask_bt = np.arange(tokens_bt.shape[1]) < lengths_b[:, None]
  with torch.inference_mode():
    return model(torch.tensor(tokens_bt), attention_mask=torch.tensor(mask_bt).long()
                 ).logits.float().numpy()


@functools.partial(jax.jit, static_argnums=3)
def _feed(module, tokens_bt, cache, slots):
  positions = state_lib.block_positions(cache.length_b, tokens_bt.shape[1], slots)
  return module(tokens_bt, *positions, cache)


def blockwise_logits(module, cache, tokens_bt: np.ndarray, lengths_b: np.ndarray, *,
                     block: int, slots: int) -> np.ndarray:
  """Our logits, `block` tokens a call through the cache; 0 past a row's length.

  Row i keeps `block - i` tokens of each call and rolls the others back: rows are never in step.
  """
  rows, width = tokens_bt.shape
  found = np.zeros((rows, width, module.config.vocab_size), np.float32)
  while ((before_b := np.asarray(cache.length_b)) < lengths_b).any():
    index_bt = np.minimum(before_b[:, None] + np.arange(block), width - 1)
    output = _feed(module, np.take_along_axis(tokens_bt, index_bt, 1), cache, slots)
    kept_b = np.minimum(block - np.arange(rows), lengths_b - before_b)
    for row, (start, kept) in enumerate(zip(before_b, kept_b)):
      found[row, start:start + kept] = output.logits_btv[row, :kept]
    cache = output.cache.rollback(jnp.asarray(before_b + kept_b))
  return found


def greedy(model, prompt: list[int], max_new_tokens: int, **settings) -> list[int]:
  """The new tokens of `transformers.generate`, of one row, so without any padding."""
  with torch.inference_mode():
    out = model.generate(torch.tensor([prompt]), do_sample=False, num_beams=1,
                         attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                         max_new_tokens=max_new_tokens, pad_token_id=0, **settings)
  return out[0, len(prompt):].tolist()
