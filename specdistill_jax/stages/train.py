"""The training loop, top to bottom: one for target, draft and distilled drafts."""

from collections.abc import Callable
import dataclasses
import functools
import pathlib
from typing import Any

from absl import logging
import jax
from jax.sharding import Mesh
import ml_collections

from specdistill_jax import sharding
from specdistill_jax.checkpoints import pretrained
from specdistill_jax.checkpoints import store
from specdistill_jax.data import shards
from specdistill_jax.drafters import families
from specdistill_jax.losses import objectives
from specdistill_jax.models import base
from specdistill_jax.stages import feature_drafts
from specdistill_jax.stages import heldout
from specdistill_jax.training import rollouts
from specdistill_jax.training import state as state_lib
from specdistill_jax.training import step as step_lib
from specdistill_jax.training import writer as writer_lib


@dataclasses.dataclass(frozen=True)
class Run:
  """One training run: what the loop needs to know beside the study's config.

  Attributes:
    stage: target, draft or distill.
    name: of the run, in `metrics.jsonl` and TensorBoard.
    directory: where model and checkpoints go.
    settings: a `train` section.
    seed: of data order, dropout and rollouts.
    model_config: of the model that is trained, a config of one of the families.
    init: makes its first parameters, laid out on a mesh.
    data: directory of the shards that batches, or prompts, come from.
    objective: what is minimised.
    teacher: the frozen target; None when there is none to compare with.
    rollout: how the student's own data are sampled; None for stored data.
    held_out_tokens: new tokens of a held-out prompt, where there is a teacher.
    layout: of the model that is trained, one of `sharding.LAYOUTS`.
    hub_config: the config.json that an imported model came with.
  """
  stage: str
  name: str
  directory: pathlib.Path
  settings: ml_collections.ConfigDict
  seed: int
  model_config: Any
  init: Callable[[Mesh], Any]
  data: pathlib.Path
  objective: objectives.Objective = objectives.Objective()
  teacher: base.Model | None = None
  rollout: rollouts.Rollout | None = None
  held_out_tokens: int = 64
  layout: str = sharding.DEFAULT_LAYOUT
  hub_config: dict[str, Any] | None = None


def run(config: ml_collections.ConfigDict, workdir: pathlib.Path, which: str) -> None:
  """Trains `which`, target or draft, by cross-entropy on the prepared data.

  From scratch, or from `init_from`: then with 0 steps the model is taken as it is.
  """
  section, data = config[which], workdir / 'data'
  if families.is_feature_draft(section.model):
    feature_drafts.start(config, workdir)
    return
  if section.init_from is not None:
    _run_imported(config, workdir, which)
    return
  model_config = families.config(
      section.model, vocab_size=shards.read_metadata(data, 'train')['vocab_size'],
      dropout=section.train.dropout, remat=section.train.remat)
  key = jax.random.key(config.seed)
  fit(Run(stage=which, name=which, directory=workdir / which, settings=section.train,
          seed=config.seed, model_config=model_config, data=data,
          init=lambda mesh: sharding.sharded_init(
              functools.partial(families.init, model_config), mesh, key, layout=section.layout),
          layout=section.layout),
      config, workdir)


def _run_imported(config, workdir, which) -> None:
  """Fine-tunes or copies the model in `init_from`; of `model` only its dtype is read."""
  section, directory = config[which], workdir / which
  source = section.init_from
  logging.info('%s starts from %s, which has its shape; of %s.model only dtype is read', which,
               source, which)
  changed = dict(dropout=section.train.dropout, remat=section.train.remat,
                 dtype=section.model.dtype)
  model_config = pretrained.load_config(source, **changed)
  init = lambda mesh: pretrained.load(source, mesh, layout=section.layout, **changed).module
  made = Run(stage=which, name=which, directory=directory, settings=section.train,
             seed=config.seed, model_config=model_config, data=workdir / 'data', init=init,
             layout=section.layout, hub_config=pretrained.hub_config(source))
  if section.train.steps:
    fit(made, config, workdir)
    return
  with store.Store(directory) as checkpoints:
    if checkpoints.latest_step() is None:
      _write_model_file(made, workdir)
      checkpoints.save_params(0, init(sharding.make_mesh(**config.mesh)))


def _write_model_file(run, workdir) -> None:
  """Says what is trained; its vocabulary is the data's."""
  data = workdir / 'data'
  name = shards.read_metadata(data, 'train').get('vocabulary', 'vocabulary.model')
  store.write_model_file(run.directory, run.model_config,
                         data / name if (data / name).exists() else None, run.hub_config)


