"""The notebooks of colabs/: each runs from top to bottom in small, and shows what it is about."""

import ast
import os
import pathlib
import re
import subprocess
import sys

import jupytext
import nbclient
import nbformat
import pytest

import compiler
import results

ROOT = pathlib.Path(__file__).resolve().parents[1]
COLABS = ROOT / 'colabs'
NAMES = ('quickstart', 'explore', 'tradeoff', 'own_divergence', 'tpu')
SIZES = dict(num_layers=1, width=16, num_heads=2, num_kv_heads=2, head_dim=8, mlp_width=32)
TRAINING = dict(batch_size=4, eval_every=4, checkpoint_every=4, warmup_steps=1)
SMALL = {
    **{f'{stage}.model.{name}': value for stage in ('target', 'draft')
       for name, value in SIZES.items()},
    **{f'{stage}.train.{name}': value for stage in ('target', 'draft', 'distill')
       for name, value in TRAINING.items()},
    'task.name': 'local_files', 'task.inputs_field': '', 'task.validation_fraction': 0.2,
    'task.vocab_size': 320, 'task.max_length': 24, 'task.prompt_length': 4,
    'distill.rollout.max_new_tokens': 8, 'evaluate.max_new_tokens': 8,
    'evaluate.bootstrap_samples': 50, 'evaluate.temperatures': (1.0,), 'distill.control': False,
}
CLEAN = """
import os
import sys
os.chdir({folder!r})
for name in list(sys.modules):
  if name.partition('.')[0] in ('specdistill_jax', 'configs', 'ipywidgets'):
    del sys.modules[name]
%reset -f
%who_ls
"""
STEPS = dict(TARGET_STEPS=4, DRAFT_STEPS=4, DISTILL_STEPS=4, GAMMAS=(2,), NUM_PROMPTS=2)


def source(name: str) -> nbformat.NotebookNode:
  return jupytext.read(COLABS / f'{name}.py')


@pytest.fixture(scope='module')
def kernel(tmp_path_factory):
  """One for all notebooks: a new one imports everything, which takes ten seconds."""
  client = nbclient.NotebookClient(nbformat.v4.new_notebook(), timeout=3600, iopub_timeout=300,
                                 startup_timeout=600, kernel_name='python3')
  with client.setup_kernel(env={
      **os.environ, 'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT), 'TF_CPP_MIN_LOG_LEVEL': '3',
      'XLA_FLAGS': compiler.QUICK,
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
      'JAX_COMPILATION_CACHE_DIR': str(tmp_path_factory.mktemp('cache'))}):
    yield client


def clean(kernel, folder: pathlib.Path) -> None:
  """No names are left, nor modules of the project, nor what a notebook did to ipywidgets."""
  cell = nbformat.v4.new_code_cell(CLEAN.format(folder=str(folder)))
  kernel.nb = nbformat.v4.new_notebook(cells=[cell])
  kernel.execute(cleanup_kc=False)
  assert shown(kernel.nb, 'text/plain') == ['[]']


def execute(kernel, name: str, folder: pathlib.Path, before: str = '', **parameters):
  """Runs a notebook in `folder`, these values in place of those in its cell of parameters.

  `before`: code that comes first.
  """
  notebook = nbformat.read(COLABS / f'{name}.ipynb', as_version=4)
  cell, = [cell for cell in notebook.cells if 'parameters' in cell.metadata.get('tags', ())]
  defaults = {target.id for node in ast.walk(ast.parse(cell.source))
              for target in ast.walk(node)
              if isinstance(target, ast.Name) and isinstance(target.ctx, ast.Store)}
  assert set(parameters) <= defaults, f'{name}.ipynb has no {set(parameters) - defaults}'
  cell.source += ''.join(f'\n{key} = {value!r}' for key, value in parameters.items()) + before
  clean(kernel, folder)
  kernel.nb = notebook
  kernel.execute(cleanup_kc=False)
  return notebook


def shown(notebook, kind: str) -> list[str]:
  """All outputs of a MIME type; `text` is what was printed."""
  found = []
  for cell in notebook.cells:
    for output in cell.get('outputs', ()):
      if kind == 'text' and output.output_type == 'stream' and output.name == 'stdout':
        found.append(output.text)
      found += [output.data[kind]] if kind in output.get('data', ()) else []
  return found


