"""`report.html`: the report for people, one file that needs no network.

The same rows as in `report.md`: a table that sorts, an explorer of all settings, curves, sample
texts with the origin of each token, and drafted trees. `page/` holds the page itself; it names
its own scripts by their hashes, so that a browser runs no other one, whatever a model wrote.
"""

import base64
from collections.abc import Iterable, Mapping, Sequence
import hashlib
import html
import json
import pathlib
import re
from typing import Any

from plotly import offline

from specdistill_jax import storage
from specdistill_jax.evaluation import drafted
from specdistill_jax.evaluation import summary as summary_lib
from specdistill_jax.stages import html_figures

PAGE = pathlib.Path(__file__).parent / 'page'
Table = tuple[Sequence[str], Sequence[Sequence[str]]]  # header and lines
_WORDS = ('method', 'rule')  # columns of words; the others are numbers
_WORDY, _ALONE = ' class="words"', ' class="alone"'
_ORIGINS = {True: ('drafted', 'drafted and kept'), False: ('own', "the target's own")}


def _inline(text: str) -> str:
  """A sentence of Markdown, as `report.md` has it: code, bold and italic."""
  text = html.escape(text)
  text = re.sub(r'`([^`]+)`', r'<code>\1</code>', text)
  text = re.sub(r'\*\*(.+?)\*\*', r'<strong>\1</strong>', text)
  return re.sub(r'(?<![\w*])\*(?!\s)([^*]+?)\*(?![\w*])', r'<em>\1</em>', text)


def _answer(text: str) -> str:
  """A question and its answer: paragraphs, and a list where there is much to say."""
  parts = []
  for block in text.split('\n\n'):
    if block.startswith('- '):
      items = ''.join(f'<li>{_inline(line[2:])}</li>' for line in block.splitlines())
      parts.append(f'<ul>{items}</ul>')
    else:
      parts.append(f'<p>{_inline(block)}</p>')
  return ''.join(parts)


def _color(method: str, colors: Mapping[str, str]) -> str | None:
  """Of a cell that names a method; None where that is the target alone."""
  return colors.get(method.removesuffix(', lossy'))


def _cell(name: str, text: str, colors: Mapping[str, str]) -> str:
  kind = _WORDY * (name in _WORDS)
  color = _color(text, colors) if name == 'method' else None
  swatch = f'<span class="swatch" style="background:{color}"></span>' if color else ''
  shown = re.sub(r'(\[[^]]*\])$', r'<small>\1</small>', html.escape(text))
  return f'<td{kind}>{swatch}{shown}</td>'


def _table(name: str, table: Table, colors: Mapping[str, str]) -> str:
  """A table whose first column is the temperature."""
  header, lines = table
  heads = ''.join(
      f'<th scope="col"{_WORDY * (title in _WORDS)} aria-sort="none">'
      f'<button type="button">{html.escape(title)}</button></th>' for title in header)
  method = header.index('method')
  rows = '\n'.join(
      f'<tr data-temperature="{html.escape(line[0])}"'
      f'{_ALONE * (_color(line[method], colors) is None)}>'
      f'{"".join(_cell(title, text, colors) for title, text in zip(header, line))}</tr>'
      for line in lines)
  return (f'<div class="scroll"><table class="sortable" id="{name}"><thead><tr>{heads}</tr>'
          f'</thead>\n<tbody>\n{rows}\n</tbody></table></div>')


def _section(name: str, title: str, *parts: str) -> str:
  return f'<section id="{name}">\n<h2>{title}</h2>\n' + '\n'.join(parts) + '\n</section>\n'


def _note(text: str) -> str:
  return f'<p class="note">{text}</p>'


def _pieces(sample: Mapping[str, Any]) -> str:
  spans = []
  for piece, is_drafted in zip(sample['pieces'], sample['drafted'], strict=True):
    kind, told = _ORIGINS[is_drafted]
    shown = html.escape(piece).replace('\n', '⏎\n')
    spans.append(f'<span class="{kind}" title="{told}">{shown}</span>')
  return ''.join(spans)


def _sample(sample: Mapping[str, Any], colors: Mapping[str, str]) -> str:
  method, count = summary_lib.method(sample), len(sample['tokens'])
  shape = f'γ = {sample["gamma"]}' if sample['tree'] == 'chain' else f'tree {sample["tree"]}'
  rule = sample['rule'] if sample['lossless'] else (
      f'{sample["rule"]} ε={sample["epsilon"]:.2g}, lossy')
  calls = sample['target_calls']
  facts = (f'{rule}, {shape}: {count} tokens, {sum(sample["drafted"])} of them drafted, in {calls} '
           'calls of the target')
  return (f'<article class="sample" data-prompt="{sample["number"]}" '
          f'data-temperature="{sample["temperature"]:g}">\n'
          f'<h3><span class="swatch" style="background:{colors[method]}"></span>'
          f'{html.escape(method)}</h3>\n{_note(html.escape(facts))}\n'
          f'<div class="text">{_pieces(sample)}</div>\n</article>')


def _samples(samples: Sequence[Mapping[str, Any]], colors: Mapping[str, str]) -> str:
  if not samples:
    return _section('samples', 'Sample texts', _note(
        'None is stored: this study was evaluated by a version that kept none.'))
  prompts = {sample['number']: sample['prompt'] for sample in samples}
  return _section(
      'samples', 'Sample texts',
      '<p class="note"><span class="drafted">Underlined on green</span>: drafted, and kept by '
      'the target. <span class="own">Bold orange</span>: the target\'s own token, a correction '
      'or the bonus token. ∎ is the end token.</p>',
      '<form class="controls" aria-label="samples shown">'
      '<label>temperature <select id="sample-temperature"></select></label>'
      '<label>prompt <select id="sample-prompt"></select></label></form>',
      *(f'<div class="sample" data-prompt="{number}"><h3>Prompt {number}</h3>'
        f'<div class="text prompt">{html.escape(prompt)}</div></div>'
        for number, prompt in sorted(prompts.items())),
      *(_sample(sample, colors) for sample in samples))


