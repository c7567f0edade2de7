"""What `report.html` draws: points of the explorer, and figures of Plotly that are complete.

A method has the colour that it has in the plots of `report.md`.
"""

from collections.abc import Iterable, Mapping, Sequence
import html
from typing import Any

import numpy as np
from plotly import graph_objects

from specdistill_jax.evaluation import drafted
from specdistill_jax.evaluation import summary as summary_lib
from specdistill_jax.evaluation import tradeoff
from specdistill_jax.evaluation import tree_picture

Curves = Mapping[str, Sequence[Sequence[tuple[int, float]]]]
INK, SOFT = '#1a1a1a', '#555555'
BEFORE = {'target': INK, 'draft': '#7a7a7a'}  # training runs that no method is named after
_LONGEST = 16  # characters of a word in a tree
_AXIS = dict(gridcolor='#e6e6e6', linecolor='#999999', zeroline=False, ticks='outside',
             tickcolor='#999999', automargin=True, title=dict(standoff=8))
LAYOUT = dict(
    template='none', paper_bgcolor='white', plot_bgcolor='white', font=dict(color=INK, size=13),
    margin=dict(l=56, r=16, t=36, b=48), xaxis=_AXIS, yaxis=_AXIS,
    hoverlabel=dict(bgcolor='white', bordercolor=SOFT, font=dict(color=INK), align='left'),
    legend=dict(orientation='h', x=0, y=-0.2, yanchor='top'))


def colors(methods: Iterable[str]) -> dict[str, str]:
  """A colour for each method, in the order of first appearance."""
  return {name: color for name, (color, _) in tradeoff.looks_of(methods).items()}


def _ranged(value: float, interval: tuple[float, float] | None, unit: str = '') -> str:
  if interval is None:
    return f'{value:.2f}{unit}'
  return f'{value:.2f}{unit} [{interval[0]:.2f}, {interval[1]:.2f}]'


def _shape(s: summary_lib.Summary) -> str:
  return f'tree {s.tree}' if s.is_tree else f'γ = {s.gamma}'


def _hover(s: summary_lib.Summary) -> str:
  """The whole setting and what came of it, as Plotly reads it."""
  shape = f'tree {s.tree}, {s.gamma} levels' if s.is_tree else f'γ = {s.gamma}'
  stops = f', stops below {s.min_confidence:g}' * (s.min_confidence > 0)
  show = lambda value: 'not measured' if value is None else f'{value:.1f}'
  lines = [
      f'temperature {s.temperature:g}, {shape}, {s.draft_sampling} drafts{stops}',
      f'rule {s.rule}, ε = {s.epsilon:.3g}, {"lossless" if s.lossless else "lossy"}',
      f'speed-up {_ranged(s.speedup_measured, s.speedup_measured_interval, "x")}, '
      f'predicted {s.speedup_predicted:.2f}x',
      f'{1e3 / s.tokens_per_second:.3g} ms a token, the target alone '
      f'{1e3 / s.autoregressive_tokens_per_second:.3g} ms',
      f'block efficiency {_ranged(s.block_efficiency, s.block_efficiency_interval)}',
      f'α {_ranged(s.alpha, s.alpha_interval)}']
  if s.quality_metric is not None:
    lines.append(f'{s.quality_metric} {show(s.quality)} %, target {show(s.target_quality)} %')
  lines.append(f'{s.num_seeds} seed{"s" * (s.num_seeds > 1)}')
  escaped = [html.escape(line, quote=False) for line in (s.method, *lines)]
  return '<br>'.join([f'<b>{escaped[0]}</b>', *escaped[1:]])


def points(summaries: Sequence[summary_lib.Summary]) -> list[dict[str, Any]]:
  """Of each setting what the explorer places, tells apart, and says of it.

  `ms` is the time of a token of the batch.
  """
  return [dict(
      method=s.method, temperature=s.temperature, shape=_shape(s), rule=s.rule,
      lossless=s.lossless, greedy=s.draft_sampling == 'greedy',
      label='' if s.lossless else f'{s.epsilon:.2g}', ms=1e3 / s.tokens_per_second,
      speedup=s.speedup_measured, speedup_interval=s.speedup_measured_interval,
      tau=s.block_efficiency, tau_interval=s.block_efficiency_interval,
      quality=s.quality, hover=_hover(s)) for s in summaries]


def alone(summaries: Sequence[summary_lib.Summary]) -> list[dict[str, Any]]:
  """The target without a draft at each temperature, likewise."""
  first = {s.temperature: s for s in reversed(summaries)}
  found = []
  for temperature, s in sorted(first.items()):
    ms = 1e3 / s.autoregressive_tokens_per_second
    quality = '' if s.target_quality is None else (
        f'<br>{html.escape(str(s.quality_metric))} {s.target_quality:.1f} %')
    found.append(dict(temperature=temperature, ms=ms, speedup=1.0, tau=1.0,
                      quality=s.target_quality, hover=(
                          f'<b>target alone</b><br>temperature {temperature:g}'
                          f'<br>{ms:.3g} ms a token{quality}')))
  return found


