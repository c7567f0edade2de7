"""T5 of Hugging Face: the same logits and text as `transformers`, in and out again."""

import os

os.environ.setdefault('HF_HUB_OFFLINE', '1')

import jax
import numpy as np
import pytest

from specdistill_jax import api
from specdistill_jax.checkpoints import hf
from specdistill_jax.checkpoints import key_tables
from specdistill_jax.checkpoints import pretrained
from specdistill_jax.models import t5_layers
import hub
import test_hf_tokenizers

LENGTHS_B = np.array([9, 4, 7])
PROMPTS_BT = np.random.default_rng(0).integers(2, hub.VOCAB, (3, 9))
FED_BT = np.concatenate([np.zeros((3, 1), int), np.random.default_rng(1).integers(
    2, hub.VOCAB, (3, 5))], axis=1)
SLOTS, NEW = 10, 8
KINDS = {
    'ungated, tied': ('T5', dict(feed_forward_proj='relu')),
    'gated, untied': ('T5', dict(feed_forward_proj='gated-gelu', tie_word_embeddings=False)),
    'mt5': ('MT5', dict(feed_forward_proj='gated-gelu')),
}


# Jitted here, so that kinds of one config share a compilation.
_full = jax.jit(lambda module, prompts, lengths, fed: module.logits(
    module.decode(fed, *module.encode(prompts, lengths))))
_memory = jax.jit(lambda module, prompts, lengths: module.start(prompts, lengths).memory)


def build(kind, **more):
  name, fields = KINDS[kind]
  hub.torch.manual_seed(0)
  config = getattr(hub.transformers, f'{name}Config')(**dict(
      vocab_size=hub.VOCAB, d_model=30, d_kv=10, d_ff=52, num_layers=2, num_decoder_layers=3,
      num_heads=3, relative_attention_num_buckets=8, relative_attention_max_distance=9,
      decoder_start_token_id=0, dropout_rate=0.0, eos_token_id=1, pad_token_id=0) | fields | more)
  model = getattr(hub.transformers, f'{name}ForConditionalGeneration')(config).eval()
  if kind != 'ungated, tied':  # transformers ties heads that published checkpoints do not tie
    model.lm_head.weight = hub.torch.nn.Parameter(
        0.3 * hub.torch.randn_like(model.lm_head.weight), requires_grad=False)
  with hub.torch.no_grad():
    for parameter in model.parameters():
      parameter.add_(0.1 * hub.torch.randn_like(parameter))
  return model


def logits(model):
  mask = hub.torch.tensor(np.arange(9) < LENGTHS_B[:, None]).long()
  with hub.torch.inference_mode():
    return model(input_ids=hub.torch.tensor(PROMPTS_BT), attention_mask=mask,
                 decoder_input_ids=hub.torch.tensor(FED_BT)).logits.numpy()


def greedy(model, prompt):
  with hub.torch.inference_mode():
    out = model.generate(hub.torch.tensor([prompt]), do_sample=False, num_beams=1,
                         # Its cache has as many layers as the encoder.
                         use_cache=False, max_new_tokens=NEW)[0, 1:].tolist()
  return out + [0] * (NEW - len(out))


@pytest.mark.parametrize('kind', KINDS)
def test_logits_and_greedy_text_are_those_of_transformers(kind, tmp_path):
  reference = build(kind)
  reference.save_pretrained(tmp_path / 'in')
  model = pretrained.load(tmp_path / 'in')
  assert model.config.tie_embeddings == (kind == 'ungated, tied')
  wanted = logits(reference)
  np.testing.assert_allclose(_full(model.module, PROMPTS_BT, LENGTHS_B, FED_BT), wanted,
                             atol=1e-4)
  unrolled = model.module.unstacked()
  memory = _memory(unrolled, PROMPTS_BT, LENGTHS_B)
  found = hub.blockwise_logits(unrolled, unrolled.init_cache(3, SLOTS, memory), FED_BT,
                               np.full(3, FED_BT.shape[1]), block=4, slots=SLOTS)
  np.testing.assert_allclose(found, wanted, atol=1e-4)
  prompts = [row[:n].tolist() for row, n in zip(PROMPTS_BT, LENGTHS_B)]
  found = api.generate(model, prompts, max_new_tokens=NEW, temperature=0.0, key=jax.random.key(0))
  assert found.tokens.tolist() == [greedy(reference, prompt) for prompt in prompts]

  hf.save(model, tmp_path / 'out')
  again = type(reference).from_pretrained(tmp_path / 'out').eval()
  np.testing.assert_array_equal(logits(again), wanted)
  back = pretrained.load(tmp_path / 'out')
  assert back.config == model.config
  first, second = (key_tables.by_path(m.module) for m in (model, back))
  for name, leaf in first.items():
    np.testing.assert_array_equal(leaf, second[name], err_msg=name)


@pytest.mark.parametrize('bidirectional', [True, False])
def test_buckets_of_distances_are_those_of_transformers(bidirectional):
  """At the published sizes, whose boundaries the short prompts above never reach."""
  attention = hub.transformers.models.t5.modeling_t5.T5Attention
  distance = np.arange(-300, 301)
  wanted = attention._relative_position_bucket(  # pylint: disable=protected-access
      hub.torch.tensor(distance), bidirectional=bidirectional, num_buckets=32, max_distance=128)
  found = t5_layers.relative_bias(
      np.arange(32)[:, None], distance[None, None], bidirectional=bidirectional,
      max_distance=128)
  np.testing.assert_array_equal(found[0, 0, 0], wanted)


def test_text_prompts_are_read_as_transformers_reads_them(tmp_path):
  """The encoder's prompt ends in an end token; what follows from ids is tested above."""
  test_hf_tokenizers.write_sentencepiece(tmp_path, 'spiece.model', 34, pad_id=0, eos_id=1,
                                         unk_id=2, bos_id=-1)
  build('gated, untied', vocab_size=140).save_pretrained(tmp_path)
  tokenizer = hub.transformers.T5Tokenizer.from_pretrained(tmp_path)
  prompts = ['The old hen', 'The quick fox jumps\n']
  found_bt, lengths_b = api.pad_prompts(pretrained.load(tmp_path), prompts, max_new_tokens=NEW)
  ids = [row[:length].tolist() for row, length in zip(found_bt, lengths_b)]
  assert ids == tokenizer(prompts)['input_ids'] and all(row[-1] == 1 for row in ids)
