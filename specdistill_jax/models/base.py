"""A model as users hold it: a module, its config, and a vocabulary if there is one."""

from collections.abc import Iterable
import dataclasses
import functools
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Model:
  """What `sd.load_pretrained` returns and `sd.generate` takes.

  Attributes:
    module: the NNX module, a pytree of parameters; callable as `structs.TargetFn`.
    config: the module's frozen config dataclass.
    vocabulary: turns text into ids and back; None when prompts are ids only.
    hub_config: the config.json it was imported with, for what the config doesn't hold (the
      longest context, special tokens); None of a model that was trained here.
  """
  module: Any
  config: Any
  vocabulary: Any = None
  hub_config: dict[str, Any] | None = None

  @functools.cached_property
  def unrolled(self) -> Any:
    """The module as decoding loops take it, one module a layer: a copy of stacked layers, kept."""
    return self.module.unstacked() if hasattr(self.module, 'unstacked') else self.module

  @property
  def num_parameters(self) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(self.module))


def check_fields(config_class: type, changed: Iterable[str]) -> None:
  """Raises ValueError if one of `changed` is no field of such a config."""
  fields = [field.name for field in dataclasses.fields(config_class)]
  if unknown := [name for name in changed if name not in fields]:
    raise ValueError(f'{config_class.__name__} has no field {", ".join(unknown)}; its fields are '
                     f'{", ".join(fields)}')
