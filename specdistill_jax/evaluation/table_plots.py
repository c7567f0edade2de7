"""Plots of papers' tables, in the look of the report's: heat map, bars, Pareto, scatter."""

from collections.abc import Callable, Sequence
import pathlib
from typing import Any

from matplotlib import pyplot as plt
import numpy as np

from specdistill_jax import storage
from specdistill_jax.evaluation import paper_tables
from specdistill_jax.evaluation import tradeoff

Lines = Sequence[paper_tables.Line]
_HATCHES = ('', '///', '...', 'xxx', '---')


def _by_temperature(made: Lines) -> dict[float, list[paper_tables.Line]]:
  found: dict[float, list[paper_tables.Line]] = {}
  for line in made:
    found.setdefault(line.about['temperature'], []).append(line)
  return dict(sorted(found.items()))


def _overall(made: Lines) -> list[paper_tables.Line]:
  """Measured lines of all prompts that have a draft."""
  return [line for line in made if line.summary is not None and line.about['category'] is None
          and line.method != paper_tables.TARGET_ALONE]


def _grid(made: Lines, sources: Sequence[str], objectives: Sequence[str]) -> np.ndarray:
  """Gains `[source, objective]`; NaN where there is none."""
  found = np.full((len(sources), len(objectives)), np.nan)
  for line in made:
    if line.gain is not None and line.about['objective'] in objectives:
      found[sources.index(line.about['data_source']),
            objectives.index(line.about['objective'])] = line.gain[0]
  return found


def heat_map(made: Lines, path: pathlib.Path, title: str) -> None:
  """Gain by data source (rows) and divergence (columns), a panel for each task and temperature."""
  chosen = [line for line in _overall(made) if line.gain is not None
            and line.about['objective'] not in ('none', 'cross_entropy')]
  sources = list(dict.fromkeys(line.about['data_source'] for line in chosen))
  objectives = list(dict.fromkeys(line.about['objective'] for line in chosen))
  panels = {(task, temperature): _grid(mine, sources, objectives)
            for task in dict.fromkeys(line.task for line in chosen)
            for temperature, mine in _by_temperature(
                [line for line in chosen if line.task == task]).items()}
  with plt.rc_context(tradeoff.STYLE | {'axes.grid': False}):
    figure, axes = plt.subplots(1, len(panels), squeeze=False, figsize=(
        1.2 + 3.9 * len(panels), 1.5 + 0.5 * len(sources)), layout='constrained')
    highest = max(np.nanmax(np.abs(grid)) for grid in panels.values()) or 1.0
    for axis, ((task, temperature), grid) in zip(axes[0], panels.items()):
      # Purple is a gain and orange a loss: apart for colour-blind readers too.
      image = axis.imshow(grid, cmap='PuOr', vmin=-highest, vmax=highest, aspect='auto')
      for (row, column), value in np.ndenumerate(grid):
        dark = abs(value) > 0.45 * highest
        axis.text(column, row, '–' if np.isnan(value) else f'{value:+.2f}', ha='center',
                  va='center', color='white' if dark else '#222222')
      axis.set_xticks(range(len(objectives)), objectives, rotation=20)
      axis.set_yticks(range(len(sources)), sources)
      axis.set_title(f'{task}, {tradeoff.title(temperature)}')
    figure.colorbar(image, ax=axes[0].tolist(), label=title, fraction=0.05)
    figure.savefig(path)
    plt.close(figure)


