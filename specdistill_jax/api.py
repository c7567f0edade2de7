"""`sd.generate` and `sd.speculate`: prompts in, tokens out, everything checked at the edge."""

from collections.abc import Sequence
import dataclasses
import functools
from typing import Any

from absl import logging
import jax
from jaxtyping import Int
import numpy as np

from specdistill_jax import structs
from specdistill_jax.decoding import engine
from specdistill_jax.decoding import rules
from specdistill_jax.decoding import sampling as sampling_lib
from specdistill_jax.decoding import tree_names
from specdistill_jax.drafters import built
from specdistill_jax.drafters import families
from specdistill_jax.drafters import feature
from specdistill_jax.drafters import feature_config
from specdistill_jax.models import base

SMALLEST_WIDTH = 16
DRAFT_SAMPLING = ('sampled', 'greedy')


def generate(target: base.Model, prompts: Sequence[Any], *, max_new_tokens: int,
             temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
             key: jax.Array, prompt_width: int | None = None) -> structs.Generation:
  """Decodes the target alone, a token per call.

  Args:
    target: a model, as from `load_pretrained`.
    prompts: `b` token-id lists of any lengths, or strings if the target has a vocabulary.
    max_new_tokens: budget of each row, the end token included.
    temperature: 0 is greedy.
    top_k: keep the k most probable tokens; None keeps all.
    top_p: keep the smallest set of tokens of this mass, after top-k; None keeps all.
    key: a PRNG key, or one for each row. Row i draws from `fold_in(key, i)`: its output
      depends neither on its neighbours nor on their number.
    prompt_width: pad prompts to this many tokens, so that calls share a compilation; None
      takes the next power of two.

  Returns:
    `Generation` with tokens `[b, max_new_tokens]`.

  Raises:
    ValueError: an empty prompt, one longer than `prompt_width`, an id outside the vocabulary,
      or a sampling setting outside its range.
  """
  sampling = sampling_lib.Sampling(temperature, top_k, top_p)
  prompts_bt, lengths_b = pad_prompts(target, prompts, max_new_tokens, prompt_width)
  module = target.unrolled
  state = engine.prefill_autoregressive(
      module, prompts_bt, lengths_b, key, max_new_tokens=max_new_tokens)
  state = engine.decode_autoregressive(module, state, sampling=sampling)
  return engine.generation(state, max_new_tokens=max_new_tokens)


def speculate(target: base.Model, drafter: base.Model | Any, prompts: Sequence[Any], *,
              gamma: int | None = None, tree: str | None = None,
              max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None,
              top_p: float | None = None, rule: str = 'exact', epsilon: float = 1.0,
              draft_sampling: str = 'sampled', min_confidence: float = 0.0, key: jax.Array,
              prompt_width: int | None = None) -> structs.Generation:
  """Decodes the target speculatively (Leviathan et al. 2023; Chen et al. 2023).

  Args (beside those of `generate`, which mean the same here):
    drafter: a smaller model with the target's vocabulary, or a feature-level draft of it; or a
      `structs.Drafter` of yours, which says itself what it drafts and how.
    gamma: tokens of the chain that is drafted in a cycle, at least 1.
    tree: drafted in place of a chain: 'eagle1', the ranks along the paths to all nodes, as in
      '0 1 00 01', or EAGLE-2's dynamic tree, as in 'dynamic k10 d6 n60' (top-k, depth, nodes).
      Siblings are drawn without replacement, or the most probable tokens where draft_sampling
      is 'greedy', at temperature 0, and in a dynamic tree always. Any rule but 'block'.
    rule: which drafted tokens to keep. Lossless: 'exact', 'block' (never fewer tokens a
      call). Lossy above temperature 0: 'linear', 'square', 'exponential' (lenience of
      DistillSpec), 'typical' (Medusa); at 0: 'greedy_lenience'; at any: 'top_k', which keeps
      the target's 1 / epsilon best tokens.
    epsilon: leniency of a lossy rule, in (0, 1]; 1 is lossless, smaller is more lenient.
    draft_sampling: 'sampled' drafts from the drafter's law, warped like the target's;
      'greedy' drafts its most probable token. Both are exact under an exact rule.
    min_confidence: a row stops drafting, before gamma, where the drafter's best token is less
      likely than this; 0 never stops. As exact as a fixed length. Of chains only.

  Returns:
    `Generation` with tokens `[b, max_new_tokens]` and, in `stats`, what was drafted and kept.

  Raises:
    ValueError: as `generate`; gamma below 1, or a tree that there is not, or both; a rule that
      makes no sense with this epsilon or temperature; min_confidence outside [0, 1);
      vocabularies that differ.
  """
  sampling = sampling_lib.Sampling(temperature, top_k, top_p)
  built_rule = rules.for_sampling(rule, epsilon, sampling)
  if isinstance(drafter, base.Model):
    target, drafter = check_pair(target, drafter)
    module = decoding_module(target, drafter)
    built_drafter = make_drafter(drafter, gamma=gamma, tree=tree, target_sampling=sampling,
                                 target=target, draft_sampling=draft_sampling,
                                 min_confidence=min_confidence)
  else:
    module, built_drafter = target.unrolled, drafter
    if gamma is not None or tree is not None:
      raise ValueError(f'gamma is {gamma} and tree is {tree!r}, but the drafter is a '
                       f'{type(drafter).__name__}, which says itself what it drafts; leave both '
                       'out')
  prompts_bt, lengths_b = pad_prompts(target, prompts, max_new_tokens, prompt_width)
  state = engine.prefill_speculative(
      module, built_drafter, prompts_bt, lengths_b, key, max_new_tokens=max_new_tokens)
  state = engine.decode_speculative(
      module, built_drafter, state, rule=built_rule, sampling=sampling)
  return engine.generation(state, max_new_tokens=max_new_tokens)


