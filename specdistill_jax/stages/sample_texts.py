"""Sample texts of a study: `evaluate` keeps a few of each method, `report` shows them.

`samples.jsonl` has a line for each method, temperature and prompt. It is only ever appended to:
what is there already is not decoded again.
"""

from collections.abc import Mapping, Sequence
import pathlib
from typing import Any

import jax
import numpy as np

from specdistill_jax.decoding import sampling as sampling_lib
from specdistill_jax.decoding import state as state_lib
from specdistill_jax.decoding import tree_names
from specdistill_jax.evaluation import drafted
from specdistill_jax.evaluation import rows as rows_lib
from specdistill_jax.evaluation import step_costs
from specdistill_jax.models import base

FILE = 'samples.jsonl'
PROMPTS = 4  # of each method at each temperature
END = '∎'  # stands for an end token
_METHOD = ('objective', 'data_source', 'temperature', 'config_hash')
_TOLD = _METHOD + ('train_steps', 'seed', 'gamma', 'tree', 'rule', 'epsilon', 'lossless',
                   'draft_sampling', 'min_confidence')


def _method(fields: Mapping[str, Any]) -> tuple[Any, ...]:
  return tuple(fields[name] for name in _METHOD)


def _one_each(wanted: Mapping[Any, Mapping[str, Any]]) -> list[Any]:
  """Of each method the first setting, a lossless chain where there is one."""
  found: dict[Any, Any] = {}
  for name in sorted(wanted, key=lambda name: (
      not wanted[name]['lossless'], wanted[name]['tree'] != tree_names.CHAIN)):
    found.setdefault(_method(wanted[name]), name)
  return list(found.values())


def _text(vocabulary: Any, tokens: Sequence[int]) -> str:
  return ' '.join(map(str, tokens)) if vocabulary is None else vocabulary.decode(list(tokens))


def pieces(vocabulary: Any, tokens: Sequence[int], end_ids: Sequence[int]) -> list[str]:
  """What each token adds to the text; a character of several tokens comes with its last one."""
  if vocabulary is None:
    return [f' {token}' for token in tokens]
  found, text = [], ''
  for index, token in enumerate(tokens):
    if token in end_ids:
      found.append(END)
      continue
    longer = _text(vocabulary, tokens[:index + 1])
    is_last = index + 1 == len(tokens)
    if longer.endswith('\ufffd') and not is_last:  # the bytes of a character so far
      found.append('')
      continue
    found.append(longer[len(text):])
    text = longer
  return found


def _texts(module, setting, batches, key, **how) -> list[tuple[list[int], drafted.Text]]:
  """(prompt, text) of the first prompts, drawn from the keys that measurements draw from."""
  found = []
  for index, (prompts_bt, lengths_b) in enumerate(batches):
    texts = drafted.watch(module, setting, prompts_bt, lengths_b,
                          jax.random.fold_in(key, index), **how)
    found += [(prompt[:length].tolist(), text)
              for prompt, length, text in zip(prompts_bt, lengths_b, texts)]
    if len(found) >= PROMPTS:
      break
  return found[:PROMPTS]


def keep(workdir: pathlib.Path, target: base.Model, wanted: Mapping[Any, Mapping[str, Any]],
         built: Mapping[Any, step_costs.Setting],
         batches: Sequence[tuple[np.ndarray, np.ndarray]], key: jax.Array, *,
         sampling: sampling_lib.Sampling, max_new_tokens: int) -> None:
  """Decodes a few prompts with each method and writes texts with the origin of each token.

  Args:
    wanted: fields of the rows that are being measured; likewise `built`.
    batches: (prompts_bt, prompt_lengths_b), as they are measured.
  """
  path, vocabulary, module = workdir / FILE, target.vocabulary, target.module.unstacked()
  end_ids = np.atleast_1d(state_lib.end_ids(module)).tolist()
  rows_lib.repair(path)
  present = {_method(line) for line in rows_lib.read(path)}
  for name in _one_each(wanted):
    fields = wanted[name]
    if _method(fields) in present:
      continue
    texts = _texts(module, built[name], batches, key, sampling=sampling,
                   max_new_tokens=max_new_tokens)
    rows_lib.append(path, *({field: fields[field] for field in _TOLD} | dict(
        number=number, prompt=_text(vocabulary, prompt),
        pieces=pieces(vocabulary, text.tokens, end_ids), tokens=text.tokens,
        drafted=text.drafted, target_calls=text.target_calls)
                            for number, (prompt, text) in enumerate(texts, start=1)))


def found(workdir: pathlib.Path, config_hash: str) -> list[dict[str, Any]]:
  """The lines of a config."""
  return [line for line in rows_lib.read(workdir / FILE) if line['config_hash'] == config_hash]
