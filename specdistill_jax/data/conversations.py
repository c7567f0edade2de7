"""Conversations to train on, in the layouts of ShareGPT and of UltraChat and OpenAI.

A JSON line has `conversations`, a list of `{"from": ..., "value": ...}`, or `messages`, a list
of `{"role": ..., "content": ...}`. What people share is untidy: leading answers and trailing
questions are cut off; what is then no dialogue is left out, and counted.
"""

from collections.abc import Sequence

from specdistill_jax.data import files
from specdistill_jax.data import splits

# The list's field -> (field of the role, field of the text).
LAYOUTS = {'conversations': ('from', 'value'), 'messages': ('role', 'content')}
ROLES = {'system': 'system', 'user': 'user', 'human': 'user', 'assistant': 'assistant',
         'gpt': 'assistant', 'chatgpt': 'assistant', 'bing': 'assistant', 'bard': 'assistant',
         'model': 'assistant'}

Turns = tuple[tuple[str, str], ...]


def read(paths: Sequence[str]) -> tuple[list[splits.Example], dict[str, int]]:
  """The conversations of JSON lines files, and how many were left out and why.

  Raises:
    ValueError: a file or a line of another layout, with its number; a role that is unknown.
  """
  found, dropped = [], {'no_answer': 0, 'not_alternating': 0}
  for path in paths:
    if not isinstance(path, str) or not path.endswith(('.jsonl', '.jsonl.gz')):
      raise ValueError(f'Conversations are read from .jsonl or .jsonl.gz files, not {path!r}.')
    for number, record in files.json_objects(path):
      turns = _dialogue(_turns(record, f"'{path}', line {number}"))
      if not turns:
        dropped['no_answer'] += 1
      elif not _alternates(turns):
        dropped['not_alternating'] += 1
      else:
        found.append(example(turns, f'{path}:{number}'))
  return found, dropped


def example(turns: Turns, document: str) -> splits.Example:
  """A conversation as an example."""
  said = {'assistant': [], 'other': []}
  for role, text in turns:
    said['assistant' if role == 'assistant' else 'other'].append(text)
  return splits.Example('\n'.join(said['other']), '\n'.join(said['assistant']), document,
                        turns=tuple(turns))


def _turns(record: dict, place: str) -> Turns:
  layout = next((name for name in LAYOUTS if name in record), None)
  if layout is None:
    raise ValueError(f"{place}, has neither 'conversations' (ShareGPT) nor 'messages' "
                     f'(UltraChat, OpenAI); it has {", ".join(map(repr, record)) or "none"}.')
  role_field, text_field = LAYOUTS[layout]
  if not isinstance(record[layout], list):
    raise ValueError(f"{place}: the field '{layout}' must be a list of turns; it is "
                     f'{record[layout]!r:.60}.')
  turns = []
  for index, turn in enumerate(record[layout]):
    if not isinstance(turn, dict) or role_field not in turn or text_field not in turn:
      raise ValueError(f"{place}: turn {index} of '{layout}' must have '{role_field}' and "
                       f"'{text_field}'; it is {turn!r:.60}.")
    if turn[role_field] not in ROLES:
      raise ValueError(f"{place}: turn {index} is said by {turn[role_field]!r:.60}; known are "
                       f'{", ".join(ROLES)}.')
    text = files.check_text(turn[text_field], text_field, place)
    turns.append((ROLES[turn[role_field]], text.strip()))
  return tuple(turns)


def _dialogue(turns: Turns) -> Turns:
  """From the first question to the last answer, a system prompt kept; () where no such is."""
  system = turns[:1] if turns and turns[0][0] == 'system' else ()
  roles = [role for role, _ in turns]
  if 'user' not in roles or 'assistant' not in roles:
    return ()
  first, last = roles.index('user'), len(roles) - 1 - roles[::-1].index('assistant')
  return system + turns[first:last + 1] if first < last else ()


def _alternates(turns: Turns) -> bool:
  roles = [role for role, _ in turns]
  roles = roles[1:] if roles[0] == 'system' else roles
  expected = ('user', 'assistant') * (len(roles) // 2)
  return tuple(roles) == expected and all(text for _, text in turns)
