"""Trees of table models: a draft whose features tell its context, oracles, and laws enumerated.

`tests/laws.py` is the script that draws a million samples of each case here.
"""

import dataclasses
import functools

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from specdistill_jax import structs
from specdistill_jax.decoding import rules
from specdistill_jax.decoding import sampling as sampling_lib
from specdistill_jax.decoding import tree as tree_lib
from specdistill_jax.drafters import tree as drafter_lib
import laws
import tables


@struct.dataclass
class TableDraft:
  """Draws from `logits_vvv[first, second]`; the feature beside `second` says what `first` was.

  It looks `first` up in its cache too. Where the two differ, a slip in cache, mask, position or
  feature, it drafts something else.
  """
  logits_vvv: jax.Array

  def init_cache(self, batch, num_slots):
    return tables.table_cache(batch, num_slots)

  def inputs(self, target_output):
    return target_output.features['token_btd']

  def read(self, tokens_bt, carried_btd, positions_bt, mask_bts, cache):
    cache = cache.write(tokens_bt, positions_bt)
    before_bt, seen_bt = carried_btd[..., 0], cache.look(positions_bt - 1, mask_bts)
    # The first pair sees none before it.
    agrees_bt = ((positions_bt <= 0) | (before_bt == seen_bt)) & (
        cache.look(positions_bt, mask_bts) == tokens_bt)
    logits_btv = self.logits_vvv[before_bt, tokens_bt]
    return (jnp.where(agrees_bt[..., None], logits_btv, jnp.roll(logits_btv, 1, axis=-1)),
            tokens_bt[..., None], cache)

  def logits(self, read_btv):
    return read_btv


