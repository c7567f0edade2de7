"""Everything about a config that can be refused before anything is read or compiled.

`LEGAL` is the table of fields: what is not in it is misspelt, what its rule refuses is wrong.
Rules that look at several fields at once follow below it. Each error is one sentence with the
field, its value, and what would be right.
"""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import difflib
import math
import re
from typing import Any

import ml_collections

from specdistill_jax.data import chat
from specdistill_jax.data import quality
from specdistill_jax.stages import evaluate_checks
from specdistill_jax.stages import feature_checks
from specdistill_jax.stages import imports
from specdistill_jax.stages import objective_checks
from specdistill_jax.stages import places
from specdistill_jax.stages import sources
from specdistill_jax.stages import task_checks

Rule = Callable[[Any], str | None]  # a value -> what would be right, or None if it is

TASKS = sources.NAMES
OBJECTIVES = objective_checks.NAMES
DATA_SOURCES = ('fixed', 'target', 'draft', 'draft_stored', 'fixed+draft', 'target+draft')
RULES = ('exact', 'block', 'linear', 'square', 'exponential', 'greedy_lenience', 'typical',
         'top_k')  # of decoding.rules, named here since JAX is not yet wanted
DEFAULT_STUDENT_FRACTION = 0.5  # of configs/common.py: says that nobody asked for another


def _is_number(value: Any) -> bool:
  return (isinstance(value, (int, float)) and not isinstance(value, bool)
          and math.isfinite(value))


def _is_whole(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool)


def whole(low: int) -> Rule:
  return lambda x: None if _is_whole(x) and x >= low else f'a whole number of at least {low}'


def number(text: str, accepts: Callable[[float], bool]) -> Rule:
  return lambda x: None if _is_number(x) and accepts(x) else f'a number {text}'


def one_of(*names: str) -> Rule:
  def rule(value):
    if value in names:
      return None
    near = difflib.get_close_matches(str(value), names, n=1)
    hint = f' (did you mean {near[0]!r}?)' if near else ''
    return f'one of {", ".join(names)}{hint}'
  return rule


def optional(rule: Rule) -> Rule:
  def either(value):
    wish = None if value is None else rule(value)
    return wish and f'{wish}, or None'
  return either


def each(rule: Rule) -> Rule:
  """A non-empty tuple whose elements follow `rule` and differ from one another."""
  def all_of(values):
    if not isinstance(values, (tuple, list)) or not values:
      return 'a tuple of at least one value'
    wishes = [wish for wish in map(rule, values) if wish]
    if wishes:
      return f'a tuple in which each value is {wishes[0]}'
    return None if len(set(values)) == len(values) else 'a tuple without repeated values'
  return all_of


def text(value: Any) -> str | None:
  return None if isinstance(value, str) and value else 'a non-empty string'


def anything(value: Any) -> None:
  del value


def truth(value: Any) -> str | None:
  return None if isinstance(value, bool) else 'True or False'


def _paths(value: Any) -> str | None:
  wish = 'a tuple of paths, or of (inputs path, targets path) pairs'
  if not isinstance(value, (tuple, list)):
    return wish
  is_path = lambda x: isinstance(x, str) and bool(x)
  is_pair = lambda x: isinstance(x, (tuple, list)) and len(x) == 2 and all(map(is_path, x))
  return None if all(is_path(x) or is_pair(x) for x in value) else wish


def _rules(values: Any) -> str | None:
  wish = "a tuple of (rule, epsilon) pairs, as in (('exact', 1.0), ('linear', 0.5))"
  is_pair = lambda x: isinstance(x, (tuple, list)) and len(x) == 2
  if not isinstance(values, (tuple, list)) or not values or not all(map(is_pair, values)):
    return wish
  for name, epsilon in values:
    if fault := one_of(*RULES)(name):
      return f'{wish}, each rule being {fault}'
    if fault := SHARE(epsilon):
      return f'{wish}, each epsilon being {fault}'
  return None if len(set(map(tuple, values))) == len(values) else f'{wish}, without repetition'


def _trees(values: Any) -> str | None:
  # What the names stand for is looked into when JAX is there.
  return None if isinstance(values, (tuple, list)) and not values else each(text)(values)


