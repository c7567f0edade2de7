"""Published models as tables of sizes: `config('qwen3-0.6b')`.

Shapes and constants are those of the base checkpoints' own `config.json`. The vocabulary counts the
rows of the embedding, padding included; end tokens are the project's, since an import takes its
own from its files.
"""

from collections.abc import Mapping
import dataclasses
import math
from typing import Any

from specdistill_jax.models import decoder
from specdistill_jax.models import t5

_DECODER_COLUMNS = ('num_layers', 'width', 'num_heads', 'num_kv_heads', 'head_dim', 'mlp_width')
_T5_COLUMNS = ('num_encoder_layers', 'num_decoder_layers', 'width', 'num_heads', 'head_dim',
               'mlp_width')

# What all sizes of a line of models share; then its sizes, with what differs.
_LLAMA2 = dict(vocab_size=32_000, norm_eps=1e-5, tie_embeddings=False)
_LLAMA2_SIZES = {
    '7b': (32, 4096, 32, 32, 128, 11_008),
    '13b': (40, 5120, 40, 40, 128, 13_824),
    '70b': (80, 8192, 64, 8, 128, 28_672),
}
# Vicuna 1.5 is made of Llama 2, the 33B of version 1.3 of the first LLaMA.
_VICUNA_SIZES = {
    '7b': _LLAMA2_SIZES['7b'],
    '13b': _LLAMA2_SIZES['13b'],
    '33b': (60, 6656, 52, 52, 128, 17_920, dict(norm_eps=1e-6)),
}
_LLAMA3 = dict(vocab_size=128_256, norm_eps=1e-5, rope_theta=500_000.0, tie_embeddings=False)
_LLAMA3_SIZES = {
    '8b': (32, 4096, 32, 8, 128, 14_336),
    '70b': (80, 8192, 64, 8, 128, 28_672),
}
_LLAMA3_1 = _LLAMA3 | dict(rope_scaling='llama3', rope_factor=8.0)
_LLAMA3_2 = _LLAMA3 | dict(rope_scaling='llama3', rope_factor=32.0, tie_embeddings=True)
_LLAMA3_2_SIZES = {
    '1b': (16, 2048, 32, 8, 64, 8192),
    '3b': (28, 3072, 24, 8, 128, 8192),
}
_QWEN2_5 = dict(vocab_size=152_064, rope_theta=1e6, attention_bias=True, tie_embeddings=False)
_SMALL_QWEN2_5 = dict(vocab_size=151_936, tie_embeddings=True)
_QWEN2_5_SIZES = {
    '0.5b': (24, 896, 14, 2, 64, 4864, _SMALL_QWEN2_5),
    '1.5b': (28, 1536, 12, 2, 128, 8960, _SMALL_QWEN2_5),
    '3b': (36, 2048, 16, 2, 128, 11_008, _SMALL_QWEN2_5),
    '7b': (28, 3584, 28, 4, 128, 18_944),
    '14b': (48, 5120, 40, 8, 128, 13_824, dict(norm_eps=1e-5)),
    '32b': (64, 5120, 40, 8, 128, 27_648, dict(norm_eps=1e-5)),
}
_QWEN3 = dict(vocab_size=151_936, rope_theta=1e6, qk_norm=True, tie_embeddings=False)
_TIED = dict(tie_embeddings=True)
_QWEN3_SIZES = {
    '0.6b': (28, 1024, 16, 8, 128, 3072, _TIED),
    '1.7b': (28, 2048, 16, 8, 128, 6144, _TIED),
    '4b': (36, 2560, 32, 8, 128, 9728, _TIED),
    '8b': (36, 4096, 32, 8, 128, 12_288),
    '14b': (40, 5120, 40, 8, 128, 17_408),
    '32b': (64, 5120, 64, 8, 128, 25_600),
}
_GEMMA = dict(norm_offset=1.0, post_norms=True, activation='gelu_tanh', tie_embeddings=True)
_GEMMA2 = _GEMMA | dict(vocab_size=256_000, attention_softcap=50.0, logit_softcap=30.0,
                        sliding_window=4096, global_every=2)
_GEMMA2_SIZES = {
    '2b': (26, 2304, 8, 4, 256, 9216),
    '9b': (42, 3584, 16, 8, 256, 14_336),
    '27b': (46, 4608, 32, 16, 128, 36_864, dict(query_scale=144 ** -0.5)),
}
# Text models; five local layers to a global one.
_GEMMA3 = _GEMMA | dict(vocab_size=262_208, qk_norm=True, rope_theta=1e6, rope_local_theta=1e4,
                        rope_scaling='linear', rope_factor=8.0, sliding_window=1024,
                        global_every=6)
