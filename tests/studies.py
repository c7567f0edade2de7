"""A study of a few seconds: token rows of a noisy cycle, tiny models, no vocabulary file."""

import pathlib

import ml_collections
import numpy as np

from configs import common
from specdistill_jax import structs
from specdistill_jax.data import records
from specdistill_jax.data import shards

VOCAB_SIZE = 16
MAX_LENGTH = 12
PROMPT_LENGTH = 3


def rows(count: int, seed: int) -> list[records.Row]:
  """Ragged rows that count up modulo the vocabulary, with noise; each ends in an end token."""
  rng = np.random.default_rng(seed)
  made = []
  for index in range(count):
    length = int(rng.integers(PROMPT_LENGTH + 2, MAX_LENGTH + 1))
    steps = rng.choice([1, 2], size=length, p=[0.8, 0.2])
    tokens = 2 + np.cumsum(steps) % (VOCAB_SIZE - 2)
    tokens[-1] = structs.EOS_ID
    mask = np.arange(length) >= PROMPT_LENGTH
    made.append(records.Row(tokens.astype(np.int32), PROMPT_LENGTH, mask.astype(np.uint8),
                            '', f'{seed}-{index}'))
  return made


def write_data(workdir: pathlib.Path) -> None:
  metadata = dict(vocab_size=VOCAB_SIZE, vocabulary_digest='none', max_length=MAX_LENGTH,
                  source='fixed', task='cycle', metric=None)
  shards.write(workdir / 'data', 'train', rows(64, 0), metadata)
  shards.write(workdir / 'data', 'validation', rows(16, 1), metadata)


def config(**train) -> ml_collections.ConfigDict:
  """Two tiny models; `train` overrides fields of all three `train` sections."""
  study = common.study('tiny')
  study.task.max_length, study.task.prompt_length = MAX_LENGTH, PROMPT_LENGTH
  model = dict(num_layers=2, width=16, num_heads=2, num_kv_heads=2, head_dim=8, mlp_width=32,
               tie_embeddings=True, dtype='float32')
  study.target.model.update(model)
  study.draft.model.update(model | dict(num_layers=1, width=8, num_heads=1, num_kv_heads=1))
  settings = dict(steps=6, batch_size=8, warmup_steps=1, learning_rate=1e-2, log_every=1,
                  eval_every=3, checkpoint_every=2) | train
  for section in (study.target, study.draft, study.distill):
    section.train.update(settings)
  study.distill.rollout.max_new_tokens = 6
  study.distill.seeds = (0,)
  return study
