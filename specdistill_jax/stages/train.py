"""The training loop, top to bottom: one for target, draft and distilled drafts."""

from collections.abc import Callable
import functools
import pathlib
from typing import Any

from absl import logging
import jax
import ml_collections

from specdistill_jax import sharding
from specdistill_jax.checkpoints import pretrained
from specdistill_jax.checkpoints import store
from specdistill_jax.data import shards
from specdistill_jax.drafters import families
from specdistill_jax.models import base
from specdistill_jax.stages import feature_drafts
from specdistill_jax.stages import heldout
from specdistill_jax.stages import replay
from specdistill_jax.stages import runs
from specdistill_jax.stages import workdirs
from specdistill_jax.training import preemption
from specdistill_jax.training import profiling
from specdistill_jax.training import stalls
from specdistill_jax.training import step as step_lib
from specdistill_jax.training import writer as writer_lib

Run = runs.Run


def fit(run: Run, config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
  """Trains, from the newest checkpoint of `run` if there is one; returns at once if finished.

  Raises:
    ValueError: impossible settings, before anything is compiled; too little room on the disk.
    FloatingPointError: a loss or gradient that is not finite, with its step.
    store.SaveFailed: a checkpoint was not written.
    preemption.Stopped: asked to stop, and saved.
    preemption.Superseded: another launch goes on with this run.
  """
  settings, ready = run.settings, runs.ready(run, config)
  with preemption.training(), profiling.run(), stalls.watched(), store.Store(
      run.directory, keep=settings.keep_checkpoints) as checkpoints:
    # Restore, or start.
    first = checkpoints.latest_step()
    if first == settings.steps:
      return
    if first is not None and first > settings.steps:
      raise ValueError(f'{run.directory} holds step {first}, past train.steps, '
                       f'{settings.steps}; use another workdir')
    workdirs.check_room(run.directory, ready.abstract, settings.keep_checkpoints)
    if first is None:
      first, state = 0, ready.start()
      runs.write_model_file(run, workdir)
    else:
      state = ready.restore(checkpoints, first)

    # Loop. A step's figures are fetched after the next step was dispatched, so that the
    # device never waits for the host; only evaluation and checkpoints wait for both.
    held_out = heldout.HeldOut(
        workdir / 'data', ready.mesh, batch_size=settings.batch_size, seed=config.seed,
        teacher=run.teacher, max_new_tokens=run.held_out_tokens, tensor=run.decoding_tensor,
        head_chunk=settings.head_chunk, objective=run.objective)
    with writer_lib.Writer(workdir, run.stage, run.name, first_step=first,
                           steps=settings.steps) as writer:
      meter, late = writer_lib.Meter(), None
      if first == 0:
        writer.write(0, **held_out.measure(base.Model(state.params, run.model_config)))
      for step in range(first + 1, settings.steps + 1):
        profiling.before(step, workdir)
        batch = ready.put(meter.next_batch(ready.data))
        state, metrics = ready.update(state, ready.teacher, batch, ready.key)
        if late is not None:
          figures = _fetch(*late, meter, run, workdir)
          if late[0] % settings.log_every == 0:
            writer.write(late[0], seconds_per_step=meter.seconds_per_step, **figures)
            meter.mark()
            checkpoints.check()
          else:
            writer.tell(late[0], seconds_per_step=meter.seconds_per_step, **figures)
        late = step, metrics, batch
        writer.advance(step)
        stopping = preemption.asked()
        evaluating = step % settings.eval_every == 0 or step == settings.steps
        saving = step % settings.checkpoint_every == 0 or step == settings.steps
        if evaluating or saving or stopping:
          figures, late = _fetch(*late, meter, run, workdir), None
          if evaluating:
            figures |= held_out.measure(base.Model(state.params, run.model_config))
            figures |= _rollout_share(ready, state.params, batch, meter)
          workdirs.check_alone_together(workdir, run.stage)
          if evaluating or saving or step % settings.log_every == 0:
            writer.write(step, seconds_per_step=meter.seconds_per_step, **figures)
            meter.mark()
          if saving or stopping:
            writer.sync()
            checkpoints.save(step, state.params, state.opt_state, ready.data.get_state())
          if stopping and step < settings.steps:
            raise preemption.Stopped(f'{run.name} at step {step}')
          meter.pause()
        profiling.after(step, metrics)
        stalls.step_ended()


Fit = Callable[[Run, ml_collections.ConfigDict, pathlib.Path], None]


def run(config: ml_collections.ConfigDict, workdir: pathlib.Path, which: str,
        fit: Fit = fit) -> None:
  """Trains `which`, target or draft, by cross-entropy on the prepared data.

  From scratch, or from `init_from`: then with 0 steps the model is taken as it is. `fit` is
  what is done with the run; another one looks at a step of it again.
  """
  section, data = config[which], workdir / 'data'
  if families.is_feature_draft(section.model):
    feature_drafts.start(config, workdir)
    return
  if section.init_from is not None:
    _run_imported(config, workdir, which, fit)
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


def _run_imported(config, workdir, which, fit) -> None:
  """Fine-tunes or copies the model in `init_from`; of `model` only its dtype is read."""
  section, directory = config[which], workdir / which
  source = section.init_from
  logging.info('%s starts from %s, which has its shape; of %s.model only dtype is read', which,
               source, which)
  changed = dict(dropout=section.train.dropout, remat=section.train.remat,
                 dtype=section.model.dtype)
  model_config = pretrained.load_config(source, **changed)
  # Masters of what is trained are float32; what is taken as it is keeps its dtype.
  init = lambda mesh: pretrained.load(
      source, mesh, layout=section.layout,
      parameter_dtype='float32' if section.train.steps else None, **changed).module
  made = Run(stage=which, name=which, directory=directory, settings=section.train,
             seed=config.seed, model_config=model_config, data=workdir / 'data', init=init,
             layout=section.layout, hub_config=pretrained.hub_config(source))
  if section.train.steps:
    fit(made, config, workdir)
    return
  with store.Store(directory) as checkpoints:
    if checkpoints.latest_step() is None:
      runs.write_model_file(made, workdir)
      checkpoints.save_params(0, init(sharding.make_mesh(**config.mesh)))


def _fetch(step, metrics, batch, meter, run, workdir) -> dict[str, Any]:
  """A step's figures, once it is done; raises if they are not finite, and keeps the batch."""
  metrics = jax.device_get(metrics)
  try:
    step_lib.check_finite(metrics, step)
  except FloatingPointError as error:
    path = replay.save(workdir, run, step, batch)
    raise FloatingPointError(f'{error}; --replay={path} looks at that step row by row') from None
  meter.add(float(metrics.num_tokens))
  weights_g = metrics.kl_weight_g.tolist() if run.objective.name == 'lk_hybrid' else None
  return dict(loss=metrics.loss, alpha=metrics.alpha, grad_norm=metrics.grad_norm,
              trained_alpha_by_position=metrics.alpha_g.tolist(),
              trained_kl_weight_by_position=weights_g,
              learning_rate=metrics.learning_rate, on_policy=metrics.on_policy,
              tokens_per_second=meter.tokens_per_second,
              data_wait_share=meter.data_wait_share, rollout_share=None)


def _rollout_share(ready, params, batch, meter) -> dict[str, Any]:
  """Share of a step's time that goes into rollouts: the same rollout timed alone."""
  run = ready.run
  if run.rollout is None or (step_seconds := meter.mean_seconds_per_step) is None:
    return {}
  seconds = heldout.rollout_seconds(
      params, batch, ready.key, rollout=run.rollout, dtype=run.settings.weights_dtype,
      mesh=ready.mesh, layout=run.layout)
  return dict(rollout_share=run.rollout.student_fraction * seconds / step_seconds)
