"""FLOPs, bytes and collectives of a compiled module, every loop body as often as it runs.

Everything is of one chip. FLOPs are those of matrix products (TPU compilers write them as
convolutions; of a single row, as sums, which count none). Bytes are those that move between a
kernel, a fusion being one, and HBM, or the chip's own memory, where the compiler keeps what it
can, whole small models included; a slice of an array costs the slice. Padding of arrays to the
hardware's tiles is left out.
"""

from collections.abc import Iterator
import dataclasses
import functools
import math
import re

import numpy as np

from specdistill_jax.costs import hlo

COLLECTIVES = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute',
               'ragged-all-to-all', 'collective-broadcast')
_FREE = ('parameter', 'tuple', 'get-tuple-element', 'constant', 'bitcast', 'after-all', 'iota',
         'partition-id', 'replica-id', 'opt-barrier', 'domain', 'add-dependency')
# Custom calls that move nothing: the first two name memory, the others hand a collective on.
_NAMES = ('ConcatBitcast', 'AllocateBuffer', 'AsyncCollectiveStart', 'AsyncCollectiveDone')
_SLICES = ('dynamic-slice', 'slice', 'gather')


@dataclasses.dataclass(frozen=True)
class Operation:
  """One kernel or collective, and how often it runs.

  Attributes:
    kind: a member of `COLLECTIVES`, or '' for a kernel.
    flops: of its matrix products.
    hbm_bytes: read and written.
    chip_bytes: read and written in the chip's own memory.
    wire_bytes: sent by one chip, on a ring; 0 for a kernel.
    group: chips that a collective joins.
    times: it runs.
    source: where it comes from in the JAX program.
  """
  kind: str
  flops: float
  hbm_bytes: float
  chip_bytes: float
  wire_bytes: float
  group: int
  times: float
  source: str


def operations(module: hlo.Module, unknown_trips: float) -> list[Operation]:
  """Everything that runs; loops whose end depends on data run `unknown_trips` times.

  Within such a loop another one counts once: how far it goes is not what the outer one decides.
  """
  return list(_walk(module, module.computations[module.entry], 1.0, unknown_trips))


def _walk(module, computation, times, unknown_trips, joined=frozenset()) -> Iterator[Operation]:
  # The parts of an overlapped collective share its channel, also those in a loop that it passes.
  joined = set(joined)
  walk = functools.partial(_walk, module, unknown_trips=unknown_trips, joined=joined)
  for instruction in computation.instructions.values():
    opcode = instruction.opcode
    if opcode == 'while':
      trips = hlo.trip_count(module, computation, instruction)
      body = module.computations[instruction.called('body')[0]]
      if trips is None:
        yield from walk(body, times * unknown_trips, unknown_trips=min(unknown_trips, 1))
      else:
        yield from walk(body, times * trips)
    elif opcode == 'conditional':
      names = (instruction.called('branch_computations')
               or instruction.called('true_computation') + instruction.called('false_computation'))
      branches = [list(walk(module.computations[name], times)) for name in names]
      yield from max(branches, key=lambda found: sum(
          (o.flops + o.hbm_bytes + o.wire_bytes) * o.times for o in found))
    elif opcode in ('call', 'async-start'):
      yield from walk(module.computations[(instruction.called('to_apply')
                                           or instruction.called('calls'))[0]], times)
    elif opcode not in _FREE and not opcode.endswith(('-done', '-update')) and not (
        _only_names(instruction)):
      for found, inside in _collectives(module, computation, instruction):
        channel = found.attribute('channel_id') or found.name
        if channel not in joined:
          joined.add(channel)
          yield _collective(found, inside, times)
      yield Operation('', _flops(module, computation, instruction),
                      _moved(module, computation, instruction, _in_hbm),
                      _moved(module, computation, instruction, _on_chip), 0.0, 1, times,
                      instruction.op_name)


def _only_names(instruction) -> bool:
  target = instruction.attribute('custom_call_target') or ''
  return instruction.opcode == 'custom-call' and target.strip('"') in _NAMES


def _collectives(module, computation, instruction):
  """Collectives of an instruction, with the computation that holds each: itself, or fused."""
  if instruction.opcode.removesuffix('-start') in COLLECTIVES:
    yield instruction, computation
  elif instruction.opcode == 'fusion':
    inside = module.computations[instruction.called('calls')[0]]
    for nested in inside.instructions.values():
      yield from _collectives(module, inside, nested)


def _collective(instruction, computation, times) -> Operation:
  kind = instruction.opcode.removesuffix('-start')
  group = group_size(instruction)
  sent = sum(computation.instructions[name].bytes for name in instruction.operands)
  # A ring passes each chip's share on; an all-reduce scatters and gathers.
  factor = {'all-gather': group - 1, 'all-reduce': 2 * (group - 1) / group,
            'collective-permute': 1}.get(kind, (group - 1) / group)
  return Operation(kind, 0.0, 0.0, 0.0, sent * factor, group, times, instruction.op_name)


def group_size(instruction: hlo.Instruction) -> int:
  """Chips that exchange data with one another."""
  text = instruction.attributes
  if found := re.search(r'replica_groups=\[(\d+),(\d+)\]', text):      # [groups, size]<=[...]
    return int(found.group(2))
  if found := re.search(r'replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}', text):
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", found.group(1)))
    return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", found.group(2)))
  if found := re.search(r'replica_groups=\{\{([\d,]*)\}', text):
    return len(found.group(1).split(','))
  return 2 if 'source_target_pairs' in text else 1


