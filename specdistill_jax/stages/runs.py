"""A training run, and what its loop needs before the first step."""

from collections.abc import Callable
import dataclasses
import functools
import pathlib
from typing import Any

import jax
from jax.sharding import Mesh
import ml_collections

from specdistill_jax import processes
from specdistill_jax import sharding
from specdistill_jax.checkpoints import store
from specdistill_jax.data import shards
from specdistill_jax.drafters import families
from specdistill_jax.losses import objectives
from specdistill_jax.models import base
from specdistill_jax.training import laws
from specdistill_jax.training import rollouts
from specdistill_jax.training import state as state_lib
from specdistill_jax.training import step as step_lib


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
    reference: the draft that tells a selective objective which tokens to keep, or None.
    rollout: how the student's own data are sampled; None for stored data.
    held_out_tokens: new tokens of a held-out prompt, where there is a teacher.
    decoding_tensor: devices that share a model's heads when held-out prompts are decoded; None:
      as in training.
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
  decoding_tensor: int | None = None
  layout: str = sharding.DEFAULT_LAYOUT
  hub_config: dict[str, Any] | None = None
  reference: base.Model | None = None


@dataclasses.dataclass(frozen=True)
class Ready:
  """A run whose settings fit together; nothing is read or compiled yet.

  Attributes:
    mesh: of all devices of all processes.
    data: this process's rows of each batch, as host arrays.
    abstract: shapes of the state.
    create: parameters -> the state before the first step.
    update: the jitted step.
    teacher: module of the target, or None where the objective does not read it.
    key: of the run.
  """
  run: Run
  mesh: Mesh
  data: Any
  abstract: state_lib.TrainState
  create: Callable[[Any], state_lib.TrainState]
  update: Callable[..., Any]
  teacher: Any
  key: jax.Array

  def put(self, batch: Any) -> Any:
    """This process's rows to the global batch, spread over the mesh."""
    return sharding.put_rows(batch, self.mesh, self.run.settings.batch_size)

  def start(self) -> state_lib.TrainState:
    """The state before the first step; the optimizer's part is made where it will live."""
    shardings = sharding.parameter_shardings(self.abstract, self.mesh, self.run.layout)
    return jax.jit(self.create, out_shardings=shardings,
                   donate_argnums=0)(self.run.init(self.mesh))

  def restore(self, checkpoints: store.Store, step: int) -> state_lib.TrainState:
    """The state after `step`; the data go on from there."""
    params, opt_state, position = checkpoints.restore(
        step, self.abstract.params, self.abstract.opt_state, self.mesh, self.run.layout)
    self.data.set_state(position)
    return state_lib.TrainState(sharding.put(jax.numpy.int32(step), sharding.replicated(self.mesh)),
                                params, opt_state)


def ready(run: Run, config: ml_collections.ConfigDict) -> Ready:
  """Checks that everything fits.

  Raises:
    ValueError: impossible settings, before anything is compiled.
  """
  settings = run.settings
  mesh = sharding.make_mesh(**config.mesh)
  state_lib.check(settings, sharding.rows_per_step(mesh))
  metadata = shards.read_metadata(run.data, 'train')
  data = shards.batches(
      run.data, 'train', batch_size=settings.batch_size, max_length=metadata['max_length'],
      seed=run.seed, batch_rows=sharding.local_rows(mesh, settings.batch_size))
  _check_positions(run, metadata['max_length'])
  create = functools.partial(state_lib.create,
                             transformation=state_lib.optimizer(settings, run.objective))
  abstract = jax.eval_shape(lambda: create(families.init(run.model_config, jax.random.key(0))))
  return Ready(
      run=run, mesh=mesh, data=data, abstract=abstract, create=create,
      update=step_lib.make(settings, run.objective, run.rollout, mesh, abstract, run.layout),
      teacher=_teaching(run),
      key=jax.random.key(run.seed))


def _teaching(run):
  if not run.objective.needs_teacher:
    return None
  if run.reference is None:
    return run.teacher.module
  return laws.Guided(run.teacher.module, run.reference.module)


def write_model_file(run, workdir) -> None:
  """Says what is trained; its vocabulary is the data's."""
  data = workdir / 'data'
  split = shards.splits(data)[0]
  name = shards.read_metadata(data, split).get('vocabulary', 'vocabulary.model')
  if processes.is_first():
    store.write_model_file(run.directory, run.model_config,
                           data / name if (data / name).exists() else None, run.hub_config)


def _check_positions(run, width):
  """Learnt positions past the table would silently repeat its last row."""
  width = max(width, run.rollout.width if run.rollout else 0)
  teacher = run.teacher.config if run.teacher else run.model_config
  for config in (run.model_config, teacher):
    if 0 < config.max_positions < width:
      raise ValueError(f'{run.name}: rows have up to {width} tokens, but the model has '
                       f'{config.max_positions} learnt positions; raise max_positions')
