"""A paper's table from result rows: a line for each method and way to decode of each cell.

A cell is a study of the table's sweep. Lines that the config asks for and nobody measured stand in
the table too, as missing or failed. `paper_text` writes them.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
from typing import Any, NamedTuple

import numpy as np

from specdistill_jax.decoding import tree_names
from specdistill_jax.evaluation import intervals
from specdistill_jax.evaluation import measures
from specdistill_jax.evaluation import rows as rows_lib
from specdistill_jax.evaluation import summary as summary_lib

TARGET_ALONE = 'target alone'
TARGET = 'target'  # the objective of such a line, which has no draft
IMPORTED = 'draft of another cell'
_WAY = ('gamma', *summary_lib.WAY)


class Setting(NamedTuple):
  """What a line is of; fields as in a results row."""
  objective: str
  data_source: str | None
  temperature: float
  gamma: int
  draft_sampling: str
  rule: str
  epsilon: float
  min_confidence: float
  tree: str


@dataclasses.dataclass(frozen=True)
class Cell:
  """A study of the table.

  Attributes:
    name: of the cell in the table.
    task: that it is about.
    wanted: settings in order, each with its seeds; none where it only trains.
    rows: that are of it.
    failure: what it failed of, if it did and is not complete.
    trains: whether it has a distillation; else its drafts come from another cell.
    training: by (objective, data source), further figures of the arm, see `stages.cells`.
  """
  name: str
  task: str
  wanted: Mapping[Setting, tuple[int, ...]]
  rows: Sequence[Mapping[str, Any]]
  failure: str | None = None
  trains: bool = True
  training: Mapping[tuple[str, str | None], Mapping[str, float]] = dataclasses.field(
      default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Line:
  """A line of the table.

  Attributes:
    about: the cell's name, the setting's fields and the category.
    has_categories: whether its setting has lines of single categories and their mean.
  """
  about: Mapping[str, Any]
  task: str
  method: str
  status: str = ''
  summary: summary_lib.Summary | None = None
  training: Mapping[str, float] = dataclasses.field(default_factory=dict)
  gain: tuple[float, intervals.Interval | None] | None = None
  baseline: str = ''
  has_categories: bool = False


def setting(row: Mapping[str, Any]) -> Setting:
  return Setting(*(row[name] for name in Setting._fields))


def matches(about: Mapping[str, Any], fields: Mapping[str, Any]) -> bool:
  """Whether a line has these fields; 'dynamic' stands for every dynamic tree."""
  def same(name, value):
    found = about.get(name)
    return found == value or (name == 'tree' and isinstance(found, str)
                              and found.startswith(f'{value} '))
  return all(same(*field) for field in fields.items())


def _summaries(cell: Cell, samples: int) -> dict[tuple[Setting, str | None], Any]:
  """By setting and category; an arm is summarised with its own rows alone."""
  arms: dict[tuple[str, str | None], list[Mapping[str, Any]]] = {}
  for row in cell.rows:
    arms.setdefault((row['objective'], row['data_source']), []).append(row)
  return {(Setting(*arm, s.temperature, *(getattr(s, name) for name in _WAY)), s.category): s
          for arm, mine in arms.items() for by_category in (False, True)
          for s in summary_lib.summarise(mine, samples=samples, by_category=by_category)}


def _alone(summary: summary_lib.Summary) -> summary_lib.Summary:
  """The target without a draft, as one more way to decode the same prompts."""
  counts_kpc = summary.counts_kpc.copy()
  at = rows_lib.COUNTS.index
  for name, source in (('emitted', 'autoregressive_emitted'), ('seconds', 'autoregressive_seconds'),
                       ('target_calls', 'autoregressive_emitted')):
    counts_kpc[..., at(name)] = counts_kpc[..., at(source)]
  return dataclasses.replace(
      summary, method=TARGET_ALONE, objective=TARGET, counts_kpc=counts_kpc, block_efficiency=1.0,
      block_efficiency_interval=None, speedup_measured=1.0, speedup_measured_interval=None,
      tokens_per_second=summary.autoregressive_tokens_per_second,
      quality=summary.target_quality, lossless=True)


def _name(cell: Cell, wanted: Setting) -> str:
  if not cell.trains:
    return IMPORTED
  return summary_lib.method(wanted._asdict())


def _cell_lines(cell: Cell, samples: int, with_target: bool) -> list[Line]:
  found, made, seen = _summaries(cell, samples), [], set()
  for wanted, seeds in cell.wanted.items():
    about = dict(cell=cell.name, **wanted._asdict(), category=None)
    fields = dict(task=cell.task, method=_name(cell, wanted),
                  training=cell.training.get(wanted[:2], {}))
    whole = found.get((wanted, None))
    if whole is None:
      made.append(Line(about, **fields, status='failed' if cell.failure else 'missing'))
      continue
    short = '' if whole.num_seeds >= len(seeds) else f'{whole.num_seeds} of {len(seeds)} seeds'
    categories = [s.category for place, s in found.items() if place[0] == wanted and s.category]
    mean = summary_lib.equally(whole, [found[wanted, category] for category in categories],
                               samples=samples) if len(categories) > 1 else None
    for category in (None, *([summary_lib.MEAN] if mean else []), *categories):
      s = mean if category == summary_lib.MEAN else found[wanted, category]
      if with_target and (wanted.temperature, category) not in seen:
        seen.add((wanted.temperature, category))
        alone = dict(cell=cell.name, temperature=wanted.temperature, objective=TARGET,
                     category=category)
        made.append(Line(alone, cell.task, TARGET_ALONE, summary=_alone(s)))
      made.append(Line(about | dict(category=category), **fields, status=short, summary=s,
                       has_categories=mean is not None))
  order = {line.method: index for index, line in enumerate(made)}
  order[TARGET_ALONE] = -1
  place = {category: index for index, category in enumerate((None, summary_lib.MEAN))}
  return sorted(made, key=lambda line: (line.about['temperature'],
                                        place.get(line.about['category'], len(place)),
                                        line.about['category'] or '', line.about.get('tree', ''),
                                        line.about.get('gamma', 0), order[line.method]))


def lines(cells: Iterable[Cell], *, samples: int, with_target: bool = False) -> list[Line]:
  """Every line of the table, measured or not; `with_target`: the target alone too."""
  return [line for cell in cells for line in _cell_lines(cell, samples, with_target)]


class Figure(NamedTuple):
  """What lines are compared in: columns of counts, whose ratio it is."""
  title: str
  columns: Callable[[np.ndarray], np.ndarray]


_SPEED = Figure('speed', lambda counts: measures.columns(counts, 'emitted', 'seconds'))
FIGURES = dict(
    block_efficiency=Figure('block efficiency', measures.block_efficiency_counts),
    alpha=Figure('α', measures.alpha_counts), speedup=_SPEED, speed=_SPEED)


def _difference(sums_c: np.ndarray) -> np.ndarray:
  return sums_c[..., 0] / sums_c[..., 1] - sums_c[..., 2] / sums_c[..., 3]


def _wanted_baseline(about: Mapping[str, Any], named: Mapping[str, Any]) -> dict[str, Any]:
  """Fields of the line that this one is compared with: its own way, but for what is named."""
  shared = ['cell', 'temperature', 'category']
  if named.get('objective') != TARGET:
    shared += ['min_confidence', *(() if 'rule' in named else ('rule', 'epsilon')),
               *(() if 'tree' in named else ('tree', 'gamma', 'draft_sampling'))]
  return {name: about.get(name) for name in shared} | dict(named)


def with_gains(made: Sequence[Line], baseline: Callable[[str], Mapping[str, Any]], figure: str, *,
               absolute: bool, samples: int) -> list[Line]:
  """Each measured line with its gain over its baseline's, paired by prompt, and its interval.

  None where the baseline was not measured, or on other prompts, or, of a speed, on another
  device. A ratio, or `absolute` a difference; of alpha always a difference.
  """
  columns = FIGURES[figure].columns
  statistic = _difference if absolute or figure == 'alpha' else intervals.ratio_of_ratios
  compared = []
  for line in made:
    if line.summary is None:
      compared.append(line)
      continue
    fields = _wanted_baseline(line.about, baseline(line.about['cell']))
    other = next((o for o in made if o.summary is not None and matches(o.about, fields)), None)
    if other is None or other is line or other.task != line.task or (
        other.summary.counts_kpc.shape[1:] != line.summary.counts_kpc.shape[1:]):
      compared.append(line)
      continue
    alike = FIGURES[figure] is not _SPEED or line.summary.devices == other.summary.devices
    gain = summary_lib.compare(line.summary, other.summary, columns, statistic,
                               samples=samples) if alike else None
    where = '' if other.about['cell'] == line.about['cell'] else f'{other.about["cell"]}: '
    how = shape(other.about)
    how = f', {how}' if how not in ('', shape(line.about)) else ''
    how += '' if alike else f', not compared: on {" and ".join(other.summary.devices)}'
    compared.append(dataclasses.replace(line, gain=gain, baseline=where + other.method + how))
  return compared


def beside(line: Line, published: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
  """What was published of this line: of all its prompts, unless a category is named.

  A mean of categories stands beside all prompts where a study has no categories.
  """
  def fields(entry):
    found = dict(category=None) | {name: value for name, value in entry.items()
                                   if name not in ('figure', 'value', 'source', 'trust')}
    is_mean = found['category'] == summary_lib.MEAN
    return found | dict(category=None) if is_mean and not line.has_categories else found
  return [entry for entry in published if line.method != TARGET_ALONE and matches(
      line.about, fields(entry))]


def shape(about: Mapping[str, Any]) -> str:
  """'γ=7', 'tree eagle1', and the rule where it is lossy."""
  if 'tree' not in about:
    return ''
  words = [f'γ={about["gamma"]}' if about['tree'] == tree_names.CHAIN else f'tree {about["tree"]}']
  if about['epsilon'] < 1:
    words.append(f'{about["rule"]} ε={about["epsilon"]:g}')
  elif about['rule'] != 'exact':
    words.append(about['rule'])
  if about['draft_sampling'] == 'greedy' and about['tree'] == tree_names.CHAIN:
    words.append('greedy drafts')
  if about['min_confidence']:
    words.append(f'stops below {about["min_confidence"]:g}')
  return ', '.join(words)
