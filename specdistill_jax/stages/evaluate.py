"""Every draft of a study against its target: one line of `results.jsonl` for each setting.

For each temperature, all drafts and ways to speculate (rule, draft mode, draft length) are
measured interleaved on the same held-out prompts; the target's own continuations, drawn in the
same loop, are what `alpha` is taken on. A setting whose line is there already is not
measured again. Where prompts have categories, as those of Spec-Bench, each category has a line
of its own before that of all prompts.
"""

from collections.abc import Sequence
import dataclasses
import math
import pathlib
import subprocess
import time
from typing import Any

from absl import logging
import jax
import ml_collections
import numpy as np
from rich import progress as rich_progress

from specdistill_jax import api
from specdistill_jax import processes
from specdistill_jax import sharding
from specdistill_jax import storage
from specdistill_jax import structs
from specdistill_jax.checkpoints import store
from specdistill_jax.data import quality
from specdistill_jax.data import shards
from specdistill_jax.decoding import rules
from specdistill_jax.decoding import sampling as sampling_lib
from specdistill_jax.decoding import tree_names
from specdistill_jax.evaluation import acceptance
from specdistill_jax.evaluation import batch_files
from specdistill_jax.evaluation import latency
from specdistill_jax.evaluation import measures
from specdistill_jax.evaluation import rows
from specdistill_jax.evaluation import step_costs
from specdistill_jax.evaluation import ways
from specdistill_jax.models import base
from specdistill_jax.stages import distill
from specdistill_jax.stages import sample_texts
from specdistill_jax.stages import tree_pictures
from specdistill_jax.stages import workdirs

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_SECONDS_A_LINE = 60.0
_PARTS = 'evaluate-parts'


@dataclasses.dataclass(frozen=True)
class Draft:
  """A draft and how it came to be.

  `train_steps` are those after the draft's own training, `weights` is `store.weights_digest`.
  """
  model: base.Model
  objective: str
  data_source: str | None
  train_steps: int
  seed: int
  weights: str


@dataclasses.dataclass(frozen=True)
class Prompts:
  """Held-out prompts in batches of one shape; reference texts and categories of each batch."""
  batches: list[tuple[np.ndarray, np.ndarray]]
  references: list[list[str]]
  categories: list[list[str]]

  def parts(self) -> dict[str | None, list[int]]:
    """Batches of each category, where there are several; last, as None, all batches.

    A batch of several prompts has one time for all of them, and none for a category.
    """
    found: dict[str | None, list[int]] = {}
    for index, categories in enumerate(self.categories):
      if len(categories) == 1 and categories[0]:
        found.setdefault(categories[0], []).append(index)
    everything = list(range(len(self.batches)))
    return (found if len(found) > 1 else {}) | {None: everything}


def _decoding_mesh(settings: ml_collections.ConfigDict) -> jax.sharding.Mesh:
  """The devices of this process that decode, the first ones: all of them if an axis is -1."""
  sizes = dict(settings.mesh)
  needed = None if -1 in sizes.values() else math.prod(sizes.values())
  return sharding.make_mesh(**sizes, devices=jax.local_devices()[:needed])


def _load(config: ml_collections.ConfigDict, directory: pathlib.Path, which: str) -> base.Model:
  """A model as it decodes; its stacked layers are not kept beside the unrolled ones."""
  model = store.load_model(directory, _decoding_mesh(config.evaluate),
                           layout=sharding.decoding_layout(which, config[which].layout),
                           weights_dtype=config.evaluate.weights_dtype)
  if hasattr(model.module, 'unstacked'):
    model = dataclasses.replace(model, module=model.module.unstacked(release=True))
  return model


