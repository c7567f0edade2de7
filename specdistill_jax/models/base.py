"""A model as users hold it: a module, its config, and a vocabulary if there is one."""

import dataclasses
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

  @property
  def num_parameters(self) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(self.module))
