"""The programs of a study as the compiler gets them: abstract arrays with their layout, no weights.

`target` is the update of the target by cross-entropy, `train` that of the draft on stored rows,
`on_policy` the same with its rollout inside; `held_out` decodes held-out prompts beside the
training's state, `samples` draws a model's stored answers. On the slice that decodes, `generate`
is the target alone, `draft` the draft alone, `speculate` both with a chain or a tree. A
feature-level draft is never trained on its own text; `draft` feeds it its own outputs.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
import ml_collections

from specdistill_jax import sharding
from specdistill_jax import structs
from specdistill_jax.costs import alone
from specdistill_jax.decoding import autoregressive
from specdistill_jax.decoding import engine
from specdistill_jax.decoding import rules
from specdistill_jax.decoding import sampling as sampling_lib
from specdistill_jax.decoding import tree as tree_lib
from specdistill_jax.drafters import built as built_lib
from specdistill_jax.drafters import families
from specdistill_jax.drafters import feature
from specdistill_jax.losses import objectives
from specdistill_jax.losses import specs
from specdistill_jax.training import rollouts
from specdistill_jax.training import state as state_lib
from specdistill_jax.training import step as step_lib

TRAINING = ('target', 'train', 'on_policy', 'held_out', 'samples')
DECODING = ('generate', 'draft', 'speculate')
NAMES = (*TRAINING, *DECODING)


@dataclasses.dataclass(frozen=True)
class Program:
  """One program, ready for the compiler.

  Attributes:
    name: one of `NAMES`.
    function: jitted; `arguments` are abstract and laid out.
    arguments: of the function.
    mesh: what the arguments are laid out on.
    steps: of a loop whose end depends on its data: tokens a row decodes, at most.
    tokens: trained on in one call; 0 when decoding.
    reference: the same computation, to be traced for the FLOPs that it needs: nothing is
      rematerialised in it.
  """
  name: str
  function: Callable[..., Any]
  arguments: tuple[Any, ...]
  mesh: Mesh
  steps: int
  tokens: int
  reference: Callable[..., Any]

  def lower(self) -> jax.stages.Lowered:
    with jax.set_mesh(self.mesh):
      return self.function.lower(*self.arguments)


def names(config: ml_collections.ConfigDict) -> tuple[str, ...]:
  """The programs of a study, of what it trains and decodes."""
  found = ['target'] if config.target.train.steps else []
  if config.distill is not None and config.distill.init_from is None:
    found += ['train'] if families.is_feature_draft(config.draft.model) else ['train', 'on_policy']
    found += ['held_out'] * (config.distill.rollout.tensor != 0)
    found += ['samples'] * (_sampled(config) is not None)
  return (*found, *(DECODING if config.evaluate is not None else ()))


def _sampled(config: ml_collections.ConfigDict) -> str | None:
  """Whose answers are stored before the draft learns from them, if anybody's."""
  source = config.distill.data_source
  return 'draft' if source == 'draft_stored' else 'target' if source.startswith('target') else None


def _laid_out(tree: Any, shardings: Any) -> Any:
  return jax.tree.map(lambda leaf, layout: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=layout), tree, shardings)


def _everywhere(tree: Any, layout: NamedSharding) -> Any:
  return _laid_out(tree, jax.tree.map(lambda _: layout, tree))


def _key(mesh: Mesh) -> Any:
  return _everywhere(jax.eval_shape(lambda: jax.random.key(0)), sharding.replicated(mesh))


def _model_config(config: ml_collections.ConfigDict, which: str, **changed: Any) -> Any:
  target = None if which == 'target' else _model_config(config, 'target')
  return families.config(config[which].model, target, vocab_size=config.task.vocab_size, **changed)


def module(config: ml_collections.ConfigDict, which: str, mesh: Mesh, *, layout: str, dtype: str,
           unstacked: bool) -> Any:
  """The abstract target or draft."""
  def init():
    built = sharding.matrices_in(
        families.init(_model_config(config, which), jax.random.key(0)), dtype)
    return built.unstacked() if unstacked and hasattr(built, 'unstacked') else built
  abstract = jax.eval_shape(init)
  return _laid_out(abstract, sharding.parameter_shardings(abstract, mesh, layout))