def _flops(module, computation, instruction) -> float:
  if instruction.opcode == 'dot':
    contracted = re.findall(r'\d+', instruction.attribute('lhs_contracting_dims') or '')
    dims = computation.operand(instruction, 0).arrays[0].dims
    return 2.0 * instruction.arrays[0].size * math.prod(dims[int(i)] for i in contracted)
  if instruction.opcode == 'convolution':
    return _convolution_flops(computation, instruction)
  if instruction.opcode == 'fusion':
    inside = module.computations[instruction.called('calls')[0]]
    return sum(_flops(module, inside, nested) for nested in inside.instructions.values())
  return 0.0


def _convolution_flops(computation, instruction) -> float:
  """Twice the products whose factors both exist: padding and dilation have none."""
  labels = instruction.attribute('dim_labels')
  source_labels, kernel_labels, out_labels = re.split(r'_|->', labels)
  source, kernel = (computation.operand(instruction, i).arrays[0].dims for i in (0, 1))
  out = instruction.arrays[0].dims
  window = instruction.attribute('window') or ''
  products = out[out_labels.index('b')] * out[out_labels.index('f')]
  products *= kernel[kernel_labels.index('i')]
  for axis in range(len(source_labels) - 2):
    def of(name, default):
      found = re.search(rf'\b{name}=([\dx_\-]+)', window)
      return found.group(1).split('x')[axis] if found else default
    products *= _valid_pairs(
        source[source_labels.index(str(axis))], kernel[kernel_labels.index(str(axis))],
        out[out_labels.index(str(axis))], int(of('stride', '1')),
        int(of('pad', '0_0').split('_')[0]), int(of('lhs_dilate', '1')),
        int(of('rhs_dilate', '1')))
  return 2.0 * products


@functools.lru_cache(maxsize=None)
def _valid_pairs(source, kernel, out, stride, pad, source_dilation, kernel_dilation) -> int:
  """Pairs of an output and a kernel position that meet an element of the source."""
  at = (np.arange(out)[:, None] * stride + np.arange(kernel)[None] * kernel_dilation - pad)
  return int(((at >= 0) & (at % source_dilation == 0) & (at // source_dilation < source)).sum())


def _in_hbm(instruction: hlo.Instruction) -> int:
  return sum(array.hbm_bytes for array in instruction.arrays)


def _on_chip(instruction: hlo.Instruction) -> int:
  return sum(array.chip_bytes for array in instruction.arrays)


def _moved(module, computation, instruction, size) -> float:
  """Bytes that an instruction reads and writes in the memory of `size`."""
  opcode = instruction.opcode
  if opcode == 'fusion':
    inside = module.computations[instruction.called('calls')[0]]
    read = sum(_read(module, inside, inside.parameter(index), size)
               for index in range(len(instruction.operands)))
    return read + _written(module, inside, inside.root, instruction, size)
  if opcode in _SLICES:
    return 2 * size(instruction)
  if opcode in ('dynamic-update-slice', 'scatter'):
    update = computation.operand(instruction, 1 if opcode == 'dynamic-update-slice' else -1)
    return 2 * update.bytes if size(instruction) else 0
  if opcode in ('copy-start', 'slice-start'):  # (result, operand, flag), ((operand), result, flag)
    result = instruction.arrays[opcode == 'slice-start']
    written = size(dataclasses.replace(instruction, arrays=(result,)))
    return written + (result.bytes if size(computation.operand(instruction, 0)) else 0)
  read = sum(size(computation.instructions[name]) for name in instruction.operands)
  return read if opcode.endswith('-start') else read + size(instruction)


def _read(module, computation, value, size) -> float:
  """Bytes that a fused computation reads of one of its parameters."""
  return 0.0 if value is None or not size(value) else _used(module, computation, value)


def _used(module, computation, value) -> float:
  """Bytes of a value that its users inside a fused computation touch."""
  total = 0.0
  for user in computation.users(value.name):
    index = user.operands.index(value.name)
    if user.opcode in _SLICES and index == 0:
      total += user.bytes
    elif user.opcode == 'dynamic-update-slice' and index == 0:
      continue  # overwritten in place
    elif user.opcode in COLLECTIVES or _only_names(user):
      continue  # on its way beside the kernel
    elif user.opcode == 'bitcast':
      total += _used(module, computation, user)
    elif user.opcode == 'fusion':
      inside = module.computations[user.called('calls')[0]]
      parameter = inside.parameter(index)
      total += (_used(module, computation, user) if _is_handed_through(inside, parameter)
                else _used(module, inside, parameter))
    elif user.opcode != 'tuple':
      return float(value.bytes)
  return min(total, float(value.bytes))


def _is_handed_through(computation, parameter) -> bool:
  """Whether a fusion in a fusion only gives a parameter another shape."""
  root = computation.root
  while root.opcode == 'bitcast':
    root = computation.operand(root, 0)
  return root is parameter


def _written(module, computation, root, result, size) -> float:
  """Bytes that a fused computation writes: all of its result, or what it updates in place."""
  if root.opcode == 'tuple' and len(root.operands) == len(result.arrays):
    return sum(_written(module, computation, computation.instructions[name],
                        dataclasses.replace(result, arrays=(array,)), size)
               for name, array in zip(root.operands, result.arrays))
  if not size(result) or root.opcode in ('parameter', *COLLECTIVES) or _only_names(root):
    return 0.0
  if root.opcode == 'bitcast':
    return _written(module, computation, computation.operand(root, 0), result, size)
  if root.opcode == 'dynamic-update-slice':
    return float(computation.operand(root, 1).bytes)
  if root.opcode == 'fusion':
    inside = module.computations[root.called('calls')[0]]
    return _written(module, inside, inside.root, result, size)
  return float(size(result))
