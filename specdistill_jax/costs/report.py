"""What the compiled programs of a study mean together: rows of figures, and a table for people."""

from collections.abc import Mapping, Sequence
from typing import Any

from specdistill_jax.costs import ahead
from specdistill_jax.costs import chips
from specdistill_jax.costs import count
from specdistill_jax.costs import hlo
from specdistill_jax.costs import needed
from specdistill_jax.costs import programs
from specdistill_jax.costs import roofline

ALPHAS = (0.5, 0.6, 0.7, 0.8, 0.9)  # of the curve, where no acceptance rate is given
GIB = 2 ** 30


def row(program: programs.Program, compiled: ahead.Compiled, topology: str) -> dict[str, Any]:
  """Figures of one program on one chip of the slice; null for what a program does not have.

  `iteration` is one turn of the program's decoding loop, whose length depends on the data;
  the rest of the row takes that loop at its longest.
  """
  chip = chips.CHIPS[chips.split(topology)[0]]
  num_chips = program.mesh.size
  found = dict(
      program=program.name, topology=topology, chips=num_chips,
      mesh={axis: size for axis, size in program.mesh.shape.items()},
      fits=compiled.fits and compiled.needs <= chip.hbm_gib * GIB,
      needs_gib=compiled.needs / GIB, hbm_gib=chip.hbm_gib,
      available_gib=compiled.available and compiled.available / GIB,
      **{f'{name}_bytes': size for name, size in compiled.memory.items()},
      compile_seconds=compiled.seconds)
  if not compiled.fits:
    return found
  module = hlo.parse(compiled.text)
  whole, outside, once = (roofline.cost(count.operations(module, trips), chip)
                          for trips in (program.steps, 0, 1))
  trace = program.reference()
  ideal = needed.flops(trace, program.steps) / num_chips
  found |= dict(
      flops=whole.flops, needed_flops=ideal, hbm_bytes=whole.hbm_bytes,
      wire_bytes=whole.wire_bytes, kernel_seconds=whole.kernel_seconds,
      network_seconds=whole.network_seconds, roofline_seconds=whole.seconds, bound=whole.bound,
      num_collectives=whole.num_collectives, collectives=list(whole.collectives))
  if program.tokens:
    found |= dict(tokens=program.tokens, tokens_per_second=program.tokens / whole.seconds,
                  mfu=ideal / chip.flops / whole.seconds)
  else:
    kernels = once.kernel_seconds - outside.kernel_seconds
    network = once.network_seconds - outside.network_seconds
    # Within a turn each layer waits for its reductions: nothing overlaps.
    found |= dict(
        prefill_seconds=outside.kernel_seconds + outside.network_seconds,
        iteration=dict(seconds=kernels + network, kernel_seconds=kernels,
                       network_seconds=network, flops=once.flops - outside.flops,
                       hbm_bytes=once.hbm_bytes - outside.hbm_bytes,
                       num_collectives=once.num_collectives - outside.num_collectives,
                       wire_bytes=once.wire_bytes - outside.wire_bytes))
  return found


def prediction(rows: Mapping[str, Mapping[str, Any]], gamma: int, batch_size: int,
               alpha: float | None = None, tau: float | None = None,
               tree: str | None = None) -> dict[str, Any] | None:
  """Cost ratios and speed-up from the turns of the three decoding programs; None without them.

  cost_ratio, verify_ratio and speedup_predicted are those of the project's reports, with
  roofline times in place of measured ones. A given tau counts before a given alpha. Of a tree,
  gamma is the depth, what its levels cost beyond a draft step each counts as verification, and
  without a tau nothing is predicted: acceptance rates are about chains.
  """
  if any('iteration' not in rows.get(name, ()) for name in programs.DECODING):
    return None
  target, draft, cycle = (rows[name]['iteration']['seconds'] for name in programs.DECODING)

  def point(alpha, tau):
    return dict(alpha=alpha, block_efficiency=tau, speedup_predicted=tau * target / cycle,
                tokens_per_second=batch_size * tau / cycle)

  if tau is None and tree is not None:
    points = []
  elif tau is not None:
    points = [point(alpha, tau)]
  else:
    points = [point(a, roofline.block_efficiency(a, gamma))
              for a in (ALPHAS if alpha is None else (alpha,))]
  return dict(gamma=gamma, tree=tree, batch_size=batch_size, cost_ratio=draft / target,
              verify_ratio=(cycle - gamma * draft) / target, target_step_seconds=target,
              draft_step_seconds=draft, cycle_seconds=cycle,
              autoregressive_tokens_per_second=batch_size / target, predicted=points)


