"""All families by name: whole models, which target and draft can be, and feature-level drafts."""

from collections.abc import Mapping
from typing import Any

import jax

from specdistill_jax.drafters import eagle3
from specdistill_jax.drafters import feature_config
from specdistill_jax.drafters import fspad
from specdistill_jax.drafters import heads
from specdistill_jax.drafters import mtp
from specdistill_jax.models import families as models

FEATURE_DRAFTS = {
    'eagle': (fspad.EagleConfig, fspad.init),
    'fspad': (fspad.FSPADConfig, fspad.init),
    'eagle3': (eagle3.Eagle3Config, eagle3.init),
    'mtp': (mtp.MTPConfig, mtp.init),
    'medusa': (heads.MedusaConfig, heads.init),
    'mlp': (heads.MLPConfig, heads.init),
}
FAMILIES = models.FAMILIES | FEATURE_DRAFTS


def is_feature_draft(config: Any) -> bool:
  """Whether a model with this config, or with this section as its config, reads features."""
  return getattr(config, 'family', models.DEFAULT) in FEATURE_DRAFTS


def config(fields: Mapping[str, Any], target: Any = None, **more: Any) -> Any:
  """The config of a `model` section; a feature-level draft takes its sizes from the target's.

  Raises:
    ValueError: an unknown family, or a value that its config refuses.
    TypeError: a field that the family lacks.
  """
  family = fields.get('family', models.DEFAULT)
  if family in FEATURE_DRAFTS:
    return feature_config.for_target(FEATURE_DRAFTS[family][0], dict(fields) | more, target)
  return models.config(fields, **more)


def init(config: Any, key: jax.Array) -> Any:  # pylint: disable=redefined-outer-name
  """A freshly initialised module; trace it under `sharding.sharded_init` to lay it out."""
  return FAMILIES[config.family][1](config, key)
