"""Speculative samples of table models, and the laws that they should follow, enumerated.

`PYTHONPATH=. python tests/laws.py [samples [chains|trees]]` draws a million samples, or as many as
said, for every lossless rule, draft mode, draft length and warp, for every lossy rule, and for
every kind of tree, and prints the p-values, corrected for their number.
"""

import dataclasses
import functools
import itertools
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np

from specdistill_jax import structs
from specdistill_jax.decoding import engine
from specdistill_jax.decoding import rules
from specdistill_jax.decoding import sampling as sampling_lib
from specdistill_jax.drafters import lm
import tables

NUM_SAMPLES = int(os.environ.get('LAW_SAMPLES', 50_000))
DEPTH = 3
NEW_TOKENS = 4  # beyond the depth, so that cycles straddle it

@functools.cache
def models(vocab):
  """The target over so many tokens, by the name `target`, and its drafts."""
  target, other, noise = (tables.random_table(seed, vocab) for seed in range(3))
  return dict(
      target=target, unrelated=other, same=target,
      similar=tables.TableModel(target.logits_vvv + 0.4 * noise.logits_vvv),
      overconfident=tables.TableModel(4.0 * target.logits_vvv),
      uniform=tables.TableModel(jnp.zeros((vocab, vocab, vocab))))


@dataclasses.dataclass(frozen=True)
class Case:
  """One way to speculate; a draft temperature of None is the target's own."""
  draft: str = 'unrelated'
  gamma: int = 3
  temperature: float = 1.0
  top_k: int | None = None
  top_p: float | None = None
  draft_temperature: float | None = None
  prompt: tuple[int, ...] = (2, 3)
  min_confidence: float = 0.0
  vocab: int = 5

  @property
  def target(self):
    return models(self.vocab)['target']

  @property
  def sampling(self):
    return sampling_lib.Sampling(self.temperature, self.top_k, self.top_p)

  @property
  def draft_sampling(self):
    if self.draft_temperature is None:
      return self.sampling
    return sampling_lib.Sampling(self.draft_temperature)

  @property
  def drafter(self):
    return lm.LMDrafter(module=models(self.vocab)[self.draft], gamma=self.gamma,
                        sampling=self.draft_sampling, min_confidence=self.min_confidence)


def sample(case, rule, *, drafter=None, num_samples=None, new_tokens=NEW_TOKENS, seed=7):
  """Decodes the case's prompt in as many rows as there are samples."""
  num_samples, drafter = num_samples or NUM_SAMPLES, drafter or case.drafter
  prompts_bt = jnp.broadcast_to(jnp.asarray(case.prompt), (num_samples, len(case.prompt)))
  lengths_b = jnp.full((num_samples,), len(case.prompt))
  state = engine.prefill_speculative(case.target, drafter, prompts_bt, lengths_b,
                                     jax.random.key(seed), max_new_tokens=new_tokens)
  state = engine.decode_speculative(case.target, drafter, state, rule=rule,
                                    sampling=case.sampling)
  return jax.device_get(engine.generation(state, max_new_tokens=new_tokens))


def p_value(case, rule, *, law=None, **how):
  """Of the samples under `law`, or under the target's own."""
  if law is None:
    law = target_law(case)
  out = sample(case, rule, **how)
  return tables.chi_square_p_value(law, out.tokens, out.lengths, DEPTH)


def target_law(case):
  return tables.enumerated_law(case.target, case.prompt, DEPTH, **_warp(case.sampling))


def _warp(sampling):
  return dict(temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p)


def law_after(model, sequence, sampling):
  before = sequence[-2] if len(sequence) > 1 else 0
  logits = np.asarray(model.logits_vvv, np.float64)[before, sequence[-1]]
  return tables.warped(logits, **_warp(sampling))


def cycle_law(case, keep, correct):
  """Law of the first `DEPTH` tokens of cycles that keep tokens as `keep` says.

  Args:
    keep: (judged target law, draft law) -> how probably each drafted token is kept, `[v]`.
    correct: (target law, draft law) -> the law of the token after a refusal, `[v]`.
  """
  draft, law = models(case.vocab)[case.draft], {}
  judged_by = case.sampling if case.temperature else sampling_lib.Sampling(1.0)

  def extend(sequence, position, drafting, probability):
    new = tuple(sequence[len(case.prompt):])
    if len(new) == DEPTH or new[-1:] == (structs.EOS_ID,):
      law[new] = law.get(new, 0.0) + probability
      return
    target_v = law_after(case.target, sequence, case.sampling)
    next_v, kept_v = target_v, np.zeros_like(target_v)
    if drafting and position < case.gamma:
      draft_v = law_after(draft, sequence, case.draft_sampling)
      kept_v = draft_v * keep(law_after(case.target, sequence, judged_by), draft_v)
      refused = 1.0 - kept_v.sum()
      next_v = refused * correct(target_v, draft_v) if refused > 1e-12 else 0.0 * target_v
    confidence = law_after(draft, sequence, sampling_lib.Sampling(1.0)).max()
    for token in range(len(target_v)):
      if kept_v[token] > 0:
        extend([*sequence, token], position + 1, confidence >= case.min_confidence,
               probability * kept_v[token])
      if next_v[token] > 0:
        extend([*sequence, token], 0, True, probability * next_v[token])

  extend(list(case.prompt), 0, True, 1.0)
  assert np.isclose(sum(law.values()), 1.0)
  return law


