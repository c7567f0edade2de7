"""Examples, and how they part into training and held-out splits that share nothing."""

import collections
from collections.abc import Sequence
import hashlib
from typing import NamedTuple

PAIRS = 'pairs'
LANGUAGE_MODELLING = 'language modelling'
PROMPTS = 'prompts'  # for evaluation only, without completions; also the name of their split


class Example(NamedTuple):
  """One example before tokenisation.

  Attributes:
    inputs: the prompt, or None in language modelling.
    targets: the completion; the whole text in language modelling.
    document: id of the document it comes from; a document is never on both sides of a split.
    category: that its file gives it, or ''.
    turns: (role, text) of a conversation in order, role `system`, `user` or `assistant`; the
      last is the assistant's. Empty where there is no conversation; else `inputs` and `targets`
      are what the other side and the assistant say in it.
  """
  inputs: str | None
  targets: str
  document: str
  category: str = ''
  turns: tuple[tuple[str, str], ...] = ()


def split(examples: Sequence[Example], fraction: float,
          seed: int) -> tuple[list[Example], list[Example]]:
  """Parts `examples` by document: (training, validation).

  Args:
    examples: in any order; their order is kept inside each part.
    fraction: of the documents that goes to validation, at least one document.
    seed: another seed holds out other documents.

  Raises:
    ValueError: the fraction lies outside (0, 1), or there are too few documents.
  """
  if not 0.0 < fraction < 1.0:
    raise ValueError(f'task.validation_fraction is {fraction}; it must lie between 0 and 1.')
  documents = sorted({e.document for e in examples}, key=lambda d: _rank(d, seed))
  num_held_out = max(1, round(fraction * len(documents)))
  if num_held_out >= len(documents):
    raise ValueError(
        f'The training split is empty: {len(documents)} document(s) cannot be parted with '
        f'task.validation_fraction {fraction}; give more documents, or validation files.')
  held_out = set(documents[:num_held_out])
  return ([e for e in examples if e.document not in held_out],
          [e for e in examples if e.document in held_out])


def without_leaks(train: Sequence[Example],
                  validation: Sequence[Example]) -> list[Example]:
  """`train` less the examples whose prompt (or text) also stands in `validation`.

  Users' files repeat themselves, and a held-out text seen in training is no longer held out.
  """
  held_out = {_content(e) for e in validation}
  return [e for e in train if _content(e) not in held_out]


def without_empty(examples: Sequence[Example]) -> list[Example]:
  """`examples` less those with nothing to learn from, or nothing to learn."""
  return [e for e in examples
          if e.targets.strip() and (e.inputs is None or e.inputs.strip())]


def kinds(examples: Sequence[Example]) -> collections.Counter:
  """How many examples there are of each kind, `PAIRS` and `LANGUAGE_MODELLING`."""
  return collections.Counter(
      LANGUAGE_MODELLING if e.inputs is None else PAIRS for e in examples)


def _content(example: Example) -> str:
  return ' '.join((example.targets if example.inputs is None else example.inputs).split())


def _rank(document: str, seed: int) -> bytes:
  # A hash and not an enumeration: a document added later does not reshuffle the others.
  return hashlib.sha256(f'{seed}:{document}'.encode('utf-8', 'surrogatepass')).digest()
