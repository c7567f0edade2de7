"""Published figures of a config file as grids: what they are about beside what was printed."""

from collections.abc import Mapping, Sequence
from typing import Any

from specdistill_jax.evaluation import formats

_COLUMNS = ('temperature', 'category', 'rule', 'epsilon')  # the others name the line
_ABOUT = dict(temperature='T', gamma='γ', epsilon='ε')
_NOT_ABOUT = ('figure', 'value', 'source', 'trust')


def _words(about: Mapping[str, Any]) -> str:
  """'gkd, forward_kl' or 'T=1, MT-bench'."""
  words = []
  for name, value in about.items():
    if name in _ABOUT:
      words.append(f'{_ABOUT[name]}={value:g}')
    else:
      words.append('all' if value is None else f'{value}')
  return ', '.join(words)


def grids(published: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str], list[list[str]]]]:
  """(caption, header, lines) for each printed table; a value that is not known is blank.

  Args:
    published: entries as `configs.common.published` makes them.
  """
  tables: dict[str, dict[str, dict[str, str]]] = {}
  for entry in published:
    about = {name: value for name, value in entry.items() if name not in _NOT_ABOUT}
    line = _words({name: value for name, value in about.items() if name not in _COLUMNS})
    column = _words({name: about[name] for name in _COLUMNS if name in about})
    caption = f'{entry["figure"]}: {entry["source"]} ({entry["trust"]})'
    value = '' if entry['value'] is None else formats.figure(entry['value'])
    tables.setdefault(caption, {}).setdefault(line, {})[column] = value
  made = []
  for caption, lines in tables.items():
    columns = list(dict.fromkeys(column for cells in lines.values() for column in cells))
    made.append((caption, ['', *(column or 'value' for column in columns)],
                 [[line, *(cells.get(column, '') for column in columns)]
                  for line, cells in lines.items()]))
  return made
