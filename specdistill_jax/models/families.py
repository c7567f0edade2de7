"""The families of models by name: a config dataclass, and what makes a module of it.

All modules have the same face: `start`, `init_cache`, `__call__` (see `structs.Decodable`),
`supervise`, `logits` and `unstacked`. Nothing outside of this room asks which one it holds.
"""

from collections.abc import Mapping
from typing import Any

import jax

from specdistill_jax.models import decoder
from specdistill_jax.models import t5

DEFAULT = 'decoder'
FAMILIES = {
    'decoder': (decoder.DecoderConfig, decoder.init),
    't5': (t5.T5Config, t5.init),
}


def config(fields: Mapping[str, Any], **more: Any) -> Any:
  """The config of a `model` section: its `family`, and the fields of that family's config.

  Raises:
    ValueError: an unknown family, or a value that its config refuses.
    TypeError: a field that the family lacks.
  """
  fields = dict(fields)
  family = fields.pop('family', DEFAULT)
  if family not in FAMILIES:
    raise ValueError(f'family is {family!r}; it must be one of {", ".join(FAMILIES)}')
  return FAMILIES[family][0](**{**fields, **more})


def init(config: Any, key: jax.Array) -> Any:  # pylint: disable=redefined-outer-name
  """A freshly initialised module; trace it under `sharding.sharded_init` to lay it out."""
  return FAMILIES[config.family][1](config, key)
