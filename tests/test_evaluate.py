"""The evaluate stage on untrained models: rows, resuming, and what is left null."""

import dataclasses
import pathlib
import subprocess
import tarfile

import jax
import numpy as np
import pytest

import studies
from specdistill_jax import processes
from specdistill_jax.checkpoints import store
from specdistill_jax.data import shards
from specdistill_jax.evaluation import rows
from specdistill_jax.evaluation import tree_picture
from specdistill_jax.models import families
from specdistill_jax.stages import checks
from specdistill_jax.stages import distill
from specdistill_jax.stages import evaluate
from specdistill_jax.stages import report
from specdistill_jax.stages import sample_texts
from specdistill_jax.stages import tree_pictures
from specdistill_jax.stages import workdirs
from specdistill_jax.training import preemption


@pytest.fixture(scope='module', autouse=True)
def keep_programs():
  """The stage forgets them after a temperature, to compile the same ones again for these tests."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(jax, 'clear_caches', lambda: None)
    yield


TREE = 'dynamic k2 d2 n4'  # with room for the best path, whatever else is likely: 2 + 1


def study():
  config = studies.config()
  config.target.model.num_layers = 1
  config.evaluate.temperatures = (0.0,)
  config.evaluate.gammas = (2,)
  # At temperature 0 block is exact and greedy drafts are sampled ones: two ways are left.
  config.evaluate.rules = (('exact', 1.0), ('block', 1.0), ('greedy_lenience', 0.5))
  config.evaluate.draft_sampling = ('sampled', 'greedy')
  config.evaluate.num_prompts = 3
  config.evaluate.max_new_tokens = 5
  config.evaluate.bootstrap_samples = 20
  return config


def save(directory, section, seed):
  """An untrained model, as a training run would leave it."""
  config = families.config(section.model, vocab_size=studies.VOCAB_SIZE)
  module = jax.jit(families.init, static_argnums=0)(config, jax.random.key(seed))
  store.write_model_file(directory, config)
  with store.Store(directory) as checkpoints:
    checkpoints.save(1, module, {'count': jax.numpy.int32(1)}, {})


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  config, path = study(), tmp_path_factory.mktemp('study')
  checks.check(config)
  studies.write_data(path)
  save(path / 'target', config.target, 0)
  save(path / 'draft', config.draft, 1)
  for seed, name in enumerate(distill.arm_names(config)):
    save(path / 'distill' / name, config.draft, 2 + seed)
  evaluate.run(config, path)
  return path


def test_one_complete_row_for_each_setting(workdir):
  found = rows.read(workdir / 'results.jsonl')
  assert [(row['objective'], row['data_source'], row['train_steps']) for row in found] == 2 * [
      ('none', None, 0), ('forward_kl', 'draft', 6), ('cross_entropy', 'fixed', 6)]
  assert [(row['rule'], row['epsilon'], row['lossless'], row['draft_sampling'])
          for row in found] == (3 * [('exact', 1.0, True, 'sampled')]
                                + 3 * [('greedy_lenience', 0.5, False, 'sampled')])
  for row in found:
    assert set(row) == set(rows.FIELDS)
    unmeasured = {field for field in rows.FIELDS if row[field] is None}
    # The rows of this study have no text: no metric. Outside of git there is no commit.
    assert unmeasured - {'data_source', 'commit'} == {
        'quality_metric', 'quality', 'target_quality', 'top_k', 'top_p', 'category'}


def test_figures_fit_their_definitions(workdir):
  for row in rows.read(workdir / 'results.jsonl'):
    tau, gamma = row['block_efficiency'], row['gamma']
    assert 1.0 <= tau <= gamma + 1
    assert row['accepted_per_call'] == pytest.approx(tau - 1)
    assert row['drafted_per_call'] == gamma
    assert 0.0 <= row['alpha'] <= 1.0
    assert row['speedup_predicted'] == pytest.approx(
        tau / (gamma * row['cost_ratio'] + row['verify_ratio']))
    assert row['speedup_measured'] == pytest.approx(
        row['tokens_per_second'] / row['autoregressive_tokens_per_second'])
    assert row['mbsu'] == pytest.approx(
        tau / (gamma * row['draft_parameters'] / row['target_parameters'] + 1))
    low, high = row['block_efficiency_interval']
    assert low <= tau <= high
    emitted, calls = (sum(line[rows.COUNTS.index(name)] for line in row['counts'])
                      for name in ('emitted', 'target_calls'))
    assert tau == pytest.approx(emitted / calls)
    # At batch 1 every kept draft is a token beyond one a call, unless it was the last token.
    assert sum(row['accepted_by_position']) <= emitted
    assert len(row['counts']) == row['num_prompts']


def test_sample_texts_are_those_that_were_measured(workdir):
  """A lossless text a method and prompt; its counts are those of the row."""
  found = rows.read(workdir / sample_texts.FILE)
  measured = {row['objective']: row for row in rows.read(workdir / 'results.jsonl')
              if row['lossless']}
  assert [(line['objective'], line['number']) for line in found] == [
      (objective, number) for objective in ('none', 'forward_kl', 'cross_entropy')
      for number in (1, 2, 3)]
  for line in found:
    assert line['lossless'] and line['rule'] == 'exact'
    counts = dict(zip(rows.COUNTS, measured[line['objective']]['counts'][line['number'] - 1]))
    assert (len(line['tokens']), line['target_calls']) == (
        counts['emitted'], counts['target_calls'])
    assert len(line['pieces']) == len(line['drafted']) == len(line['tokens'])
  for objective, row in measured.items():
    assert sum(row['accepted_by_position']) == sum(
        sum(line['drafted']) for line in found if line['objective'] == objective)


def test_what_is_there_is_not_measured_again(workdir, monkeypatch):
  before = (workdir / 'results.jsonl').read_bytes()
  monkeypatch.setattr(evaluate.latency, 'measure', None)  # calling it would raise
  evaluate.run(study(), workdir)
  assert (workdir / 'results.jsonl').read_bytes() == before


def test_a_killed_evaluation_resumes(workdir):
  path = workdir / 'results.jsonl'
  whole, texts = path.read_bytes(), (workdir / sample_texts.FILE).read_bytes()
  lines = whole.splitlines(keepends=True)
  path.write_bytes(b''.join(lines[:2]) + lines[2][:40])
  try:
    evaluate.run(study(), workdir)
    resumed = rows.read(path)
    assert path.read_bytes().startswith(b''.join(lines[:2]))
    assert [row['objective'] for row in resumed] == 2 * ['none', 'forward_kl', 'cross_entropy']
    # Counts don't depend on what else was measured; times do.
    first = rows.read(_written(workdir / 'first.jsonl', whole))
    assert resumed[2]['accepted_by_position'] == first[2]['accepted_by_position']
    assert resumed[2]['alpha'] == first[2]['alpha']
    assert (workdir / sample_texts.FILE).read_bytes() == texts  # neither lost nor doubled
  finally:
    path.write_bytes(whole)


def test_batches_outlive_a_kill_within_a_temperature(workdir, monkeypatch):
  path, speculative, decoded = workdir / 'results.jsonl', evaluate.latency.speculative, []
  whole = path.read_bytes()
  path.unlink()
  settings = len(whole.splitlines())

  def killed(module, setting, *inputs, **how):
    decoded.append(setting)
    if len(decoded) == kill_at:
      raise KeyboardInterrupt
    return speculative(module, setting, *inputs, **how)
  monkeypatch.setattr(evaluate.latency, 'speculative', killed)
  monkeypatch.setattr(evaluate, 'commit', lambda: 'one')
  # Of several processes only the first evaluates: it must not wait for the others.
  monkeypatch.setattr(processes, 'agree', None)
  monkeypatch.setattr(processes, 'meet', None)
  parts = workdir / 'evaluate-parts'
  try:
    kill_at = settings * 5 // 2  # past the warm-up, which has a setting of each kind at most
    with pytest.raises(KeyboardInterrupt):
      evaluate.run(study(), workdir)
    kept = len(list(parts.glob('*/batch-*.json')))
    assert 0 < kept < 3 and not path.exists()
    decoded, kill_at = [], None
    evaluate.run(study(), workdir)
    assert len(decoded) <= settings * (3 - kept + 1)
    figures = lambda content: [
        {name: row[name] for name in ('objective', 'rule', 'alpha', 'accepted_by_position')}
        for row in rows.read(_written(workdir / 'other.jsonl', content))]
    assert figures(path.read_bytes()) == figures(whole)
    assert not parts.exists()
  finally:
    path.write_bytes(whole)


def test_an_evaluation_that_another_launch_has_begun_adds_nothing(workdir, monkeypatch):
  path, speculative = workdir / 'results.jsonl', evaluate.latency.speculative
  whole = path.read_bytes()
  path.unlink()

  def begun_elsewhere(*inputs, **how):
    workdirs.write_atomically(workdirs.attempts_path(workdir, 'evaluate'), dict(
        stage='evaluate', seconds=[None, None], launch='other'))
    return speculative(*inputs, **how)
  monkeypatch.setattr(evaluate.latency, 'speculative', begun_elsewhere)
  try:
    with pytest.raises(preemption.Superseded), workdirs.attempt(workdir, 'evaluate'):
      evaluate.run(study(), workdir)
    assert not path.exists() and not list(workdir.glob('evaluate-parts/*/*'))
  finally:
    path.write_bytes(whole)


def _written(path, content):
  path.write_bytes(content)
  return path


@pytest.fixture(scope='module')
def categories(workdir, tmp_path_factory):
  """The same models on prompts of two categories, and one without any; the draft alone, with a
  chain and a tree."""
  path = tmp_path_factory.mktemp('categories')
  for name in ('target', 'draft'):
    (path / name).symlink_to(workdir / name)
  names = ['maths', 'maths', 'poems', 'poems', '']
  held_out = [dataclasses.replace(row, category=name)
              for row, name in zip(studies.rows(5, 1), names)]
  metadata = shards.read_metadata(workdir / 'data', 'validation')
  shards.write(path / 'data', 'validation', held_out, metadata)
  config = study()
  config.distill, config.evaluate.num_prompts = None, 5
  config.evaluate.update(draft_sampling=('sampled',), rules=(('exact', 1.0),),
                         trees=(TREE,))
  checks.check(config)
  evaluate.run(config, path)
  return config, path


def test_a_tree_has_lines_beside_the_chain(categories):
  found = [row for row in rows.read(categories[1] / 'results.jsonl') if row['category'] is None]
  chain, tree = found
  assert (chain['tree'], tree['tree']) == ('chain', TREE)
  assert (tree['gamma'], tree['drafted_per_call'], tree['draft_sampling']) == (2, 4.0, 'greedy')
  assert 1.0 <= tree['block_efficiency'] <= 3.0 and tree['alpha'] == chain['alpha']
  # Two levels hold the chain of the best tokens, and more.
  assert tree['block_efficiency'] >= chain['block_efficiency']
  assert tree['speedup_predicted'] == pytest.approx(
      tree['block_efficiency'] / (2 * tree['cost_ratio'] + tree['verify_ratio']))
  assert tree['mbsu'] == pytest.approx(tree['block_efficiency'] / (
      2 * tree['draft_parameters'] / tree['target_parameters'] + 1))


def test_the_report_shows_a_tree(categories):
  config, path = categories
  line, = rows.read(path / tree_pictures.FILE)
  assert (line['tree'], len(line['picture']['parents'])) == (TREE, 4)
  report.run(config, path)
  text = (path / 'report.md').read_text()
  assert '(tree_1.png)' in text and 'What do trees buy?' in text and f'tree {TREE}' in text
  assert (path / 'tree_1.png').read_bytes().startswith(b'\x89PNG')


def test_nodes_of_a_picture_have_places_of_their_own():
  """Levels from left to right; what hangs together stays together."""
  place = tree_picture.places([0, 0, 1, 1, 2, 3])
  assert place[:, 0].tolist() == [0, 1, 1, 2, 2, 2, 3]
  assert len(set(map(tuple, place.tolist()))) == 7
  assert place[1, 1] > place[2, 1] and place[3, 1] > place[4, 1] > place[5, 1] == place[2, 1]
  assert place[6, 1] == place[3, 1]


def test_categories_have_lines_of_their_own_that_add_up(categories):
  found = [row for row in rows.read(categories[1] / 'results.jsonl') if row['tree'] == 'chain']
  assert [(row['category'], row['num_prompts']) for row in found[-1:]] == [(None, 5)]
  parts = {row['category']: row for row in found[:-1]}
  assert {name: row['num_prompts'] for name, row in parts.items()} == {'maths': 2, 'poems': 2}
  whole, parts = found[-1], list(parts.values())
  counts = [tuple(line) for row in parts for line in row['counts']]
  assert len(counts) == 4 and set(counts) < {tuple(line) for line in whole['counts']}
  for row in found:
    emitted, calls = np.sum(row['counts'], axis=0)[:2]
    assert row['block_efficiency'] == pytest.approx(emitted / calls)
    assert row['cost_ratio'] == whole['cost_ratio']
  chosen = shards.evaluation_rows(categories[1] / 'data', 5, seed=0)
  first = [i for i, row in enumerate(chosen) if row.category == parts[0]['category']]
  assert parts[0]['counts'] == [whole['counts'][i] for i in first]


def test_a_setting_with_categories_is_not_measured_again(categories, monkeypatch):
  config, path = categories
  monkeypatch.setattr(evaluate.latency, 'measure', None)
  evaluate.run(config, path)
  report.run(config, path)
  by_category = (path / 'report.md').read_text().partition('By cat')[2]
  assert '| 0 | 2 | standard SD | exact | ' in by_category
  assert f'| 0 | 2 | standard SD | exact, tree {TREE}, greedy drafts | ' in by_category


def test_a_batch_of_several_prompts_counts_for_no_category():
  made = lambda *categories: evaluate.Prompts([None] * len(categories), [], list(categories))
  assert made(['a'], ['b'], [''], ['a']).parts() == {'a': [0, 3], 'b': [1], None: [0, 1, 2, 3]}
  assert made(['a', 'a'], ['b', 'b']).parts() == {None: [0, 1]}
  assert made(['a'], ['a']).parts() == made([''], ['']).parts() == {None: [0, 1]}


def test_too_few_prompts_is_one_sentence(workdir):
  config = study()
  config.evaluate.num_prompts = 99
  with pytest.raises(ValueError, match='99.*16'):
    evaluate.run(config, workdir)


def test_report_follows(workdir):
  report.run(study(), workdir)
  text = (workdir / 'report.md').read_text()
  assert 'target alone' in text and 'greedy_lenience ε=0.5, lossy' in text
  assert 'The task has no metric' in text


def test_a_finished_study_can_be_asked_for_another_budget(workdir):
  config = study()
  lines = (workdir / 'results.jsonl').read_bytes()
  config.evaluate.max_quality_drop = 0.1
  report.run(config, workdir)
  assert (workdir / 'results.jsonl').read_bytes() == lines


def test_an_archive_knows_its_commit(tmp_path):
  """Launchers send `git archive` to the hosts, which have no repository."""
  root = pathlib.Path(__file__).resolve().parents[1]
  if not (root / '.git').exists():
    pytest.skip('not in a git checkout')
  git = lambda *words: subprocess.run(['git', '-C', str(root), *words], capture_output=True,
                                      check=True).stdout
  (tmp_path / 'code.tar').write_bytes(git('archive', 'HEAD', 'launch/COMMIT'))
  with tarfile.open(tmp_path / 'code.tar') as archive:
    archive.extractall(tmp_path)
  head = git('rev-parse', 'HEAD').decode().strip()
  assert evaluate.commit(tmp_path) == head and evaluate.commit(root).startswith(head)
  (tmp_path / 'launch' / 'COMMIT').write_bytes((root / 'launch' / 'COMMIT').read_bytes())
  assert evaluate.commit(tmp_path) is None and evaluate.commit(tmp_path / 'launch') is None


def test_weights_decode_in_the_dtype_that_is_asked_for(workdir):
  """And once only: layers that are unrolled for decoding are not kept stacked beside."""
  config = study()
  whole, *_ = evaluate.load_drafts(config, workdir)
  config.evaluate.weights_dtype = 'bfloat16'
  half, *_ = evaluate.load_drafts(config, workdir)
  size = lambda draft: sum(leaf.nbytes for leaf in jax.tree.leaves(draft.model.module))
  assert size(half) < 0.6 * size(whole)
  assert half.model.module.unstacked() is half.model.module
