"""Hugging Face directories, both ways, without torch: config.json, safetensors, tokenizer.

A family is a module with `FAMILIES` (model types), `CONFIG` (our config class), `init`,
`to_config`, `from_config` and `table`; see `hf_decoder`.
"""

from collections.abc import Sequence
import contextlib
import json
import pathlib
import shutil
from typing import Any

from absl import logging
import jax
from jax.sharding import Mesh

from specdistill_jax import sharding
from specdistill_jax import storage
from specdistill_jax import structs
from specdistill_jax.checkpoints import hf_decoder
from specdistill_jax.checkpoints import hf_t5
from specdistill_jax.checkpoints import key_tables
from specdistill_jax.checkpoints import safetensors_io
from specdistill_jax.data import tokenizers
from specdistill_jax.models import base

CONFIG_FILE = 'config.json'
MODULES = (hf_decoder, hf_t5)
DTYPES = ('float32', 'bfloat16')


def is_hub_directory(directory: pathlib.Path) -> bool:
  """Whether a directory looks like one of Hugging Face's, be it complete or not."""
  names = (CONFIG_FILE, safetensors_io.SINGLE_FILE, safetensors_io.INDEX_FILE)
  return any((directory / name).is_file() for name in names) or any(
      next(directory.glob(pattern), None) for pattern in safetensors_io.PICKLES)


def load(directory: pathlib.Path | str, mesh: Mesh | None = None, *,
         layout: str = sharding.DEFAULT_LAYOUT, parameter_dtype: str | None = 'float32',
         **overrides: Any) -> base.Model:
  """A model from a Hugging Face directory, each device reading its own slices.

  Args:
    mesh: where to lay the parameters out; the first device if None.
    layout: how, one of `sharding.LAYOUTS`.
    parameter_dtype: of the parameters: 'float32' masters, 'bfloat16', or None as in the file.
    **overrides: fields of the model's config to change, for example `dtype`, that of the
      activations (the file's own unless given).

  Raises:
    ValueError: one sentence about a directory without config or weights, pickled or truncated
      weights, an unknown family, tensors that do not fit, or a tokenizer that does not.
  """
  directory = storage.path(directory)
  check_dtype(parameter_dtype)
  hub = read_config(directory)
  family = _family(hub, directory)
  vocabulary = tokenizers.find(directory)
  config = _config(family, hub, directory, vocabulary, overrides)
  mesh = mesh or sharding.make_mesh(devices=jax.devices()[:1])
  abstract = jax.eval_shape(lambda: family.init(config, jax.random.key(0)))
  with safetensors_io.Reader(storage.local(directory)) as reader:
    module = key_tables.load(family.table(config), reader, abstract,
                             sharding.parameter_shardings(abstract, mesh, layout),
                             dtype=parameter_dtype)
  logging.info('read %s, a %s of %s parameters', directory, hub['model_type'],
               f'{sum(leaf.size for leaf in jax.tree.leaves(module)):,}')
  return base.Model(module=module, config=config, vocabulary=vocabulary, hub_config=hub)


def check_dtype(parameter_dtype: str | None) -> None:
  """Raises ValueError if parameters can't be read in such a dtype."""
  if parameter_dtype not in (*DTYPES, None):
    raise ValueError(f'parameter_dtype is {parameter_dtype!r}; it must be one of '
                     f'{", ".join(DTYPES)}, or None to keep that of the file')


def load_config(directory: pathlib.Path | str, **overrides: Any) -> Any:
  """The config of the model in a Hugging Face directory, with `overrides` of its fields."""
  directory = storage.path(directory)
  hub = read_config(directory)
  return _config(_family(hub, directory), hub, directory, tokenizers.find(directory), overrides)


def load_vocabulary(directory: pathlib.Path | str) -> Any:
  """The tokenizer of a Hugging Face directory, or None."""
  return tokenizers.find(directory)


def read_config(directory: pathlib.Path) -> dict[str, Any]:
  """config.json, with the end tokens of generation_config.json where that has some."""
  path = directory / CONFIG_FILE
  try:
    hub = json.loads(path.read_text(encoding='utf-8'))
  except FileNotFoundError:
    raise ValueError(f'{path} is missing: {directory} is not the directory of a model') from None
  except ValueError as error:
    raise ValueError(f'{path} is not JSON ({error})') from error
  generation = directory / 'generation_config.json'
  if generation.is_file():
    ends = json.loads(generation.read_text(encoding='utf-8')).get('eos_token_id')
    hub['eos_token_id'] = hub.get('eos_token_id') if ends is None else ends
  return hub


