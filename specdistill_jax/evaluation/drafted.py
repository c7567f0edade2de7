"""What a decoding loop drafts, call by call, and what became of it; to look at, no figures."""

from collections.abc import Callable, Iterator
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from specdistill_jax import structs
from specdistill_jax.decoding import chain
from specdistill_jax.decoding import engine
from specdistill_jax.decoding import judging
from specdistill_jax.decoding import sampling as sampling_lib
from specdistill_jax.decoding import state as state_lib
from specdistill_jax.evaluation import step_costs

MOST_CYCLES = 8  # that are looked at for one in which something was kept


@dataclasses.dataclass(frozen=True)
class Call:
  """One call of the target: what was drafted for it, and what became of that.

  Slots: 0 is the root, the last token of the text before; i + 1 is the i-th drafted token.

  Attributes:
    root: its token id.
    tokens: drafted, the longest chain or all nodes of a tree, by slot.
    parents: the slot that each of them follows.
    probabilities: the draft's, of each after what it follows; None where it doesn't say.
    kept: slots of what was accepted, the root's first, as far as the text goes on.
    next_token: what the target put behind them; None where the text ended before.
  """
  root: int
  tokens: list[int]
  parents: list[int]
  probabilities: list[float] | None
  kept: list[int]
  next_token: int | None

  @property
  def accepted(self) -> list[int]:
    """Drafted tokens that are now part of the text."""
    return [self.tokens[slot - 1] for slot in self.kept[1:]]

  @property
  def emitted(self) -> list[int]:
    """What this call added to the text."""
    return self.accepted + [self.next_token] * (self.next_token is not None)

  @property
  def is_bonus(self) -> bool:
    """Whether the next token is one beyond a draft that was accepted to its end.

    Else it is a correction, in place of what was refused.
    """
    return self.next_token is not None and self.kept[-1] not in self.parents


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
  return state, _seen(proposal), verdict


def _seen(proposal: structs.Proposal) -> structs.Proposal:
  """What is looked at of a proposal: of its laws the drafted tokens' own log-probabilities."""
  if proposal.branches is not None:
    return proposal.replace(drafter_state=None, log_probs_bgv=None)
  log_probs_bg1 = jnp.take_along_axis(
      proposal.log_probs_bgv, proposal.tokens_bg[..., None], axis=-1)
  return proposal.replace(drafter_state=None, log_probs_bgv=log_probs_bg1,
                          num_drafted_b=judging.num_drafted(proposal))


def calls(module: Any, setting: step_costs.Setting, prompts_bt: np.ndarray,
          prompt_lengths_b: np.ndarray, key: jax.Array, *, sampling: sampling_lib.Sampling,
          max_new_tokens: int) -> Iterator[Call]:
  """Continues a batch, and gives each call that its first row took part in."""
  state = engine.prefill_speculative(module, setting.drafter, prompts_bt, prompt_lengths_b, key,
                                     max_new_tokens=max_new_tokens)
  while not bool(state.done_b[0]):
    before = int(state.lengths_b[0])
    state, proposal, verdict = _cycle(module, setting.drafter, state, rule=setting.rule,
                                      sampling=sampling)
    text = state.tokens_bs[0, before - 1:int(state.lengths_b[0])].tolist()
    yield _call(jax.device_get(proposal), text, int(verdict.num_accepted_b[0]))


def look(module: Any, setting: step_costs.Setting, *inputs, word: Callable[[int], str] = str,
         **how) -> Tree:
  """Continues a batch until two tokens of a tree of its first row were kept, and gives that tree.

  After `MOST_CYCLES`, or at the row's end, the last one.

  Args (beside those of `calls`):
    setting: its drafter drafts trees.
    word: a token id to what stands for it.
  """
  for number, call in enumerate(calls(module, setting, *inputs, **how), start=1):
    if len(call.kept) > 2 or number == MOST_CYCLES:
      break
  return Tree(call.parents, [word(token) for token in (call.root, *call.tokens)],
              call.probabilities, call.kept,
              None if call.next_token is None else word(call.next_token), number)


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


def _call(proposal: structs.Proposal, text: list[int], num_accepted: int) -> Call:
  """`text` is the root and what the call added to the first row."""
  branches, tokens = proposal.branches, proposal.tokens_bg[0].tolist()
  if branches is None:
    tokens = tokens[:int(proposal.num_drafted_b[0])]
    parents, log_probs = list(range(len(tokens))), proposal.log_probs_bgv[0, :len(tokens), 0]
  else:
    parents, log_probs = branches.parents_bm[0].tolist(), branches.draft_log_probs_bm
    log_probs = None if log_probs is None else log_probs[0]
  kept = [0]
  for token in text[1:1 + num_accepted]:  # siblings differ, and filler comes last
    kept.append(next(node + 1 for node, parent in enumerate(parents)
                     if parent == kept[-1] and tokens[node] == token))
  return Call(text[0], tokens, parents, None if log_probs is None else np.exp(log_probs).tolist(),
              kept, text[-1] if len(text) > 1 + num_accepted else None)