def _residual(over_v, draft_v):
  left_v = np.maximum(over_v - draft_v, 0.0)
  return left_v / left_v.sum()


def _entropy(law_v):
  return -sum(p * np.log(p) for p in law_v if p > 0)


LENIENT = {'linear': lambda p, epsilon: p / epsilon, 'square': lambda p, epsilon: p / epsilon**2,
           'exponential': lambda p, epsilon: np.where(p > 0, p**epsilon, 0.0)}
LEAST = {
    'greedy_lenience': lambda p, epsilon: epsilon * p.max(),
    'typical': lambda p, epsilon: min(epsilon, np.sqrt(epsilon) * np.exp(-_entropy(p))),
    'top_k': lambda p, epsilon: np.sort(p)[-min(round(1 / epsilon), len(p))],
}


def lossy_law(case, name, epsilon, *, lenient_residual=False):
  """The closed form that each lossy rule states, from NumPy alone."""
  if name in LENIENT:
    lenient = lambda p: LENIENT[name](p, epsilon)
    keep = lambda p, d: np.minimum(1.0, lenient(p) / np.maximum(d, 1e-300))
    correct = lambda p, d: _residual(lenient(p) if lenient_residual else p, d)
  else:
    keep = lambda p, d: ((p >= LEAST[name](p, epsilon) - 1e-12) & (p > 0)).astype(float)
    correct = lambda p, d: p
  return cycle_law(case, keep, correct)


# Temperature, top-k, top-p, vocabulary.
WARPS = ((1.0, None, None, 8), (0.6, None, None, 4), (1.7, None, None, 6), (1.0, 3, None, 7),
         (1.0, None, 0.8, 5), (1.3, 4, 0.7, 8))
LOSSY = (('linear', 0.5), ('linear', 0.1), ('square', 0.5), ('exponential', 0.5),
         ('typical', 0.6), ('typical', 0.2), ('top_k', 1 / 2), ('top_k', 1 / 3))


def lossless_grid():
  """Every lossless rule, draft mode, draft length and warp: (name, case, rule)."""
  for rule, greedy, adaptive, (temperature, top_k, top_p, vocab) in itertools.product(
      ('exact', 'block'), (False, True), (False, True), WARPS):
    case = Case(draft='similar' if greedy or adaptive else 'unrelated', temperature=temperature,
                top_k=top_k, top_p=top_p, draft_temperature=0.0 if greedy else None,
                min_confidence=0.4 if adaptive else 0.0, vocab=vocab)
    name = (f'{rule}, {"greedy" if greedy else "sampled"} drafts, '
            f'{"adaptive" if adaptive else "fixed"} length, temperature {temperature:g}, '
            f'top-k {top_k}, top-p {top_p}, '
            f'{vocab} tokens')
    yield name, case, rules.for_sampling(rule, 1.0, case.sampling), None


def lossy_grid():
  """Every lossy rule under both draft modes and lengths: (name, case, rule, its law)."""
  for (rule, epsilon), greedy, adaptive in itertools.product(LOSSY, (False, True), (False, True)):
    case = Case(draft='similar', temperature=0.9, top_p=0.95,
                draft_temperature=0.0 if greedy else None,
                min_confidence=0.4 if adaptive else 0.0)
    name = (f'{rule} {epsilon:.2g}, {"greedy" if greedy else "sampled"} drafts, '
            f'{"adaptive" if adaptive else "fixed"} length')
    yield (name, case, rules.for_sampling(rule, epsilon, case.sampling),
           lossy_law(case, rule, epsilon))


def main():
  import trees  # which knows this file
  num_samples = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
  grids = dict(chains=(lossless_grid, lossy_grid), trees=(trees.grid,))
  chosen = sys.argv[2:] or grids
  found = []
  for name, case, rule, law in itertools.chain(*(make() for kind in chosen
                                                 for make in grids[kind])):
    found.append(p_value(case, rule, law=law, num_samples=num_samples))
    print(f'{found[-1]:.4f}  {name}', flush=True)
  print(f'{len(found)} cases of {num_samples} samples each; the smallest p-value is '
        f'{min(found):.4g}, {min(tables.holm(found)):.4g} after Holm\'s correction')


if __name__ == '__main__':
  main()