def growth(documents: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
  """How a training step changes from the first slice to the others, with as many rows a chip.

  `relative` is of roofline times; `seconds_by_kind` of collectives, and `grew` names the kinds
  that take longer than on the first slice.
  """
  found, first = [], {}
  for document in documents:
    for row_ in document['programs']:
      if 'mfu' not in row_:
        continue
      by_kind = {}
      for joined in row_['collectives']:
        by_kind[joined['kind']] = by_kind.get(joined['kind'], 0.0) + joined['seconds']
      start = first.setdefault(row_['program'], dict(seconds=row_['roofline_seconds'],
                                                     by_kind=by_kind))
      found.append(dict(
          study=document['study'], program=row_['program'], topology=row_['topology'],
          chips=row_['chips'], roofline_seconds=row_['roofline_seconds'],
          relative=row_['roofline_seconds'] / start['seconds'],
          kernel_seconds=row_['kernel_seconds'], network_seconds=row_['network_seconds'],
          seconds_by_kind=by_kind,
          grew=[kind for kind, seconds in by_kind.items()
                if seconds > start['by_kind'].get(kind, 0.0)]))
  return found


def growth_table(found: Sequence[Mapping[str, Any]]) -> str:
  """Markdown: a line for each training program and slice."""
  lines = ['| study | program | slice | chips | roofline ms | of the first | kernels ms | '
           + 'network ms | collectives that grew, ms |', '|' + '---|' * 9]
  for line in found:
    grew = ', '.join(f'{kind} {1e3 * line["seconds_by_kind"][kind]:.3f}' for kind in line['grew'])
    lines.append(
        f'| {line["study"]} | {line["program"]} | {line["topology"]} | {line["chips"]} | '
        f'{1e3 * line["roofline_seconds"]:.3f} | {line["relative"]:.3f} | '
        f'{1e3 * line["kernel_seconds"]:.3f} | {1e3 * line["network_seconds"]:.3f} | '
        f'{grew or "-"} |')
  return '\n'.join(lines)


_COLUMNS = ('study', 'program', 'slice', 'GiB/chip', 'of', 'fits', 'TFLOP', 'HBM GB', 'ICI GB',
            'collectives', 'roofline ms', 'bound', 'MFU', 'tokens/s')


def table(documents: Sequence[Mapping[str, Any]]) -> str:
  """Markdown: a line for each program, then a line for each prediction."""
  lines = ['| ' + ' | '.join(_COLUMNS) + ' |', '|' + '---|' * len(_COLUMNS)]
  for document in documents:
    for found in document['programs']:
      cells = [document['study'], found['program'], found['topology'],
               f'{found["needs_gib"]:.2f}', f'{found["hbm_gib"]:g}',
               'yes' if found['fits'] else 'no', *_speed_cells(found)]
      lines.append('| ' + ' | '.join(cells) + ' |')
  if any(document['prediction'] for document in documents):
    lines += ['', '| study | slice | gamma | c | v | target ms/step | '
              + 'speed-up at alpha (tau) |', '|' + '---|' * 7]
  for document in documents:
    if found := document['prediction']:
      points = ', '.join(
          f'{p["speedup_predicted"]:.2f} at '
          + (f'{p["alpha"]:g} ({p["block_efficiency"]:.2f})' if p['alpha'] is not None
             else f'tau {p["block_efficiency"]:.2f}') for p in found['predicted'])
      lines.append(f'| {document["study"]} | {document["decode_topology"]} | '
                   f'{found["tree"] or found["gamma"]} | '
                   f'{found["cost_ratio"]:.3f} | {found["verify_ratio"]:.2f} | '
                   f'{1e3 * found["target_step_seconds"]:.3f} | {points} |')
  return '\n'.join(lines)


def summary(documents: Sequence[Mapping[str, Any]], alpha: float = 0.8) -> str:
  """Markdown: a line for each study with a training step, its prediction taken at `alpha`."""
  lines = ['| study | trains on | GiB/chip | step, ms | MFU | decodes on | GiB/chip | '
           + f'speed-up at {alpha:g} |', '|' + '---|' * 8]
  for document in documents:
    by_name = {found['program']: found for found in document['programs']}
    step, cycle = by_name.get('train'), by_name.get('speculate')
    if step is None:
      continue
    room = lambda found: f'{found["needs_gib"]:.1f} of {found["hbm_gib"]:g}' if found else '-'
    predicted = [f'{point["speedup_predicted"]:.1f}' for point in
                 (document['prediction'] or dict(predicted=()))['predicted']
                 if point['alpha'] == alpha]
    lines.append('| ' + ' | '.join([
        document['study'], step['topology'], room(step),
        f'{1e3 * step["roofline_seconds"]:.0f}' if step['fits'] else '-',
        f'{step["mfu"]:.2f}' if step['fits'] else '-',
        cycle['topology'] if cycle else '-', room(cycle), *(predicted or ['-'])]) + ' |')
  return '\n'.join(lines)


def _speed_cells(found):
  if not found['fits']:
    return ['-'] * 8
  step = found.get('iteration', found)
  seconds = step['seconds'] if 'iteration' in found else found['roofline_seconds']
  return [f'{step["flops"] / 1e12:.4g}', f'{step["hbm_bytes"] / 1e9:.3g}',
          f'{step["wire_bytes"] / 1e9:.3g}', f'{step["num_collectives"]:,.0f}',
          f'{1e3 * seconds:.3f}' + (' a turn' if 'iteration' in found else ''),
          found['bound'], f'{found["mfu"]:.2f}' if 'mfu' in found else '-',
          f'{found["tokens_per_second"]:,.0f}' if 'mfu' in found else '-']