def _chat_template(value: Any) -> str | None:
  # A file is looked into when its turn comes.
  if isinstance(value, str) and value.endswith('.json'):
    return None
  wish = one_of(*chat.TEMPLATES)(value)
  return wish and f'{wish}, or the path of a .json file'


def _topology(value: Any) -> str | None:
  wish = "a TPU slice such as 'v5e:4x4' or 'v4:2x2x4'"
  return None if isinstance(value, str) and re.fullmatch(r'v\w+:\d+(x\d+)+', value) else wish


POSITIVE = number('above 0', lambda x: x > 0)
NOT_NEGATIVE = number('of at least 0', lambda x: x >= 0)
FRACTION = number('from 0 to 1', lambda x: 0 <= x <= 1)
INNER_FRACTION = number('above 0 and below 1', lambda x: 0 < x < 1)
SHARE = number('above 0 and at most 1', lambda x: 0 < x <= 1)
DECAY = number('of at least 0 and below 1', lambda x: 0 <= x < 1)
DTYPE = one_of('float32', 'bfloat16')
AXIS = lambda x: None if x == -1 else whole(1)(x) and 'a whole number of at least 1, or -1'

TRAIN = dict(
    steps=whole(1), batch_size=whole(1), accumulation=whole(1),
    head_chunk=optional(whole(1)),
    optimizer=one_of('adamw', 'adafactor'), learning_rate=POSITIVE, warmup_steps=whole(0),
    schedule=one_of('cosine', 'linear', 'constant', 'plateau_cosine'), final_fraction=FRACTION,
    weight_decay=NOT_NEGATIVE, b1=DECAY, b2=DECAY, clip_norm=optional(POSITIVE),
    clip_value=optional(POSITIVE), dropout=DECAY,
    weights_dtype=DTYPE, remat=one_of('none', 'dots', 'full'),
    log_every=whole(1), eval_every=whole(1), checkpoint_every=whole(1),
    keep_checkpoints=whole(1))
MESH = dict(data=AXIS, fsdp=AXIS, tensor=AXIS)
LAYOUT = one_of('sharded', 'tensor', 'replicated')
# An imported model may be taken as it is.
STEPS = lambda x: (None if _is_whole(x) and x >= 0
                   else 'a whole number of at least 1, or 0 with init_from')
SAMPLING = dict(top_k=optional(whole(1)), top_p=optional(SHARE))

# A nested dict is a section; `anything` marks what another function looks into.
LEGAL = dict(
    study=text,
    seed=whole(0),
    mesh=MESH,
    topology=optional(_topology),
    bucket=optional(text),
    task=dict(
        name=one_of(*TASKS), vocab_size=whole(8), max_length=whole(2), prompt_length=whole(1),
        max_examples=optional(whole(1)), validation_fraction=INNER_FRACTION,
        train_files=_paths, validation_files=_paths,
        inputs_field=lambda x: None if isinstance(x, str) else 'a string', targets_field=text,
        metric=optional(one_of(*quality.METRICS)), max_inputs=optional(whole(1)),
        max_targets=optional(whole(1)), data_dir=optional(text), vocabulary=optional(text),
        chat_template=optional(_chat_template), prompt_files=_paths),
    target=dict(init_from=optional(text), model=anything, train=TRAIN | dict(steps=STEPS),
                layout=LAYOUT, teacher_layout=optional(LAYOUT), weights_dtype=DTYPE),
    draft=dict(init_from=optional(text), model=anything, train=TRAIN | dict(steps=STEPS),
               layout=LAYOUT),
    distill=dict(
        objective=objective_checks.objective, also=objective_checks.further, beta=INNER_FRACTION,
        data_source=one_of(*DATA_SOURCES),
        student_fraction=FRACTION, normalisation=one_of('sequence', 'token'),
        temperature=optional(POSITIVE),
        rollout=dict(temperature=NOT_NEGATIVE, max_new_tokens=whole(1), tensor=optional(whole(0)),
                     **SAMPLING),
        seeds=each(whole(0)), control=truth, init_from=optional(text), train=TRAIN),
    evaluate=dict(
        temperatures=each(NOT_NEGATIVE), gammas=each(whole(1)),
        draft_sampling=each(one_of('sampled', 'greedy')), rules=_rules, trees=_trees,
        min_confidences=each(DECAY), max_quality_drop=optional(DECAY),
        batch_size=whole(1), num_prompts=optional(whole(1)), max_new_tokens=whole(1),
        bootstrap_samples=whole(1), mesh=MESH, topology=optional(_topology), weights_dtype=DTYPE,
        **SAMPLING),
)
OPTIONAL_SECTIONS = ('target', 'draft', 'distill', 'evaluate')


