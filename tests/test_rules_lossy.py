"""Each lossy rule emits the law that it states; at epsilon 1 leniency is exact, draw for draw."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import laws
from laws import Case
from specdistill_jax import structs
from specdistill_jax.decoding import lossy_rules
from specdistill_jax.decoding import rules
from specdistill_jax.decoding import sampling as sampling_lib
import tables

# name: (case, rule name, epsilon, lenient residual)
CASES = {
    'linear': (Case(), 'linear', 0.5, False),
    'linear_lenient_residual': (Case(), 'linear', 0.5, True),
    'linear_adaptive': (Case('similar', temperature=0.8, min_confidence=0.4), 'linear', 0.2, False),
    'square': (Case('similar', gamma=2, top_p=0.8), 'square', 0.7, False),
    'square_greedy_draft': (Case(draft_temperature=0.0), 'square', 0.5, False),
    'exponential': (Case(), 'exponential', 0.4, False),
    'exponential_lenient_residual': (Case(top_k=3), 'exponential', 0.6, True),
    'typical': (Case('similar', temperature=1.2), 'typical', 0.6, False),
    'typical_greedy_draft': (Case(top_p=0.9, draft_temperature=0.0), 'typical', 0.3, False),
    'top_k': (Case(), 'top_k', 1 / 2, False),
    'top_k_adaptive': (Case('similar', top_k=4, min_confidence=0.4), 'top_k', 1 / 3, False),
    'greedy_lenience': (Case(temperature=0.0, draft_temperature=1.0), 'greedy_lenience', 0.3,
                        False),
    'top_k_greedy': (Case(temperature=0.0, draft_temperature=1.0), 'top_k', 1 / 3, False),
}


def build(case, name, epsilon, lenient_residual):
  if lenient_residual:
    return lossy_rules.Lenient(name, epsilon, lenient_residual=True)
  return rules.for_sampling(name, epsilon, case.sampling)


@pytest.fixture(scope='module')
def p_values():
  """Of every case under its stated law, after Holm's correction; and under the target's own."""
  found, exact = [], []
  for case, name, epsilon, lenient in CASES.values():
    law = laws.lossy_law(case, name, epsilon, lenient_residual=lenient)
    out = laws.sample(case, build(case, name, epsilon, lenient))
    fit = lambda law: tables.chi_square_p_value(law, out.tokens, out.lengths, laws.DEPTH)
    found.append(fit(law))
    exact.append(fit(laws.target_law(case)))
  return dict(zip(CASES, zip(tables.holm(found), exact)))


@pytest.mark.parametrize('name', CASES)
def test_a_lossy_rule_emits_the_law_that_it_states(name, p_values):
  assert p_values[name][0] > 1e-3


@pytest.mark.parametrize('name', CASES)
def test_and_that_is_not_the_targets_law(name, p_values):
  """Each case is lossy enough to show: a rule that was exact after all would fail here."""
  assert p_values[name][1] < 1e-12


def random_block(count=4096, gamma=3, size=6, seed=0, scale=1.5):
  """Target laws, a proposal drawn from random draft laws, and keys."""
  keys = jax.random.split(jax.random.key(seed), 4)
  target_btv = jax.nn.log_softmax(scale * jax.random.normal(keys[0], (count, gamma + 1, size)))
  draft_bgv = jax.nn.log_softmax(scale * jax.random.normal(keys[1], (count, gamma, size)))
  tokens_bg = jax.random.categorical(keys[2], draft_bgv).astype(jnp.int32)
  return (target_btv, structs.Proposal(tokens_bg, draft_bgv, None),
          jax.random.split(keys[3], count))


@pytest.mark.parametrize('name', lossy_rules.LENIENCE)
def test_lenience_of_one_is_exact_draw_for_draw(name):
  block = random_block()
  lenient, exact = (jax.jit(rule)(*block)
                    for rule in (lossy_rules.Lenient(name, 1.0), rules.Exact()))
  np.testing.assert_array_equal(lenient.num_accepted_b, exact.num_accepted_b)
  np.testing.assert_array_equal(lenient.next_token_b, exact.next_token_b)
  assert lossy_rules.Lenient(name, 1.0).lossless
  assert not lossy_rules.Lenient(name, 0.99).lossless
  assert rules.for_sampling(name, 1.0, sampling_lib.Sampling(1.0)) == rules.Exact()


@pytest.mark.parametrize('name', rules.NAMES)
def test_acceptance_grows_with_leniency(name):
  """Row by row, under the same draws: smaller epsilons never keep less, and some keep more."""
  if name in rules.LOSSLESS:
    return
  block, greedy = random_block(), name == 'greedy_lenience'
  epsilons = (1 / 2, 1 / 3, 1 / 5) if name == 'top_k' else (0.9, 0.5, 0.2, 0.05)
  sampling = sampling_lib.Sampling(0.0 if greedy else 1.0)
  kept = [jax.jit(rules.for_sampling(name, epsilon, sampling))(*block).num_accepted_b
          for epsilon in epsilons]
  for less, more in zip(kept, kept[1:]):
    assert np.all(more >= less)
  assert kept[-1].sum() > 1.2 * kept[0].sum()


@pytest.mark.parametrize('name, epsilon, bound', [('linear', 0.5, 2.0), ('square', 0.5, 4.0)])
def test_accepted_mass_exceeds_the_target_by_a_known_factor_at_most(name, epsilon, bound):
  """What is kept, min(draft, f), stays below target / epsilon or target / epsilon^2."""
  target_btv, proposal, key_b = random_block(count=200_000, gamma=1, size=3)
  same = lambda array: jnp.broadcast_to(array[:1], array.shape)
  target_btv, draft_bgv = same(target_btv), same(proposal.log_probs_bgv)
  tokens_bg = jax.random.categorical(jax.random.key(5), draft_bgv).astype(jnp.int32)
  verdict = jax.jit(lossy_rules.Lenient(name, epsilon))(
      target_btv, structs.Proposal(tokens_bg, draft_bgv, None), key_b)
  target, draft = np.exp(target_btv[0, 0]), np.exp(draft_bgv[0, 0])
  for token in range(3):
    kept = float(np.mean((tokens_bg[:, 0] == token) & (verdict.num_accepted_b == 1)))
    wanted = min(draft[token], bound * target[token])
    assert abs(kept - wanted) < 5 * np.sqrt(max(wanted, 1e-4) / 200_000)


def test_a_token_of_no_probability_is_never_kept():
  """Even by top-k with more places than the target has tokens."""
  target = jnp.log(jnp.asarray([[[0.0, 1.0, 0.0], [0.0, 1.0, 0.0]]] * 256))
  proposal = structs.Proposal(jnp.zeros((256, 1), jnp.int32),
                              jnp.log(jnp.full((256, 1, 3), 1 / 3)), None)
  keys = jax.random.split(jax.random.key(0), 256)
  for name, epsilon in (('linear', 0.01), ('square', 0.01), ('exponential', 0.01),
                        ('typical', 0.01), ('top_k', 1 / 3)):
    verdict = jax.jit(rules.for_sampling(name, epsilon, sampling_lib.Sampling(1.0)))(
        target, proposal, keys)
    assert int(verdict.num_accepted_b.sum()) == 0, name
    assert bool((verdict.next_token_b == 1).all()), name


NONSENSE = [
    ('exact', 0.5, 1.0, 'lossless and has no leniency'),
    ('block', 0.5, 1.0, 'lossless and has no leniency'),
    ('linear', 0.5, 0.0, "does nothing at temperature 0.*'greedy_lenience'"),
    ('exponential', 0.0, 1.0, r'must lie in \(0, 1\]'),
    ('greedy_lenience', 0.5, 0.7, "samples at temperature 0.7; use 'linear'"),
    ('typical', 1.0, 1.0, 'epsilon below 1'),
    ('typical', 0.3, 0.0, 'a temperature above 0'),
    ('top_k', 0.4, 1.0, 'epsilon is 0.4; it must be 1 / 2, 1 / 3'),
    ('top_k', 1.0, 1.0, 'not lossless at temperature 1'),
    ('cubic', 0.5, 1.0, 'one of exact, block, linear'),
]


@pytest.mark.parametrize('name, epsilon, temperature, message', NONSENSE)
def test_what_makes_no_sense_is_refused_in_one_sentence(name, epsilon, temperature, message):
  with pytest.raises(ValueError, match=message) as caught:
    rules.for_sampling(name, epsilon, sampling_lib.Sampling(temperature))
  assert '\n' not in str(caught.value)


def test_equal_laws_are_equal_values():
  """So that a study measures them once."""
  greedy, plain = sampling_lib.Sampling(0.0), sampling_lib.Sampling(1.0)
  for name in ('exact', 'block', 'linear', 'greedy_lenience', 'top_k'):
    assert rules.for_sampling(name, 1.0, greedy) == rules.Greedy()
  assert rules.for_sampling('linear', 0.5, plain) != rules.for_sampling('square', 0.5, plain)
  assert len({rules.for_sampling(name, 0.5, plain)
              for name in ('linear', 'square', 'exponential', 'typical', 'top_k')}) == 5
