"""Feature-level drafts in trees: greedy equality, laws, and drafting as it is step by step."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

import drafts
import laws
import tables
import trees
from specdistill_jax import api
from specdistill_jax import structs
from specdistill_jax.decoding import chain
from specdistill_jax.decoding import engine
from specdistill_jax.decoding import rules
from specdistill_jax.decoding import sampling as sampling_lib
from specdistill_jax.decoding import tree as tree_lib
from specdistill_jax.drafters import feature
from specdistill_jax.drafters import tree as drafter_lib

TARGET = drafts.target(num_layers=3)  # of which EAGLE-3 reads the inputs of two
NEW, WIDTH, VOCAB = 12, 8, 19
# As many nodes and levels each, so that one state will do for both.
DYNAMIC, STATIC = tree_lib.Dynamic(4, 3, 8), trees.BUSHY
HOT = sampling_lib.Sampling(4.0)  # flat laws, of which some drafts are accepted
GREEDY = sampling_lib.Sampling(0.0)


def prompts(count, shortest=1, seed=0):
  rng = np.random.default_rng(seed)
  lengths_b = rng.integers(shortest, WIDTH + 1, count).astype(np.int32)
  tokens_bt = rng.integers(2, VOCAB, (count, WIDTH))
  return np.where(np.arange(WIDTH) < lengths_b[:, None], tokens_bt, 0).astype(np.int32), lengths_b


@functools.cache
def draft(kind):
  return drafts.tiny(kind, TARGET)


def drafter(kind, tree, sampling=None):
  bound = feature.Bound(draft(kind).module, TARGET.module.without_layers())
  return drafter_lib.TreeDrafter(bound, tree, sampling)


@functools.cache
def target_module(kind):
  return api.decoding_module(TARGET, draft(kind))


def decode(module, built, rows, *, rule, sampling, key=jax.random.key(1)):
  state = engine.prefill_speculative(module, built, *rows, key, max_new_tokens=NEW)
  state = engine.decode_speculative(module, built, state, rule=rule, sampling=sampling)
  return jax.device_get(engine.generation(state, max_new_tokens=NEW))


# EAGLE-1's tree, of which a random draft keeps every fourth first token, and a wide dynamic one.
@pytest.mark.parametrize('kind, tree, batch', [
    ('eagle', tree_lib.EAGLE1, 8), ('fspad', tree_lib.Dynamic(8, 3, 40), 1),
    ('eagle3', tree_lib.Dynamic(8, 3, 40), 8)])
def test_greedy_decoding_along_trees_is_the_targets_own(kind, tree, batch):
  prompts_bt, lengths_b = prompts(32)
  plain = TARGET.module.unstacked()
  state = engine.prefill_autoregressive(plain, prompts_bt, lengths_b, jax.random.key(0),
                                        max_new_tokens=NEW)
  expected = jax.device_get(engine.generation(
      engine.decode_autoregressive(plain, state, sampling=GREEDY), max_new_tokens=NEW))
  emitted = calls = 0
  for begin in range(0, 32, batch):
    rows = slice(begin, begin + batch)
    found = decode(target_module(kind), drafter(kind, tree), (prompts_bt[rows], lengths_b[rows]),
                   rule=rules.Greedy(), sampling=GREEDY)
    np.testing.assert_array_equal(found.tokens, expected.tokens[rows])
    np.testing.assert_array_equal(found.lengths, expected.lengths[rows])
    emitted, calls = emitted + found.lengths.sum(), calls + found.stats.target_calls_b.sum()
  assert emitted > 1.3 * calls, 'the draft is too weak for this test'


@functools.cache
def going_on(kind):
  """Ragged rows after three cycles, of whose drawn trees flat laws keep much."""
  built = drafter(kind, STATIC, HOT)
  prompts_bt, lengths_b = prompts(8, shortest=2, seed=3)
  state = engine.prefill_speculative(target_module(kind), built, prompts_bt, lengths_b,
                                     jax.random.key(3), max_new_tokens=NEW)
  step = jax.jit(functools.partial(chain.step, rule=rules.Exact(), sampling=HOT, eos_id=-1))
  for _ in range(3):
    state = step(target_module(kind), built, state)
  advanced = set((state.lengths_b - lengths_b).tolist())
  assert len(advanced) > 1 and max(advanced) > 3, 'rows advance alike, or nothing is accepted'
  return state


def explicit(kind, tokens_s, length):
  """A path of drafted tokens -> the draft's log-probabilities after it, float64 `[v]`.

  From the text alone, the first `length` tokens, in NumPy: true features along it, and then token
  by token, each with the draft's own output beside it.
  """
  p, config, module = drafts.numbers(draft(kind).module), draft(kind).config, TARGET.module
  step = drafts.step(config)
  numbers = lambda x: np.asarray(x, np.float64)
  output = _causal(module.capturing(draft(kind).module.captured), tokens_s[None])
  table, tokens, num_pairs = numbers(module.embedding_vd[...]), tokens_s[:length], length - 1
  features = numbers(output.features['final_btd'][0])
  if config.family == 'eagle3':
    features = numbers(output.features['captured_btw'][0]) @ p['fusion_dw'].T

  def log_probs(read):
    if config.family != 'eagle3':
      logits = numbers(module.head_vd[...]) @ read
    else:
      logits = np.full(VOCAB, -np.inf)
      logits[list(drafts.DRAFT_IDS)] = p['head_vd'] @ read
    return logits - np.log(np.sum(np.exp(logits - logits.max()))) - logits.max()

  @functools.cache
  def after(path):
    if not path:
      found = step(p, config, table[tokens[1:]], features[:num_pairs], np.arange(num_pairs))
    else:
      _, carried, slots = after(path[:-1])[1]
      found = step(p, config, table[[path[-1]]], carried[-1:], [num_pairs + len(path) - 1], slots)
    return log_probs(found[0][-1]), found

  return lambda path: after(path)[0]


_causal = jax.jit(lambda module, tokens_bt: module.causal(tokens_bt))
_propose = jax.jit(drafter_lib.TreeDrafter.propose)


def texts(state):
  """Committed tokens of each row, padded to one width, and their number."""
  return list(zip(np.asarray(state.tokens_bs), np.asarray(state.lengths_b)))


@pytest.mark.parametrize('kind', ['fspad', 'eagle3'])
def test_a_dynamic_tree_is_what_drafting_step_by_step_makes_of_the_text(kind):
  """Its nodes, in order: so the draft's cache holds true features alone, and each node sees its
  ancestors' outputs, tokens and positions."""
  state = going_on(kind)
  proposal = _propose(drafter(kind, DYNAMIC), state, state.key_b)
  for row, text in enumerate(texts(state)[:3]):
    after = explicit(kind, *text)
    expected = trees.dynamic_paths(DYNAMIC, lambda path: after(path).astype(np.float32))
    found = trees.proposed_paths(proposal, row)
    assert set(found.values()) == set(expected)
    for ranks, path in found.items():
      assert np.argsort(-after(path[:-1]), kind='stable')[ranks[-1]] == path[-1]
  np.testing.assert_array_equal(proposal.drafter_state.cache.length_b, state.lengths_b - 1)


