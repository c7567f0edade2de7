"""The tables of sizes give the published parameter counts; nothing is allocated."""

import jax
import pytest

from specdistill_jax.models import families
from specdistill_jax.models import variants

# Parameters of the published checkpoints, tied embeddings counted once, text part only.
PUBLISHED = {
    't5-small': 60_506_624,
    't5-base': 222_903_552,
    't5-large': 737_668_096,
    't5-3b': 2_851_598_336,
    't5-11b': 11_307_321_344,
    't5-v1.1-small': 76_961_152,
    't5-v1.1-base': 247_577_856,
    't5-v1.1-large': 783_150_080,
    't5-v1.1-xl': 2_849_757_184,
    't5-v1.1-xxl': 11_135_332_352,
    'mt5-small': 300_176_768,
    'mt5-base': 582_401_280,
    'mt5-large': 1_229_581_312,
    'mt5-xl': 3_742_619_648,
    'mt5-xxl': 12_921_057_280,
    'llama-2-7b': 6_738_415_616,
    'llama-2-13b': 13_015_864_320,
    'llama-2-70b': 68_976_648_192,
    'vicuna-7b': 6_738_415_616,
    'vicuna-13b': 13_015_864_320,
    'vicuna-33b': 32_528_943_616,
    'llama-3-8b': 8_030_261_248,
    'llama-3-70b': 70_553_706_496,
    'llama-3.1-8b': 8_030_261_248,
    'llama-3.1-70b': 70_553_706_496,
    'llama-3.2-1b': 1_235_814_400,
    'llama-3.2-3b': 3_212_749_824,
    'qwen2.5-0.5b': 494_032_768,
    'qwen2.5-1.5b': 1_543_714_304,
    'qwen2.5-3b': 3_085_938_688,
    'qwen2.5-7b': 7_615_616_512,
    'qwen2.5-14b': 14_770_033_664,
    'qwen2.5-32b': 32_763_876_352,
    'qwen3-0.6b': 596_049_920,
    'qwen3-1.7b': 1_720_574_976,
    'qwen3-4b': 4_022_468_096,
    'qwen3-8b': 8_190_735_360,
    'qwen3-14b': 14_768_307_200,
    'qwen3-32b': 32_762_123_264,
    'gemma-2-2b': 2_614_341_888,
    'gemma-2-9b': 9_241_705_984,
    'gemma-2-27b': 27_227_128_320,
    'gemma-3-1b': 999_885_952,
    'gemma-3-4b': 3_880_263_168,
    'gemma-3-12b': 11_766_034_176,
    'gemma-3-27b': 27_009_346_304,
}


def count(config) -> int:
  abstract = jax.eval_shape(lambda: families.init(config, jax.random.key(0)))
  return sum(leaf.size for leaf in jax.tree.leaves(abstract))


@pytest.mark.parametrize('name', PUBLISHED)
def test_parameters_are_the_published_ones(name):
  assert count(variants.config(name)) == PUBLISHED[name]


def test_every_variant_is_checked():
  """FLAN-T5 has the shapes of T5 v1.1; of the LM1B pair only rounded totals are published."""
  unchecked = {name for name in variants.names() if name not in PUBLISHED}
  assert unchecked == {'lm1b-234m', 'lm1b-33m'} | {
      f'flan-t5-{size}' for size in ('small', 'base', 'large', 'xl', 'xxl')}
  assert variants.config('flan-t5-xl') == variants.config('t5-v1.1-xl')
  assert count(variants.config('lm1b-234m')) == pytest.approx(234e6, rel=0.01)
  assert count(variants.config('lm1b-33m')) == pytest.approx(33e6, rel=0.01)


@pytest.mark.parametrize('name, global_layers', [
    ('gemma-2-2b', [1, 3, 5, 7, 9, 11]), ('gemma-3-1b', [5, 11])])
def test_local_layers_are_those_of_gemma(name, global_layers):
  """Gemma 2 begins with a local layer and alternates; Gemma 3 has five local ones to a global."""
  config = variants.config(name)
  found = [index for index in range(12) if (index + 1) % config.global_every == 0]
  assert found == global_layers and config.sliding_window in (4096, 512)


def test_overrides_and_unknown_names():
  config = variants.config('gemma-3-4b', vocab_size=1000, dtype='float32')
  assert (config.vocab_size, config.dtype, config.embedding_scale) == (1000, 'float32', 2560**.5)
  with pytest.raises(ValueError, match="no model 'qwen4-8b'; there are llama-2-7b, "):
    variants.config('qwen4-8b')
