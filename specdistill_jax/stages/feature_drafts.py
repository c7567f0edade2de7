"""Where a feature-level draft begins: the draft stage, which has nothing to train it on alone.

It copies the draft in `init_from`, or writes a fresh one, with the sizes of the trained target
and, for EAGLE-3, the tokens that the training data hold most often. `distill` trains every arm
from there, and `evaluate` measures it beside them as the draft before any training.
"""

import functools
import pathlib
from typing import Any

import jax
import ml_collections
import numpy as np

from specdistill_jax import processes
from specdistill_jax import sharding
from specdistill_jax.checkpoints import pretrained
from specdistill_jax.checkpoints import store
from specdistill_jax.data import shards
from specdistill_jax.drafters import eagle3
from specdistill_jax.drafters import families
from specdistill_jax.drafters import feature_config


def token_counts(data: pathlib.Path, vocab_size: int) -> np.ndarray:
  """How often each token is learnt in the training split, int64 `[v]`."""
  counts = np.zeros(vocab_size, np.int64)
  for row in shards.rows(data, 'train'):
    counts += np.bincount(row.tokens[row.loss_mask > 0], minlength=vocab_size)
  return counts


def model_config(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> Any:
  """The draft's config: the section's fields, else the target's, and the draft vocabulary."""
  target = store.load_config(workdir / 'target')
  made = families.config(config.draft.model, target)
  if made.family != 'eagle3' or made.draft_vocab_size == made.vocab_size:
    return made
  ids = eagle3.most_frequent(token_counts(workdir / 'data', made.vocab_size),
                             made.draft_vocab_size)
  return families.config(config.draft.model, target,
                         draft_vocabulary=eagle3.vocabulary_bits(ids, made.vocab_size))


def start(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
  """Writes the draft to `draft/` as step 0; does nothing where it is there already."""
  directory, source = workdir / 'draft', config.draft.init_from
  with store.Store(directory) as checkpoints:
    if checkpoints.latest_step() is not None:
      return
    mesh, layout = sharding.make_mesh(**config.mesh), config.draft.layout
    if source is None:
      made = model_config(config, workdir)
      module = sharding.sharded_init(functools.partial(families.init, made), mesh,
                                     jax.random.key(config.seed), layout=layout)
    else:
      target = store.load_config(workdir / 'target')
      model = pretrained.load(source, mesh, target=target, layout=layout, parameter_dtype=None)
      made, module = model.config, model.module
      feature_config.check_fits(made, target)
    if processes.is_first():
      store.write_model_file(directory, made, store.vocabulary_path(workdir / 'target'))
    checkpoints.save_params(0, module)