@pytest.mark.parametrize('kind', ['fspad'])
def test_siblings_are_drawn_from_the_law_of_drafting_step_by_step(kind):
  """Every law of a static tree that says so, warped; and its siblings differ."""
  state, sampling = going_on(kind), sampling_lib.Sampling(1.5, top_k=9)
  proposal = _propose(drafter(kind, STATIC, sampling), state, state.key_b)
  for row, text in enumerate(texts(state)[:2]):
    after, paths = explicit(kind, *text), {(): ()} | trees.proposed_paths(proposal, row)
    for slot in sum(STATIC.expanded, ()):
      ranks = ((), *STATIC.paths)[slot]
      law = tables.warped(after(paths[ranks]), 1.5, 9, None)
      stated = proposal.log_probs_bgv[row, proposal.branches.laws_bt[row, slot]]
      np.testing.assert_allclose(np.exp(stated), law, atol=1e-4)
      assert all(law[path[-1]] > 0 for path in paths.values() if path[:-1] == paths[ranks] != path)


@dataclasses.dataclass(frozen=True)
class Case:
  """A tiny target and a feature-level draft of it, as `laws.sample` takes them."""
  kind: str
  tree: object
  drawn: bool = False
  temperature: float = 0.8
  prompt: tuple[int, ...] = (2, 3, 4)

  @property
  def models(self):
    return _small(self.kind)

  @property
  def target(self):
    return api.decoding_module(*self.models)

  @property
  def sampling(self):
    return sampling_lib.Sampling(self.temperature, top_p=0.95)

  @property
  def drafter(self):
    target, model = self.models
    return drafter_lib.TreeDrafter(
        feature.Bound(model.module, target.module.without_layers()), self.tree,
        self.sampling if self.drawn else None)


