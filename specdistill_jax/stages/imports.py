"""What a study takes from the models that it starts from, `init_from` of target and draft."""

from typing import Any


def vocabulary(config: Any) -> Any:
  """The vocabulary of the imported models, in which the data must be; None if there is none.

  Raises:
    ValueError: an imported model has no tokenizer, or two have different ones.
  """
  found = {}
  for which in ('target', 'draft'):
    section = getattr(config, which, None)
    source = section.get('init_from') if section is not None else None
    if source is None:
      continue
    from specdistill_jax.checkpoints import pretrained  # pylint: disable=g-import-not-at-top
    from specdistill_jax.drafters import families
    if families.is_feature_draft(section.model):  # it has its target's tokens
      continue
    found[which] = pretrained.load_vocabulary(source)
    if found[which] is None:
      raise ValueError(f'config.{which}.init_from names {source}, which has no tokenizer: the '
                       'data can\'t be written in its tokens')
  if len({one.digest for one in found.values()}) > 1:
    raise ValueError(f'{config.target.init_from} and {config.draft.init_from} have different '
                     'vocabularies: a draft needs its target\'s')
  return next(iter(found.values()), None)
