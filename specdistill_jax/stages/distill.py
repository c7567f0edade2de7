"""DistillSpec: from the trained draft, one distilled draft a seed, and its control.

The control takes as many further cross-entropy steps on the fixed data, with the same batch
and schedule, so that a table never credits distillation with mere further training.
"""

import functools
import pathlib
import re
from typing import Any

from jax.sharding import Mesh
import ml_collections

from specdistill_jax import api
from specdistill_jax import processes
from specdistill_jax import sharding
from specdistill_jax import storage
from specdistill_jax.checkpoints import store
from specdistill_jax.losses import objectives
from specdistill_jax.losses import specs
from specdistill_jax.models import base
from specdistill_jax.stages import samples
from specdistill_jax.stages import train

DATA_SOURCES = ('fixed', 'target', 'draft', 'draft_stored', 'fixed+draft', 'target+draft')

# An objective's settings may hold a hyphen, as in lk_hybrid,eta=1e-3; a data source has none.
_ARM = re.compile(r'(.+)-([^-]+)-seed(\d+)')


def arm_names(config: ml_collections.ConfigDict) -> list[str]:
  """The arms of a study, in order: `<objective>-<data source>-seed<k>`, last of a seed control."""
  distill = config.distill
  kinds = [(spec, distill.data_source) for spec in (distill.objective, *distill.also)]
  if distill.control:
    kinds.append((objectives.CROSS_ENTROPY, 'fixed'))
  return [f'{objective}-{source}-seed{seed}'
          for seed in distill.seeds for objective, source in kinds]


def parse_arm(name: str) -> tuple[str, str, int]:
  """Objective, data source and seed of an arm that `arm_names` named.

  Raises:
    ValueError: no arm has such a name.
  """
  if (found := _ARM.fullmatch(name)) is None:
    raise ValueError(f'{name!r} is the name of no arm; it must be <objective>-<data source>-seed'
                     '<number>, as in forward_kl-draft-seed0')
  objective, data_source, seed = found.groups()
  return objective, data_source, int(seed)


def from_scratch(config: ml_collections.ConfigDict) -> bool:
  """Whether the arms begin with a draft that has learnt nothing, which is then no rival."""
  return (config.distill is not None and config.draft.init_from is None
          and not config.draft.train.steps)


def run(config: ml_collections.ConfigDict, workdir: pathlib.Path,
        fit: train.Fit = train.fit) -> None:
  """Trains every arm from `draft/`; finished arms are skipped, an interrupted one resumes.

  With `distill.init_from` all arms are copied from there. `fit` is what is done with each; another
  one looks at a step of it again.

  Raises:
    ValueError: impossible settings, or a draft and target with different vocabularies.
  """
  distill = config.distill
  if distill.data_source not in DATA_SOURCES:
    raise ValueError(f'distill.data_source is {distill.data_source!r}, and must be one of '
                     f'{", ".join(DATA_SOURCES)}')
  if distill.init_from is not None:
    _take(config, workdir)
    return
  mesh = sharding.make_mesh(**config.mesh)
  teacher = store.load_model(workdir / 'target', mesh,
                             layout=config.target.teacher_layout or config.target.layout,
                             weights_dtype=config.target.weights_dtype)
  draft = store.load_model(workdir / 'draft', mesh, layout=config.draft.layout)
  teacher, draft = api.check_pair(teacher, draft)
  data = _data(config, workdir, mesh, teacher, draft)
  # Nothing in it has a temperature, but for the laws that it is looked at with, as all arms are.
  control = objective(config, objectives.CROSS_ENTROPY)
  rollout = None
  if distill.data_source.rpartition('+')[2] == 'draft':
    is_mixture = '+' in distill.data_source
    rollout = samples.rollout(config, workdir / 'data',
                              student_fraction=distill.student_fraction if is_mixture else 1.0)

  how = dict(changed=api.vocabulary_fields(draft), hub_config=draft.hub_config)
  del draft  # every arm reads its own
  names = iter(arm_names(config))
  for seed in distill.seeds:
    arm = functools.partial(_arm, config, workdir, seed=seed, teacher=teacher, **how)
    trained = {}
    for spec in (distill.objective, *distill.also):
      trained[spec] = name = next(names)
      reference = specs.reference(spec)
      reference = reference and store.load_model(
          workdir / 'distill' / trained[reference], mesh, layout=config.draft.layout)
      fit(arm(name, objective(config, spec), data, rollout, reference=reference), config, workdir)
    if distill.control:
      fit(arm(next(names), control, workdir / 'data', None), config, workdir)


def _take(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
  """Copies the arms of another study, each as after its last step."""
  mesh, layout = sharding.make_mesh(**config.mesh), config.draft.layout
  for name in arm_names(config):
    directory = workdir / 'distill' / name
    with store.Store(directory) as checkpoints:
      if checkpoints.latest_step() is None:
        model = store.load_model(storage.path(config.distill.init_from) / name, mesh,
                                 layout=layout, weights_dtype=None)
        if processes.is_first():
          store.write_model_file(directory, model.config, store.vocabulary_path(workdir / 'draft'),
                                 model.hub_config)
        checkpoints.save_params(config.distill.train.steps, model.module)


def objective(config: ml_collections.ConfigDict, spec: str) -> objectives.Objective:
  """What a study minimises in the arm of this name; the loss's temperature is that of serving."""
  distill = config.distill
  return objectives.from_spec(
      spec, beta=distill.beta, normalisation=distill.normalisation,
      temperature=specs.serving_temperature(
          distill.temperature, config.evaluate and config.evaluate.temperatures))


def _arm(config, workdir, name, objective, data, rollout, *, seed, teacher, changed, hub_config,
         reference=None) -> train.Run:
  settings, start = config.distill.train, workdir / 'draft'
  layout = config.draft.layout
  changed = dict(dropout=settings.dropout, remat=settings.remat, **changed)
  return train.Run(
      stage='distill', name=name, directory=workdir / 'distill' / name, settings=settings,
      seed=seed, model_config=store.load_config(start, **changed),
      init=lambda mesh: store.load_model(start, mesh, layout=layout, **changed).module,
      layout=layout,
      data=data, objective=objective, teacher=teacher, rollout=rollout, reference=reference,
      hub_config=hub_config,
      held_out_tokens=config.distill.rollout.max_new_tokens,
      decoding_tensor=config.distill.rollout.tensor)


def _data(config, workdir, mesh: Mesh, teacher: base.Model, draft: base.Model) -> pathlib.Path:
  """The shards that the objective's arm reads; samples of a model are made here, once."""
  source = config.distill.data_source
  if source.startswith('target'):
    return samples.stored(config, workdir, mesh, 'target', teacher)
  if source == 'draft_stored':
    return samples.stored(config, workdir, mesh, 'draft', draft)
  return workdir / 'data'
