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
  """
  module: Any
  config: Any
  vocabulary: Any = None

  @property
  def num_parameters(self) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(self.module))