def _batch(rows: int, widths: structs.Widths, mesh: Mesh) -> structs.Batch:
  whole = lambda dtype: jax.ShapeDtypeStruct((rows, widths.prompt + widths.completion), dtype)
  length = jax.ShapeDtypeStruct((rows,), jnp.int32)
  batch = structs.Batch(whole(jnp.int32), whole(jnp.float32), length, length, widths)
  return _everywhere(batch, sharding.batch_sharding(mesh))


def training(config: ml_collections.ConfigDict, widths: structs.Widths, mesh: Mesh, *,
             name: str) -> Program:
  """The update of the target, or of the draft towards it as `stages.distill` runs it."""
  if name == 'target':
    return _update(name, config, 'target', config.target.train, widths, mesh,
                   objectives.Objective(), None, None)
  if name in ('held_out', 'samples'):
    return _beside_training(name, config, widths, mesh)
  distill = config.distill
  objective = objectives.from_spec(
      distill.objective, beta=distill.beta, normalisation=distill.normalisation,
      temperature=specs.serving_temperature(
          distill.temperature, config.evaluate and config.evaluate.temperatures))
  rollout = None
  if name == 'on_policy':
    if families.is_feature_draft(config.draft.model):
      raise ValueError(f'there is no program on_policy: {config.draft.model.family!r} learns on '
                       'given text alone')
    new_tokens = distill.rollout.max_new_tokens
    widths = structs.Widths(widths.prompt, new_tokens)
    rollout = rollouts.Rollout(
        sampling_lib.Sampling(distill.rollout.temperature, distill.rollout.top_k,
                              distill.rollout.top_p),
        max_new_tokens=new_tokens, prompt_width=widths.prompt)

  return _update(name, config, 'draft', distill.train, widths, mesh, objective, rollout,
                 _teacher(config, mesh))


def _teacher(config, mesh, layout=None) -> Any:
  return module(config, 'target', mesh,
                layout=layout or config.target.teacher_layout or config.target.layout,
                dtype=config.target.weights_dtype, unstacked=False)


def _beside_training(name, config, widths, mesh) -> Program:
  """What decodes on the slice that trains, with all that is held there meanwhile."""
  settings, asked = config.distill.train, config.distill.rollout
  tensor = asked.tensor or None
  student = _model_config(config, 'draft')
  state = jax.eval_shape(lambda: state_lib.create(
      families.init(student, jax.random.key(0)), state_lib.optimizer(settings)))
  held = [_teacher(config, mesh),
          _laid_out(state, sharding.parameter_shardings(state, mesh, config.draft.layout))]
  regrouped = sharding.regrouped(mesh, tensor)
  read = held
  if tensor is not None:
    read = [_teacher(config, regrouped, sharding.DEFAULT_LAYOUT),
            _laid_out(state, sharding.parameter_shardings(state, regrouped))]
  if name == 'held_out':
    rollout = rollouts.held_out(widths.prompt, asked.max_new_tokens)
    rows = rollouts.held_out_rows(settings.batch_size, sharding.rows_per_step(mesh), widths.prompt)
    def function(held, teacher, student, batch, key):
      del held
      return built_lib.speculate(
          teacher, student, batch.tokens_bt[:, :rollout.prompt_width], batch.prompt_lengths_b,
          key, shape=rollouts.HELD_OUT_GAMMA, rule=rules.Exact(), sampling=rollout.sampling,
          max_new_tokens=rollout.max_new_tokens).stats
    held = held if tensor is not None else [held[1].opt_state]
    models = (read[0], read[1].params)
  else:
    rollout = rollouts.Rollout(
        sampling_lib.Sampling(asked.temperature, asked.top_k, asked.top_p),
        max_new_tokens=asked.max_new_tokens, prompt_width=widths.prompt)
    rows = settings.batch_size
    def function(held, model, batch, key):
      del held
      return rollouts.generate(model, batch, key, rollout)
    chosen = ('target', 'draft').index(_sampled(config))
    both = lambda pair: [pair[0], pair[1].params]
    models = (both(read)[chosen],)
    held = both(held) if tensor is not None else [both(held)[1 - chosen]]
  batch = _batch(rows, structs.Widths(widths.prompt, rollout.max_new_tokens), regrouped)
  function = jax.jit(function, keep_unused=True)
  arguments = (held, *models, batch, _key(regrouped))
  return Program(name=name, function=function, arguments=arguments, mesh=regrouped,
                 steps=rollout.max_new_tokens, tokens=0,
                 reference=lambda: jax.make_jaxpr(function)(*arguments))


