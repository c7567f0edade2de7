"""DistillSpec: from the trained draft, one distilled draft a seed, and its control.

The control takes as many further cross-entropy steps on the fixed data, with the same batch
and schedule, so that a table never credits distillation with mere further training.
"""

import collections
import functools
import pathlib
from typing import Any

from absl import logging
import jax
from jax.sharding import Mesh
import ml_collections
import numpy as np

from specdistill_jax import api
from specdistill_jax import processes
from specdistill_jax import sharding
from specdistill_jax import structs
from specdistill_jax.checkpoints import store
from specdistill_jax.data import records
from specdistill_jax.data import shards
from specdistill_jax.decoding import sampling as sampling_lib
from specdistill_jax.losses import objectives
from specdistill_jax.losses import specs
from specdistill_jax.models import base
from specdistill_jax.stages import train
from specdistill_jax.training import rollouts

DATA_SOURCES = ('fixed', 'target', 'draft', 'draft_stored', 'fixed+draft', 'target+draft')

_generate = jax.jit(rollouts.generate, static_argnames='rollout')


def arm_names(config: ml_collections.ConfigDict) -> list[str]:
  """The arms of a study, in order: `<objective>-<data source>-seed<k>`, last of a seed control."""
  distill = config.distill
  kinds = [(spec, distill.data_source) for spec in (distill.objective, *distill.also)]
  if distill.control:
    kinds.append((objectives.CROSS_ENTROPY, 'fixed'))
  return [f'{objective}-{source}-seed{seed}'
          for seed in distill.seeds for objective, source in kinds]


def from_scratch(config: ml_collections.ConfigDict) -> bool:
  """Whether the arms begin with a draft that has learnt nothing, which is then no rival."""
  return (config.distill is not None and config.draft.init_from is None
          and not config.draft.train.steps)


def run(config: ml_collections.ConfigDict, workdir: pathlib.Path,
        fit: train.Fit = train.fit) -> None:
  """Trains every arm from `draft/`; finished arms are skipped, an interrupted one resumes.

  `fit` is what is done with each; another one looks at a step of it again.

  Raises:
    ValueError: impossible settings, or a draft and target with different vocabularies.
  """
  distill = config.distill
  if distill.data_source not in DATA_SOURCES:
    raise ValueError(f'distill.data_source is {distill.data_source!r}, and must be one of '
                     f'{", ".join(DATA_SOURCES)}')
  mesh = sharding.make_mesh(**config.mesh)
  teacher = store.load_model(workdir / 'target', mesh,
                             layout=config.target.teacher_layout or config.target.layout,
                             weights_dtype=config.target.weights_dtype)
  draft = store.load_model(workdir / 'draft', mesh, layout=config.draft.layout)
  teacher, draft = api.check_pair(teacher, draft)
  data = _data(config, workdir, mesh, teacher, draft)
  control = objectives.Objective(normalisation=distill.normalisation)
  online = distill.data_source.rpartition('+')[2] == 'draft'
  rollout = _rollout(config, workdir / 'data', online=online) if online else None

  names = iter(arm_names(config))
  for seed in distill.seeds:
    arm = functools.partial(_arm, config, workdir, seed=seed, teacher=teacher, draft=draft)
    trained = {}
    for spec in (distill.objective, *distill.also):
      trained[spec] = name = next(names)
      reference = specs.reference(spec)
      reference = reference and store.load_model(
          workdir / 'distill' / trained[reference], mesh, layout=config.draft.layout)
      fit(arm(name, objective(config, spec), data, rollout, reference=reference), config, workdir)
    if distill.control:
      fit(arm(next(names), control, workdir / 'data', None), config, workdir)


def objective(config: ml_collections.ConfigDict, spec: str) -> objectives.Objective:
  """What a study minimises in the arm of this name; the loss's temperature is that of serving."""
  distill = config.distill
  return objectives.from_spec(
      spec, beta=distill.beta, normalisation=distill.normalisation,
      temperature=specs.serving_temperature(
          distill.temperature, config.evaluate and config.evaluate.temperatures))