def _trees(trees: Sequence[tuple[str, str, drafted.Tree]], figures: dict[str, Any]) -> str:
  """Adds to `figures`."""
  parts = []
  for number, (_, caption, seen) in enumerate(trees, start=1):
    figures[f'tree-{number}'], width, height = html_figures.tree(seen)
    parts.append(f'<figure><div class="scroll"><div id="tree-{number}" class="plot" '
                 f'style="min-width:{width}px;height:{height}px"></div></div>'
                 f'<figcaption class="note">{_inline(caption)}</figcaption></figure>')
  return _section('trees', 'Drafted trees', *parts) if parts else ''


def _training(training: Mapping[str, html_figures.Curves], colors: Mapping[str, str],
              figures: dict[str, Any]) -> str:
  """Adds to `figures`."""
  parts = []
  for number, (title, curves) in enumerate(training.items(), start=1):
    if curves:
      figures[f'training-{number}'] = html_figures.curves(curves, colors, title)
      parts.append(f'<div id="training-{number}" class="plot"></div>')
  return _section('training', 'Training', f'<div class="pair">{"".join(parts)}</div>', _note(
      'Means over seeds, single seeds thin. Losses of different objectives are different '
      'quantities; held-out α is the same for all.')) if parts else ''


def _plots(plots: Iterable[tuple[str, bytes]]) -> str:
  """PNGs with captions, folded away."""
  parts = [f'<figure><img alt="{html.escape(caption)}" src="data:image/png;base64,'
           f'{base64.b64encode(content).decode()}">'
           f'<figcaption class="note">{_inline(caption)}</figcaption></figure>'
           for caption, content in plots]
  return _section('plots', 'Plots', '<details><summary>The plots of report.md</summary>',
                  *parts, '</details>') if parts else ''


def _categories(table: Table | None, colors: Mapping[str, str]) -> str:
  return '' if table is None else _section(
      'categories', 'By category', _table('categories-table', table, colors),
      _note('Block efficiency and measured speed-up on the prompts of each category.'))


def _data(summaries: Sequence[summary_lib.Summary], **more: Any) -> str:
  """What the page's script reads."""
  metric = next((s.quality_metric for s in summaries if s.quality is not None), None)
  return _json(dict(
      points=html_figures.points(summaries), alone=html_figures.alone(summaries),
      layout=html_figures.LAYOUT, quality_metric=metric, **more))


def _json(document: Any) -> str:
  """JSON that stays inside its script element, whatever it says."""
  text = json.dumps(document, allow_nan=False, ensure_ascii=False)
  return text.replace('&', r'\u0026').replace('<', r'\u003c').replace('>', r'\u003e')


def _policy(*scripts: str) -> str:
  """Only these scripts run, nothing is fetched."""
  hashes = ' '.join(
      f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
      for script in scripts)
  return (f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; "
          "img-src data: blob:; base-uri 'none'; form-action 'none'")


def write(path: pathlib.Path, summaries: Sequence[summary_lib.Summary], *, title: str,
          setting: str, answers: Sequence[str], results: Table, notes: str,
          categories: Table | None, training: Mapping[str, html_figures.Curves],
          samples: Sequence[Mapping[str, Any]], trees: Sequence[tuple[str, str, drafted.Tree]],
          plots: Iterable[tuple[str, bytes]], footer: str,
          max_quality_drop: float | None) -> None:
  """Writes the page.

  Args:
    summaries: of all settings.
    title, setting, answers, notes, footer: Markdown, as in `report.md`.
    results, categories: tables with a column `method`, the first column being the temperature.
    training: by what is drawn against the step, by method or run, points of each seed.
    samples: lines of `samples.jsonl`.
    trees: title, caption and tree of each.
    plots: caption and PNG of each.
    max_quality_drop: draws the least quality within this share of the target's; None: no line.
  """
  colors = html_figures.colors([
      *(s.method for s in summaries), *map(summary_lib.method, samples),
      *(name for curves in training.values() for name in curves
        if name not in html_figures.BEFORE)])
  figures: dict[str, Any] = {}
  library, script = offline.get_plotlyjs(), (PAGE / 'page.js').read_text(encoding='utf-8')
  filled = dict(
      title=html.escape(title), setting=_inline(setting), notes=_inline(notes),
      answers='\n'.join(map(_answer, answers)),
      results=_table('results-table', results, colors),
      categories=_categories(categories, colors),
      training=_training(training, colors, figures), samples=_samples(samples, colors),
      trees=_trees(trees, figures), plots=_plots(plots), footer=_inline(footer),
      budget_note='' if max_quality_drop is None else (
          f' Dotted: {100 * max_quality_drop:g} % below the target\'s quality.'),
      style=(PAGE / 'page.css').read_text(encoding='utf-8'), library=library, script=script,
      policy=_policy(library, script))
  filled['data'] = _data(summaries, colors=colors, figures=figures,
                         max_quality_drop=max_quality_drop)
  template = (PAGE / 'page.html').read_text(encoding='utf-8')
  # All at once: what is filled in may itself look like a place to be filled.
  page = re.sub(r'\{\{(\w+)\}\}', lambda found: filled[found[1]], template)
  storage.write(path, page)
