"""seqio tasks over examples held in memory: the only module that imports TensorFlow.

A task is registered afresh each time it is made, because its vocabulary and its examples
belong to one workdir and not to the process.
"""

from collections.abc import Iterator, Mapping, Sequence
import os
from typing import Any, NamedTuple

# TensorFlow announces every CPU feature it finds; it reads this at import.
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')

# pylint: disable=g-import-not-at-top
import numpy as np
import seqio
import tensorflow as tf

from specdistill_jax.data import quality
from specdistill_jax.data import splits
from specdistill_jax.data import vocabulary as vocabulary_lib

# Between a prompt and its completion. A newline keeps the two texts apart for the model and
# belongs to the prompt, so the completion decodes to the targets and nothing else.
SEPARATOR = '\n'


class TokenisedExample(NamedTuple):
  """One example after tokenisation.

  Attributes:
    inputs: int32 token ids of the prompt, separator included; empty in language modelling.
    targets: int32 token ids of the completion, end token included.
    reference: the completion's text.
    document: id of the document it comes from.
  """
  inputs: np.ndarray
  targets: np.ndarray
  reference: str
  document: str


def make(name: str, examples: Mapping[str, Sequence[splits.Example]],
         vocabulary: Any, metric: str | None) -> seqio.Task:
  """Registers the task `specdistill_<name>`, in place of an earlier one.

  Args:
    name: of the task in the config.
    examples: by split; all with inputs, or all without.
    vocabulary: ours (or the path of its model), or one of `data.tokenizers`.
    metric: name of a quality metric, or None.
  """
  # It would take the accelerator's memory for nothing.
  tf.config.set_visible_devices([], 'GPU')
  vocabulary = seqio_vocabulary(vocabulary)
  first = next(iter(examples.values()))[0]
  features = {'targets': seqio.Feature(vocabulary, add_eos=True)}
  if first.inputs is not None:
    features['inputs'] = seqio.Feature(vocabulary, add_eos=False)
  registered = f'specdistill_{name}'
  if registered in seqio.TaskRegistry.names():
    seqio.TaskRegistry.remove(registered)
  return seqio.TaskRegistry.add(
      registered,
      source=seqio.FunctionDataSource(
          lambda split, shuffle_files: _dataset(examples[split]), splits=tuple(examples),
          num_input_examples={split: len(e) for split, e in examples.items()}),
      preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
      output_features=features,
      metric_fns=[_metric_fn(metric)] if metric else [])


def seqio_vocabulary(vocabulary: Any) -> seqio.Vocabulary:
  """A vocabulary of this project, or a tokenizer of `data.tokenizers`, as one of seqio's.

  seqio keeps SentencePiece models by path for as long as the process lives, so a path must
  never be used for two models.
  """
  if isinstance(vocabulary, (str, vocabulary_lib.Vocabulary)):
    path = getattr(vocabulary, 'path', vocabulary)
    return seqio.SentencePieceVocabulary(str(path), extra_ids=0)
  return TokenizerVocabulary(vocabulary)


class TokenizerVocabulary(seqio.Vocabulary):
  """seqio's interface to a tokenizer of `data.tokenizers`; special tokens are the tokenizer's."""

  def __init__(self, tokenizer: Any):
    super().__init__(extra_ids=0)
    self.tokenizer = tokenizer

  def __eq__(self, other):
    return (isinstance(other, TokenizerVocabulary)
            and self.tokenizer.digest == other.tokenizer.digest)

  @property
  def bos_id(self) -> int | None:
    return self.tokenizer.bos_id

  @property
  def eos_id(self) -> int:
    return self.tokenizer.eos_id

  @property
  def pad_id(self) -> int:
    return self.tokenizer.pad_id

  @property
  def unk_id(self) -> None:
    return None  # every id is known

  @property
  def _base_vocab_size(self) -> int:
    return self.tokenizer.size

  def _encode(self, s: str) -> list[int]:
    return self.tokenizer.encode(s)

  def _decode(self, ids: Sequence[int]) -> str:
    return self.tokenizer.decode(ids)

  def _encode_tf(self, s: tf.Tensor) -> tf.Tensor:
    def encode(text):  # bytes in a graph, an array of them outside one
      text = text.item() if isinstance(text, np.ndarray) else text
      return np.array(self.tokenizer.encode(text.decode()), np.int32)
    ids = tf.numpy_function(encode, [tf.convert_to_tensor(s)], tf.int32, stateful=False)
    return tf.ensure_shape(ids, [None])

  def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
    def decode(ids):
      rows = ids.reshape(-1, ids.shape[-1])
      texts = [self.tokenizer.decode(row).encode() for row in rows]
      return np.array(texts, object).reshape(ids.shape[:-1])
    text = tf.numpy_function(decode, [ids], tf.string, stateful=False)
    return tf.ensure_shape(text, ids.shape[:-1])


def tokenised(task: seqio.Task, split: str) -> Iterator[TokenisedExample]:
  """The examples of a split in their order, whole: nothing is trimmed."""
  dataset = task.get_dataset(sequence_length=None, split=split, shuffle=False)
  nothing = np.zeros((0,), np.int32)
  for example in dataset.as_numpy_iterator():
    yield TokenisedExample(
        example.get('inputs', nothing), example['targets'],
        example['targets_pretokenized'].decode(), example['document'].decode())


def _dataset(examples: Sequence[splits.Example]) -> tf.data.Dataset:
  columns = {'targets': [e.targets for e in examples],
             'document': [e.document for e in examples]}
  if examples[0].inputs is not None:
    columns['inputs'] = [e.inputs + SEPARATOR for e in examples]
  return tf.data.Dataset.from_tensor_slices(columns)


def _metric_fn(name: str):
  metric = quality.metric(name)
  # seqio tells a metric on predictions from one on scores by these argument names.
  def metric_fn(targets, predictions):
    return {name: metric(targets, predictions)}
  return metric_fn
