"""The performance suite: how fast decoding is, with and without a draft, and beside its peers.

  python -m specdistill_jax.bench
  python -m specdistill_jax.bench --preset=big --gamma=2,4,8 --batch_sizes=1,8 --peers=hf
  python -m specdistill_jax.bench --preset=1b --dtype=bfloat16          (on an accelerator)

Everything decodes with the same random weights in interleaved rounds; rounds in which other
processes took more than 5 % of the cores are left out while enough others remain. `speculative`
has a draft of one layer that nearly always agrees; `simulated` has the same draft and keeps its
tokens at a rate that is asked for. A table goes to standard error, and the last line of standard
output is one JSON document.
"""

from collections.abc import Iterable, Sequence
import importlib
import json
import os
import pathlib
import sys
from typing import Any

from absl import flags

PRESETS = ('tiny', 'small', 'medium', 'big', '1b')
COLUMNS = (  # heading, key, format
    ('batch', 'batch_size', 'd'), ('competitor', 'competitor', 's'), ('gamma', 'gamma', 'd'),
    ('tokens/s', 'tokens_per_second', '.1f'), ('+prefill', 'tokens_per_second_with_prefill', '.1f'),
    ('tau', 'block_efficiency', '.2f'), ('c', 'cost_ratio', '.3f'), ('v', 'verify_ratio', '.2f'),
    ('predicted', 'speedup_predicted', '.2f'), ('measured', 'speedup_measured', '.2f'),
    ('of memory', 'share_of_memory_read_ceiling', '.0%'), ('ours/peer', 'ours_over_peer', '.2f'),
    ('same tokens', 'identical_to_autoregressive', ''))


def make_flags() -> flags.FlagValues:
  values = flags.FlagValues()
  flags.DEFINE_enum('preset', 'small', PRESETS, 'Size of the models.', flag_values=values)
  flags.DEFINE_enum('dtype', 'float32', ('float32', 'bfloat16'),
                    'Of parameters and activations.', flag_values=values)
  flags.DEFINE_list('gamma', ['2', '4', '8'], 'Drafted tokens of a cycle; several make a grid.',
                    flag_values=values)
  flags.DEFINE_list('batch_sizes', ['1', '8'], 'Rows decoded together.', flag_values=values)
  flags.DEFINE_integer('new_tokens', 64, 'Tokens that each row decodes.', lower_bound=2,
                       flag_values=values)
  flags.DEFINE_float('temperature', 0.0, 'Of target and draft; 0 is greedy.', lower_bound=0.0,
                     flag_values=values)
  flags.DEFINE_list('acceptance', ['0.8'], 'Simulated acceptance at each draft position, given '
                    'that it is reached; the last figure holds for those beyond.',
                    flag_values=values)
  flags.DEFINE_float('tau', None, 'Simulated tokens per target call, in place of --acceptance.',
                     flag_values=values)
  flags.DEFINE_enum('peers', None, ('hf', 'none'), 'Whom to compare with; hf if it is installed.',
                    flag_values=values)
  flags.DEFINE_integer('rounds', 9, 'Rounds; an interval needs six undisturbed ones.',
                       lower_bound=1, flag_values=values)
  flags.DEFINE_string('output', None, 'File to write the JSON document to as well.',
                      flag_values=values)
  flags.DEFINE_string('profile', None, "Directory for a profiler's trace of one more round.",
                      flag_values=values)
  return values


def numbers(values: flags.FlagValues, name: str, kind: type, least: float,
            most: float = float('inf')) -> tuple[Any, ...]:
  """The numbers of a list flag, each within its bounds."""
  found = []
  for text in values[name].value:
    try:
      found.append(kind(text))
    except ValueError:
      raise ValueError(f'--{name} holds {text!r}; it must list numbers ({kind.__name__}), '
                       'parted by commas') from None
    if not least <= found[-1] <= most:
      raise ValueError(f'--{name} holds {text}; each must lie in [{least}, {most}]')
  if not found:
    raise ValueError(f'--{name} is empty; give at least one number')
  return tuple(found)


