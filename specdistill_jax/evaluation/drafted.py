"""What a decoding loop drafted and what became of it: for who looks on, not for figures."""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from specdistill_jax import structs
from specdistill_jax.decoding import chain
from specdistill_jax.decoding import engine
from specdistill_jax.decoding import sampling as sampling_lib
from specdistill_jax.decoding import state as state_lib
from specdistill_jax.evaluation import step_costs

MOST_CYCLES = 8  # that are looked at for one in which something was kept


@dataclasses.dataclass(frozen=True)
class Tree:
  """A tree by slots: 0 is the root, the last committed token, i + 1 node i.

  Attributes:
    parents: the slot of each node's parent.
    words: the root's and each node's.
    probabilities: the draft's, of each node after its parent; None where it didn't say.
    kept: slots of the accepted path, the root's first, as far as the text goes on.
    next_word: what the target put behind them, its correction or the bonus token; None where the
      text ended before.
    cycle: which one of the text it was, from 1.
  """
  parents: list[int]
  words: list[str]
  probabilities: list[float] | None
  kept: list[int]
  next_word: str | None
  cycle: int


@dataclasses.dataclass(frozen=True)
class Text:
  """What one prompt was continued with.

  Attributes:
    tokens: the new ones, the end token included.
    drafted: of each of them, whether it was drafted and kept; the others are the target's own,
      corrections and bonus tokens.
    target_calls: cycles that it took.
  """
  tokens: list[int]
  drafted: list[bool]
  target_calls: int


@functools.partial(jax.jit, static_argnames=('rule', 'sampling'), donate_argnames=('state',))
def _cycle(module, drafter, state, *, rule, sampling):
  state, proposal, _, verdict = chain.cycle(
      module, drafter, state, rule=rule, sampling=sampling, eos_id=state_lib.end_ids(module))
  return state, proposal.replace(drafter_state=None), verdict


def look(module: Any, setting: step_costs.Setting, prompts_bt: np.ndarray,
         prompt_lengths_b: np.ndarray, key: jax.Array, *, sampling: sampling_lib.Sampling,
         max_new_tokens: int, word: Callable[[int], str] = str) -> Tree:
  """Continues a batch until two tokens of a tree of its first row were kept, and gives that tree.

  After `MOST_CYCLES`, or at the row's end, the last one.

  Args:
    setting: its drafter drafts trees.
    word: a token id to what stands for it.
  """
  state = engine.prefill_speculative(module, setting.drafter, prompts_bt, prompt_lengths_b, key,
                                     max_new_tokens=max_new_tokens)
  for number in range(1, MOST_CYCLES + 1):
    before = int(state.lengths_b[0])
    state, proposal, verdict = _cycle(module, setting.drafter, state, rule=setting.rule,
                                      sampling=sampling)
    text = state.tokens_bs[0, before - 1:int(state.lengths_b[0])].tolist()
    found = _tree(jax.device_get(proposal), text, int(verdict.num_accepted_b[0]), number, word)
    if len(found.kept) > 2 or bool(state.done_b[0]):
      break
  return found


def watch(module: Any, setting: step_costs.Setting, prompts_bt: np.ndarray,
          prompt_lengths_b: np.ndarray, key: jax.Array, *, sampling: sampling_lib.Sampling,
          max_new_tokens: int) -> list[Text]:
  """Continues a batch cycle by cycle to its end; each row's tokens and where they came from."""
  state = engine.prefill_speculative(module, setting.drafter, prompts_bt, prompt_lengths_b, key,
                                     max_new_tokens=max_new_tokens)
  texts = [Text([], [], 0) for _ in prompt_lengths_b]
  while not np.all(state.done_b):
    before_b = np.asarray(state.lengths_b)
    state, _, verdict = _cycle(module, setting.drafter, state, rule=setting.rule,
                               sampling=sampling)
    tokens_bs, lengths_b, kept_b = jax.device_get(
        (state.tokens_bs, state.lengths_b, verdict.num_accepted_b))
    for row, text in enumerate(texts):
      texts[row] = _continued(text, tokens_bs[row, before_b[row]:lengths_b[row]].tolist(),
                              int(kept_b[row]))
  return texts


def _continued(text: Text, new: list[int], num_accepted: int) -> Text:
  """`text` with what a cycle added: the kept tokens come first, and the end may cut them."""
  if not new:
    return text
  return Text(text.tokens + new,
              text.drafted + [index < num_accepted for index in range(len(new))],
              text.target_calls + 1)


def _tree(proposal: structs.Proposal, text: list[int], num_accepted: int, number: int,
          word: Callable[[int], str]) -> Tree:
  """`text` is the root and what the cycle added to the first row."""
  branches, tokens = proposal.branches, [text[0], *proposal.tokens_bg[0].tolist()]
  if branches is None:  # a tree of width one, proposed as a chain
    parents, thought = list(range(len(tokens) - 1)), None
  else:
    parents, thought = branches.parents_bm[0].tolist(), branches.draft_log_probs_bm
  kept = [0]
  for token in text[1:1 + num_accepted]:  # siblings differ, and filler comes last
    kept.append(next(node + 1 for node, parent in enumerate(parents)
                     if parent == kept[-1] and tokens[node + 1] == token))
  return Tree(parents, [word(token) for token in tokens],
              None if thought is None else np.exp(thought[0]).tolist(), kept,
              word(text[-1]) if len(text) > 1 + num_accepted else None, number)
