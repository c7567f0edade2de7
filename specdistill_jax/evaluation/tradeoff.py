"""Plots of the report, drawn from summaries; `table_plots` draws papers' tables in this look.

One colour and one marker a method in every plot, from the palette of Okabe and Ito, which
colour-blind readers can tell apart.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import os
import pathlib
from typing import Any

import matplotlib
if 'MPLBACKEND' not in os.environ:  # a notebook has its own, which shows figures
  matplotlib.use('Agg')
from matplotlib import pyplot as plt  # pylint: disable=g-import-not-at-top
from matplotlib import ticker
import numpy as np

from specdistill_jax.evaluation import frontier
from specdistill_jax.evaluation import intervals
from specdistill_jax.evaluation import summary as summary_lib

_FIXED = {summary_lib.STANDARD: ('#7a7a7a', 'o'), summary_lib.CONTROL: ('#E69F00', 's')}
_OTHERS = (('#0072B2', 'D'), ('#009E73', '^'), ('#CC79A7', 'v'), ('#D55E00', 'P'))
STYLE = {
    'font.size': 10.5, 'axes.titlesize': 11, 'axes.titleweight': 'bold',
    'axes.spines.top': False, 'axes.spines.right': False, 'axes.grid': True,
    'axes.axisbelow': True, 'grid.color': '#e6e6e6', 'grid.linewidth': 0.8,
    'axes.edgecolor': '#555555', 'lines.linewidth': 1.8, 'lines.markersize': 6,
    'legend.frameon': False, 'figure.dpi': 150, 'savefig.bbox': 'tight',
}
Summaries = Sequence[summary_lib.Summary]


def looks_of(methods: Iterable[str]) -> dict[str, tuple[str, str]]:
  """Colour and marker of each method, in the order of first appearance; 16 before they repeat."""
  looks, others = {}, 0
  for name in methods:
    if name in looks:
      continue
    if name not in _FIXED:
      turn = others // len(_OTHERS)
      color, marker = _OTHERS[others % len(_OTHERS)][0], _OTHERS[(others + turn) % len(_OTHERS)][1]
      others += 1
    looks[name] = _FIXED.get(name) or (color, marker)
  return looks


def error(value: float, interval: intervals.Interval | None) -> tuple[float, float]:
  """Lengths of an error bar below and above; a value outside its interval gets none there."""
  if interval is None:
    return 0.0, 0.0
  return max(value - interval[0], 0.0), max(interval[1] - value, 0.0)


def panels(count: int, width: float = 4.1, height: float = 3.3):
  figure, axes = plt.subplots(1, count, figsize=(width * count + 0.6, height), sharey=True,
                              squeeze=False)
  return figure, list(axes[0])


def _temperatures(summaries: Summaries) -> list[float]:
  return sorted({summary.temperature for summary in summaries})


def title(temperature: float) -> str:
  return 'greedy (temperature 0)' if temperature == 0 else f'temperature {temperature:g}'


def save(figure, handles: Mapping[str, Any], path: pathlib.Path, columns: int = 5) -> None:
  """One legend under all panels, then the file."""
  figure.tight_layout()
  last = [name for name in ('target alone', 'predicted') if name in handles]
  names = [name for name in handles if name not in last] + last
  figure.legend([handles[name] for name in names], names, loc='upper center',
                bbox_to_anchor=(0.5, 0.02), ncols=min(len(names), columns), columnspacing=1.4,
                handletextpad=0.5)
  figure.savefig(path)
  plt.close(figure)


def _by_temperature(summaries: Summaries, path: pathlib.Path, ylabel: str, xlabel: str,
                    draw: Callable[[Any, Summaries, dict[str, tuple[str, str]], dict[str, Any]],
                                   None]) -> None:
  """A panel for each temperature; `draw(axis, summaries, looks, handles)` fills it."""
  with plt.rc_context(STYLE):
    temperatures = _temperatures(summaries)
    figure, axes = panels(len(temperatures))
    looks, handles = looks_of(summary.method for summary in summaries), {}
    for axis, temperature in zip(axes, temperatures):
      draw(axis, [s for s in summaries if s.temperature == temperature], looks, handles)
      axis.set_title(title(temperature))
      axis.set_xlabel(xlabel)
    axes[0].set_ylabel(ylabel)
    save(figure, handles, path)


def _line(axis, xs, ys, errors, name, looks, handles) -> None:
  color, marker = looks[name]
  handles[name] = axis.errorbar(
      xs, ys, yerr=None if errors is None else np.transpose(errors), color=color, marker=marker,
      capsize=3, elinewidth=1.1, markeredgecolor='white', markeredgewidth=0.8)


def block_efficiency(summaries: Summaries, path: pathlib.Path) -> None:
  """tau against the draft length, with 95 % intervals."""
  def draw(axis, chosen, looks, handles):
    gammas = sorted({s.gamma for s in chosen})
    for index, name in enumerate(looks):
      mine = [s for s in chosen if s.method == name]
      shift = 0.06 * (index - (len(looks) - 1) / 2)  # so that error bars don't hide each other
      _line(axis, [s.gamma + shift for s in mine], [s.block_efficiency for s in mine],
            [error(s.block_efficiency, s.block_efficiency_interval) for s in mine],
            name, looks, handles)
    axis.set_xticks(gammas)
  _by_temperature(summaries, path, 'block efficiency\n(tokens per target call)',
                  'draft length γ', draw)


def acceptance_by_position(summaries: Summaries, path: pathlib.Path) -> None:
  """Acceptance at each draft position that was reached, for the longest draft length.

  Error bars are Wilson intervals: late positions are reached rarely.
  """
  longest = max(s.gamma for s in summaries)

  def draw(axis, chosen, looks, handles):
    for s in chosen:
      if s.gamma == longest:
        ys = [np.nan if y is None else y for y in s.acceptance_by_position]
        errors = [error(y, intervals.wilson(y, reached)) for y, reached in zip(
            ys, s.reached_by_position)]
        shift = 0.08 * (list(looks).index(s.method) - (len(looks) - 1) / 2)
        _line(axis, np.arange(1, longest + 1) + shift, ys, errors, s.method, looks, handles)
    axis.set_xticks(range(1, longest + 1))
    axis.set_ylim(0, 1)
    axis.yaxis.set_major_formatter(ticker.PercentFormatter(1.0))
  _by_temperature(summaries, path, 'accepted, given reached', f'draft position (γ = {longest})',
                  draw)


def speedups(summaries: Summaries, path: pathlib.Path) -> None:
  """Measured speed-up over the target alone, with 95 % intervals, and what was predicted."""
  def draw(axis, chosen, looks, handles):
    gammas = sorted({s.gamma for s in chosen})
    width = 0.8 / len(looks)
    for index, name in enumerate(looks):
      mine = [s for s in chosen if s.method == name]
      xs = [gammas.index(s.gamma) + width * (index - (len(looks) - 1) / 2) for s in mine]
      handles[name] = axis.bar(xs, [s.speedup_measured for s in mine], 0.9 * width,
                               color=looks[name][0], zorder=2)
      axis.errorbar(xs, [s.speedup_measured for s in mine], linestyle='none', color='#333333',
                    yerr=np.transpose([error(s.speedup_measured, s.speedup_measured_interval)
                                       for s in mine]), capsize=3, elinewidth=1.1, zorder=3)
      handles['predicted'] = axis.scatter(
          xs, [s.speedup_predicted for s in mine], marker='D', s=26, facecolor='white',
          edgecolor='#222222', linewidth=1.1, zorder=4)
    handles['target alone'] = axis.axhline(1.0, color='#222222', linestyle='--', linewidth=1.1,
                                           zorder=3)
    axis.set_xticks(range(len(gammas)), [str(gamma) for gamma in gammas])
    axis.grid(axis='x', visible=False)
  _by_temperature(summaries, path, 'speed-up over the target alone', 'draft length γ', draw)


RULES = dict(exact='o', block='s', linear='^', square='v', exponential='D', typical='P',
              top_k='X', greedy_lenience='<')


def _points(axis, chosen: Summaries, looks, handles) -> None:
  """A marker a setting: colour for its method, shape for its rule, hollow for greedy drafts."""
  for s in chosen:
    color, _ = looks[s.method]
    at = 1e3 / s.tokens_per_second, s.quality
    hollow = s.draft_sampling == 'greedy'
    axis.scatter(*at, marker=RULES[s.rule], s=46, linewidth=1.2, edgecolor=color, zorder=3,
                 facecolor='white' if hollow else color)
    if label := ' '.join([f'{s.epsilon:.2g}'] * (not s.lossless) + ['tree'] * s.is_tree):
      axis.annotate(label, at, xytext=(5, 3), textcoords='offset points',
                    fontsize=7, color='#555555')
    handles.setdefault(s.method, plt.Line2D([], [], color=color, linewidth=4))
    handles.setdefault(s.rule, plt.Line2D([], [], color='#333333', marker=RULES[s.rule],
                                          linestyle='none'))


def tradeoff(summaries: Summaries, path: pathlib.Path, max_quality_drop: float | None) -> None:
  """Quality against the time of a token, the frontier through what nothing beats in both.

  Args:
    summaries: all with a quality.
    max_quality_drop: draws the least quality within this share of the target's; None: no line.
  """
  def draw(axis, chosen, looks, handles):
    _points(axis, chosen, looks, handles)
    alone = frontier.target_alone(chosen)
    best = [(s.tokens_per_second, s.quality) for s in frontier.undominated(chosen)]
    if not any(frontier.dominates(place, alone) for place in best):
      best = sorted([alone, *best])
    axis.plot([1e3 / speed for speed, _ in best], [quality for _, quality in best],
              color='#222222', linewidth=1.1, zorder=2)
    handles['target alone'] = axis.scatter(1e3 / alone[0], alone[1], marker='*', s=150,
                                           color='#222222', zorder=4)
    if max_quality_drop is not None:
      handles['quality budget'] = axis.axhline((1 - max_quality_drop) * alone[1], zorder=1,
                                               color='#D55E00', linestyle=':', linewidth=1.3)
  _by_temperature(summaries, path, f'{summaries[0].quality_metric} (%)',
                  'milliseconds a token (batch of prompts)', draw)


def training_curves(curves: Mapping[str, Sequence[Sequence[tuple[int, float]]]],
                    path: pathlib.Path) -> None:
  """Held-out alpha during distillation.

  Args:
    curves: by method, a list of (step, alpha) for each seed.
  """
  with plt.rc_context(STYLE):
    figure, (axis,) = panels(1, width=5.2)
    looks, handles = looks_of(curves), {}
    for name, seeds in curves.items():
      color, _ = looks[name]
      for points in seeds if len(seeds) > 1 else ():
        axis.plot(*zip(*points), color=color, linewidth=0.9, alpha=0.45)
      steps = sorted(set.intersection(*({step for step, _ in points} for points in seeds)))
      mean = [np.mean([dict(points)[step] for points in seeds]) for step in steps]
      _line(axis, steps, mean, None, name, looks, handles)
    axis.set_xlabel('step of distillation')
    axis.set_ylabel('α on held-out prompts')
    save(figure, handles, path)