def bars(made: Lines, path: pathlib.Path, figure_name: str, ylabel: str) -> None:
  """A group of bars for each cell, a panel for each temperature; colours are methods, hatches ways.

  `figure_name`: a field of `Summary` that has an interval.
  """
  chosen = _overall(made)
  ways = _ways(chosen)
  with plt.rc_context(tradeoff.STYLE):
    cells = list(dict.fromkeys(line.about['cell'] for line in chosen))
    looks = tradeoff.looks_of(line.method for line in chosen)
    order = list(looks)
    colors = [color for color, _ in looks.values()]
    turns = {name: colors[:index].count(colors[index]) for index, name in enumerate(order)}
    panels = _by_temperature(chosen)
    figure, axes = tradeoff.panels(len(panels), width=max(4.1, 1.1 * len(cells)))
    handles: dict[str, Any] = {}
    for axis, (temperature, mine) in zip(axes, panels.items()):
      for start, cell in enumerate(cells):
        own = sorted((line for line in mine if line.about['cell'] == cell),
                     key=lambda line: order.index(line.method))
        width = 0.8 / max(len(own), 1)
        for index, line in enumerate(own):
          at = start + width * (index - (len(own) - 1) / 2)
          value = getattr(line.summary, figure_name)
          error = tradeoff.error(value, getattr(line.summary, f'{figure_name}_interval'))
          way = paper_tables.shape(line.about) if len(ways) > 1 else ways[0]
          name = f'{line.method}, {way}' if way else line.method
          hatch = ways.index(way) + len(ways) * turns[line.method]  # a colour's next turn too
          handles[name] = axis.bar(
              at, value, 0.9 * width, color=looks[line.method][0], zorder=2, edgecolor='white',
              hatch=_HATCHES[hatch % len(_HATCHES)], linewidth=0.4)
          axis.errorbar(at, value, yerr=np.transpose([error]), linestyle='none', color='#333333',
                        capsize=2, elinewidth=1.1, zorder=3)
      handles['target alone'] = axis.axhline(1.0, color='#222222', linestyle='--', linewidth=1.1)
      axis.set_xticks(range(len(cells)), cells, rotation=20 if len(cells) > 3 else 0)
      axis.grid(axis='x', visible=False)
      axis.set_title(tradeoff.title(temperature))
    axes[0].set_ylabel(ylabel)
    tradeoff.save(figure, handles, path, columns=3)


def _ways(chosen: Lines) -> list[str]:
  """The ways to decode, where a cell has several; else one without a name."""
  found: dict[str, set[str]] = {}
  for line in chosen:
    found.setdefault(line.about['cell'], set()).add(paper_tables.shape(line.about))
  if max(map(len, found.values())) == 1:
    return ['']
  return list(dict.fromkeys(paper_tables.shape(line.about) for line in chosen))


def pareto(made: Lines, path: pathlib.Path) -> None:
  """Quality against the time of a token; what nothing beats in both is joined.

  The target alone is a star; lossy points have their rule's shape and their epsilon beside them,
  and all others are then round.
  """
  chosen = [line for line in made if line.summary is not None and line.summary.quality is not None
            and line.about['category'] is None]
  several = len({line.about['cell'] for line in chosen}) > 1
  labels = {id(line): f'{line.about["cell"]}: {line.method}' if several else line.method
            for line in chosen}
  lossy = not all(line.summary.lossless for line in chosen)
  with plt.rc_context(tradeoff.STYLE):
    looks = tradeoff.looks_of(labels[id(line)] for line in chosen)
    panels = _by_temperature(chosen)
    figure, axes = tradeoff.panels(len(panels), width=4.8, height=3.8)
    handles, rules = {}, {}
    for axis, (temperature, mine) in zip(axes, panels.items()):
      places = []
      for line in mine:
        alone = line.method == paper_tables.TARGET_ALONE
        color, marker = looks[labels[id(line)]]
        at = 1e3 / line.summary.tokens_per_second, line.summary.quality
        places.append(at)
        rule = None if line.summary.lossless else line.about['rule']
        shape = tradeoff.RULES.get(rule, 'o' if lossy else marker)
        drawn = axis.scatter(*at, marker='*' if alone else shape,
                             s=140 if alone else 46, color=color, zorder=3)
        if rule is None:
          handles[labels[id(line)]] = drawn
          continue
        rules[rule] = plt.Line2D([], [], color='#333333', marker=tradeoff.RULES[rule],
                                   linestyle='none')
        axis.annotate(f'{line.about["epsilon"]:.2g}', at, xytext=(5, 3),
                      textcoords='offset points', fontsize=7, color='#555555')
      front = sorted(a for a in places if not any(
          b[0] <= a[0] and b[1] >= a[1] and b != a for b in places))
      axis.plot(*zip(*front), color='#222222', linewidth=1.1, zorder=2)
      axis.set_title(tradeoff.title(temperature))
      axis.set_xlabel('milliseconds a token')
    axes[0].set_ylabel(f'{chosen[0].summary.quality_metric} (%)')
    tradeoff.save(figure, handles | rules, path, columns=2)


