"""The lines of `results.jsonl`: one evaluated setting each, appended so that a kill is harmless."""

from collections.abc import Mapping
import hashlib
import json
import pathlib
from typing import Any

from specdistill_jax import storage

# What every line has; a figure that was not measured is null, never 0.
FIELDS = (
    'study', 'task', 'target', 'draft', 'objective', 'data_source', 'train_steps', 'seed',
    'temperature', 'gamma', 'draft_sampling', 'rule', 'epsilon', 'batch_size', 'num_prompts',
    'alpha', 'block_efficiency', 'accepted_per_call', 'acceptance_by_position', 'cost_ratio',
    'verify_ratio', 'tokens_per_second', 'autoregressive_tokens_per_second', 'speedup_measured',
    'speedup_predicted', 'mbsu', 'quality_metric', 'quality', 'target_quality', 'device',
    'jax_version', 'commit', 'config_hash',
    # Beyond the common fields: 95 % intervals, settings, sizes, times, and counts by prompt.
    'alpha_interval', 'block_efficiency_interval', 'speedup_measured_interval', 'lossless',
    'top_k', 'top_p', 'max_new_tokens', 'target_parameters', 'draft_parameters',
    'target_step_seconds', 'draft_step_seconds', 'verify_seconds', 'prefill_seconds',
    'autoregressive_prefill_seconds', 'counts', 'reached_by_position', 'accepted_by_position',
    'min_confidence', 'drafted_per_call',
    # The tree that was drafted, 'chain' for none; gamma is its depth, drafted_per_call its nodes.
    'tree',
    # The part of the prompts that a line is about; null: all of them.
    'category',
)
# Columns of `counts`, one line of them for each batch of prompts (a prompt, at batch size 1).
COUNTS = ('emitted', 'target_calls', 'seconds', 'autoregressive_emitted',
          'autoregressive_seconds', 'overlap', 'overlap_tokens', 'drafted')
IDENTITY = (
    'study', 'task', 'target', 'draft', 'objective', 'data_source', 'train_steps', 'seed',
    'temperature', 'gamma', 'draft_sampling', 'rule', 'epsilon', 'batch_size', 'num_prompts',
    'top_k', 'top_p', 'max_new_tokens', 'min_confidence', 'tree', 'config_hash', 'category')


def make(**values: Any) -> dict[str, Any]:
  """A line with every field of `FIELDS`; what is not given is None. Refuses unknown fields."""
  unknown = sorted(set(values) - set(FIELDS))
  if unknown:
    raise ValueError(f'a results row has no field {", ".join(unknown)}')
  return {field: values.get(field) for field in FIELDS}


def identity(row: Mapping[str, Any]) -> tuple[Any, ...]:
  """What says that two lines are the same setting, whatever was measured."""
  return tuple(row.get(field) for field in IDENTITY)


def config_hash(config: Mapping[str, Any]) -> str:
  """Twelve hexadecimal digits of a config's canonical JSON."""
  canonical = json.dumps(config, sort_keys=True, separators=(',', ':'))
  return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def read(path: pathlib.Path) -> list[dict[str, Any]]:
  """All complete lines, of `metrics.jsonl` too; a last one that a kill has cut is left out."""
  if not path.exists():
    return []
  found = []
  complete = path.read_bytes().decode('utf-8', 'replace').rpartition('\n')[0]
  for number, line in enumerate(complete.split('\n') if complete else [], start=1):
    try:
      found.append(json.loads(line))
    except ValueError as error:
      raise ValueError(f'{path}, line {number} is not JSON ({error}); remove the line') from error
  return found


def of_last_config(found: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], int]:
  """Rows of the configuration that the last one is of, and how many there are of older ones."""
  kept = [row for row in found if row['config_hash'] == found[-1]['config_hash']]
  return kept, len(found) - len(kept)


def older_told(place: pathlib.Path | str, count: int) -> list[str]:
  """A sentence about rows that `of_last_config` leaves out, where there are any."""
  return [f'{place}: {count} rows are of an older configuration and left out.'] if count else []


def repair(path: pathlib.Path) -> None:
  """Drops what a kill left of a write: a torn last line, and categories without their whole.

  The lines of one setting are written at once, those of categories first and that of all
  prompts last; without the last, the setting will be measured again, and the others would be
  there twice.
  """
  if not path.exists():
    return
  content = path.read_bytes()
  kept = content[:content.rfind(b'\n') + 1]
  lines = kept.splitlines(keepends=True)
  while lines and json.loads(lines[-1]).get('category') is not None:
    kept = kept[:-len(lines.pop())]
  if len(kept) < len(content):
    storage.write(path, kept)


def append(path: pathlib.Path, *rows: Mapping[str, Any]) -> None:
  """Writes lines in one write and waits until they are safe. NaN and infinity are refused."""
  lines = storage.Lines(path)
  lines.append(''.join(json.dumps(row, allow_nan=False) + '\n' for row in rows))
  lines.sync()