def curves(curves_by_name: Curves, of: Mapping[str, str], title: str) -> dict[str, Any]:
  """A figure against the step of training: means over seeds, single seeds thin.

  Args:
    of: colours of methods.
  """
  figure = graph_objects.Figure(layout=LAYOUT)
  for name, seeds in curves_by_name.items():
    color = of.get(name) or BEFORE[name]
    for points_of_seed in seeds if len(seeds) > 1 else ():
      xs, ys = zip(*points_of_seed)
      figure.add_scatter(x=xs, y=ys, mode='lines', hoverinfo='skip', showlegend=False,
                         legendgroup=name, opacity=0.45, line=dict(color=color, width=1))
    steps = sorted(set.intersection(*({step for step, _ in line} for line in seeds)))
    mean = [float(np.mean([dict(line)[step] for line in seeds])) for step in steps]
    told = html.escape(name, quote=False) + f', mean of {len(seeds)} seeds' * (len(seeds) > 1)
    figure.add_scatter(
        x=steps, y=mean, mode='lines+markers', name=html.escape(name, quote=False),
        legendgroup=name, line=dict(color=color, width=2), marker=dict(size=5),
        hovertemplate=f'{told}<br>step %{{x}}: %{{y:.3f}}<extra></extra>')
  figure.update_layout(hovermode='closest', showlegend=True)
  figure.update_xaxes(title_text='step')
  figure.update_yaxes(title_text=title)
  return figure.to_plotly_json()


def _word(word: str, longest: int | None = None) -> str:
  """A word on one line, spaces visible, escaped."""
  word = word.replace('\n', '⏎').replace(' ', '␣') or '∅'
  if longest is not None and len(word) > longest:
    word = f'{word[:longest - 1]}…'
  return html.escape(word, quote=False)


def _box(place, text: str, color: str, strong: bool, hover: str) -> dict[str, Any]:
  return dict(x=place[0], y=place[1], text=text, showarrow=False, borderpad=3, borderwidth=1.5,
              bordercolor=color, bgcolor=color if strong else 'white', hovertext=hover,
              captureevents=True,
              font=dict(size=12, color='white' if strong else INK))


def _edge(figure, one, other, color: str, width: float, dash: str = 'solid') -> None:
  figure.add_scatter(x=[one[0], other[0]], y=[one[1], other[1]], mode='lines', hoverinfo='skip',
                     line=dict(color=color, width=width, dash=dash))


def tree(seen: drafted.Tree) -> tuple[dict[str, Any], int, int]:
  """A drafted tree from left to right, its width and height in pixels at least."""
  kept_color, next_color = '#00735a', '#b34a00'  # white on them can be read
  figure, place = graph_objects.Figure(layout=LAYOUT), tree_picture.places(seen.parents)
  kept, levels = set(seen.kept), int(place[:, 0].max())
  boxes = [_box(place[0], _word(seen.words[0], _LONGEST), INK, True, 'the last committed token')]
  for node, parent in sorted(enumerate(seen.parents, start=1), key=lambda pair: pair[0] in kept):
    strong = node in kept
    _edge(figure, place[parent], place[node], kept_color if strong else '#c4c4c4',
          2.5 if strong else 1.0)
    text, hover = _word(seen.words[node], _LONGEST), f'<b>{_word(seen.words[node])}</b>'
    if seen.probabilities is not None:
      text += f'  {seen.probabilities[node - 1]:.2f}'
      hover += f'<br>probability {seen.probabilities[node - 1]:.4f} after its parent'
    hover += f'<br>level {int(place[node][0])}, ' + ('kept' if strong else 'not kept')
    boxes.append(_box(place[node], f'<b>{text}</b>' if strong else text,
                      kept_color if strong else '#8a8a8a', strong, hover))
  if seen.next_word is not None:
    beside, last = np.array([levels + 1.0, place[seen.kept[-1], 1]]), place[seen.kept[-1]]
    _edge(figure, last, beside, next_color, 1.5, 'dot')
    boxes.append(_box(beside, f'<b>{_word(seen.next_word, _LONGEST)}</b>', next_color, True,
                      f'<b>{_word(seen.next_word)}</b><br>what the target put behind them'))
  names = ['committed', *(f'level {level}' for level in range(1, levels + 1)), 'the target']
  top, bottom = place[:, 1].max(), place[:, 1].min()
  figure.update_layout(
      annotations=boxes + [dict(x=level, y=top + 1.0, text=name, showarrow=False,
                                font=dict(color=SOFT, size=12))
                           for level, name in enumerate(names)],
      showlegend=False, dragmode='pan', margin=dict(l=8, r=8, t=32, b=8),
      xaxis=dict(visible=False, range=[-0.6, levels + 1.6]),
      yaxis=dict(visible=False, range=[bottom - 0.8, top + 1.6]))
  return figure.to_plotly_json(), 145 * (levels + 2), int(27 * (top - bottom + 3)) + 40