def may_be_none(path: Sequence[str]) -> bool:
  """Whether the field, or section, of this path is legal without a value."""
  legal = LEGAL
  for name in path:
    if not isinstance(legal, dict) or name not in legal:
      return False
    legal = legal[name]
  return tuple(path) in zip(OPTIONAL_SECTIONS) if isinstance(legal, dict) else legal(None) is None


def unknown_name(path: str, name: str, legal: Iterator[str]) -> str:
  """The sentence about a field that does not exist, with the nearest ones that do."""
  legal = sorted(legal)
  near = difflib.get_close_matches(name, legal, n=2, cutoff=0.6)
  hint = f'did you mean {" or ".join(near)}?' if near else f'the fields are {", ".join(legal)}'
  return f'config has no field {path}{name}; {hint}'


def _check_fields(section: Any, legal: dict[str, Any], path: str) -> None:
  if not isinstance(section, ml_collections.ConfigDict):
    raise ValueError(f'config.{path.rstrip(".")} is {section!r}; it must be a section with the '
                     f'fields {", ".join(legal)}')
  for name in section:
    if name not in legal:
      raise ValueError(unknown_name(path, name, legal))
  for name, rule in legal.items():
    if name not in section:
      raise ValueError(f'config has no field {path}{name}; start from configs.common.study()')
    value = section[name]
    if isinstance(rule, dict):
      if value is not None or path or name not in OPTIONAL_SECTIONS:
        _check_fields(value, rule, f'{path}{name}.')
    elif wish := rule(value):
      raise ValueError(f'config.{path}{name} is {value!r}; it must be {wish}')


def _check_model(model: Any, vocab_size: int, path: str) -> None:
  from specdistill_jax.models import families  # brings in JAX, which the flags can do without
  if not isinstance(model, ml_collections.ConfigDict):
    raise ValueError(f'config.{path} is {model!r}; it must be a section, see '
                     'configs.common.decoder() and configs.common.t5()')
  family = model.get('family', families.DEFAULT)
  if wish := one_of(*families.FAMILIES)(family):
    raise ValueError(f'config.{path}.family is {family!r}; it must be {wish}')
  fields = dataclasses.fields(families.FAMILIES[family][0])
  legal = {field.name for field in fields} - {'vocab_size'} | {'family'}
  for name in model:
    if name not in legal:
      raise ValueError(unknown_name(f'{path}.', name, legal))
  try:
    families.config(model, vocab_size=vocab_size)
  except (ValueError, TypeError) as error:
    raise ValueError(f'config.{path} is wrong: {error}') from error


def _check_init_from(section: Any, name: str) -> str:
  """Where a model is imported from, so that a wrong path is not told after `prepare`.

  Returns the family of the model, imported or not.
  """
  if section.init_from is None:
    if section.train.steps == 0:
      raise ValueError(f'config.{name}.train.steps is 0; it must be a whole number of at least 1, '
                       f'or {name}.init_from must name the model to take as it is')
    return section.model.get('family', 'decoder')
  if places.is_open(section.init_from):  # as long as nothing is run, `model` says what it will be
    return section.model.get('family', 'decoder')
  from specdistill_jax.checkpoints import pretrained  # as above
  try:
    return pretrained.load_config(section.init_from).family
  except ValueError as error:
    raise ValueError(f'config.{name}.init_from is {section.init_from!r}: {error}') from error


def _check_same_family(config: Any, families: dict[str, str]) -> None:
  """A decoder reads prompt and completion in one row, an encoder-decoder apart."""
  if len(set(families.values())) > 1:
    told = ' and '.join(
        f"config.{name}.{'model.family' if config[name].init_from is None else 'init_from'} "
        f"{'is' if config[name].init_from is None else 'is of the family'} {family!r}"
        for name, family in families.items())
    raise ValueError(f'{told}; a draft must be of its target\'s family')