@pytest.mark.parametrize('name', NAMES)
def test_both_forms_are_the_same_notebook(name):
  """Mended by: jupytext --to ipynb --update colabs/*.py"""
  made, kept = source(name), nbformat.read(COLABS / f'{name}.ipynb', as_version=4)
  told = lambda notebook: [(cell.cell_type, cell.source, cell.metadata.get('tags', []))
                           for cell in notebook.cells]
  assert told(made) == told(kept)
  assert not any(cell.get('outputs') or cell.get('execution_count') for cell in kept.cells)
  nbformat.validate(kept)


@pytest.mark.parametrize('name', NAMES)
def test_every_notebook_begins_and_ends_alike(name):
  cells = source(name).cells
  assert cells[0].source.startswith('# ')
  assert cells[1].source == source(NAMES[0]).cells[1].source
  assert '## What to try next' in cells[-1].source
  for link in re.findall(r'`(\w+)\.ipynb`', '\n'.join(cell.source for cell in cells)):
    assert link in NAMES
  assert max(map(len, (COLABS / f'{name}.py').read_text().splitlines())) <= 100


def test_notebooks_are_all_of_them():
  for suffix in ('py', 'ipynb'):
    assert {path.stem for path in COLABS.glob(f'*.{suffix}')} == set(NAMES)


def run_install(folder, *lines, **environment):
  code = '\n'.join([source('tpu').cells[1].source, *lines])
  clean = {name: value for name, value in os.environ.items() if name != 'PYTHONPATH'}
  return subprocess.run([sys.executable, '-c', code], cwd=folder, env=clean | environment,
                        capture_output=True, text=True, check=True).stdout


def test_inside_a_checkout_nothing_is_installed():
  found = run_install(COLABS, 'import specdistill_jax', 'print(specdistill_jax.__file__)')
  assert pathlib.Path(found.strip()) == ROOT / 'specdistill_jax' / '__init__.py'


def test_elsewhere_the_project_is_fetched_once(tmp_path):
  """As in Colab, from a repository that looks like ours, with a pip that only tells."""
  made = tmp_path / 'theirs'
  (made / 'specdistill_jax').mkdir(parents=True)
  (made / 'specdistill_jax' / '__init__.py').write_text('fetched = True\n')
  git = ['git', '-c', 'user.name=a', '-c', 'user.email=a@b.c', '-C', str(made)]
  for command in (['init', '-q'], ['add', '.'], ['commit', '-qm', 'all']):
    subprocess.run([*git, *command], check=True)
  (tmp_path / 'tools').mkdir()
  (tmp_path / 'tools' / 'pip.py').write_text('import sys\nprint("pip", *sys.argv[1:])\n')
  (tmp_path / 'notebook').mkdir()
  code = source('tpu').cells[1].source
  code = code.replace('https://github.com/YOUR-NAME/specdistill_jax', f'file://{made}')
  assert str(made) in code
  clean = {**os.environ, 'PYTHONPATH': str(tmp_path / 'tools')}
  run = lambda: subprocess.run(
      [sys.executable, '-c', f'{code}\nimport specdistill_jax\nprint(specdistill_jax.fetched)'],
      cwd=tmp_path / 'notebook', env=clean, capture_output=True, text=True, check=True).stdout
  first, again = run(), run()
  checkout = tmp_path / 'notebook' / 'specdistill_checkout'
  assert f'pip install -q -c {checkout}/constraints.txt -r {checkout}/' in first
  assert again == 'True\n'


def check_quickstart(notebook):
  printed = '\n'.join(shown(notebook, 'text'))
  assert printed.count('the same text, ') == 2
  table, = [text for text in shown(notebook, 'text/markdown') if '## Results' in text]
  assert 'DistillSpec (forward_kl, draft)' in table and 'target alone' in table
  assert len(shown(notebook, 'image/png')) == 4


