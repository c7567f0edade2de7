"""A model's own continuations of the training prompts, stored as shards under `data/<source>/`.

They are sampled on all devices and written part by part, so that a run that is stopped or killed
goes on after the last whole part.
"""

from collections.abc import Iterator, Sequence
import functools
import itertools
import pathlib
import time
from typing import Any

import jax
from jax.sharding import Mesh
import ml_collections
import numpy as np

from specdistill_jax import processes
from specdistill_jax import sharding
from specdistill_jax import storage
from specdistill_jax import structs
from specdistill_jax.data import records
from specdistill_jax.data import shards
from specdistill_jax.decoding import sampling as sampling_lib
from specdistill_jax.models import base
from specdistill_jax.stages import workdirs
from specdistill_jax.training import rollouts

BATCHES_A_PART = 32

_generate = jax.jit(rollouts.generate, static_argnames='rollout')


def rollout(config: ml_collections.ConfigDict, data: pathlib.Path, *,
            student_fraction: float = 1.0) -> rollouts.Rollout:
  """How continuations of the prompts in `data` are sampled."""
  settings, metadata = config.distill.rollout, shards.read_metadata(data, 'train')
  return rollouts.Rollout(
      sampling=sampling_lib.Sampling(settings.temperature, settings.top_k, settings.top_p),
      max_new_tokens=settings.max_new_tokens, prompt_width=metadata['longest_prompt'],
      shortest_prompt=metadata['shortest_prompt'], student_fraction=student_fraction)


def stored(config: ml_collections.ConfigDict, workdir: pathlib.Path, mesh: Mesh, source: str,
           model: base.Model) -> pathlib.Path:
  """Continuations of training prompts by `model`: made once, and of them only what is missing.

  Args:
    mesh: of training; `distill.rollout.tensor` regroups its devices for sampling.
    source: whose they are, 'target' or 'draft'.

  Returns:
    The folder of the shards.

  Raises:
    ValueError: samples with other settings are there.
  """
  data, directory = workdir / 'data', workdir / 'data' / source
  how, settings = rollout(config, data), config.distill.train
  # One epoch of prompts, or as many as the training will read.
  count = min(len(shards.rows(data, 'train')), settings.steps * settings.batch_size)
  described = _described(config, data, source, how, count)
  if processes.agree('samples', lambda: _is_there(directory, 'train', described)):
    return directory
  parts, size = data / f'{source}-parts', BATCHES_A_PART * settings.batch_size
  pieces = {f'part-{begin // size:05d}': range(begin, min(begin + size, count))
            for begin in range(0, count, size)}
  done = processes.agree('parts of samples', lambda: sum(1 for _ in itertools.takewhile(
      lambda name: _is_there(parts, name, described), pieces)))
  sample = _sampler(config, data, mesh, model, how) if done < len(pieces) else None
  started, before = time.monotonic(), done * size
  for name in list(pieces)[done:]:
    rows = list(sample(pieces[name]))  # all processes share the work; process 0 writes
    workdirs.check_alone_together(workdir, 'distill')
    if processes.is_first():
      shards.write(parts, name, rows, described)
    made = pieces[name].stop
    rate = (made - before) / (time.monotonic() - started)
    processes.say(f'  {made:,} of {count:,} continuations of the {source}, {rate:.3g} a second, '
                  f'{(count - made) / rate / 60:.3g} minutes left')
  workdirs.check_alone_together(workdir, 'distill')
  if processes.is_first():
    shards.write(directory, 'train', itertools.chain.from_iterable(
        map(functools.partial(shards.rows, parts), pieces)), described)
    storage.remove(parts)
  processes.meet('samples are written')
  return directory


def _described(config, data, source, how, count) -> dict[str, Any]:
  metadata, asked = shards.read_metadata(data, 'train'), config.distill.rollout.to_dict()
  asked.pop('tensor')  # where they are sampled changes nothing
  return dict(
      vocab_size=metadata['vocab_size'], vocabulary_digest=metadata['vocabulary_digest'],
      task=metadata.get('task'), metric=metadata.get('metric'), max_length=how.width,
      source=source, seed=config.seed, num_prompts=count, **asked)


def _is_there(directory, split, described) -> bool:
  if not shards.exists(directory, split):
    return False
  found = shards.read_metadata(directory, split)
  for name, value in described.items():
    if found.get(name) != value:
      raise ValueError(f'{directory} holds samples with {name} {found.get(name)!r}, and this '
                       f'study asks for {value!r}; use another workdir')
  return True


def _sampler(config, data, mesh, model, how):
  """A function: places of prompts -> their continuations, in order; all processes call it."""
  prompts, size = shards.rows(data, 'train'), config.distill.train.batch_size
  key, tensor = jax.random.key(config.seed), config.distill.rollout.tensor or None
  mesh = sharding.regrouped(mesh, tensor)
  module = model.module if tensor is None else sharding.laid_out(model.module, mesh)

  def rows(places: Sequence[int]) -> Iterator[records.Row]:
    for begin in range(places.start, places.stop, size):
      chosen = [prompts[place] for place in range(begin, min(begin + size, places.stop))]
      yield from _batch(module, chosen, size, jax.random.fold_in(key, begin), how, mesh)
  return rows


def _batch(module, chosen: list[records.Row], size, key, how, mesh) -> Iterator[records.Row]:
  """One batch of continuations; a last short batch is filled up, to share its compilation."""
  filled = chosen + chosen[:1] * (size - len(chosen))
  prompts_bt = np.full((size, how.prompt_width), structs.PAD_ID, np.int32)
  for index, row in enumerate(filled):
    prompts_bt[index, :row.prompt_length] = row.tokens[:row.prompt_length]
  lengths_b = np.array([row.prompt_length for row in filled], np.int32)
  batch = structs.Batch(prompts_bt, np.zeros(prompts_bt.shape, np.float32), lengths_b, lengths_b)
  with jax.set_mesh(mesh):  # caches are laid out on it
    sampled = sharding.fetch(_generate(
        module, sharding.put(batch, sharding.batch_sharding(mesh)), key, rollout=how))
  for index, source in enumerate(chosen):
    length = int(sampled.lengths_b[index])
    yield records.Row(
        sampled.tokens_bt[index, :length], source.prompt_length,
        sampled.loss_mask_bt[index, :length].astype(np.uint8), source.reference, source.document)
