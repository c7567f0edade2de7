"""Tables as text: Markdown, LaTeX (booktabs), CSV; and how figures stand in them."""

from collections.abc import Sequence
import csv
import io

from specdistill_jax.evaluation import intervals

FORMATS = ('markdown', 'latex', 'csv')
# What LaTeX reads otherwise, one pass over the characters.
_LATEX = {
    '\\': r'\textbackslash{}', '{': r'\{', '}': r'\}', '$': r'\$', '&': r'\&', '#': r'\#',
    '%': r'\%', '_': r'\_', '^': r'\textasciicircum{}', '~': r'\textasciitilde{}',
    '<': r'\textless{}', '>': r'\textgreater{}', '|': r'\textbar{}', 'γ': r'$\gamma$',
    'α': r'$\alpha$', 'ε': r'$\varepsilon$', 'τ': r'$\tau$', '±': r'$\pm$', '×': r'$\times$'}


def figure(value: float | str) -> str:
  """A figure that is printed with two decimals, or already text."""
  return value if isinstance(value, str) else f'{value:.2f}'


def brackets(value: float, interval: intervals.Interval | None, unit: str = '') -> str:
  """'2.26 [2.10, 2.41]': a figure and its interval."""
  if interval is None:
    return f'{value:.2f}{unit}'
  return f'{value:.2f}{unit} [{interval[0]:.2f}, {interval[1]:.2f}]'


def percent(ratio: float, interval: intervals.Interval | None) -> str:
  """'+14.5 % [+10.1, +18.0]': what a ratio is above 1."""
  show = lambda value: f'{100 * (value - 1):+.1f}'
  if interval is None:
    return f'{show(ratio)} %'
  return f'{show(ratio)} % [{show(interval[0])}, {show(interval[1])}]'


def signed(value: float, interval: intervals.Interval | None) -> str:
  """'+0.53 [+0.41, +0.66]': a difference."""
  if interval is None:
    return f'{value:+.2f}'
  return f'{value:+.2f} [{interval[0]:+.2f}, {interval[1]:+.2f}]'


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
  row = lambda cells: '| ' + ' | '.join(cell.replace('|', r'\|') for cell in cells) + ' |'
  return '\n'.join([row(header), row(['---'] * len(header)), *map(row, lines)])


def latex(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
  def row(cells):
    # A line that begins with a bracket would be taken for the length behind \\.
    words = [''.join(_LATEX.get(character, character) for character in cell) for cell in cells]
    return ' & '.join(f'{{{word}}}' if word.startswith('[') else word for word in words) + r' \\'
  return '\n'.join([rf'\begin{{tabular}}{{{"l" * len(header)}}}', r'\toprule', row(header),
                    r'\midrule', *map(row, lines), r'\bottomrule', r'\end{tabular}'])


def comma_separated(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
  text = io.StringIO()
  csv.writer(text, lineterminator='\n').writerows([header, *lines])
  return text.getvalue().rstrip('\n')


def written(header: Sequence[str], lines: Sequence[Sequence[str]], form: str) -> str:
  """The table in one of `FORMATS`."""
  return dict(markdown=markdown, latex=latex, csv=comma_separated)[form](header, lines)
