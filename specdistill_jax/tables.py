"""Papers' tables from result rows, with what was published beside them; or studies side by side.

  python -m specdistill_jax.tables --config=configs/lk_table1.py:small --workdir=W
  python -m specdistill_jax.tables --config=... --workdir=W1,W2 --plots=DIR --format=latex
  python -m specdistill_jax.tables --config=configs/lk_table1.py     (what was published)
  python -m specdistill_jax.tables --workdir=W/cell-0,W/cell-1 --figure=speedup

With --config the table has a line for everything that the config's sweep asks for: W is the
folder that `main --sweep=all` was given, several are merged. What is missing or failed stands in
the table; the commands that fill it, and what is odd about rows, are told on standard error. Rows
are pooled over seeds; brackets are 95 % intervals from bootstraps over prompts (batches of them
where several are decoded at once) and seeds, those of gains paired by prompt. Overrides that the
cells were run with are given here too: --config.field=value.

Without --config: a line for each study, draft and method, a column for each way to decode; plots
are bars. Where studies have different tasks or targets standard error says so.
"""

from collections.abc import Sequence
import pathlib
import sys
from typing import Any

from absl import flags

from specdistill_jax import storage

FIGURES = dict(block_efficiency='block_efficiency', speedup='speedup_measured', alpha='alpha')
FORMATS = ('markdown', 'latex', 'csv')  # of evaluation.formats, named here for the flags alone
_CONFIGS = pathlib.Path(__file__).resolve().parents[1] / 'configs'


def load(workdir: pathlib.Path) -> tuple[list[dict[str, Any]], int]:
  """The rows of a workdir's last configuration, and how many there are of older ones.

  Raises:
    ValueError: there is no row.
  """
  from specdistill_jax.evaluation import rows as rows_lib  # as below
  if not workdir.exists():
    raise ValueError(f'{workdir} does not exist; give the --workdir of a study that has run')
  found = rows_lib.read(workdir / 'results.jsonl')
  if not found:
    raise ValueError(f'{workdir} has no results.jsonl with rows; run its study first')
  return rows_lib.of_last_config(found)


def summaries(workdirs: Sequence[pathlib.Path],
              samples: int = 1000) -> tuple[list[tuple[pathlib.Path, str, int, Any]], list[str]]:
  """(workdir, draft, its parameters, `evaluation.summary.Summary`) of all that was measured.

  Beside them sentences about rows that are left out.
  """
  from specdistill_jax.evaluation import rows as rows_lib
  from specdistill_jax.evaluation import summary as summary_lib  # a misspelt flag needs no NumPy
  found, notes, kinds = [], [], {}
  for workdir in workdirs:
    rows, older = load(workdir)
    kinds.setdefault((rows[-1]['task'], rows[-1]['target']), workdir)
    notes += rows_lib.older_told(workdir, older)
    for draft, size in {row['draft']: row['draft_parameters'] for row in rows}.items():
      mine = [row for row in rows if row['draft'] == draft]
      found += [(workdir, draft, size, one)
                for one in summary_lib.summarise(mine, samples=samples)]
  if len(kinds) > 1:
    notes.append('These studies have other tasks or targets, so that their figures are not to be '
                 'compared: ' + '; '.join(f'{workdir}, {task}, {target}' for (task, target), workdir
                                          in kinds.items()) + '.')
  return found, notes + _other_data(workdirs)


def _other_data(workdirs: Sequence[pathlib.Path]) -> list[str]:
  """A sentence about each study of the first one's task whose section `task` is not the same."""
  from specdistill_jax.stages import workdirs as workdirs_lib
  tasks = {workdir: {name: value for name, value in stored['task'].items()
                     if name not in ('data_dir', 'vocabulary')}  # places, of what may be the same
           for workdir in workdirs if (stored := workdirs_lib.stored_config(workdir))}
  if not tasks:
    return []
  (first, here), *others = tasks.items()
  return [f'The data of {first} (here) and of {other} (there) are not the same, so that their '
          f'figures may not be comparable: {"; ".join(found[:workdirs_lib.SHOWN_DIFFERENCES])}.'
          for other, there in others if there['name'] == here['name']
          and (found := workdirs_lib.differences(there, here))]


