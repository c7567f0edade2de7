"""Objectives of one's own, some of them wrong."""

import jax
import jax.numpy as jnp


def sharp_kl(student_logits, teacher_logits):
  """The forward KL to the teacher at half its temperature."""
  student, teacher = jax.nn.log_softmax(student_logits), jax.nn.log_softmax(2 * teacher_logits)
  return jnp.sum(jnp.exp(teacher) * (teacher - student), axis=-1)


def forward_kl(student_logits, teacher_logits):
  student, teacher = jax.nn.log_softmax(student_logits), jax.nn.log_softmax(teacher_logits)
  return jnp.sum(jnp.exp(teacher) * (teacher - student), axis=-1)


def averaged(student_logits, teacher_logits):
  return jnp.mean(forward_kl(student_logits, teacher_logits))


def broken(student_logits, teacher_logits):
  return student_logits @ teacher_logits


def nothing(student_logits, teacher_logits):
  forward_kl(student_logits, teacher_logits)


number = 3
