"""What a study takes from others: the models in `init_from` of target, draft and distillation."""

import pathlib
from typing import Any

from specdistill_jax import storage
from specdistill_jax.stages import places
from specdistill_jax.stages import workdirs


def check_finished(source: str | None, field: str, arm: str = '') -> None:
  """A model of a study is taken when it is trained, not as it happens to be.

  Args:
    source: what the config's `field` says.
    arm: whose model it is, in that folder.

  Raises:
    ValueError: the stage that makes the model has not finished.
  """
  if source is None or places.is_open(source):
    return
  if unfinished := workdirs.unfinished(storage.path(source) / arm):
    workdir, stage = unfinished
    raise ValueError(f'config.{field} is {source!r}, but stage {stage!r} of the study in '
                     f'{workdir} has not finished; run that to its end first')


def check_arms(config: Any) -> None:
  """Raises a ValueError unless `distill.init_from` has all arms, and they are what config says."""
  source, steps = config.distill.init_from, config.distill.train.steps
  if source is None or places.is_open(source):
    return
  from specdistill_jax.checkpoints import store  # pylint: disable=g-import-not-at-top
  from specdistill_jax.stages import distill
  names, folder = distill.arm_names(config), storage.path(source)
  there = sorted(path.name for path in (folder.iterdir() if folder.is_dir() else ())
                 if (path / 'model.json').exists())
  if missing := [name for name in names if name not in there]:
    raise ValueError(f'config.distill.init_from is {source!r}, which must be the folder `distill` '
                     f'of a study with the arms {", ".join(names)}; it lacks {", ".join(missing)} '
                     f'and has {", ".join(there) or "none"}')
  for name in names:
    check_finished(source, 'distill.init_from', name)
    found = store.newest_step(folder / name)
    if found != steps:
      raise ValueError(f'config.distill.train.steps is {steps}; the arm {name} in '
                       f'distill.init_from, {source!r}, has {found} steps behind it, and '
                       'distill.train.steps must be that')
  _check_origin(config, folder.parent)


def _check_origin(config: Any, study: pathlib.Path) -> None:
  """The study that trained the arms had this `distill` section, and began them as this draft."""
  stored, distill = workdirs.stored_config(study), config.distill
  if stored is None:
    return
  there = stored.get('distill') or {}
  here = workdirs.to_json(config)['distill']
  for section in (there, here):
    section.get('rollout', {}).pop('tensor', None)
    for name in ('init_from', 'objective', 'also', 'seeds', 'control'):  # arms are looked for
      section.pop(name, None)
  if 'functions' in there:  # of all its arms, of which not all may be taken
    taken = here.get('functions', {})
    there['functions'] = {name: lines for name, lines in there['functions'].items()
                          if name in taken} or None
  if found := workdirs.differences(there, here):
    raise ValueError(f'config.distill.init_from is {distill.init_from!r}, whose arms were trained '
                     'otherwise than config.distill says, which must be as it is there: '
                     f'{"; ".join(found[:workdirs.SHOWN_DIFFERENCES])}')
  draft = config.draft
  if draft.init_from is None and not draft.train.steps:  # arms from scratch are compared with none
    return
  if draft.train.steps or (storage.absolute(storage.path(draft.init_from))
                           != storage.absolute(study / 'draft')):
    raise ValueError(
        f'config.distill.init_from is {distill.init_from!r}, whose arms began as {study / "draft"} '
        'and are compared with it: draft.init_from must be that with draft.train.steps of 0, and '
        f'is {draft.init_from!r} with {draft.train.steps}')


def _sources(config: Any) -> dict[str, Any]:
  """The folders of the imported models, by field; of another study's arms the first one's."""
  found = {}
  for which in ('target', 'draft', 'distill'):
    section = getattr(config, which, None)
    source = section.get('init_from') if section is not None else None
    if source is None:
      continue
    if which == 'distill':
      from specdistill_jax.stages import distill  # pylint: disable=g-import-not-at-top
      source = str(storage.path(source) / distill.arm_names(config)[0])
    found[which] = source
  return found


def vocabulary(config: Any) -> Any:
  """The vocabulary of the imported models, in which the data must be; None if there is none.

  Raises:
    ValueError: an imported model has no tokenizer, or two have different ones.
  """
  found = {}
  for which, source in _sources(config).items():
    from specdistill_jax.checkpoints import pretrained  # pylint: disable=g-import-not-at-top
    from specdistill_jax.drafters import families
    # A feature-level draft has its target's tokens.
    if which != 'target' and families.is_feature_draft(config.draft.model):
      continue
    found[source] = pretrained.load_vocabulary(source)
    if found[source] is None:
      raise ValueError(f'config.{which}.init_from names {source}, which has no tokenizer: the '
                       'data can\'t be written in its tokens')
  if len({one.digest for one in found.values()}) > 1:
    raise ValueError(f'{" and ".join(found)} have different vocabularies: a draft needs its '
                     "target's")
  return next(iter(found.values()), None)