def table(measured: Sequence[tuple[pathlib.Path, str, int, Any]],
          figure: str = 'block_efficiency') -> tuple[list[str], list[list[str]]]:
  """Header and lines of `summaries`; a cell is empty where a study has no such way to decode.

  Of several studies each line begins with its own.
  """
  from specdistill_jax.evaluation import formats  # as above
  several = len({workdir for workdir, *_ in measured}) > 1
  columns: dict[tuple[Any, ...], None] = {}
  lines: dict[tuple[str, ...], dict[tuple[Any, ...], str]] = {}
  for workdir, draft, size, found in measured:
    shape = found.tree if found.is_tree else f'γ={found.gamma}'
    column = (found.temperature, found.is_tree, shape, found.way)
    line = (*((str(workdir),) if several else ()), draft, _parameters(size), found.method,
            str(found.num_seeds))
    name = FIGURES[figure]
    columns.setdefault(column)
    lines.setdefault(line, {})[column] = formats.brackets(
        getattr(found, name), getattr(found, f'{name}_interval'))
  ordered = sorted(columns)
  ways = {way for _, is_tree, _, way in ordered if not is_tree}
  header = ['study'] * several + ['draft', 'parameters', 'method', 'seeds'] + [
      f'T={temperature:g}, {shape}' + f', {way}' * (len(ways) > 1 and not is_tree)
      for temperature, is_tree, shape, way in ordered]
  return header, [[*line, *(cells.get(column, '') for column in ordered)]
                  for line, cells in lines.items()]


def _parameters(count: int) -> str:
  return f'{count / 1e6:.1f}M' if count >= 1e5 else f'{count / 1e3:.0f}k'


def bars(measured: Sequence[tuple[pathlib.Path, str, int, Any]], folder: pathlib.Path,
         figure: str) -> list[str]:
  """Draws `summaries` as bars, a group for each workdir and draft; returns sentences."""
  from specdistill_jax.evaluation import paper_tables
  from specdistill_jax.evaluation import table_plots  # matplotlib takes a second to import
  several = len({workdir for workdir, *_ in measured}) > 1
  fields = [name for name in paper_tables.Setting._fields if name not in (
      'objective', 'data_source')]
  made = [paper_tables.Line(
      dict(cell=f'{workdir.name}, {draft}' if several else draft, category=found.category,
           **{name: getattr(found, name) for name in fields}),
      task='', method=found.method, summary=found) for workdir, draft, _, found in measured]
  drawn = table_plots.draw(('bars',), made, folder, figure)
  return [f'{path} is drawn.' for path in drawn]


def _cells(path: str, words: Sequence[str]) -> tuple[Any, list[str], list[Any], bool]:
  """A config file's module; name and study of each cell, with overrides; whether it has a sweep."""
  from ml_collections import config_flags
  from specdistill_jax.stages import config_files
  module, arguments = config_files.module(path)
  in_sweep = hasattr(module, 'get_sweep')
  count = len(config_files.cells(path)) if in_sweep else 1
  configs = []
  for number in range(count):
    config = config_files.load(path, str(number) if in_sweep else None)
    config_files.check_overrides(words, config)
    values, argv = flags.FlagValues(), ['tables', *config_files.unset(words, config)]
    config_flags.DEFINE_config_dict('config', config, lock_config=True, flag_values=values,
                                    sys_argv=argv)
    values(argv)
    configs.append(values.config)
  named = getattr(module, 'CELLS', {}).get(arguments[0] if arguments else '')
  return module, list(named or (config.study for config in configs)), configs, in_sweep


def paper_table(path: str, roots: Sequence[pathlib.Path], *, words: Sequence[str] = (),
                figure: str = 'block_efficiency', form: str = 'markdown', samples: int = 1000,
                plots: pathlib.Path | None = None) -> tuple[str, list[str]]:
  """The table of a config file, and sentences about what is odd, missing or failed.

  Args:
    path: of the config file, with its argument.
    roots: folders that hold the workdirs of its cells, or such workdirs.
    words: overrides, `--config.a=b`.
    figure: what gains are in; `speed` adds the target alone.
    plots: folder of the plots; None: none are drawn.
  """
  from specdistill_jax.evaluation import formats
  from specdistill_jax.evaluation import paper_tables
  from specdistill_jax.evaluation import paper_text
  from specdistill_jax.stages import cells as cells_lib
  module, names, configs, in_sweep = _cells(path, words)
  with_training = bool({'cost', 'draft_quality'} & set(getattr(module, 'PLOTS', ())))
  found, notes = cells_lib.read(names, configs, roots, with_training=with_training)
  absolute = 'heat_map' in getattr(module, 'PLOTS', ())
  published = getattr(module, 'PUBLISHED', ())
  made = paper_tables.lines([one.cell for one in found], samples=samples,
                            with_target=figure == 'speed' or 'pareto' in getattr(
                                module, 'PLOTS', ()))
  made = paper_tables.with_gains(
      made, getattr(module, 'baseline', lambda cell: dict(objective='none')), figure,
      absolute=absolute, samples=samples)
  text = formats.written(*paper_text.table(made, published, figure, absolute=absolute), form)
  used = [id(entry) for line in made for entry in paper_tables.beside(line, published)]
  if left := [entry for entry in published if id(entry) not in used]:
    if form == 'markdown':
      text += '\n\nPublished, beside no line above:\n\n' + _published(left)
    else:
      notes.append(f'{len(left)} published figures stand beside no line; --format=markdown, or no '
                   '--workdir, shows them.')
  if plots is not None:
    from specdistill_jax.evaluation import table_plots  # matplotlib takes a second to import
    notes += [f'{drawn} is drawn.' for drawn in table_plots.draw(
        getattr(module, 'PLOTS', ('bars',)), made, plots, figure)]
  lacking = cells_lib.commands(path, found, roots[0], words, in_sweep)
  notes += [f'{state}:\n  {command}' for state, command in lacking]
  return text, notes