def check_explore(notebook):
  pages = [page for page in shown(notebook, 'text/html') if '<h4>' in page]
  assert len(pages) == 4
  for page in pages:
    count = lambda kind, page=page: page.count(f'class="{kind}"')
    tokens, calls = map(int, re.search(r': (\d+) tokens in (\d+) calls', page).groups())
    assert count('accepted') + count('correction') + count('bonus') == tokens <= 12
    assert count('correction') + count('bonus') in (calls, calls - 1)  # the text's end cuts one
    assert count('refused') >= count('correction')
    assert all('line-through' in style for style in re.findall(
        r'class="refused" style="([^"]*)"', page))
  assert len(shown(notebook, 'image/png')) == 2  # the tree, and the strip
  means = [float(x) for x in re.findall(r'α along this text ([\d.]+)',
                                        '\n'.join(shown(notebook, 'text')))]
  assert len(means) == 2 and all(0 < mean <= 1 for mean in means)


def check_own_divergence(notebook):
  table, = [text for text in shown(notebook, 'text/markdown') if '| method |' in text]
  assert 'DistillSpec (__main__.renyi, draft)' in table
  assert 'DistillSpec (forward_kl, draft)' in table
  assert len(shown(notebook, 'image/png')) == 4  # the toy twice, and two plots of the study
  printed = '\n'.join(shown(notebook, 'text'))
  assert float(re.search(r'equal laws: (\S+)', printed).group(1)) < 1e-5


def test_from_nothing_to_a_draft_a_look_at_it_and_a_divergence_of_ones_own(kernel, tmp_path):
  """Three notebooks in one folder, as a reader goes through them: the later use the first's."""
  text = tmp_path / 'text.txt'
  text.write_text('\n\n'.join(f'{i} the cat sat on mat {i % 7} and the dog ran {i * i % 5}'
                              for i in range(300)))
  changes = {**SMALL, 'task.train_files': (str(text),)}
  check_quickstart(execute(kernel, 'quickstart', tmp_path, SEEDS=(0,), CHANGES=changes, **STEPS))
  check_explore(execute(kernel, 'explore', tmp_path, PROMPT='1 the cat', NEW_TOKENS=12, GAMMA=2,
                        TREE='0 1 00'))
  check_own_divergence(execute(
      kernel, 'own_divergence', tmp_path, TOY_STEPS=20, **STEPS,
      CHANGES=changes | {'target.train.steps': 0, 'draft.train.steps': 0}))


def test_the_tradeoff_of_a_finished_study(kernel, tmp_path):
  workdir = tmp_path / 'study'
  (workdir / 'done').mkdir(parents=True)
  (workdir / 'done' / 'evaluate.json').write_text('{}')
  results.write(workdir, results.lossy_study())
  notebook = execute(kernel, 'tradeoff', tmp_path, WORKDIR=str(workdir), RULE='linear',
                     EPSILON=0.5, MAX_QUALITY_DROP=0.1,
                     before='\nsys.modules["ipywidgets"] = None')
  printed = '\n'.join(shown(notebook, 'text'))
  assert 'accuracy 48.0, the target\'s 50.0 (-4%)' in printed  # the chosen setting
  assert printed.count('linear ε=0.5, lossy') == 2             # and the fastest within the budget
  assert 'linear ε=0.1, lossy' not in printed
  assert len(shown(notebook, 'image/png')) == 4
  assert any('| linear ε=0.1, lossy |' in text for text in shown(notebook, 'text/markdown'))


def test_tpus_are_asked_for_without_one(kernel, tmp_path):
  notebook = execute(kernel, 'tpu', tmp_path, CONFIG='configs/pod_lm1b.py', PROGRAMS='draft',
                     TOPOLOGY='v5e:1x1')
  printed = '\n'.join(shown(notebook, 'text'))
  assert 'Not compiled: libtpu is not installed' in printed or 'on v5e:1x1: fits' in printed
  if (ROOT / '.git').exists():  # what is launched is a commit
    assert 'queued-resources create my-slice --accelerator-type=v5litepod-16' in printed
  assert 'Not run: this machine has no TPU' in printed
  assert any('pod_llama3_70b' in text for text in shown(notebook, 'text/markdown'))