def fit(run: Run, config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
  """Trains, from the newest checkpoint of `run` if there is one; returns at once if finished.

  Raises:
    ValueError: impossible settings, before anything is compiled.
    FloatingPointError: a loss or gradient that is not finite, with its step.
  """
  settings = run.settings

  # Mesh.
  mesh = sharding.make_mesh(**config.mesh)
  state_lib.check(settings, sharding.rows_per_step(mesh))

  # Data: rows of tokens, or prompts for rollouts.
  metadata = shards.read_metadata(run.data, 'train')
  data = shards.batches(
      run.data, 'train', batch_size=settings.batch_size, max_length=metadata['max_length'],
      seed=run.seed, process_index=jax.process_index(), process_count=jax.process_count())

  # Model: its shapes; parameters come from a checkpoint or from `init`.
  _check_positions(run, metadata['max_length'])
  transformation = state_lib.optimizer(settings)
  create = functools.partial(state_lib.create, transformation=transformation)
  abstract = jax.eval_shape(lambda: create(families.init(run.model_config, jax.random.key(0))))

  # Step.
  update = step_lib.make(settings, run.objective, run.rollout, mesh, abstract, run.layout)
  key = jax.random.key(run.seed)
  teacher = run.teacher.module if run.objective.needs_teacher else None

  with store.Store(run.directory, keep=settings.keep_checkpoints) as checkpoints:
    # Restore, or start.
    first = checkpoints.latest_step()
    if first == settings.steps:
      return
    if first is not None and first > settings.steps:
      raise ValueError(f'{run.directory} holds step {first}, past train.steps, '
                       f'{settings.steps}; use another workdir')
    if first is None:
      first, state = 0, _start(create, run, mesh, abstract)
      _write_model_file(run, workdir)
    else:
      first, params, opt_state, position = checkpoints.restore(
          abstract.params, abstract.opt_state, mesh, run.layout)
      state = state_lib.TrainState(
          jax.device_put(jax.numpy.int32(first), sharding.replicated(mesh)), params, opt_state)
      data.set_state(position)

    # Loop. A step's figures are fetched after the next step was dispatched, so that the
    # device never waits for the host; only evaluation and checkpoints wait for both.
    held_out = heldout.HeldOut(
        workdir / 'data', mesh, batch_size=settings.batch_size, seed=config.seed,
        teacher=run.teacher, max_new_tokens=run.held_out_tokens)
    with writer_lib.Writer(workdir, run.stage, run.name, first_step=first,
                           steps=settings.steps) as writer:
      meter, late = writer_lib.Meter(), None
      if first == 0:
        writer.write(0, **held_out.measure(base.Model(state.params, run.model_config)))
      for step in range(first + 1, settings.steps + 1):
        batch = _put(meter.next_batch(data), mesh)
        state, metrics = update(state, teacher, batch, key)
        if late is not None:
          figures = _fetch(*late, meter)
          if late[0] % settings.log_every == 0:
            writer.write(late[0], **figures)
        late = step, metrics
        writer.advance(step)
        evaluating = step % settings.eval_every == 0 or step == settings.steps
        saving = step % settings.checkpoint_every == 0 or step == settings.steps
        if evaluating or saving:
          figures, late = _fetch(step, metrics, meter), None
          if evaluating:
            figures |= held_out.measure(base.Model(state.params, run.model_config))
            figures |= _rollout_share(run, state.params, batch, key, meter)
          writer.write(step, **figures)
          if saving:
            checkpoints.save(step, state.params, state.opt_state, data.get_state())
          meter.pause()


def _start(create, run, mesh, abstract):
  """The state before the first step; the optimizer's part is made where it will live."""
  shardings = sharding.parameter_shardings(abstract, mesh, run.layout)
  return jax.jit(create, out_shardings=shardings, donate_argnums=0)(run.init(mesh))


def _put(batch, mesh):
  """This process's rows to the global batch, spread over the mesh."""
  layout = sharding.batch_sharding(mesh)
  return jax.tree.map(
      lambda x: jax.make_array_from_process_local_data(layout, x), batch)


def _fetch(step, metrics, meter) -> dict[str, Any]:
  """A step's figures, once it is done; raises if they are not finite."""
  metrics = jax.device_get(metrics)
  step_lib.check_finite(metrics, step)
  meter.add(float(metrics.num_tokens))
  return dict(loss=metrics.loss, alpha=metrics.alpha, grad_norm=metrics.grad_norm,
              learning_rate=metrics.learning_rate, on_policy=metrics.on_policy,
              tokens_per_second=meter.tokens_per_second,
              data_wait_share=meter.data_wait_share, rollout_share=None)


def _rollout_share(run, student, batch, key, meter) -> dict[str, Any]:
  """Share of a step's time that goes into rollouts: the same rollout timed alone."""
  if run.rollout is None or meter.seconds_per_step is None:
    return {}
  seconds = heldout.rollout_seconds(student, batch, key, run.rollout)
  return dict(rollout_share=run.rollout.student_fraction * seconds / meter.seconds_per_step)


def _check_positions(run, width):
  """Learnt positions past the table would silently repeat its last row."""
  width = max(width, run.rollout.width if run.rollout else 0)
  teacher = run.teacher.config if run.teacher else run.model_config
  for config in (run.model_config, teacher):
    if 0 < config.max_positions < width:
      raise ValueError(f'{run.name}: rows have up to {width} tokens, but the model has '
                       f'{config.max_positions} learnt positions; raise max_positions')
