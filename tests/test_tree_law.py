"""Tokens accepted along trees follow the law that their rule states: enumerated, then chi-square.

As in `test_law.py`, on fewer jitted samples: p-values corrected for their number.
`python tests/laws.py` runs more cases, on a million samples each.
"""

import os

import pytest

import laws
from specdistill_jax.decoding import rules
import tables
import trees

NUM_SAMPLES = int(os.environ.get('LAW_SAMPLES', 60_000))
LOSSLESS = ('drawn_small', 'dynamic_warped')
LOSSY = ('linear_small', 'typical_dynamic')


@pytest.fixture(scope='module')
def p_values():
  """Of every case under its stated law, after Holm's correction; and under the target's own."""
  found, exact = {}, {}
  for name in LOSSLESS:
    case = trees.LOSSLESS_CASES[name]
    found[name] = laws.p_value(case, rules.Exact(), num_samples=NUM_SAMPLES)
  for name in LOSSY:
    rule, epsilon, case = trees.LOSSY_CASES[name]
    out = laws.sample(case, rules.for_sampling(rule, epsilon, case.sampling),
                      num_samples=NUM_SAMPLES)
    fit = lambda law: tables.chi_square_p_value(law, out.tokens, out.lengths, laws.DEPTH)
    found[name] = fit(trees.tree_cycle_law(case, trees.judge_of(rule, epsilon)))
    exact[name] = fit(laws.target_law(case))
  return dict(zip(found, tables.holm(list(found.values())))), exact


@pytest.mark.parametrize('name', LOSSLESS)
def test_samples_along_trees_follow_the_targets_law(name, p_values):
  assert p_values[0][name] > 1e-3


@pytest.mark.parametrize('name', LOSSY)
def test_a_lossy_rule_emits_on_trees_the_law_that_it_states(name, p_values):
  """And not the target's: each case is lossy enough to show."""
  assert p_values[0][name] > 1e-3
  assert p_values[1][name] < 1e-12


@pytest.mark.parametrize('name', ['drawn', 'fixed', 'dynamic', 'drawn_same'])
def test_the_oracle_itself_finds_exact_judging_lossless(name):
  """No samples: the recursion that lossy laws are taken from gives the target's law when exact."""
  case = trees.LOSSLESS_CASES[name]
  found, expected = trees.tree_cycle_law(case, trees.judge_of('exact', 1.0)), laws.target_law(case)
  assert set(found) == set(expected)
  for sequence, probability in expected.items():
    assert abs(found[sequence] - probability) < 1e-9