def parse(argv: Sequence[str]) -> flags.FlagValues | None:
  """Flags, or None after printing the help."""
  values = make_flags()
  if '--help' in argv:
    print(f'{__doc__}\nflags:\n{values.get_help()}')
    return None
  try:
    rest = values(list(argv))
  except flags.Error as error:
    raise ValueError(str(error)) from error
  if len(rest) > 1:
    raise ValueError(f'{rest[1]!r} is no flag; see --help')
  for name in ('gamma', 'batch_sizes'):
    if len(set(numbers(values, name, int, 1))) < len(values[name].value):
      raise ValueError(f'--{name} is {",".join(values[name].value)}; its numbers must differ')
  numbers(values, 'acceptance', float, 0.0, 1.0)
  return values


def _progress(description: str):
  def wrap(rounds):
    for index in rounds:
      print(f'{description}, round {index + 1} of {len(rounds)}', file=sys.stderr, flush=True)
      yield index
  return wrap


def table(rows: Iterable[dict[str, Any]]) -> str:
  """Rows as aligned text; what was not measured is a dash."""
  show = lambda value, form: '-' if value is None else format(value, form)
  lines = [[heading for heading, _, _ in COLUMNS]] + [
      [show(row.get(key), form) for _, key, form in COLUMNS] for row in rows]
  widths = [max(map(len, column)) for column in zip(*lines)]
  return '\n'.join('  '.join(cell.rjust(width) for cell, width in zip(line, widths))
                   for line in lines)


def summary(document: dict[str, Any]) -> str:
  """The document for a reader."""
  start = document['startup']
  lines = [
      f'{document["preset"]} ({document["target_parameters"] / 1e6:.1f}M, draft '
      f'{document["draft_parameters"] / 1e6:.1f}M parameters), {document["dtype"]}, '
      f'{document["device"]}, {document["prompt_tokens"]} + {document["new_tokens"]} tokens',
      f'import {start["import_seconds"]:.2f} s, first use {start["first_use_seconds"]:.2f} s']
  for batch in document['by_batch_size']:
    lines += [table(batch['rows'])]
    compiled = ', '.join(f'{name} {parts["prefill"]:.1f} + {parts["decode"]:.1f}'
                         for name, parts in batch['compile_seconds'].items())
    lines += [f'compiling prefill + decode, s: {compiled}; after warm-up '
              f'{batch["compilations_after_warm_up"]} compilations']
    if not batch['rows'][0]['undisturbed']:
      lines += ['DISTURBED: too few rounds in which other processes left the machine alone']
  if document['no_peers_because']:
    lines += [f'no peers: {document["no_peers_because"]}']
  return '\n'.join(lines)


def main(argv: Sequence[str] | None = None) -> int:
  """The command. Returns the exit status: 0, or 2 after printing one `error:` line."""
  # A peer shares the accelerator: memory is taken as it is needed, not in advance.
  os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')
  try:
    values = parse(list(sys.argv if argv is None else argv))
    if values is None:
      return 0
    benchmark = importlib.import_module('specdistill_jax.stages.benchmark')
    options = benchmark.Options(
        gammas=numbers(values, 'gamma', int, 1),
        batch_sizes=numbers(values, 'batch_sizes', int, 1),
        acceptance=numbers(values, 'acceptance', float, 0.0, 1.0),
        **{name: values[name].value for name in (
            'preset', 'dtype', 'new_tokens', 'temperature', 'tau', 'peers', 'rounds',
            'profile')})
    document = benchmark.run(options, progress=_progress)
  except ValueError as error:
    print(f'error: {" ".join(str(error).split())}', file=sys.stderr, flush=True)
    return 2
  print(summary(document), file=sys.stderr, flush=True)
  line = json.dumps(document)
  if values.output:
    pathlib.Path(values.output).write_text(line + '\n', encoding='utf-8')
  print(line, flush=True)
  return 0


if __name__ == '__main__':
  sys.exit(main())