def _family(hub, directory):
  name = hub.get('model_type')
  for module in MODULES:
    if name in module.FAMILIES:
      return module
  if name is None and 'study' in hub:
    raise ValueError(f'{directory} is the workdir of a study, not a model; its models are '
                     f'{directory}/target, {directory}/draft and those in {directory}/distill')
  known = ', '.join(family for module in MODULES for family in module.FAMILIES)
  raise ValueError(f'{directory / CONFIG_FILE}: model_type is {name!r}, which is no family known '
                   f'here; known are {known}')


def _config(family, hub, directory, vocabulary, overrides):
  """Our config: the family's, the end tokens, and the dtype of the file for activations."""
  base.check_fields(family.CONFIG, overrides)
  path = directory / CONFIG_FILE
  fields = dict(dtype='float32' if dtype(hub) == 'float32' else 'bfloat16')
  ends = _ends(hub, vocabulary)
  if 'eos_id' in family.CONFIG.__dataclass_fields__:
    fields['eos_id'] = ends
  elif ends not in (structs.EOS_ID, ()):
    raise ValueError(f'{path}: eos_token_id is {ends}; rows of this family end with '
                     f'{structs.EOS_ID}')
  config = family.to_config(hub, path, **(fields | overrides))
  rows = config.vocab_size + getattr(config, 'vocab_padding', 0)
  if vocabulary is not None and vocabulary.size > rows:
    raise ValueError(f'the tokenizer of {directory} has {vocabulary.size} ids and the embedding '
                     f'{rows} rows: they do not belong together')
  return config


def dtype(hub: dict[str, Any]) -> str:
  """The dtype that a config.json names."""
  return hub.get('dtype') or hub.get('torch_dtype') or 'float32'


def _ends(hub, vocabulary) -> int | tuple[int, ...]:
  """All ids that end a row: the config's, and the one that the tokenizer ends texts with."""
  ends = hub.get('eos_token_id')
  ends = list(ends) if isinstance(ends, list) else [] if ends is None else [ends]
  if vocabulary is not None and vocabulary.eos_id not in ends:
    ends.append(vocabulary.eos_id)
  return ends[0] if len(ends) == 1 else tuple(ends)


def save(model: base.Model, directory: pathlib.Path | str, *, dtype: str | None = None,
         max_shard_bytes: int = safetensors_io.MAX_SHARD_BYTES) -> None:
  """Writes a model as a directory that `transformers` loads; it appears when it is complete.

  Args:
    dtype: of the file, 'float32' or 'bfloat16'; None keeps that of the parameters, so that
      reading it back is exact.
    max_shard_bytes: above it the weights are parted into several files with an index.

  Raises:
    ValueError: the directory is in use, or no family has this model.
  """
  directory = storage.path(directory)
  if dtype not in (*DTYPES, None):
    raise ValueError(f'dtype is {dtype!r}; it must be one of {", ".join(DTYPES)}, or None')
  family = next((m for m in MODULES if isinstance(model.config, m.CONFIG)), None)
  if family is None:
    raise ValueError(f'a model with a {type(model.config).__name__} has no Hugging Face family')
  tensors = list(key_tables.tensors(family.table(model.config), model.module, dtype))
  hub = family.from_config(model.config, model.hub_config) | _tokens(model)
  hub['dtype'] = str(tensors[0].dtype)
  write_directory(directory, hub, tensors, max_shard_bytes=max_shard_bytes,
                  files=getattr(model.vocabulary, 'files', ()))


def write_directory(directory: pathlib.Path, hub: dict[str, Any],
                    tensors: list[safetensors_io.Tensor], *, max_shard_bytes: int,
                    files: Sequence[pathlib.Path] = ()) -> None:
  """Writes config.json, weights and copies of `files`; the directory appears when complete.

  Raises:
    ValueError: the directory is in use.
  """
  if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
    raise ValueError(f'{directory} is there already; name a new directory')
  is_first = jax.process_index() == 0
  with storage.staged(directory) if is_first else contextlib.nullcontext(directory) as aside:
    if is_first:
      (aside / CONFIG_FILE).write_text(json.dumps(hub, indent=2) + '\n', encoding='utf-8')
      for path in files:
        shutil.copyfile(path, aside / path.name)
    safetensors_io.write(aside, tensors, max_shard_bytes=max_shard_bytes, write_files=is_first)


def _tokens(model) -> dict[str, Any]:
  """Special tokens for config.json; what the model came with stays."""
  ends = getattr(model.config, 'eos_id', structs.EOS_ID)
  tokens = dict(eos_token_id=list(ends) or None if isinstance(ends, tuple) else ends)
  if model.hub_config is None:
    vocabulary = model.vocabulary
    tokens |= dict(bos_token_id=getattr(vocabulary, 'bos_id', None),
                   pad_token_id=getattr(vocabulary, 'pad_id', 0))
  return tokens
