"""Config files: what they define, their sweeps, and fields that the command line sets."""

from collections.abc import Sequence
import importlib.util
import pathlib
import sys
from typing import Any

import ml_collections

from specdistill_jax.stages import checks

_ROOT = pathlib.Path(__file__).resolve().parents[2]


def module(path: str) -> tuple[Any, list[str]]:
  """The module of a config file, and what its functions are to be given.

  Args:
    path: of the file, or `file:argument`.

  Raises:
    ValueError: there is no such file.
  """
  file, colon, argument = path.partition(':')
  if not pathlib.Path(file).is_file():
    raise ValueError(f'--config names {file!r}, which is not a file; name one such as '
                     'configs/quickstart.py')
  if str(_ROOT) not in sys.path:
    sys.path.append(str(_ROOT))  # config files import configs.common, wherever they are run from
  spec = importlib.util.spec_from_file_location('config_file', file)
  made = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(made)
  return made, [argument] if colon else []


def cells(path: str) -> Sequence[dict[str, Any]]:
  """The overrides of each cell of a file's sweep; raises ValueError if it has none."""
  made, arguments = module(path)
  if not hasattr(made, 'get_sweep'):
    raise ValueError(f'--sweep needs get_sweep() in {path}, a list of overrides of its config')
  return made.get_sweep(*arguments)


def load(path: str, cell: str | None = None) -> ml_collections.ConfigDict:
  """`get_config()` of a config file, or `get_config(argument)` of `file:argument`, locked.

  With `cell`, a number, the overrides of that cell of the file's sweep are in it.

  Raises:
    ValueError: no such file, argument or cell.
  """
  made, arguments = module(path)
  config = made.get_config(*arguments).lock()
  if cell is not None:
    found = cells(path)
    if not cell.isdecimal() or int(cell) >= len(found):
      raise ValueError(f'--sweep is {cell!r}; give all, or a cell from 0 to {len(found) - 1}')
    config.update_from_flattened_dict(found[int(cell)])
  return config


def check_overrides(argv: Sequence[str], config: Any) -> None:
  """Raises ValueError, one sentence, at the first `--config.a.b=` that names no field."""
  for argument in argv:
    if not argument.lstrip('-').startswith('config.'):
      continue
    section, walked = config, ''
    for name in argument.lstrip('-').split('=', 1)[0].split('.')[1:]:
      if not isinstance(section, ml_collections.ConfigDict):
        raise ValueError(f'config.{walked.rstrip(".")} is {section!r} and has no field {name!r}, '
                         f'so {argument.split("=", 1)[0]} cannot be set')
      if name not in section:
        raise ValueError(checks.unknown_name(walked, name, list(section)))
      section, walked = section[name], f'{walked}{name}.'


def unset(argv: Sequence[str], config: ml_collections.ConfigDict) -> list[str]:
  """Carries out each `--config.a.b=None` of a field that may be None; returns the other arguments.

  Raises:
    ValueError: that field must have a value.
  """
  rest = []
  for argument in argv:
    path, _, value = argument.lstrip('-').partition('=')
    if not path.startswith('config.') or value != 'None':
      rest.append(argument)
      continue
    *sections, name = path.split('.')[1:]
    if not checks.may_be_none((*sections, name)):
      raise ValueError(f'{path} is set to None, and must have a value')
    section = config
    for step in sections:
      section = section and section[step]
    if section is not None:
      section[name] = None
  return rest
