"""The ways to speculate that a study compares, each measured once: rule, draft mode and shape."""

from collections.abc import Iterator
import dataclasses
import itertools
from typing import Any

from specdistill_jax.decoding import judging
from specdistill_jax.decoding import rules
from specdistill_jax.decoding import sampling as sampling_lib
from specdistill_jax.decoding import tree as tree_lib
from specdistill_jax.decoding import tree_names


@dataclasses.dataclass(frozen=True)
class Way:
  """One way to speculate with any draft; fields as in a results row.

  Attributes:
    gamma: the length of a chain, the depth of a tree.
    tree: its name, or `tree_names.CHAIN`.
  """
  gamma: int
  draft_sampling: str
  rule: str
  epsilon: float
  min_confidence: float
  tree: str = tree_names.CHAIN


def _chains(settings: Any, rule: tuple[str, float], draft_sampling: str) -> Iterator[Way]:
  for min_confidence, gamma in itertools.product(settings.min_confidences, settings.gammas):
    yield Way(gamma, draft_sampling, *rule, min_confidence)


def _trees(settings: Any, rule: tuple[str, float], draft_sampling: str) -> Iterator[Way]:
  """A dynamic tree holds the most probable tokens, however drafts are asked to be."""
  for name in settings.trees:
    tree = tree_names.parse(name)
    fixed = isinstance(tree, tree_lib.Dynamic)
    yield Way(tree.depth, 'greedy' if fixed else draft_sampling, *rule, 0.0, name)


def distinct(settings: Any, temperature: float) -> list[Way]:
  """What `config.evaluate` asks for at a temperature, without what makes no sense there.

  Ways that draft alike and judge alike are one, known by the name that comes first: at
  temperature 0 all lossless rules agree, and so do sampled and greedy drafts. A rule that
  judges whole chains has no trees.
  """
  sampling = sampling_lib.Sampling(temperature, settings.top_k, settings.top_p)
  found: dict[Any, Way] = {}
  for rule, epsilon in settings.rules:
    if rules.objection(rule, epsilon, sampling) is not None:
      continue
    built = rules.for_sampling(rule, epsilon, sampling)
    for make, draft_sampling in itertools.product((_chains, _trees), settings.draft_sampling):
      for way in make(settings, (rule, epsilon), draft_sampling):
        greedy_drafts = sampling.is_greedy or way.draft_sampling == 'greedy'
        alike = built, greedy_drafts, way.gamma, way.min_confidence, way.tree
        if way.tree == tree_names.CHAIN or judging.judges_trees(built):
          found.setdefault(alike, way)
  return list(found.values())