def load_drafts(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> list[Draft]:
  """The undistilled draft, if it has learnt anything, and every arm of the distillation."""
  drafts = []
  if not distill.from_scratch(config):
    drafts.append(Draft(_load(config, workdir / 'draft', 'draft'), 'none', None, 0, config.seed,
                        store.weights_digest(workdir / 'draft')))
  for name in distill.arm_names(config) if config.distill is not None else ():
    objective, data_source, seed = distill.parse_arm(name)
    drafts.append(Draft(_load(config, workdir / 'distill' / name, 'draft'), objective,
                        data_source, config.distill.train.steps, seed,
                        store.weights_digest(workdir / 'distill' / name)))
  return drafts


def load_prompts(config: ml_collections.ConfigDict, workdir: pathlib.Path,
                 target: base.Model) -> Prompts:
  """`evaluate.num_prompts` prompts, the same ones for the same seed: those of the task's
  `prompt_files` where it has any, else held-out ones."""
  settings = config.evaluate
  chosen = shards.evaluation_rows(workdir / 'data', settings.num_prompts, config.seed)
  prompts_bt, lengths_b = api.pad_prompts(
      target, [row.tokens[:row.prompt_length].tolist() for row in chosen],
      settings.max_new_tokens)
  size = settings.batch_size
  if size > 1 and len({row.category for row in chosen}) > 1:
    logging.warning('The prompts have categories, but evaluate.batch_size is %d: only at 1 are '
                    'there results by category.', size)
  batched = lambda values: [values[i:i + size] for i in range(0, len(chosen), size)]
  return Prompts(list(zip(batched(prompts_bt), batched(lengths_b))),
                 batched([row.reference for row in chosen]),
                 batched([row.category for row in chosen]))


def commit(root: pathlib.Path = _ROOT) -> str | None:
  """The commit that this code is at, with '-dirty' if it was changed; None if nothing tells.

  Outside of git the file COMMIT does, in which `git archive`, and so the launchers, puts it.
  """
  if not (root / '.git').exists():
    path = root / 'launch' / 'COMMIT'
    archived = path.read_text(encoding='utf-8').strip() if path.is_file() else '$'
    return None if archived.startswith('$') else archived
  try:
    found = subprocess.run(
        ['git', '-C', str(root), 'describe', '--always', '--dirty', '--abbrev=40',
         '--exclude=*'], capture_output=True, text=True, check=True)
  except (OSError, subprocess.CalledProcessError):
    return None
  return found.stdout.strip() or None


def _describe(model: base.Model) -> str:
  """Short and readable: family, layers x width."""
  return f'{model.config.family} {model.config.size}'


def _common_fields(config: ml_collections.ConfigDict, target: base.Model,
                   num_prompts: int) -> dict[str, Any]:
  """What every row of this study shares."""
  settings = config.evaluate
  shared = ('batch_size', 'top_k', 'top_p', 'max_new_tokens')
  return dict(
      {name: settings[name] for name in shared}, num_prompts=num_prompts,
      study=config.study, task=config.task.name,
      target=_describe(target), target_parameters=target.num_parameters,
      device=jax.devices()[0].device_kind, jax_version=jax.__version__, commit=commit(),
      config_hash=rows.config_hash(workdirs.to_json(config)))


def _setting_fields(draft: Draft, temperature: float, way: ways.Way) -> dict[str, Any]:
  return dict(
      dataclasses.asdict(way),
      draft=_describe(draft.model), draft_parameters=draft.model.num_parameters,
      objective=draft.objective, data_source=draft.data_source, train_steps=draft.train_steps,
      seed=draft.seed, temperature=temperature)


def _overlaps(target: base.Model, draft: Draft, prompts: Prompts, runs: Sequence[latency.Run],
              sampling: sampling_lib.Sampling) -> np.ndarray:
  """`[batches, 2]`: overlap summed over the target's own continuations, and their tokens."""
  counts = []
  for (prompts_bt, prompt_lengths_b), run in zip(prompts.batches, runs, strict=True):
    width = prompts_bt.shape[1] + run.generation.tokens.shape[1]
    tokens_bt = np.zeros((len(prompts_bt), width), np.int32)
    for row, (start, new) in enumerate(zip(prompt_lengths_b, run.generation.lengths)):
      tokens_bt[row, :start] = prompts_bt[row, :start]
      tokens_bt[row, start:start + new] = run.generation.tokens[row, :new]
    counts_b2 = acceptance.alpha_counts(
        target.module, api.on_given_text(target, draft.model), tokens_bt, prompt_lengths_b,
        prompt_lengths_b + run.generation.lengths, sampling=sampling,
        widths=structs.Widths(prompts_bt.shape[1], run.generation.tokens.shape[1]))
    counts.append(np.asarray(counts_b2).sum(axis=0))
  return np.stack(counts)


def _quality(metric: str | None, target: base.Model, references: Sequence[Sequence[str]],
             runs: Sequence[latency.Run]) -> float | None:
  """The task's metric over the decoded completions; None for plain language modelling.

  `references` and `runs` have an entry for each batch.
  """
  if metric is None or target.vocabulary is None:
    return None
  vocabulary = target.vocabulary
  predictions = [
      vocabulary.decode([int(token) for token in tokens[:length] if token != vocabulary.eos_id])
      for run in runs
      for tokens, length in zip(run.generation.tokens, run.generation.lengths)]
  return quality.metric(metric)([text for batch in references for text in batch], predictions)


def _track(description: str):
  """A progress bar in a terminal; elsewhere a line a minute."""
  def wrap(items, what):
    if rich_progress.get_console().is_terminal:
      yield from rich_progress.track(items, f'{description}: {what}')
      return
    started = said = time.monotonic()
    for done, item in enumerate(items):
      yield item
      now = time.monotonic()
      if now - said >= _SECONDS_A_LINE:
        left = (len(items) - done - 1) * (now - started) / (done + 1)
        processes.say(f'  {description}: {done + 1:,} of {len(items):,} {what}, '
                      f'{left / 60:.3g} minutes left')
        said = now
  return wrap


def _build(target: base.Model, draft: Draft, way: ways.Way,
           sampling: sampling_lib.Sampling) -> step_costs.Setting:
  shape = dict(gamma=way.gamma) if way.tree == tree_names.CHAIN else dict(tree=way.tree)
  drafter = api.make_drafter(
      draft.model, **shape, target_sampling=sampling, draft_sampling=way.draft_sampling,
      min_confidence=way.min_confidence, target=target)
  return step_costs.Setting(drafter, rules.for_sampling(way.rule, way.epsilon, sampling))


def _lines(wanted, measured, overlaps, prompts, target, metric, samples) -> list[list[dict]]:
  """For each setting that was measured its lines: of every category, and last of all prompts."""
  at = lambda values, batches: [values[index] for index in batches]
  made = {name: [] for name in wanted}
  for category, batches in prompts.parts().items():
    references, alone = at(prompts.references, batches), at(measured.alone, batches)
    target_quality = _quality(metric, target, references, alone)
    for name, fields in wanted.items():
      runs = at(measured.runs[name], batches)
      fields = fields | dict(category=category, num_prompts=sum(map(len, references)))
      figures = measures.figures(fields, alone, runs, measured.steps[name],
                                 overlaps[name[0]][batches], samples=samples)
      made[name].append(rows.make(
          **fields, **figures, quality_metric=metric, target_quality=target_quality,
          quality=_quality(metric, target, references, runs)))
  return list(made.values())


class _Parts(batch_files.BatchFiles):
  """Batches of a temperature, as long as no other launch has gone on with them."""

  def __init__(self, workdir: pathlib.Path, temperature: float, *settings):
    super().__init__(workdir / _PARTS / f'temperature-{temperature:g}', *settings)
    self._workdir = workdir

  def write(self, index: int, batch: latency.Batch) -> None:
    workdirs.check_alone(self._workdir, 'evaluate')
    super().write(index, batch)


def _temperature(config, target, drafts, prompts, temperature, path, common) -> None:
  """Measures the settings of one temperature that have no line yet, and appends their lines."""
  settings = config.evaluate
  sampling = sampling_lib.Sampling(temperature, settings.top_k, settings.top_p)
  present = {rows.identity(row) for row in rows.read(path)}
  wanted = {}
  for way in ways.distinct(settings, temperature):
    lossless = rules.for_sampling(way.rule, way.epsilon, sampling).lossless
    for index, draft in enumerate(drafts):
      fields = {**common, **_setting_fields(draft, temperature, way), 'lossless': lossless}
      if rows.identity(rows.make(**fields)) not in present:
        wanted[index, way] = fields
  if not wanted:
    return
  built = {(index, way): _build(target, drafts[index], way, sampling)
           for index, way in wanted}
  module = api.decoding_module(target, drafts[0].model)  # all drafts of a study are of one kind
  target_weights = store.weights_digest(path.parent / 'target')
  parts = _Parts(path.parent, temperature, {
      (index, way): fields | dict(weights=[target_weights, drafts[index].weights])
      for (index, way), fields in wanted.items()})
  processes.say(f'  temperature {temperature:g}: {len(built)} settings on {len(prompts.batches)} '
                'batches; to compile them may take minutes')
  measured = latency.measure(
      module, built, prompts.batches, jax.random.key(config.seed), sampling=sampling,
      max_new_tokens=settings.max_new_tokens, kept=parts,
      progress=_track(f'temperature {temperature:g}'))
  workdirs.check_alone(path.parent, 'evaluate')
  data = path.parent / 'data'
  metric = shards.read_metadata(data, shards.evaluation_split(data))['metric']
  overlaps = {index: _overlaps(target, drafts[index], prompts, measured.alone, sampling)
              for index, _ in wanted}
  for kept in (tree_pictures, sample_texts):
    kept.keep(path.parent, dataclasses.replace(target, module=module), wanted, built,
              prompts.batches, jax.random.key(config.seed), sampling=sampling,
              max_new_tokens=settings.max_new_tokens)
  for lines in _lines(wanted, measured, overlaps, prompts, target, metric,
                      settings.bootstrap_samples):
    # The line of all prompts is the last: where it is, those of the categories are.
    workdirs.check_alone(path.parent, 'evaluate')
    rows.append(path, *lines)


def run(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
  """Evaluates `load_drafts`, at every temperature and in every way.

  Raises:
    ValueError: a model is missing, the vocabularies differ, or there are too few prompts.
  """
  workdir = storage.path(workdir)
  target = _load(config, workdir / 'target', 'target')
  drafts = load_drafts(config, workdir)
  for draft in drafts:
    target, _ = api.check_pair(target, draft.model)
  drafts = [dataclasses.replace(draft, model=api.check_pair(target, draft.model)[1])
            for draft in drafts]
  prompts = load_prompts(config, workdir, target)
  path = workdir / 'results.jsonl'
  rows.repair(path)
  common = _common_fields(config, target, sum(map(len, prompts.references)))
  with jax.set_mesh(_decoding_mesh(config.evaluate)):  # caches are laid out on it
    for temperature in config.evaluate.temperatures:
      _temperature(config, target, drafts, prompts, temperature, path, common)
      jax.clear_caches()  # programs of another temperature are others, and Linux counts mappings
  workdirs.check_alone(workdir, 'evaluate')
  storage.remove(workdir / _PARTS)