@functools.cache
def _small(kind, vocab=6):
  target = drafts.target(vocab_size=vocab, num_layers=2)
  fields = dict(draft_vocab_size=4, draft_vocabulary=drafts.eagle3.vocabulary_bits(
      (1, 2, 4, 5), vocab)) if kind == 'eagle3' else {}
  return target, drafts.tiny(kind, target, **fields)


def target_law(case):
  """Of the first tokens, enumerated by the target's full forward pass."""
  target, _ = case.models
  law, alive = {}, {(): 1.0}
  for depth in range(laws.DEPTH):
    rows = np.array([case.prompt + new for new in alive])
    logits_bv = np.asarray(_causal(target.module, rows).logits_btv[:, -1], np.float64)
    grown = {}
    for (new, probability), logits_v in zip(alive.items(), logits_bv):
      for token, p in enumerate(tables.warped(logits_v, case.temperature, None, 0.95)):
        if p > 0:
          ends = token == structs.EOS_ID or depth == laws.DEPTH - 1
          (law if ends else grown)[(*new, token)] = probability * p
    alive = grown
  assert np.isclose(sum(law.values()), 1.0)
  return law


LAW_CASES = {
    'fspad, drawn': Case('fspad', STATIC, drawn=True),
    'fspad, dynamic': Case('fspad', tree_lib.Dynamic(2, 3, 6)),
    'eagle3, drawn': Case('eagle3', STATIC, drawn=True),
    'medusa, drawn': Case('medusa', STATIC, drawn=True),
}


@pytest.fixture(scope='module')
def p_values():
  found = [laws.p_value(case, rules.Exact(), law=target_law(case), num_samples=20_000)
           for case in LAW_CASES.values()]
  return dict(zip(LAW_CASES, tables.holm(found)))


@pytest.mark.parametrize('name', LAW_CASES)
def test_samples_along_trees_follow_the_targets_law(name, p_values):
  assert p_values[name] > 1e-3


def test_a_lossy_rule_keeps_more_along_trees():
  """Medusa's heads as published, judged by typical acceptance."""
  rows, plain = prompts(64), sampling_lib.Sampling(1.0)
  run = lambda rule: decode(target_module('medusa'), drafter('medusa', STATIC), rows, rule=rule,
                            sampling=plain)
  exact, lossy = run(rules.Exact()), run(rules.for_sampling('typical', 0.2, plain))
  tau = lambda out: out.stats.emitted_b.sum() / out.stats.target_calls_b.sum()
  assert tau(lossy) > tau(exact) + 0.1


def test_a_row_does_not_depend_on_its_neighbours():
  prompts_bt, lengths_b = prompts(5)
  keys, built = jax.random.split(jax.random.key(5), 5), drafter('eagle3', DYNAMIC)
  run = lambda rows: decode(target_module('eagle3'), built, (prompts_bt[rows], lengths_b[rows]),
                            rule=rules.Exact(), sampling=HOT, key=keys[rows])
  together, order = run(np.arange(5)), np.array([4, 0, 3, 2, 1])
  shuffled = run(order)
  np.testing.assert_array_equal(shuffled.tokens, together.tokens[order])
  np.testing.assert_array_equal(shuffled.stats.accepted_bg, together.stats.accepted_bg[order])


def test_the_tree_of_width_one_is_the_chain():
  """Two drafters, one of chains: the same greedy tokens, calls and accepted drafts."""
  rows = prompts(32, shortest=2)
  built = api.make_drafter(draft('fspad'), gamma=3, target_sampling=GREEDY, target=TARGET)
  one, other = (decode(target_module('fspad'), each, rows, rule=rules.Greedy(), sampling=GREEDY)
                for each in (built, drafter('fspad', tree_lib.chain(3))))
  np.testing.assert_array_equal(one.tokens, other.tokens)
  for name in ('target_calls_b', 'reached_bg', 'accepted_bg'):
    np.testing.assert_array_equal(getattr(one.stats, name), getattr(other.stats, name))
