"""An objective in one word of a config: its name, and what differs from the defaults.

  forward_kl    lk_hybrid,eta=10    acceptance_nll,position_weights=adaptive    forward_kl,keep=0.4

A name with a dot is yours: `my_losses.sharp_kl` is the function `sharp_kl` of the module
`my_losses`, `__main__.sharp_kl` one of the notebook that asks. It takes student's and teacher's
logits `[..., v]` and returns a loss `[...]`, as those of `divergences` do.

The word also names the arm of a study, its rows, and its line in a table. Imports no JAX, so that
a config is checked without it.
"""

from collections.abc import Callable
import importlib
import inspect
from typing import Any

CROSS_ENTROPY = 'cross_entropy'  # on the target's own text: SeqKD; on the fixed data: a control
NAMES = ('forward_kl', 'reverse_kl', 'jsd', 'tvd', 'acceptance_nll', 'lk_hybrid',
         'end_to_end_tvd', 'dspark', CROSS_ENTROPY)  # the others: of objectives.DIVERGENCES
FEATURE = 'feature'
# Field -> how it is read; what they mean says `objectives.Objective`.
FIELDS = dict(eta=float, kl_weight=float, alpha_over=str, position_weights=str, decay=float,
              floor=float, block=int, keep=float)
# Fields that mean something for one objective only.
_PLAIN = (FEATURE, CROSS_ENTROPY)  # these have none
_OWNERS = dict(eta='lk_hybrid', kl_weight='lk_hybrid', alpha_over='lk_hybrid')
_LEGAL = dict(
    eta=(lambda x: x >= 0, 'at least 0'),
    kl_weight=(lambda x: x is None or 0 <= x <= 1, 'from 0 to 1'),
    alpha_over=(lambda x: x in ('batch', 'previous', 'token'), 'batch, previous or token'),
    position_weights=(lambda x: x in ('uniform', 'decay', 'adaptive'),
                      'uniform, decay or adaptive'),
    decay=(lambda x: 0 < x <= 1, 'above 0 and at most 1'),
    floor=(lambda x: 0 < x <= 1, 'above 0 and at most 1'),
    block=(lambda x: x >= 1, 'at least 1'),
    keep=(lambda x: 0 < x <= 1, 'above 0 and at most 1'))


def parse(spec: str) -> tuple[str, dict[str, Any]]:
  """`'lk_hybrid,eta=10'` to `('lk_hybrid', {'eta': 10.0})`.

  Raises:
    ValueError: no such objective or field, or a value that it can't have, with what it can.
  """
  name, *settings = spec.split(',') if isinstance(spec, str) else (spec,)
  if name not in (*NAMES, FEATURE) and not is_yours(name):
    raise ValueError(f'objective is {spec!r}; its name must be one of '
                     f'{", ".join((*NAMES, FEATURE))}, or that of a function, as in '
                     'my_losses.sharp_kl')
  found: dict[str, Any] = {}
  for setting in settings:
    field, equals, value = setting.partition('=')
    if field not in FIELDS or not equals or field in found or name in _PLAIN:
      legal = 'none' if name in _PLAIN else ', '.join(FIELDS)
      hint = '; jsd is weighted by config.distill.beta' * (field == 'beta')
      raise ValueError(f'objective is {spec!r}, in which {setting!r} is no field; {name} has '
                       f'{legal}, each once, as in lk_hybrid,eta=10{hint}')
    if _OWNERS.get(field, name) != name:
      raise ValueError(f'objective is {spec!r}, but {field} is of {_OWNERS[field]} only')
    try:
      found[field] = FIELDS[field](value)
      check(field, found[field])
    except ValueError:
      raise ValueError(f'objective is {spec!r}; {field} must be {_LEGAL[field][1]}') from None
  return name, found


def is_yours(name: Any) -> bool:
  """Whether it names a function of no module of the project."""
  return isinstance(name, str) and '.' in name.partition(',')[0]


def yours(name: str) -> Callable:
  """The function that `module.function` names.

  Raises:
    ValueError: it can't be imported, or is none.
  """
  module, _, function = name.rpartition('.')
  try:
    found = getattr(importlib.import_module(module), function)
  except (ImportError, AttributeError, ValueError) as error:
    raise ValueError(f'objective is {name!r}, and no such function can be imported ({error}); its '
                     'module must be on the path of Python (PYTHONPATH)') from error
  if not callable(found):
    raise ValueError(f'objective is {name!r}, which is {found!r} and must be a function of '
                     "student's and teacher's logits")
  return found


def source(name: str) -> str:
  """The text of that function, so that a study can tell whether it is still the same."""
  try:
    return inspect.getsource(yours(name))
  except (OSError, TypeError):  # typed at a prompt, or not written in Python
    return ''


def check(field: str, value: Any) -> None:
  """Raises ValueError if a field of `FIELDS` can't have this value."""
  accepts, wish = _LEGAL[field]
  if not accepts(value):
    raise ValueError(f'{field} is {value!r}, and must be {wish}')


def reference(spec: str) -> str | None:
  """The spec whose draft says which tokens a selective one keeps: itself, of all tokens."""
  name, found = parse(spec)
  if found.get('keep', 1.0) == 1.0:
    return None
  return ','.join([name] + [f for f in spec.split(',')[1:] if not f.startswith('keep=')])


def serving_temperature(temperature: float | None, served: Any) -> float:
  """That of a loss: as given; None: the one temperature above 0 that is served, 1 without any.

  Raises:
    ValueError: several are.
  """
  if temperature is not None:
    return temperature
  warm = [value for value in served or () if value > 0] or [1.0]
  if len(warm) > 1:
    raise ValueError(f'config.distill.temperature is None, but evaluate.temperatures has '
                     f'{len(warm)} values above 0; it must say which')
  return warm[0]