def _update(name, config, which, settings, widths, mesh, objective, rollout, teacher) -> Program:
  state_lib.check(settings, sharding.rows_per_step(mesh))
  layout = config[which].layout

  def update(remat, **changed):
    student = _model_config(config, which, dropout=settings.dropout, remat=remat)
    create = lambda: state_lib.create(
        families.init(student, jax.random.key(0)), state_lib.optimizer(settings, objective))
    abstract = jax.eval_shape(create)
    function = step_lib.make(dict(settings) | changed, objective, rollout, mesh, abstract, layout)
    return function, _laid_out(abstract, sharding.parameter_shardings(abstract, mesh, layout))

  inputs = (teacher, _batch(settings.batch_size, widths, mesh), _key(mesh))
  function, state = update(settings.remat)
  plain, plain_state = update('none', head_chunk=None)
  return Program(
      name=name, function=function, arguments=(state, *inputs), mesh=mesh, steps=widths.completion,
      tokens=settings.batch_size * widths.completion,
      reference=lambda: jax.make_jaxpr(plain)(plain_state, *inputs))


def decoding(config: ml_collections.ConfigDict, widths: structs.Widths, mesh: Mesh, *,
             name: str, shape: int | tree_lib.Tree | tree_lib.Dynamic) -> Program:
  """Prompts in, tokens out: prefill and the whole loop, in one program.

  `shape` is what `speculate` drafts: the length of a chain, or a tree.
  """
  settings = config.evaluate
  sampling = sampling_lib.Sampling(max(settings.temperatures), settings.top_k, settings.top_p)
  rule = rules.for_sampling(*settings.rules[0], sampling)
  new_tokens = settings.max_new_tokens
  weights = lambda which: module(
      config, which, mesh, dtype=settings.weights_dtype, unstacked=True,
      layout=sharding.decoding_layout(which, config[which].layout))

  def generate(target, prompts_bt, lengths_b, key):
    state = autoregressive.generate(target, prompts_bt, lengths_b, key, sampling=sampling,
                                    max_new_tokens=new_tokens)
    return engine.generation(state, max_new_tokens=new_tokens)

  def draft_features(ends, draft, *inputs):
    return generate(alone.Alone(feature.Bound(draft, ends)), *inputs)

  def speculate(*inputs):
    state = built_lib.speculate(*inputs, shape=shape, rule=rule, sampling=sampling,
                                max_new_tokens=new_tokens)
    return engine.generation(state, max_new_tokens=new_tokens)

  rows = settings.batch_size
  layout = sharding.batch_sharding(mesh) if rows % sharding.rows_per_step(mesh) == 0 else (
      sharding.replicated(mesh))
  prompts = _everywhere((jax.ShapeDtypeStruct((rows, widths.prompt), jnp.int32),
                         jax.ShapeDtypeStruct((rows,), jnp.int32)), layout)
  models = dict(generate=('target',), draft=('draft',), speculate=('target', 'draft'))[name]
  read, function = [weights(which) for which in models], generate
  if name == 'speculate':
    function = speculate
  elif name == 'draft' and built_lib.reads_features(read[0]):
    read, function = [weights('target').without_layers(), *read], draft_features
  function, arguments = jax.jit(function), (*read, *prompts, _key(mesh))
  return Program(name=name, function=function, arguments=arguments, mesh=mesh, steps=new_tokens,
                 tokens=0, reference=lambda: jax.make_jaxpr(function)(*arguments))
