"""specdistill_jax: distil draft models for speculative decoding, and prove what they buy.

A lazily imported table of contents: nothing heavy is loaded until a name is used.
"""

import importlib

# Public name -> (module, attribute); attribute None is the module itself.
_CONTENTS = {
    # Models.
    'load_pretrained': ('specdistill_jax.checkpoints.pretrained', 'load'),
    'Model': ('specdistill_jax.models.base', 'Model'),
    # Decoding.
    'generate': ('specdistill_jax.api', 'generate'),
    'speculate': ('specdistill_jax.api', 'speculate'),
    'trace': ('specdistill_jax.stages.watch', 'trace'),
    'overlap': ('specdistill_jax.stages.watch', 'overlap'),
    'Generation': ('specdistill_jax.structs', 'Generation'),
    # Training objectives.
    'divergences': ('specdistill_jax.losses.divergences', None),
    # Studies.
    'run': ('specdistill_jax.main', 'run'),
    'quickstart': ('specdistill_jax.main', 'quickstart'),
}

__all__ = list(_CONTENTS)


def __getattr__(name: str):
  if name not in _CONTENTS:
    raise AttributeError(f'specdistill_jax has no {name!r}; it has {", ".join(_CONTENTS)}')
  module_name, attribute = _CONTENTS[name]
  module = importlib.import_module(module_name)
  return module if attribute is None else getattr(module, attribute)


def __dir__():
  return sorted(_CONTENTS)