def decoding_module(target: base.Model, drafter: base.Model) -> Any:
  """The target's module as decoding loops take it, with the features that the draft reads."""
  return built.target(target.unrolled, drafter.module)


def on_given_text(target: base.Model, drafter: base.Model) -> Any:
  """The draft's module with `supervise` and `logits`, for its law along given text."""
  if families.is_feature_draft(drafter.config):
    return feature.TeacherForced(drafter.module, target.module)
  return drafter.module


def make_drafter(model: base.Model, *, gamma: int | None = None, tree: str | None = None,
                 target_sampling: sampling_lib.Sampling, draft_sampling: str = 'sampled',
                 min_confidence: float = 0.0, target: base.Model | None = None
                 ) -> Any:
  """The drafter of chains, or of trees, for a target that samples as `target_sampling` says.

  `target` is needed by a feature-level draft, which shares its embedding and head.
  """
  if (gamma is None) == (tree is None):
    raise ValueError(f'gamma is {gamma} and tree is {tree!r}; one of them must be given, the '
                     'length of a chain or a tree')
  shape = None if tree is None else tree_names.parse(tree)
  if shape is None and (not isinstance(gamma, int) or gamma < 1):
    raise ValueError(f'gamma is {gamma}; it must be an integer of at least 1')
  if draft_sampling not in DRAFT_SAMPLING:
    raise ValueError(f'draft_sampling is {draft_sampling!r}; it must be one of '
                     f'{", ".join(DRAFT_SAMPLING)}')
  if not 0.0 <= min_confidence < 1.0:
    raise ValueError(f'min_confidence is {min_confidence}; it must lie in [0, 1), and 0 drafts '
                     'gamma tokens always')
  if shape is not None and min_confidence:
    raise ValueError(f'min_confidence is {min_confidence}, but a tree is drafted as it is; it must '
                     'be 0')
  sampling = sampling_lib.Sampling(0.0) if draft_sampling == 'greedy' else target_sampling
  return built.drafter(model.unrolled, target and target.unrolled,
                       gamma if shape is None else shape, sampling, min_confidence)


def check_pair(target: base.Model, drafter: base.Model) -> tuple[base.Model, base.Model]:
  """The two models over the tokens that they share.

  Raises unless the draft can speak for the target: one family, one vocabulary.
  """
  if families.is_feature_draft(drafter.config):
    feature_config.check_fits(drafter.config, target.config)
    return check_same_vocabulary(target, drafter)
  kinds = target.config.family, drafter.config.family
  if kinds[0] != kinds[1]:
    raise ValueError(f'the target is of the family {kinds[0]!r} and the draft of '
                     f'{kinds[1]!r}; both must be of one family, since an encoder-decoder '
                     'and a decoder read prompts differently')
  return check_same_vocabulary(target, drafter)