# Trees small enough to enumerate what they do.
BUSHY = tree_lib.Tree(((0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (0, 0, 1)))
SHUFFLED = tree_lib.Tree(tuple(BUSHY.paths[node] for node in (2, 0, 4, 3, 7, 6, 1, 5)))
SMALL = tree_lib.Tree(((0,), (1,), (0, 0), (0, 1), (1, 0)))
SMALL_SHUFFLED = tree_lib.Tree(tuple(SMALL.paths[node] for node in (1, 0, 4, 3, 2)))
TREES = {
    'small_shuffled': SMALL_SHUFFLED,
    'bushy': BUSHY,
    'shuffled': SHUFFLED,
    'wide': tree_lib.Tree(((0,), (1,), (2,), (3,), (3, 0), (0, 0))),
    'chain': tree_lib.chain(3),
    'dynamic': tree_lib.Dynamic(top_k=2, depth=3, num_nodes=6),
    'dynamic_wide': tree_lib.Dynamic(top_k=3, depth=2, num_nodes=7),
}


@dataclasses.dataclass(frozen=True)
class Case(laws.Case):
  """One way to speculate with a tree; siblings are drawn, or fixed.

  A static tree under a temperature whose siblings are fixed holds the most probable tokens.
  """
  tree: str = 'bushy'
  drawn: bool = False
  language_model: bool = False

  @property
  def shape(self):
    return TREES[self.tree]

  @property
  def drafter(self):
    model = laws.models(self.vocab)[self.draft]
    draft = (drafter_lib.LanguageModel(model) if self.language_model else
             TableDraft(model.logits_vvv))
    return drafter_lib.TreeDrafter(draft, self.shape, self.sampling if self.drawn else None)


def dynamic_paths(tree, log_probs_after):
  """EAGLE-2's tree in plain words: `{path of tokens: value}` of the nodes that are kept.

  Args:
    log_probs_after: a path of tokens to float32 log-probabilities `[v]`.
  """
  found = {}  # in the order in which they were drafted, which is what ties go by
  layer = [((), np.float32(0.0))]
  for _ in range(tree.depth):
    drafted = {}
    for path, value in layer:
      log_probs = log_probs_after(path)
      for token in sorted(range(len(log_probs)), key=lambda v: (-log_probs[v], v))[:tree.top_k]:
        drafted[(*path, token)] = np.float32(value + log_probs[token])
    found |= drafted
    layer = sorted(drafted.items(), key=lambda node: -node[1])[:tree.top_k]  # a stable sort
  best = sorted(found.items(), key=lambda node: -node[1])[:tree.num_nodes]
  return dict(best)


def proposed_paths(proposal, row=0):
  """`{path of ranks: path of tokens}` of a drafted tree, in the order of its storage."""
  branches = proposal.branches
  ranks, tokens = {0: ()}, {0: ()}
  for node, parent in enumerate(np.asarray(branches.parents_bm[row]).tolist()):
    assert parent in ranks, 'a node is stored before its parent'
    ranks[node + 1] = (*ranks[parent], int(branches.ranks_bm[row, node]))
    tokens[node + 1] = (*tokens[parent], int(proposal.tokens_bg[row, node]))
  assert len(set(tokens.values())) == len(tokens), 'two siblings hold one token'
  return {ranks[slot]: tokens[slot] for slot in ranks if slot}


# The law of a cycle with a tree, from NumPy alone.

@dataclasses.dataclass(frozen=True)
class Judge:
  """How a sibling is judged, in closed form.

  Attributes:
    keep: (the target's law as judged, the token's draft law, token) -> how probably it is kept.
    correct: (target law, draft law) -> the law for what comes after a refusal.
  """
  keep: object
  correct: object


def judge_of(name, epsilon):
  if name == 'exact':
    keep = lambda p, q, x: min(1.0, p[x] / q[x])
    return Judge(keep, _residual)
  if name in laws.LENIENT:
    keep = lambda p, q, x: min(1.0, laws.LENIENT[name](p, epsilon)[x] / q[x])
    return Judge(keep, _residual)
  least = laws.LEAST[name]
  return Judge(lambda p, q, x: float(p[x] >= least(p, epsilon) - 1e-12 and p[x] > 0),
               lambda p, q: p)


def _residual(p, q):
  left = np.maximum(p - q, 0.0)
  return left / left.sum() if left.sum() > 1e-12 else p


def tree_cycle_law(case, judge):
  """Law of the first `laws.DEPTH` tokens of cycles that judge a tree's siblings as `judge` says."""
  draft, law, shape = laws.models(case.vocab)[case.draft], {}, case.shape
  is_dynamic = isinstance(shape, tree_lib.Dynamic)

  @functools.cache
  def target_after(context):
    return laws.law_after(case.target, context, case.sampling)

  @functools.cache
  def draft_after(context):
    sampling = case.sampling if case.drawn else sampling_lib.Sampling(1.0)
    return laws.law_after(draft, context, sampling)

  @functools.cache
  def children(root, ranks, tokens):
    """Tokens that follow a node of a fixed tree, in order, with their ranks."""
    if is_dynamic:
      kept = dynamic_paths(shape, lambda path: np.log(draft_after((*root, *path))).astype(
          np.float32))
      mine = [(path, value) for path, value in kept.items() if path[:-1] == tokens]
      order = draft_after((*root, *tokens))
      return sorted((path[-1] for path, _ in mine), key=lambda token: (-order[token], token))
    count = sum(path[:-1] == ranks for path in shape.paths)
    order = draft_after((*root, *tokens))
    return sorted(range(case.vocab), key=lambda token: (-order[token], token))[:count]

  def emit(sequence, probability, root, ranks, goes_on):
    """`sequence` was just extended; its last token is a node, or ends the cycle."""
    new = sequence[len(case.prompt):]
    if len(new) == laws.DEPTH or new[-1:] == (structs.EOS_ID,):
      law[new] = law.get(new, 0.0) + probability
    elif goes_on:
      visit(sequence, probability, root, ranks)
    else:
      visit(sequence, probability, sequence, ())

  def visit(sequence, probability, root, ranks):
    tokens = sequence[len(root):]
    p = target_after(sequence)
    if case.drawn:
      count = sum(path[:-1] == ranks for path in shape.paths)
      judge_drawn(sequence, probability, root, ranks, p, draft_after(sequence), 0, count)
      return
    for rank, token in enumerate(children(root, ranks, tokens)):
      q = np.eye(case.vocab)[token]
      kept = judge.keep(p, q, token)
      if kept > 0:
        emit((*sequence, token), probability * kept, root, (*ranks, rank), True)
      probability *= 1.0 - kept
      if probability <= 1e-15:
        return
      p = judge.correct(p, q)
    end_cycle(sequence, probability, p)

  def judge_drawn(sequence, probability, root, ranks, p, q, rank, count):
    if rank == count or q.sum() <= 0:
      end_cycle(sequence, probability, p)
      return
    q = q / q.sum()
    for token in np.flatnonzero(q):
      token = int(token)
      kept = judge.keep(p, q, token)
      here = probability * q[token]
      if kept > 0:
        emit((*sequence, token), here * kept, root, (*ranks, rank), True)
      if here * (1.0 - kept) > 1e-15:
        left = np.where(np.arange(len(q)) == token, 0.0, q)
        judge_drawn(sequence, here * (1.0 - kept), root, ranks, judge.correct(p, q), left,
                    rank + 1, count)

  def end_cycle(sequence, probability, p):
    for token in np.flatnonzero(p):
      emit((*sequence, int(token)), probability * p[token], None, None, False)

  visit(tuple(case.prompt), 1.0, tuple(case.prompt), ())
  assert np.isclose(sum(law.values()), 1.0)
  return law


LOSSLESS_CASES = {
    'fixed': Case(),
    'drawn': Case(drawn=True),
    'drawn_shuffled': Case('similar', drawn=True, tree='shuffled', prompt=(3, 4)),
    'fixed_shuffled': Case('similar', tree='shuffled'),
    'fixed_top_p': Case('similar', temperature=0.7, top_p=0.8, tree='wide'),
    'drawn_top_k': Case('similar', top_k=3, vocab=7, tree='wide', drawn=True),
    'drawn_cold': Case('overconfident', temperature=0.6, top_p=0.9, drawn=True, prompt=(2, 2, 4)),
    'drawn_same': Case('same', drawn=True, temperature=1.4),
    'drawn_one_token_prompt': Case('similar', drawn=True, prompt=(3,)),
    'dynamic': Case('similar', tree='dynamic'),
    'dynamic_unrelated': Case('unrelated', tree='dynamic_wide', prompt=(4, 2)),
    'dynamic_warped': Case('similar', temperature=1.3, top_k=4, top_p=0.8, vocab=8, tree='dynamic'),
    'drawn_small': Case('similar', drawn=True, tree='small_shuffled', prompt=(3,)),
    'language_model': Case('similar', drawn=True, language_model=True, top_k=3),
    'language_model_dynamic': Case('similar', tree='dynamic', language_model=True, prompt=(3,)),
    'chain': Case('similar', tree='chain', drawn=True),
}

# name: (rule, epsilon, case); prompts of two tokens or more: of one there is no pair to draft from.
LOSSY_CASES = {
    'linear_small': ('linear', 0.5, Case(tree='small_shuffled', drawn=True, prompt=(3, 4))),
    'linear_fixed': ('linear', 0.5, Case('similar', temperature=0.9)),
    'linear_drawn': ('linear', 0.5, Case(drawn=True)),
    'linear_dynamic': ('linear', 0.3, Case('similar', tree='dynamic')),
    'typical_fixed': ('typical', 0.6, Case(temperature=1.2)),
    'typical_drawn': ('typical', 0.6, Case('similar', drawn=True, temperature=1.2)),
    'typical_dynamic': ('typical', 0.6, Case(tree='dynamic', temperature=1.2, vocab=8)),
    'square_drawn': ('square', 0.7, Case('similar', tree='wide', drawn=True, top_p=0.8)),
    'exponential_fixed': ('exponential', 0.5, Case('similar')),
    'top_k_drawn': ('top_k', 1 / 2, Case(drawn=True)),
}


def grid():
  """Every kind of tree, way of drafting, rule and warp: (name, case, rule, its law)."""
  for name, case in LOSSLESS_CASES.items():
    yield f'tree, exact, {name}', case, rules.Exact(), None
  for name, (rule, epsilon, case) in LOSSY_CASES.items():
    yield (f'tree, {rule} {epsilon:.2g}, {name}', case,
           rules.for_sampling(rule, epsilon, case.sampling),
           tree_cycle_law(case, judge_of(rule, epsilon)))
