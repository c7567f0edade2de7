"""A drafted tree as a picture: levels from left to right, the accepted path marked."""

from collections.abc import Sequence
import os
import pathlib

import matplotlib
if 'MPLBACKEND' not in os.environ:  # a notebook has its own, which shows figures
  matplotlib.use('Agg')
from matplotlib import pyplot as plt  # pylint: disable=g-import-not-at-top
import numpy as np

from specdistill_jax.evaluation import drafted

KEPT, REFUSED, NEXT = '#009E73', '#9a9a9a', '#D55E00'  # from the palette of Okabe and Ito
_LONGEST = 14  # characters of a word


def places(parents: Sequence[int]) -> np.ndarray:
  """`[slots, 2]`: level and height of each slot. Leaves stand one below another, in the order of
  their parents; what has children stands in their middle."""
  children = [[] for _ in range(len(parents) + 1)]
  for node, parent in enumerate(parents):
    children[parent].append(node + 1)
  found, leaves = np.zeros((len(children), 2)), 0

  def place(slot: int, level: int) -> float:
    nonlocal leaves
    heights = [place(child, level + 1) for child in children[slot]]
    if not heights:
      leaves += 1
    found[slot] = level, np.mean([heights[0], heights[-1]]) if heights else 1 - leaves
    return found[slot, 1]

  place(0, 0)
  return found


def _shown(word: str) -> str:
  """A word on one line, spaces visible; what matplotlib would take for mathematics as it is."""
  word = word.replace('\n', '⏎').replace(' ', '␣').replace('$', r'\$') or '∅'
  return word if len(word) <= _LONGEST else f'{word[:_LONGEST - 1]}…'


def _box(axis, place, text: str, color: str, strong: bool) -> None:
  axis.text(*place, text, ha='center', va='center', fontsize=8, zorder=3,
            color='white' if strong else '#333333', weight='bold' if strong else 'normal',
            bbox=dict(boxstyle='round,pad=0.25', linewidth=1.1, edgecolor=color,
                      facecolor=color if strong else 'white'))


def draw(tree: drafted.Tree, path: pathlib.Path, title: str) -> None:
  """Writes the picture: words with the draft's probability, the kept path, and what came next."""
  place = places(tree.parents)
  kept, last = set(tree.kept), place[tree.kept[-1]]
  beside = np.array([place[:, 0].max() + 1.0, last[1]])  # right of everything
  height = 0.28 * (place[:, 1].max() - place[:, 1].min() + 1) + 1.0
  figure, axis = plt.subplots(figsize=(1.7 * beside[0] + 1.6, height), dpi=150)
  for node, parent in enumerate(tree.parents, start=1):
    strong = node in kept
    axis.plot(*zip(place[parent], place[node]), zorder=2 if strong else 1,
              color=KEPT if strong else '#cccccc', linewidth=2.2 if strong else 0.9)
  _box(axis, place[0], _shown(tree.words[0]), '#222222', True)
  for node in range(1, len(place)):
    chance = '' if tree.probabilities is None else f'  {tree.probabilities[node - 1]:.2f}'
    strong = node in kept
    _box(axis, place[node], f'{_shown(tree.words[node])}{chance}', KEPT if strong else REFUSED,
         strong)
  if tree.next_word is not None:
    axis.plot(*zip(last, beside), color=NEXT, linewidth=1.4, linestyle=':', zorder=1)
    _box(axis, beside, _shown(tree.next_word), NEXT, True)
  names = ['committed', *(f'level {level}' for level in range(1, int(beside[0]))), 'the target']
  for level, name in enumerate(names):
    axis.text(level, place[:, 1].max() + 0.9, name, ha='center', fontsize=8, color='#555555')
  axis.set_xlim(-0.6, beside[0] + 0.6)
  axis.set_ylim(place[:, 1].min() - 0.7, place[:, 1].max() + 1.6)
  axis.set_title(title, fontsize=10, weight='bold')
  axis.axis('off')
  figure.savefig(path, bbox_inches='tight')
  plt.close(figure)