def _check_train(train: Any, path: str, rows: int) -> None:
  if train.steps == 0:
    return
  if train.warmup_steps >= train.steps:
    raise ValueError(f'config.{path}.warmup_steps is {train.warmup_steps}; it must be below '
                     f'{path}.steps, {train.steps}')
  if train.schedule == 'plateau_cosine' and train.warmup_steps > train.steps // 2:
    raise ValueError(f'config.{path}.warmup_steps is {train.warmup_steps}; under plateau_cosine '
                     f'it must be at most half of {path}.steps, {train.steps}')
  if train.batch_size % train.accumulation:
    raise ValueError(f'config.{path}.batch_size is {train.batch_size}; it must be a multiple '
                     f'of {path}.accumulation, {train.accumulation}')
  if (train.batch_size // train.accumulation) % rows:
    raise ValueError(
        f'config.{path}.batch_size is {train.batch_size}; each of its {train.accumulation} '
        f'micro-batches must be a multiple of mesh.data x mesh.fsdp, {rows}')


def _check_mesh(mesh: Any, path: str) -> None:
  if [mesh[axis] for axis in mesh].count(-1) > 1:
    raise ValueError(f'config.{path} is {dict(mesh)}; only one of its axes may be -1')


def _check_sections(config: Any) -> None:
  """A stage needs the models that an earlier stage makes."""
  needs = dict(distill=('target', 'draft'), evaluate=('target', 'draft'))
  for stage, models in needs.items():
    for model in models:
      if config[stage] is not None and config[model] is None:
        raise ValueError(f'config.{model} is None but config.{stage} is set; {stage} needs a '
                         f'{model}: give config.{model}, or set config.{stage} to None')


def _check_new_tokens(task: Any, max_new_tokens: int, path: str) -> None:
  is_text = task_checks.is_language_modelling(task)
  room = task.max_length - (task.prompt_length if is_text else 1)
  if max_new_tokens > room:
    prompt = f' less task.prompt_length, {task.prompt_length},' * is_text
    raise ValueError(
        f'config.{path}.max_new_tokens is {max_new_tokens}; rows hold task.max_length tokens, '
        f'{task.max_length},{prompt} so that it must be at most {room}')


def _check_distill(config: Any) -> None:
  distill = config.distill
  if '+' not in distill.data_source and distill.student_fraction != DEFAULT_STUDENT_FRACTION:
    mixtures = ' or '.join(repr(name) for name in DATA_SOURCES if '+' in name)
    raise ValueError(
        f'config.distill.student_fraction is {distill.student_fraction}, but data_source '
        f'{distill.data_source!r} is no mixture; use {mixtures}, or leave student_fraction at '
        f'{DEFAULT_STUDENT_FRACTION}')
  objective_checks.check(config, feature_checks.is_feature_draft(config, 'draft'))
  imports.check_arms(config)


def check(config: ml_collections.ConfigDict) -> None:
  """Raises a ValueError of one sentence at the first misspelt, illegal or contradictory field."""
  _check_fields(config, LEGAL, '')
  _check_sections(config)
  models = [name for name in ('target', 'draft') if config[name] is not None]
  imported = [f'{name}.init_from' for name in ('target', 'draft', 'distill')
              if config[name] is not None and config[name].init_from is not None]
  task_checks.check(config.task, next(iter(imported), None))
  _check_mesh(config.mesh, 'mesh')
  rows = math.prod(size for size in (config.mesh.data, config.mesh.fsdp) if size > 0)
  families = {}
  for name in models:
    imports.check_finished(config[name].init_from, f'{name}.init_from')
    if feature_checks.is_feature_draft(config, name):
      feature_checks.check(config)
      continue
    _check_model(config[name].model, config.task.vocab_size, f'{name}.model')
    families[name] = _check_init_from(config[name], name)
  _check_same_family(config, families)
  for name in ('target', 'draft', 'distill'):
    if config[name] is not None:
      _check_train(config[name].train, f'{name}.train', rows)
  if config.distill is not None:
    _check_distill(config)
    _check_new_tokens(config.task, config.distill.rollout.max_new_tokens, 'distill.rollout')
  if config.evaluate is not None:
    _check_mesh(config.evaluate.mesh, 'evaluate.mesh')
    evaluate_checks.check(config.evaluate, config.task.vocab_size)
    _check_new_tokens(config.task, config.evaluate.max_new_tokens, 'evaluate')
