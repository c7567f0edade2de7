"""What a study with a feature-level draft must say; part of `checks`."""

import dataclasses
import difflib
from typing import Any

import ml_collections

from specdistill_jax.stages import places

# Of drafters.families, named here since JAX is not yet wanted.
FAMILIES = ('eagle', 'fspad', 'eagle3', 'mtp', 'medusa', 'mlp')
DATA_SOURCES = ('fixed', 'target')


def is_feature_draft(config: Any, name: str) -> bool:
  """Whether the section `name` has a model that reads the target's features."""
  model = config[name].model
  return isinstance(model, ml_collections.ConfigDict) and model.get('family') in FAMILIES


def check(config: Any) -> None:
  """Raises a ValueError of one sentence at what such a draft, or its training, can't be."""
  if config.target is not None and is_feature_draft(config, 'target'):
    raise ValueError(f'config.target.model.family is {config.target.model.family!r}, which is '
                     "a draft's; a target is a decoder")
  _check_model(config)
  family, distill = config.draft.model.family, config.distill
  if config.draft.train.steps:
    raise ValueError(f'config.draft.train.steps is {config.draft.train.steps}; it must be 0: '
                     f'{family!r} is trained by the stage distill alone')
  if distill is None:
    return
  if distill.data_source not in DATA_SOURCES:
    raise ValueError(f'config.distill.data_source is {distill.data_source!r}; it must be one of '
                     f'{", ".join(DATA_SOURCES)}: {family!r} does not write text by itself')
  if distill.control:
    raise ValueError(f'config.distill.control is True; it must be False: {family!r} has no '
                     'training of its own that a control could go on with')
  if distill.train.dropout:
    raise ValueError(f'config.distill.train.dropout is {distill.train.dropout}; it must be 0: '
                     f'{family!r} has noise on its features instead')


def _check_model(config: Any) -> None:
  from specdistill_jax.drafters import families  # brings in JAX, which the flags can do without
  model = config.draft.model
  fields = dataclasses.fields(families.FEATURE_DRAFTS[model.family][0])
  legal = sorted({field.name for field in fields} - {'vocab_size', 'draft_vocabulary'}
                 | {'family'})
  for name in model:
    if name not in legal:
      near = difflib.get_close_matches(name, legal, n=2, cutoff=0.6)
      hint = f'did you mean {" or ".join(near)}?' if near else (
          f'the fields are {", ".join(legal)}')
      raise ValueError(f'config has no field draft.model.{name}; {hint}')
  if config.target is None:
    raise ValueError(f'config.target is None, and config.draft.model.family is {model.family!r}, '
                     'which needs one: give config.target')
  if config.target.init_from is None or places.is_open(config.target.init_from):
    target = families.config(config.target.model, vocab_size=config.task.vocab_size)
  else:
    from specdistill_jax.checkpoints import pretrained
    target = pretrained.load_config(config.target.init_from)
  try:
    families.config(model, target)
  except (ValueError, TypeError) as error:
    raise ValueError(f'config.draft.model is wrong: {error}') from error
  if config.draft.init_from is not None and not places.is_open(config.draft.init_from):
    _check_init_from(config.draft, target)


def _check_init_from(draft: Any, target: Any) -> None:
  from specdistill_jax.checkpoints import pretrained
  from specdistill_jax.drafters import feature_config
  try:
    found = pretrained.load_config(draft.init_from, target)
    if found.family != draft.model.family:
      raise ValueError(f'it is of the family {found.family!r}, and draft.model.family is '
                       f'{draft.model.family!r}')
    feature_config.check_fits(found, target)
  except ValueError as error:
    raise ValueError(f'config.draft.init_from is {draft.init_from!r}: {error}') from error
