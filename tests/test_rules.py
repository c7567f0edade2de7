"""Block verification against token verification, in exact expectation; early ends of a draft."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specdistill_jax import structs
from specdistill_jax.decoding import lossy_rules
from specdistill_jax.decoding import rules
from specdistill_jax.decoding import sampling as sampling_lib

SIZE, GAMMA, PAIRS = 3, 3, 1000
PATHS = np.array(list(itertools.product(range(SIZE), repeat=GAMMA)))


def random_pairs(seed=0):
  """Laws after every prefix, for many pairs: target and draft, each a list over lengths.

  Entry i is `[pairs, SIZE**i, SIZE]`, prefixes in the order of `PATHS`. Pairs range from
  nearly flat to nearly one-hot, and from unrelated to nearly equal.
  """
  rng = np.random.default_rng(seed)
  sharpness, likeness = rng.uniform(0.2, 5, (PAIRS, 1, 1)), rng.uniform(0, 1, (PAIRS, 1, 1))
  laws = ([], [])
  for length in range(GAMMA + 1):
    target, other = rng.normal(size=(2, PAIRS, SIZE**length, SIZE))
    for law, logits in zip(laws, (target, likeness * target + (1 - likeness) * other)):
      weights = np.exp(sharpness * logits)
      law.append(weights / weights.sum(-1, keepdims=True))
  return laws


def along_paths(law, lengths):
  """`[pairs, paths, lengths, SIZE]`: the law after each prefix of each path."""
  index = [sum(PATHS[:, j] * SIZE**(i - 1 - j) for j in range(i)) for i in range(lengths)]
  return np.stack([law[i][:, np.broadcast_to(index[i], len(PATHS))] for i in range(lengths)], 2)


@pytest.fixture(scope='module')
def enumerated():
  """Laws along every path of every pair, the path's probability, and the code's cuts there."""
  target, draft = random_pairs()
  target, draft = along_paths(target, GAMMA + 1), along_paths(draft, GAMMA)
  chosen = np.broadcast_to(PATHS[None, :, :, None], (*draft.shape[:3], 1))
  pick = lambda law: np.take_along_axis(law[:, :, :GAMMA], chosen, -1)[..., 0]
  flat = lambda array: jnp.asarray(array.reshape(-1, *array.shape[2:]), jnp.float32)
  cut, residual = jax.jit(rules.block_cuts)(jnp.log(flat(target)), structs.Proposal(
      flat(chosen[..., 0]).astype(jnp.int32), jnp.log(flat(draft)), None))
  back = lambda array: np.asarray(array, np.float64).reshape(PAIRS, len(PATHS), *array.shape[1:])
  # The length is the largest i that passes: probability h_i times all later ones failing.
  fails = np.cumprod(1.0 - back(cut)[..., ::-1], -1)[..., ::-1]
  lengths = back(cut) * np.concatenate([fails[..., 1:], np.ones((PAIRS, len(PATHS), 1))], -1)
  return dict(target=target, draft=draft, target_token=pick(target), draft_token=pick(draft),
              path=pick(draft).prod(-1), lengths=lengths, residual=back(residual))


def test_block_verification_is_never_shorter_than_token_verification(enumerated):
  """On each of 1,000 random pairs, in expectation over every drafted path (no sampling)."""
  keep = np.minimum(1.0, enumerated['target_token'] / enumerated['draft_token'])
  token = (enumerated['path'] * np.cumprod(keep, -1).sum(-1)).sum(-1)
  block = (enumerated['path'] * (enumerated['lengths'] * np.arange(GAMMA + 1)).sum(-1)).sum(-1)
  assert np.all(block >= token - 1e-5)
  assert np.mean(block > token + 1e-3) > 0.5 and np.max(block - token) > 0.05


def test_block_verification_emits_the_targets_law_exactly(enumerated):
  """First gamma tokens, enumerated over paths and cuts; what follows a cut early is the target's.

  P(x) = sum over cuts i of P(path agrees with x on i, cut at i) * next law(x_i) * target(rest).
  """
  target, residual = enumerated['target'], enumerated['residual']
  joint = np.zeros((PAIRS, len(PATHS)))
  wanted = enumerated['target_token'].prod(-1)
  mass = residual.sum(-1, keepdims=True)
  law_after_cut = np.where(mass > 0, residual / np.maximum(mass, 1e-30), target[:, :, :GAMMA])
  for cut in range(GAMMA + 1):
    weight = enumerated['path'] * enumerated['lengths'][..., cut]
    for x, path in enumerate(PATHS):
      agrees = np.all(PATHS[:, :cut] == path[:cut], axis=1)
      if cut == GAMMA:
        joint[:, x] += weight[:, agrees].sum(-1)
        continue
      first = law_after_cut[:, agrees, cut, path[cut]]
      rest = enumerated['target_token'][:, x, cut + 1:].prod(-1)
      joint[:, x] += (weight[:, agrees] * first).sum(-1) * rest
  np.testing.assert_allclose(joint, wanted, atol=2e-5)


def test_block_verification_keeps_eleven_ninths():
  """The toy of Sun et al. 2024: two drafted tokens, laws (1/3, 2/3) and (2/3, 1/3) throughout.

  Token verification keeps 10/9 tokens in expectation, block verification 11/9.
  """
  count = 200_000
  target, draft = jnp.log(jnp.asarray([1 / 3, 2 / 3])), jnp.log(jnp.asarray([2 / 3, 1 / 3]))
  keys = jax.random.split(jax.random.key(0), (2, count))
  tokens_bg = jax.vmap(lambda key: jax.random.categorical(key, draft, shape=(2,)))(keys[0])
  proposal = structs.Proposal(tokens_bg, jnp.broadcast_to(draft, (count, 2, 2)), None)
  target_btv = jnp.broadcast_to(target, (count, 3, 2))
  for rule, expected in ((rules.Exact(), 10 / 9), (rules.Block(), 11 / 9)):
    kept = float(jax.jit(rule)(target_btv, proposal, keys[1]).num_accepted_b.mean())
    assert abs(kept - expected) < 4 * 0.9 / np.sqrt(count)


def blocks(count=512, gamma=4, size=5):
  keys = jax.random.split(jax.random.key(3), 4)
  target_btv = jax.nn.log_softmax(jax.random.normal(keys[0], (count, gamma + 1, size)))
  draft_bgv = jax.nn.log_softmax(
      target_btv[:, :-1] + 0.3 * jax.random.normal(keys[1], (count, gamma, size)))
  tokens_bg = jax.random.categorical(keys[2], draft_bgv).astype(jnp.int32)
  return target_btv, structs.Proposal(tokens_bg, draft_bgv, None), keys[3]


@pytest.mark.parametrize('rule', [
    rules.Exact(), rules.Block(), rules.Greedy(), lossy_rules.Lenient('linear', 0.5),
    lossy_rules.Threshold('typical', 0.3, greedy=False),
    lossy_rules.Threshold('top_k', 0.5, greedy=True)], ids=str)
def test_what_lies_behind_the_last_drafted_token_is_not_looked_at(rule):
  """Filler, even one that would surely be kept, changes nothing; nor is more kept than drafted."""
  target_btv, proposal, key = blocks()
  count, gamma = proposal.tokens_bg.shape
  drafted_b = jnp.arange(count) % gamma + 1
  filler_bg = jnp.arange(gamma)[None] >= drafted_b[:, None]
  key_b = jax.random.split(key, count)
  best_bg = jnp.argmax(target_btv[:, :-1], -1).astype(jnp.int32)
  verdicts = [jax.jit(rule)(target_btv, structs.Proposal(
      jnp.where(filler_bg, tokens, proposal.tokens_bg),
      jnp.where(filler_bg[..., None], law, proposal.log_probs_bgv), None, drafted_b), key_b)
              for tokens, law in ((0, 0.0), (best_bg, -20.0))]
  np.testing.assert_array_equal(verdicts[0].num_accepted_b, verdicts[1].num_accepted_b)
  np.testing.assert_array_equal(verdicts[0].next_token_b, verdicts[1].next_token_b)
  kept = np.asarray(verdicts[0].num_accepted_b)
  assert np.all(kept <= drafted_b) and np.mean(kept == drafted_b) > 0.1


@pytest.mark.parametrize('rule', [rules.Exact(), rules.Block(), rules.Greedy(),
                                  lossy_rules.Lenient('linear', 0.5)], ids=str)
def test_a_draft_of_full_length_is_the_same_said_or_unsaid(rule):
  target_btv, proposal, key = blocks()
  key_b = jax.random.split(key, len(proposal.tokens_bg))
  said = proposal.replace(num_drafted_b=jnp.full((len(proposal.tokens_bg),), 4))
  one, other = (jax.jit(rule)(target_btv, p, key_b) for p in (proposal, said))
  np.testing.assert_array_equal(one.num_accepted_b, other.num_accepted_b)
  np.testing.assert_array_equal(one.next_token_b, other.next_token_b)


def test_rules_are_small_hashable_values():
  for name, epsilon, temperature in (('exact', 1.0, 1.0), ('block', 1.0, 1.0),
                                     ('linear', 0.5, 1.0), ('top_k', 0.5, 0.0)):
    sampling = sampling_lib.Sampling(temperature)
    assert hash(rules.for_sampling(name, epsilon, sampling)) == hash(
        rules.for_sampling(name, epsilon, sampling))