def _arm(config, workdir, name, objective, data, rollout, *, seed, teacher, draft,
         reference=None) -> train.Run:
  settings, start = config.distill.train, workdir / 'draft'
  layout = config.draft.layout
  changed = dict(dropout=settings.dropout, remat=settings.remat, **api.vocabulary_fields(draft))
  return train.Run(
      stage='distill', name=name, directory=workdir / 'distill' / name, settings=settings,
      seed=seed, model_config=store.load_config(start, **changed),
      init=lambda mesh: store.load_model(start, mesh, layout=layout, **changed).module,
      layout=layout,
      data=data, objective=objective, teacher=teacher, rollout=rollout, reference=reference,
      hub_config=draft.hub_config,
      held_out_tokens=config.distill.rollout.max_new_tokens)


def _rollout(config, data: pathlib.Path, *, online: bool) -> rollouts.Rollout:
  """How continuations of the prompts in `data` are sampled."""
  settings = config.distill.rollout
  metadata = shards.read_metadata(data, 'train')
  is_mixture = online and '+' in config.distill.data_source
  return rollouts.Rollout(
      sampling=sampling_lib.Sampling(settings.temperature, settings.top_k, settings.top_p),
      max_new_tokens=settings.max_new_tokens, prompt_width=metadata['longest_prompt'],
      shortest_prompt=metadata['shortest_prompt'],
      student_fraction=config.distill.student_fraction if is_mixture else 1.0)


def _data(config, workdir, mesh: Mesh, teacher: base.Model, draft: base.Model) -> pathlib.Path:
  """The shards that the objective's arm reads; samples of a model are made here, once."""
  source = config.distill.data_source
  if source.startswith('target'):
    return _stored(config, workdir, mesh, 'target', teacher)
  if source == 'draft_stored':
    return _stored(config, workdir, mesh, 'draft', draft)
  return workdir / 'data'


def _stored(config, workdir, mesh, source: str, model: base.Model) -> pathlib.Path:
  """Continuations of training prompts by `model`, as shards under `data/<source>/`."""
  fixed, directory = workdir / 'data', workdir / 'data' / source
  rollout = _rollout(config, fixed, online=False)
  prompts = shards.rows(fixed, 'train')
  settings = config.distill.train
  # One epoch of prompts, or as many as the training will read.
  count = min(len(prompts), settings.steps * settings.batch_size)
  metadata = shards.read_metadata(fixed, 'train')
  described = dict(
      vocab_size=metadata['vocab_size'], vocabulary_digest=metadata['vocabulary_digest'],
      task=metadata.get('task'), metric=metadata.get('metric'), max_length=rollout.width,
      source=source, seed=config.seed, num_prompts=count, **config.distill.rollout.to_dict())
  if processes.agree('samples', lambda: shards.exists(directory, 'train')):
    found = shards.read_metadata(directory, 'train')
    for name, value in described.items():
      if found.get(name) != value:
        raise ValueError(f'{directory} holds samples with {name} {found.get(name)!r}, and this '
                         f'study asks for {value!r}; use another workdir')
    return directory
  logging.info('sampling %d continuations of the %s', count, source)
  key = jax.random.key(config.seed)
  batches = range(0, count, settings.batch_size)
  rows = (row for begin in batches for row in _sample(
      model, [prompts[i] for i in range(begin, min(begin + settings.batch_size, count))],
      settings.batch_size, jax.random.fold_in(key, begin), rollout, mesh))
  if processes.is_first():
    shards.write(directory, 'train', rows, described)
  else:
    collections.deque(rows, maxlen=0)  # its share of the work; process 0 writes
  processes.meet('samples are written')
  return directory


def _sample(model, chosen: list[records.Row], batch_size, key, rollout, mesh) -> list[Any]:
  """One batch of continuations; a last short batch is filled up, to share its compilation."""
  filled = chosen + chosen[:1] * (batch_size - len(chosen))
  prompts_bt = np.full((batch_size, rollout.prompt_width), structs.PAD_ID, np.int32)
  for index, row in enumerate(filled):
    prompts_bt[index, :row.prompt_length] = row.tokens[:row.prompt_length]
  lengths_b = np.array([row.prompt_length for row in filled], np.int32)
  batch = structs.Batch(prompts_bt, np.zeros(prompts_bt.shape, np.float32), lengths_b, lengths_b)
  batch = sharding.put(batch, sharding.batch_sharding(mesh))
  sampled = sharding.fetch(_generate(model.module, batch, key, rollout=rollout))
  def row(index, source):
    length = int(sampled.lengths_b[index])
    return records.Row(
        sampled.tokens_bt[index, :length], source.prompt_length,
        sampled.loss_mask_bt[index, :length].astype(np.uint8), source.reference, source.document)
  return [row(index, source) for index, source in enumerate(chosen)]
