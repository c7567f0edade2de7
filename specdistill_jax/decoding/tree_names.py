"""Drafted trees by the names that configs ask for them with and results rows carry.

  eagle1              the published tree of EAGLE-1, 25 nodes on 5 levels
  medusa              the published tree of Medusa, 63 nodes on 4 levels
  0 1 00 01 10 000    a static tree: the ranks along the path to each node, a digit each
  dynamic k10 d6 n60  EAGLE-2's: children of a node, levels, and nodes that are verified
"""

import re

from specdistill_jax.decoding import tree

CHAIN = 'chain'  # what a row says that drafted no tree
STATIC = {'eagle1': tree.EAGLE1, 'medusa': tree.MEDUSA}
_DYNAMIC = re.compile(r'dynamic k(\d+) d(\d+) n(\d+)')
_PATHS = re.compile(r'\d+( \d+)*')


def parse(name: str) -> tree.Tree | tree.Dynamic:
  """The tree called `name`.

  Raises:
    ValueError: there is no such tree.
  """
  if name in STATIC:
    return STATIC[name]
  if found := _DYNAMIC.fullmatch(name):
    return tree.Dynamic(*map(int, found.groups()))
  if _PATHS.fullmatch(name):
    return tree.by_digits(name)
  raise ValueError(f"tree is {name!r}; it must be {', '.join(map(repr, STATIC))}, the ranks along "
                   "the paths to all nodes, as in '0 1 00 01', or as in 'dynamic k10 d6 n60'")
