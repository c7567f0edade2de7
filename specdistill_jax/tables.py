"""Studies side by side: a line for each draft and method, a column for each way to decode.

  python -m specdistill_jax.tables --workdir=W/cell-0,W/cell-1
  python -m specdistill_jax.tables --workdir=W/cell-0,W/cell-1 --figure=speedup --format=latex

Made from the rows of each workdir's last configuration, pooled over seeds; 95 % intervals from
bootstraps over prompts and seeds.
"""

from collections.abc import Sequence
import csv
import io
import pathlib
import sys
from typing import Any

from absl import flags

from specdistill_jax import storage

FIGURES = dict(block_efficiency='block_efficiency', speedup='speedup_measured', alpha='alpha')
FORMATS = ('markdown', 'latex', 'csv')


def load(workdir: pathlib.Path) -> list[dict[str, Any]]:
  """The rows of a workdir's last configuration; raises ValueError if there is none."""
  from specdistill_jax.evaluation import rows as rows_lib  # as below
  found = rows_lib.read(workdir / 'results.jsonl')
  if not found:
    raise ValueError(f'{workdir} has no results.jsonl with rows; run its study first')
  return [row for row in found if row['config_hash'] == found[-1]['config_hash']]


def table(workdirs: Sequence[pathlib.Path], figure: str = 'block_efficiency',
          samples: int = 1000) -> tuple[list[str], list[list[str]]]:
  """Header and lines; a cell is empty where a study has no such way to decode."""
  from specdistill_jax.evaluation import summary as summary_lib  # a misspelt flag needs no NumPy
  from specdistill_jax.stages import report
  columns: dict[tuple[Any, ...], None] = {}
  lines: dict[tuple[str, ...], dict[tuple[Any, ...], str]] = {}
  for workdir in workdirs:
    rows = load(workdir)
    parameters = {row['draft']: row['draft_parameters'] for row in rows}
    for draft, size in parameters.items():
      mine = [row for row in rows if row['draft'] == draft]
      for found in summary_lib.summarise(mine, samples=samples):
        shape = found.tree if found.is_tree else f'γ={found.gamma}'
        column = (found.temperature, found.is_tree, shape, found.way)
        line = (draft, f'{size / 1e6:.1f}M', found.method, str(found.num_seeds))
        name = FIGURES[figure]
        columns.setdefault(column)
        lines.setdefault(line, {})[column] = report.brackets(
            getattr(found, name), getattr(found, f'{name}_interval'))
  ordered = sorted(columns)
  ways = {way for _, is_tree, _, way in ordered if not is_tree}
  header = ['draft', 'parameters', 'method', 'seeds'] + [
      f'T={temperature:g}, {shape}' + f', {way}' * (len(ways) > 1 and not is_tree)
      for temperature, is_tree, shape, way in ordered]
  return header, [[*line, *(cells.get(column, '') for column in ordered)]
                  for line, cells in lines.items()]


def written(header: Sequence[str], lines: Sequence[Sequence[str]], form: str) -> str:
  """The table as Markdown, LaTeX (booktabs) or CSV."""
  if form == 'csv':
    text = io.StringIO()
    csv.writer(text, lineterminator='\n').writerows([header, *lines])
    return text.getvalue().rstrip('\n')
  if form == 'latex':
    escaped = lambda cells: ' & '.join(
        cell.replace('_', r'\_').replace('%', r'\%').replace('γ', r'$\gamma$')
        .replace('α', r'$\alpha$').replace('ε', r'$\varepsilon$') for cell in cells) + r' \\'
    return '\n'.join([rf'\begin{{tabular}}{{{"l" * len(header)}}}', r'\toprule', escaped(header),
                      r'\midrule', *map(escaped, lines), r'\bottomrule', r'\end{tabular}'])
  from specdistill_jax.stages import report
  return report.markdown_table(header, lines)


def make_flags() -> flags.FlagValues:
  values = flags.FlagValues()
  flags.DEFINE_list('workdir', None, 'Workdirs of finished studies.', flag_values=values)
  flags.DEFINE_enum('figure', 'block_efficiency', list(FIGURES), 'What cells hold.',
                    flag_values=values)
  flags.DEFINE_enum('format', 'markdown', list(FORMATS), 'How it is written.',
                    flag_values=values)
  return values


def main(argv: Sequence[str] | None = None) -> int:
  """The command. Returns the exit status: 0, or 2 after printing one `error:` line."""
  argv = list(sys.argv if argv is None else argv)
  values = make_flags()
  if '--help' in argv:
    print(f'{__doc__}\nflags:\n{values.get_help()}')
    return 0
  try:
    rest = values(argv)
    if len(rest) > 1:
      raise ValueError(f'{rest[1]!r} is no flag; give --workdir=W1,W2')
    if not values.workdir:
      raise ValueError('--workdir is missing; give --workdir=W1,W2')
    made = table([storage.path(name) for name in values.workdir], values.figure)
    print(written(*made, values.format))
  except (ValueError, flags.Error) as error:
    print(f'error: {" ".join(str(error).split())}', file=sys.stderr, flush=True)
    return 2
  return 0


if __name__ == '__main__':
  sys.exit(main())