_GEMMA3_SIZES = {
    '1b': (26, 1152, 4, 1, 256, 6912,
           dict(vocab_size=262_144, rope_scaling='none', rope_factor=1.0, sliding_window=512)),
    '4b': (34, 2560, 8, 4, 256, 10_240),
    '12b': (48, 3840, 16, 8, 256, 15_360),
    '27b': (62, 5376, 32, 16, 128, 21_504, dict(query_scale=168 ** -0.5)),
}
# DistillSpec (arXiv 2310.08461) gives the totals of its LM1B pair and nothing else: these
# shapes are guesses that meet them, of a GPT-like decoder with a vocabulary of 32,000.
_LM1B = dict(vocab_size=32_000, norm='layer', gated_mlp=False, activation='gelu')
_LM1B_SIZES = {
    '234m': (16, 1024, 16, 16, 64, 4096),
    '33m': (8, 512, 8, 8, 64, 1024),
}

_T5_V1_0 = dict(vocab_size=32_128, gated_mlp=False, tie_embeddings=True)
_T5_V1_0_SIZES = {
    'small': (6, 6, 512, 8, 64, 2048),
    'base': (12, 12, 768, 12, 64, 3072),
    'large': (24, 24, 1024, 16, 64, 4096),
    '3b': (24, 24, 1024, 32, 128, 16_384),
    '11b': (24, 24, 1024, 128, 128, 65_536),
}
_T5_V1_1 = dict(vocab_size=32_128)
_T5_V1_1_SIZES = {
    'small': (8, 8, 512, 6, 64, 1024),
    'base': (12, 12, 768, 12, 64, 2048),
    'large': (24, 24, 1024, 16, 64, 2816),
    'xl': (24, 24, 2048, 32, 64, 5120),
    'xxl': (24, 24, 4096, 64, 64, 10_240),
}
_MT5 = dict(vocab_size=250_112)

# Line of models -> its config's class and columns, what its sizes share, its sizes.
_DECODER, _T5 = (decoder.DecoderConfig, _DECODER_COLUMNS), (t5.T5Config, _T5_COLUMNS)
_LINES = {
    'llama-2': (_DECODER, _LLAMA2, _LLAMA2_SIZES),
    'llama-3': (_DECODER, _LLAMA3, _LLAMA3_SIZES),
    'llama-3.1': (_DECODER, _LLAMA3_1, _LLAMA3_SIZES),
    'llama-3.2': (_DECODER, _LLAMA3_2, _LLAMA3_2_SIZES),
    'vicuna': (_DECODER, _LLAMA2, _VICUNA_SIZES),
    'qwen2.5': (_DECODER, _QWEN2_5, _QWEN2_5_SIZES),
    'qwen3': (_DECODER, _QWEN3, _QWEN3_SIZES),
    'gemma-2': (_DECODER, _GEMMA2, _GEMMA2_SIZES),
    'gemma-3': (_DECODER, _GEMMA3, _GEMMA3_SIZES),
    'lm1b': (_DECODER, _LM1B, _LM1B_SIZES),
    't5': (_T5, _T5_V1_0, _T5_V1_0_SIZES),
    't5-v1.1': (_T5, _T5_V1_1, _T5_V1_1_SIZES),
    'flan-t5': (_T5, _T5_V1_1, _T5_V1_1_SIZES),
    'mt5': (_T5, _MT5, _T5_V1_1_SIZES),
}


def names() -> list[str]:
  """Every name that `config` knows."""
  return [f'{line}-{size}' for line, (_, _, sizes) in _LINES.items() for size in sizes]


def config(name: str, **overrides: Any) -> Any:
  """The config of a published model, with `overrides` of its fields.

  Raises:
    ValueError: a name that is not in `names()`.
  """
  if name not in names():
    raise ValueError(f'there is no model {name!r}; there are {", ".join(names())}')
  line, _, size = name.rpartition('-')
  (cls, columns), shared, sizes = _LINES[line]
  *shape, extra = _with_extra(sizes[size], len(columns))
  built = cls(**{**shared, **dict(zip(columns, shape, strict=True)), **extra})
  if line.startswith('gemma'):
    built = dataclasses.replace(built, embedding_scale=math.sqrt(built.width))
  return dataclasses.replace(built, **overrides)


def _with_extra(row: tuple[Any, ...], columns: int) -> tuple[Any, ...]:
  """A size's row always ends in a mapping: what it has beside its shape."""
  return row if len(row) > columns and isinstance(row[-1], Mapping) else (*row, {})
