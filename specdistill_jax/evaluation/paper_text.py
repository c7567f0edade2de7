"""The lines of a paper's table as text, with what was published beside them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from specdistill_jax.evaluation import formats
from specdistill_jax.evaluation import paper_tables
from specdistill_jax.evaluation import summary as summary_lib

Lines = Sequence[paper_tables.Line]
Column = tuple[str, Callable[[paper_tables.Line], str]]
NOT_KNOWN = 'not known'
# Figures of training, see `stages.cells`: title and how one is written.
TRAINING = {'distill_seconds': ('distillation, s an arm', '{:.0f}'),
            'cross_entropy': ('held-out cross-entropy, nats', '{:.2f}')}


def known(entry: Mapping[str, Any]) -> str:
  """A published value as it stands in a line; one that is not known says so."""
  return NOT_KNOWN if entry['value'] is None else formats.figure(entry['value'])


def _measured(write: Callable[[summary_lib.Summary], str]) -> Callable[[paper_tables.Line], str]:
  """Empty where a line was not measured."""
  return lambda line: '' if line.summary is None else write(line.summary)


def _what(made: Lines) -> list[Column]:
  """Columns that say what a line is of; a line that was not measured says so."""
  def seeds(line):
    return line.status if 'seeds' in line.status else _measured(lambda s: str(s.num_seeds))(line)
  def alpha(line):
    if line.summary is None:
      return line.status
    is_alone = line.method == paper_tables.TARGET_ALONE
    return '' if is_alone else formats.brackets(line.summary.alpha, line.summary.alpha_interval)
  category = ('category', lambda line: line.about['category'] or 'all')
  return [
      ('cell', lambda line: line.about['cell']), ('task', lambda line: line.task),
      *([category] if any(line.about['category'] for line in made) else []),
      ('T', lambda line: f'{line.about["temperature"]:g}'),
      ('decoding', lambda line: paper_tables.shape(line.about)),
      ('method', lambda line: line.method), ('seeds', seeds), ('α', alpha)]


def _figures(made: Lines, with_speed: bool) -> list[Column]:
  """Columns of what was measured, beside alpha."""
  columns = [
      ('block efficiency', _measured(lambda s: formats.brackets(
          s.block_efficiency, s.block_efficiency_interval))),
      ('speed-up', _measured(lambda s: formats.brackets(
          s.speedup_measured, s.speedup_measured_interval, 'x')))]
  if with_speed:
    columns.append(('tokens/s', _measured(lambda s: f'{s.tokens_per_second:.0f}')))
  metrics = {line.summary.quality_metric for line in made
             if line.summary is not None and line.summary.quality is not None}
  if metrics:
    which = lambda s: f' {s.quality_metric}' if len(metrics) > 1 else ''
    title = f'{min(metrics)} (%)' if len(metrics) == 1 else 'quality (%)'
    columns.append((title, _measured(
        lambda s: '' if s.quality is None else f'{s.quality:.1f}{which(s)}')))
  for name, (title, form) in TRAINING.items():
    if any(name in line.training for line in made):
      columns.append((title, lambda line, name=name, form=form: (
          form.format(line.training[name]) if name in line.training and line.summary else '')))
  return columns


def _gains(made: Lines, figure: str, absolute: bool) -> list[Column]:
  """The gain, and over what where that differs."""
  show = formats.signed if absolute or figure == 'alpha' else formats.percent
  baselines = list(dict.fromkeys(line.baseline for line in made if line.baseline))
  over = baselines[0] if len(baselines) == 1 else 'the baseline'
  gain = (f'gain in {paper_tables.FIGURES[figure].title} over {over}',
          lambda line: show(*line.gain) if line.gain else '')
  return [gain] + [('baseline', lambda line: line.baseline)] * (len(baselines) > 1)


def _published(published: Sequence[Mapping[str, Any]]) -> list[Column]:
  joined = lambda write: lambda line: '; '.join(
      write(entry) for entry in paper_tables.beside(line, published))
  return [('published', joined(known)), ('published: what, where, trust', joined(
      lambda entry: f'{entry["figure"]}, {entry["source"]} ({entry["trust"]})'))]


def table(made: Lines, published: Sequence[Mapping[str, Any]], figure: str, *,
          absolute: bool) -> tuple[list[str], list[list[str]]]:
  """Header and lines.

  Args:
    published: entries as `configs.common.published` makes them.
    figure: a key of `paper_tables.FIGURES`, what gains are in; `absolute`: as differences.
  """
  columns = [*_what(made), *_figures(made, figure == 'speed'), *_gains(made, figure, absolute),
             *(_published(published) if published else ())]
  return [title for title, _ in columns], [[write(line) for _, write in columns] for line in made]
