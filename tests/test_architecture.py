"""The rooms, arrows and fences of the package, read off its imports."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = ROOT / 'specdistill_jax'
ENTRY_POINTS = {'main', 'compile', 'convert', 'tables', 'bench'}
MAX_LINES = 400
MAX_COLUMNS = 100

# Room -> rooms that it may import, beside itself.
ARROWS = {
    'structs': set(),
    'processes': set(),
    'storage': set(),
    'sharding': {'structs'},
    'row_sharding': {'sharding'},
    'models': {'structs', 'sharding', 'row_sharding'},
    'losses': {'structs'},
    'decoding': {'structs'},
    'data': {'structs', 'storage'},
    'drafters': {'structs', 'sharding', 'row_sharding', 'models', 'decoding'},
    'checkpoints': {'structs', 'storage', 'processes', 'sharding', 'models', 'drafters', 'data'},
    'training': {'structs', 'storage', 'processes', 'sharding', 'row_sharding', 'losses',
                 'decoding'},
    'evaluation': {'structs', 'storage', 'decoding'},
    'costs': {'structs', 'sharding', 'models', 'drafters', 'losses', 'decoding', 'training'},
    'api': {'structs', 'models', 'drafters', 'decoding'},
}
ARROWS['stages'] = set(ARROWS)
ENTRY_ARROWS = set(ARROWS)

# Library -> the files, or folders, of the project that may import it.
FENCES = {
    'tensorflow': ('specdistill_jax/data/tasks.py', 'specdistill_jax/stages/prepare.py'),
    'tensorflow_datasets': ('specdistill_jax/data/tasks.py', 'specdistill_jax/stages/prepare.py'),
    'seqio': ('specdistill_jax/data/tasks.py', 'specdistill_jax/stages/prepare.py'),
    'orbax': ('specdistill_jax/checkpoints/store.py',),
    'torch': ('specdistill_jax/evaluation/peers.py',),
    'transformers': ('specdistill_jax/evaluation/peers.py',),
    'matplotlib': ('specdistill_jax/evaluation/tradeoff.py',
                   'specdistill_jax/evaluation/table_plots.py',
                   'specdistill_jax/evaluation/tree_picture.py'),
    'plotly': ('specdistill_jax/stages/html_report.py', 'specdistill_jax/stages/html_figures.py'),
    'etils': ('specdistill_jax/storage.py',),
    'fsspec': ('specdistill_jax/storage.py',),
    'gcsfs': ('specdistill_jax/storage.py',),
    'absl.flags': tuple(f'specdistill_jax/{name}.py' for name in ENTRY_POINTS),
}


def imports(path: pathlib.Path) -> set[str]:
  """Full names of everything that a file imports, inside functions and by `importlib` too."""
  found = set()
  for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f'{path} uses a relative import'
      found |= {f'{node.module}.{alias.name}' for alias in node.names}
    elif (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
          and node.func.attr == 'import_module' and isinstance(node.args[0], ast.Constant)):
      found.add(node.args[0].value)
  return found


def sources() -> list[pathlib.Path]:
  return sorted(PACKAGE.rglob('*.py'))


def room(path: pathlib.Path) -> str:
  return path.relative_to(PACKAGE).parts[0].removesuffix('.py')


def below(library: str, name: str) -> bool:
  return name == library or name.startswith(library + '.')


@pytest.mark.parametrize('path', sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_arrows_point_down(path):
  mine = room(path)
  if mine == '__init__':
    assert not any(name.startswith('specdistill_jax') for name in imports(path))
    return
  assert mine in ARROWS or mine in ENTRY_POINTS, f'{mine} is a room that the design lacks'
  allowed = ARROWS.get(mine, ENTRY_ARROWS) | {mine}
  used = {name.split('.')[1] for name in imports(path) if name.startswith('specdistill_jax.')}
  assert used <= allowed, f'{mine} must not import {used - allowed}'


def test_arrows_have_no_cycle():
  order = []
  remaining = dict(ARROWS)
  while remaining:
    free = [name for name, needs in remaining.items() if not needs - set(order) - {name}]
    assert free, f'a cycle among {sorted(remaining)}'
    order += free
    for name in free:
      del remaining[name]


def test_algorithms_know_no_model():
  for name in ('losses', 'decoding', 'data'):
    assert ARROWS[name] - {'storage'} == {'structs'}


@pytest.mark.parametrize('library', FENCES)
def test_fences(library):
  outside = [str(path.relative_to(ROOT)) for path in sources() + sorted(ROOT.glob('configs/*.py'))
             if any(below(library, name) for name in imports(path))]
  assert set(outside) <= set(FENCES[library]), f'{library} is imported by {outside}'


def test_configs_import_only_their_library():
  for path in sorted(ROOT.glob('configs/*.py')):
    foreign = {name for name in imports(path)
               if not below('ml_collections', name) and name != 'configs.common'}
    assert not foreign, f'{path.name} imports {foreign}'


def test_files_stay_short():
  lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding='utf-8').splitlines())
             for path in sources()}
  assert max(lengths.values()) < MAX_LINES, {k: v for k, v in lengths.items() if v >= MAX_LINES}


def test_lines_stay_narrow():
  """Of everything that is Python, configs, tests and notebooks too."""
  names = {str(path.relative_to(ROOT)): path
           for folder in (PACKAGE, *(ROOT / name for name in ('configs', 'tests', 'colabs')))
           for path in sorted(folder.rglob('*.py'))}
  wide = {f'{name}:{number}': len(line) for name, path in names.items()
          for number, line in enumerate(path.read_text(encoding='utf-8').splitlines(), start=1)
          if len(line) > MAX_COLUMNS}
  assert not wide


def test_no_cycle_between_modules():
  """Module-level arrows inside a room: importing must have an order."""
  names = {'.'.join(path.relative_to(ROOT).with_suffix('').parts): path for path in sources()}
  needs = {name: {used for used in imports(path) if used in names} for name, path in names.items()}
  done = set()
  while len(done) < len(needs):
    free = {name for name in needs if name not in done and needs[name] <= done}
    assert free, f'a cycle among {sorted(set(needs) - done)}'
    done |= free


def loaded_after(statement: str) -> set[str]:
  listing = subprocess.run(
      [sys.executable, '-c', f'{statement}\nimport sys\nprint("\\n".join(sys.modules))'],
      cwd=ROOT, capture_output=True, text=True, check=True)
  return set(listing.stdout.split())


def test_importing_makes_no_array():
  """It would take the devices before processes could join, and before a flag says which."""
  rooms = ('losses', 'models', 'decoding', 'drafters', 'training')
  names = ['.'.join(path.relative_to(ROOT).with_suffix('').parts) for path in sources()
           if room(path) in rooms]
  done = subprocess.run(
      [sys.executable, '-c', f'import {", ".join(names)}\nfrom jax._src import xla_bridge\n'
       'print(xla_bridge.backends_are_initialized())'],
      cwd=ROOT, capture_output=True, text=True, check=True)
  assert done.stdout == 'False\n'


def test_importing_the_package_is_light():
  heavy = {'tensorflow', 'seqio', 'orbax', 'matplotlib', 'torch', 'jax', 'flax'}
  assert not loaded_after('import specdistill_jax') & heavy


def test_importing_main_is_light():
  heavy = {'tensorflow', 'seqio', 'orbax', 'matplotlib', 'torch', 'jax', 'flax'}
  assert not loaded_after('import specdistill_jax.main') & heavy


def test_importing_bench_is_light():
  heavy = {'tensorflow', 'seqio', 'orbax', 'matplotlib', 'torch', 'jax', 'flax'}
  assert not loaded_after('import specdistill_jax.bench') & heavy


def test_the_suite_runs_where_only_jax_is_installed():
  """An accelerator machine without what data and checkpoints need."""
  foreign = {'tensorflow', 'tensorflow_datasets', 'seqio', 'grain', 'orbax', 'matplotlib',
             'torch', 'transformers', 'rich', 'sentencepiece', 'ml_collections', 'optax'}
  found = loaded_after('import specdistill_jax.stages.benchmark') & foreign
  assert not found - loaded_after('import flax.nnx'), found  # flax has needs of its own
