"""A model from any directory that holds one: ours, or Hugging Face's."""

import pathlib
from typing import Any

from jax.sharding import Mesh

from specdistill_jax import sharding
from specdistill_jax import storage
from specdistill_jax.checkpoints import hf
from specdistill_jax.checkpoints import hf_drafters
from specdistill_jax.checkpoints import store
from specdistill_jax.drafters import families
from specdistill_jax.models import base


def is_ours(directory: pathlib.Path | str) -> bool:
  """Whether `directory` holds a checkpoint of ours (True) or of Hugging Face's (False).

  Raises:
    ValueError: it holds neither.
    OSError: it is in a bucket that can't be read.
  """
  directory = storage.path(directory)
  storage.check_readable(directory)
  if not directory.is_dir():
    raise ValueError(f'{directory} is no directory: a model is a directory of ours, with '
                     f"{store.MODEL_FILE}, or one of Hugging Face's, with {hf.CONFIG_FILE}, as "
                     '`hf download` makes it')
  if (directory / store.MODEL_FILE).is_file():
    return True
  if hf.is_hub_directory(directory):
    return False
  raise ValueError(f'{directory} holds no model: neither {store.MODEL_FILE} nor '
                   f'{hf.CONFIG_FILE} with weights')


def load(directory: pathlib.Path | str, mesh: Mesh | None = None, *, target: Any = None,
         layout: str = sharding.DEFAULT_LAYOUT, parameter_dtype: str | None = 'float32',
         **overrides: Any) -> base.Model:
  """Reads a model: `module`, `config`, and `vocabulary` if the directory has a tokenizer.

  Args:
    directory: with a checkpoint of ours, or config.json and safetensors of a known family.
    mesh: where to lay the parameters out, each device reading its own slices; the first
      device if None.
    target: config of its target, which a feature-level draft may need.
    layout: how, one of `sharding.LAYOUTS`.
    parameter_dtype: of the parameters: 'float32' masters, 'bfloat16', or None as they are
      stored. Of a checkpoint of ours 'bfloat16' is that of the matrices alone.
    **overrides: fields of the model's config to change, such as `dtype`, that of the
      activations.

  Raises:
    ValueError: one sentence about what is missing, damaged, unknown or does not fit.
  """
  if is_ours(directory):
    hf.check_dtype(parameter_dtype)
    return store.load_model(directory, mesh, layout=layout, weights_dtype=parameter_dtype,
                            **overrides)
  if hf_drafters.is_draft(storage.path(directory)):
    return hf_drafters.load(directory, mesh, target=target, layout=layout,
                            parameter_dtype=parameter_dtype, **overrides)
  return hf.load(directory, mesh, layout=layout, parameter_dtype=parameter_dtype, **overrides)


def save(model: base.Model, directory: pathlib.Path | str, **options: Any) -> None:
  """Writes a model as Hugging Face's libraries, or a draft as its authors' code, would."""
  write = hf_drafters.save if families.is_feature_draft(model.config) else hf.save
  write(model, directory, **options)


def load_config(directory: pathlib.Path | str, target: Any = None, **overrides: Any) -> Any:
  """The config that `load` would give the model; reads no weights."""
  if not is_ours(directory) and hf_drafters.is_draft(storage.path(directory)):
    return hf_drafters.load_config(directory, target, **overrides)
  read = store.load_config if is_ours(directory) else hf.load_config
  return read(directory, **overrides)


def load_vocabulary(directory: pathlib.Path | str) -> Any:
  """The vocabulary that `load` would give the model, or None; reads no weights."""
  directory = storage.path(directory)
  return store.load_vocabulary(directory) if is_ours(directory) else hf.load_vocabulary(directory)


def hub_config(directory: pathlib.Path | str) -> dict[str, Any] | None:
  """The config.json that a model came with, or None of one that was trained here."""
  directory = storage.path(directory)
  if is_ours(directory):
    return store.read_model_file(directory).get('hub_config')
  return hf.read_config(directory)