def _published(entries: Sequence[Any]) -> str:
  from specdistill_jax.evaluation import formats
  from specdistill_jax.evaluation import published
  return '\n\n'.join(f'{caption}\n\n{formats.markdown(header, lines)}'
                     for caption, header, lines in published.grids(entries))


def published_page() -> str:
  """All published figures of the configs, as docs/published.md has them."""
  from specdistill_jax.stages import config_files
  parts = ['# Published figures', 'Made by `python -m specdistill_jax.tables --published`, from '
           '`PUBLISHED` in each config. In brackets: how well a figure is known. What is blank is '
           'not known to us; nothing was measured here.']
  for file in sorted(_CONFIGS.glob('*.py')):
    entries = getattr(config_files.module(str(file))[0], 'PUBLISHED', ())
    if entries:
      parts += [f'## {file.stem}', _published(entries)]
  return '\n\n'.join(parts)


def make_flags() -> flags.FlagValues:
  values = flags.FlagValues()
  flags.DEFINE_list('workdir', None, 'Folders of cells, or workdirs of studies.',
                    flag_values=values)
  flags.DEFINE_enum('figure', 'block_efficiency', [*FIGURES, 'speed'], 'What cells hold; with '
                    '--config, what gains are in: speed has the target alone too.',
                    flag_values=values)
  flags.DEFINE_enum('format', 'markdown', list(FORMATS), 'How it is written.',
                    flag_values=values)
  flags.DEFINE_string('plots', None, 'Folder to draw the plots into.',
                      flag_values=values)
  flags.DEFINE_integer('bootstrap_samples', 1000, 'Of each interval.', lower_bound=1,
                       flag_values=values)
  flags.DEFINE_bool('published', False, 'Only what was published, of all configs.',
                    flag_values=values)
  return values


def _parted(argv: Sequence[str]) -> tuple[str | None, list[str], list[str]]:
  """--config, its overrides, and the other arguments."""
  config, words, rest = None, [], []
  arguments = iter(argv)
  for argument in arguments:
    name, equals, value = argument.lstrip('-').partition('=')
    if argument.startswith('-') and name == 'config':
      config = value if equals else next(arguments, '')
    elif argument.startswith('-') and name.startswith('config.'):
      words.append(argument if equals else f'{argument}={next(arguments, "")}')
    else:
      rest.append(argument)
  return config, words, rest


def _answer(values: flags.FlagValues, config: str | None, words: Sequence[str]) -> tuple[str, Any]:
  """Standard output, and sentences for standard error."""
  if values.published:
    return published_page(), ()
  if config is None:
    if not values.workdir:
      raise ValueError('--workdir is missing; give --workdir=W1,W2, or --config for the table of '
                       'a paper')
    if words or values.figure not in FIGURES:
      raise ValueError('--figure=speed and overrides need --config')
    from specdistill_jax.evaluation import formats
    measured, notes = summaries([storage.path(name) for name in values.workdir],
                                values.bootstrap_samples)
    if values.plots:
      notes += bars(measured, storage.path(values.plots), values.figure)
    return formats.written(*table(measured, values.figure), values.format), notes
  if not values.workdir:
    from specdistill_jax.stages import config_files
    entries = getattr(config_files.module(config)[0], 'PUBLISHED', ())
    if not entries:
      raise ValueError(f'{config} has no PUBLISHED figures; give --workdir for our own')
    return _published(entries), ()
  return paper_table(
      config, [storage.path(name) for name in values.workdir], words=words, figure=values.figure,
      form=values.format, samples=values.bootstrap_samples,
      plots=values.plots and storage.path(values.plots))


def main(argv: Sequence[str] | None = None) -> int:
  """The command. Returns the exit status: 0, or 2 after printing one `error:` line."""
  config, words, argv = _parted(list(sys.argv if argv is None else argv))
  values = make_flags()
  if '--help' in argv:
    print(f'{__doc__}\nflags:\n{values.get_help()}')
    return 0
  try:
    rest = values(argv)
    if len(rest) > 1:
      raise ValueError(f'{rest[1]!r} is no flag; give --workdir=W1,W2')
    text, notes = _answer(values, config, words)
  except (ValueError, flags.Error) as error:
    print(f'error: {" ".join(str(error).split())}', file=sys.stderr, flush=True)
    return 2
  print(text)
  for note in notes:
    print(note, file=sys.stderr, flush=True)
  return 0


if __name__ == '__main__':
  sys.exit(main())