def check_same_vocabulary(target: base.Model, drafter: base.Model
                          ) -> tuple[base.Model, base.Model]:
  """The two models over the tokens that they share; raises unless these mean the same.

  Models of one family may pad one vocabulary to different sizes. Then both laws are taken over
  the real tokens: what padding ids would get is given to these, in proportion.
  """
  digests = [getattr(model.vocabulary, 'digest', None) for model in (target, drafter)]
  if None not in digests and digests[0] != digests[1]:
    raise ValueError(f'target and draft have different vocabularies (digests {digests[0][:12]} '
                     f'and {digests[1][:12]}); speculative decoding needs the same one')
  sizes = target.config.vocab_size, drafter.config.vocab_size
  if sizes[0] == sizes[1]:
    return target, drafter
  can_narrow = all(hasattr(model.module, 'narrowed') for model in (target, drafter))
  if None in digests or target.vocabulary.size > min(sizes) or not can_narrow:
    raise ValueError(f'target has a vocabulary of {sizes[0]} tokens and draft one of {sizes[1]}; '
                     'speculative decoding needs the same one')
  shared = target.vocabulary.size
  _say_shared(*sizes, shared)
  return _narrowed(target, shared), _narrowed(drafter, shared)


@functools.cache
def _say_shared(target: int, drafter: int, shared: int) -> None:
  logging.info('target has %d logits and draft %d; their vocabulary has %d tokens, and laws are '
               'taken over these', target, drafter, shared)


def _narrowed(model: base.Model, vocab_size: int) -> base.Model:
  if model.config.vocab_size == vocab_size:
    return model
  module = model.module.narrowed(vocab_size)
  return dataclasses.replace(model, module=module, config=module.config)


def vocabulary_fields(model: base.Model) -> dict[str, Any]:
  """What a config must say to have this model's tokens, where it has been narrowed."""
  if not getattr(model.config, 'vocab_padding', 0):
    return {}
  return dict(vocab_size=model.config.vocab_size, vocab_padding=model.config.vocab_padding)


def pad_prompts(target: base.Model, prompts: Sequence[Any], max_new_tokens: int,
                prompt_width: int | None = None
                ) -> tuple[Int[np.ndarray, 'b t'], Int[np.ndarray, 'b']]:
  """Encodes, checks and right-pads prompts; returns them with their lengths."""
  if max_new_tokens < 1:
    raise ValueError(f'max_new_tokens is {max_new_tokens}; it must be at least 1')
  if isinstance(prompts, str):
    raise ValueError('prompts is one string; it must be a list of prompts')
  rows = [_encode(target, prompt, index) for index, prompt in enumerate(prompts)]
  if not rows:
    raise ValueError('prompts is empty; give at least one prompt')
  longest = max(len(row) for row in rows)
  if prompt_width is None:
    prompt_width = max(SMALLEST_WIDTH, 1 << (longest - 1).bit_length())
  elif longest > prompt_width:
    index = max(range(len(rows)), key=lambda index: len(rows[index]))
    raise ValueError(f'prompt {index} has {longest} tokens, more than the prompt buffer of '
                     f'{prompt_width}; shorten it or raise prompt_width')
  limit = getattr(target.config, 'max_positions', 0)
  if limit and longest + max_new_tokens > limit:
    raise ValueError(f'a prompt of {longest} tokens and {max_new_tokens} new ones exceed the '
                     f"target's {limit} learnt positions")
  prompts_bt = np.full((len(rows), prompt_width), structs.PAD_ID, np.int32)
  for index, row in enumerate(rows):
    prompts_bt[index, :len(row)] = row
  return prompts_bt, np.array([len(row) for row in rows], np.int32)


def _encode(target: base.Model, prompt: Any, index: int) -> list[int]:
  if isinstance(prompt, str):
    if target.vocabulary is None:
      raise ValueError(f'prompt {index} is text, but the target has no vocabulary; give token ids')
    vocabulary = target.vocabulary
    prompt = [*vocabulary.prefix_ids, *vocabulary.encode(prompt), *vocabulary.suffix_ids]
  ids = [int(token) for token in prompt]
  if not ids:
    raise ValueError(f'prompt {index} is empty; a prompt needs at least one token')
  for token in ids:
    if not 0 <= token < target.config.vocab_size:
      raise ValueError(f'prompt {index} holds token id {token}, outside the vocabulary of '
                       f'{target.config.vocab_size} tokens (0 to {target.config.vocab_size - 1})')
  return ids