def scatter(made: Lines, path: pathlib.Path, name: str, xlabel: str) -> None:
  """Block efficiency against a figure of training, `name` of `Line.training`.

  A draft that several cells decode is one point, with no cell's name.
  """
  alike: dict[tuple[Any, ...], list[paper_tables.Line]] = {}
  for line in _overall(made):
    if name in line.training:
      alike.setdefault((line.method, line.about['temperature'], line.training[name],
                        line.summary.block_efficiency), []).append(line)
  chosen = [first for first, *_ in alike.values()]
  labels = {id(first): first.method if others else f'{first.about["cell"]}: {first.method}'
            for first, *others in alike.values()}
  with plt.rc_context(tradeoff.STYLE):
    looks = tradeoff.looks_of(labels[id(line)] for line in chosen)
    panels = _by_temperature(chosen)
    figure, axes = tradeoff.panels(len(panels))
    handles: dict[str, Any] = {}
    for axis, (temperature, mine) in zip(axes, panels.items()):
      for line in mine:
        color, marker = looks[labels[id(line)]]
        error = tradeoff.error(line.summary.block_efficiency,
                               line.summary.block_efficiency_interval)
        handles[labels[id(line)]] = axis.errorbar(
            line.training[name], line.summary.block_efficiency, yerr=np.transpose([error]),
            color=color, marker=marker, linestyle='none', capsize=3, elinewidth=1.1)
      axis.set_title(tradeoff.title(temperature))
      axis.set_xlabel(xlabel)
    axes[0].set_ylabel('block efficiency\n(tokens per target call)')
    tradeoff.save(figure, handles, path, columns=2)


_BARS = {  # what gains are in -> field of `Summary`, label
    'block_efficiency': ('block_efficiency', 'block efficiency\n(tokens per target call)'),
    'alpha': ('alpha', 'α'), 'speedup': ('speedup_measured', 'speed-up over the target alone'),
    'speed': ('speedup_measured', 'speed-up over the target alone')}
_NEEDS: dict[str, Callable[[paper_tables.Line], bool]] = {
    'bars': lambda line: True,
    'heat_map': lambda line: line.gain is not None,
    'pareto': lambda line: line.summary.quality is not None,
    'cost': lambda line: 'distill_seconds' in line.training,
    'draft_quality': lambda line: 'cross_entropy' in line.training}


def draw(names: Sequence[str], made: Lines, folder: pathlib.Path, figure: str) -> list[str]:
  """The plots of these names that there is something to draw of; returns their paths.

  Args:
    names: bars, heat_map, pareto, cost (block efficiency over what an arm's distillation took),
      draft_quality (over the draft's held-out cross-entropy).
    figure: a key of `paper_tables.FIGURES`, what bars and gains are in.
  """
  plots = dict(
      bars=lambda path: bars(made, path, *_BARS[figure]),
      heat_map=lambda path: heat_map(
          made, path, f'gain in {paper_tables.FIGURES[figure].title}'),
      pareto=lambda path: pareto(made, path),
      cost=lambda path: scatter(made, path, 'distill_seconds', 'distillation, seconds an arm'),
      draft_quality=lambda path: scatter(made, path, 'cross_entropy',
                                         'held-out cross-entropy of the draft, nats'))
  measured, drawn = [line for line in made if line.summary is not None], []
  folder.mkdir(parents=True, exist_ok=True)
  for name in names:
    if any(map(_NEEDS[name], measured)):
      with storage.made(folder / f'{name}.png') as path:
        plots[name](path)
      drawn.append(str(folder / f'{name}.png'))
  return drawn
