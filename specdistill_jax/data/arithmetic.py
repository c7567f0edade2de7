"""Generated word problems with worked solutions and an exact answer, in the form of GSM8K.

A problem is a template filled at random; its solution has one line for each step and ends in
`#### answer`. All quantities are whole numbers that are never negative.
"""

from collections.abc import Callable
import random

from specdistill_jax.data import splits

_NAMES = (
    'Mia Tom Ada Liam Zoe Omar Nina Paul Ravi Sara Hugo Ines Kofi Lena Yuki Dario Amir Bella '
    'Carlos Dora Emil Fatima Greta Hana Igor Jonas Keiko Lucia Marco Nadia Oscar Priya Quinn '
    'Rosa Samuel Tara Ursula Victor Wanda Xavier Yasmin Zeno Agnes Boris Chloe Diego Elena '
    'Felix').split()
_THINGS = (
    'apples books coins marbles stamps cards shells pencils stickers beads buttons tickets '
    'cookies plants photos ribbons oranges candles magnets crayons notebooks balloons '
    'bracelets peaches lemons muffins bottles baskets feathers postcards puzzles lanterns '
    'spoons blankets sandwiches tulips kites whistles envelopes pebbles').split()
_GAINS = ('{name} buys {n} more.', '{friend} gives {name} {n} more.', '{name} finds {n} more.',
          'Then {name} gets another {n} {things}.')
_LOSSES = ('{name} gives {n} to {friend}.', '{name} loses {n} of them.',
           '{name} sells {n} of the {things}.', 'Then {friend} takes {n} {things}.')

# A template draws its numbers and returns the question, the solution's lines, the answer.
_Problem = tuple[str, list[str], int]


def problems(seed: int, num_problems: int = 10_000) -> list[splits.Example]:
  """`num_problems` different problems; the same for the same seed."""
  rng = random.Random(seed)
  solutions = {}
  while len(solutions) < num_problems:
    question, lines, answer = rng.choice(_TEMPLATES)(rng)
    solutions.setdefault(question, '\n'.join(lines + [f'#### {answer}']))
  return [splits.Example(question, solution, f'arithmetic/{question}')
          for question, solution in solutions.items()]


def _ledger(rng: random.Random) -> _Problem:
  """A quantity that grows and shrinks, one to three times."""
  (name, friend), things = rng.sample(_NAMES, 2), rng.choice(_THINGS)
  total = rng.randint(5, 60)
  sentences, lines = [f'{name} has {total} {things}.'], []
  for _ in range(rng.randint(1, 3)):
    grows = total < 5 or rng.random() < 0.5
    n = rng.randint(2, 40) if grows else rng.randint(1, total)
    phrase = rng.choice(_GAINS if grows else _LOSSES)
    sentences.append(phrase.format(name=name, friend=friend, things=things, n=n))
    after = total + n if grows else total - n
    lines.append(f'{total} {"+" if grows else "-"} {n} = {after}')
    total = after
  ending = rng.choice(('How many {t} does {n} have now?', 'How many {t} are left with {n}?'))
  return ' '.join(sentences + [ending.format(t=things, n=name)]), lines, total


def _shopping(rng: random.Random) -> _Problem:
  name, (first, second) = rng.choice(_NAMES), rng.sample(_THINGS, 2)
  a, b = rng.randint(2, 12), rng.randint(2, 12)
  price, other = rng.randint(2, 15), rng.randint(2, 15)
  total = a * price + b * other
  return (f'{name} buys {a} {first} at {price} dollars each and {b} {second} at {other} dollars '
          f'each. How many dollars does {name} pay in all?',
          [f'{a} * {price} = {a * price}', f'{b} * {other} = {b * other}',
           f'{a * price} + {b * other} = {total}'], total)


def _change(rng: random.Random) -> _Problem:
  name, things = rng.choice(_NAMES), rng.choice(_THINGS)
  n, price = rng.randint(2, 12), rng.randint(2, 12)
  money = n * price + rng.randint(1, 60)
  return (f'{name} has {money} dollars and buys {n} {things} for {price} dollars each. '
          f'How many dollars does {name} have left?',
          [f'{n} * {price} = {n * price}', f'{money} - {n * price} = {money - n * price}'],
          money - n * price)


def _boxes(rng: random.Random) -> _Problem:
  name, things = rng.choice(_NAMES), rng.choice(_THINGS)
  size, boxes = rng.randint(2, 12), rng.randint(4, 20)
  sold = rng.randint(1, boxes - 1)
  return (f'{name} packs {size * boxes} {things} into boxes of {size} and sells {sold} boxes. '
          'How many boxes are left?',
          [f'{size * boxes} / {size} = {boxes}', f'{boxes} - {sold} = {boxes - sold}'],
          boxes - sold)


def _journey(rng: random.Random) -> _Problem:
  name, vehicle = rng.choice(_NAMES), rng.choice(('bus', 'train', 'bike', 'boat', 'car'))
  speed, hours, rest = rng.randint(8, 60), rng.randint(2, 9), rng.randint(1, 30)
  return (f'{name} travels by {vehicle} at {speed} miles an hour for {hours} hours and walks '
          f'{rest} more miles. How many miles is the journey?',
          [f'{speed} * {hours} = {speed * hours}',
           f'{speed * hours} + {rest} = {speed * hours + rest}'], speed * hours + rest)


def _savings(rng: random.Random) -> _Problem:
  name, weekly, weeks = rng.choice(_NAMES), rng.randint(3, 30), rng.randint(3, 12)
  spent = rng.randint(1, weekly * weeks)
  return (f'{name} saves {weekly} dollars a week for {weeks} weeks, then spends {spent} dollars. '
          f'How many dollars are left?',
          [f'{weekly} * {weeks} = {weekly * weeks}',
           f'{weekly * weeks} - {spent} = {weekly * weeks - spent}'], weekly * weeks - spent)


def _ages(rng: random.Random) -> _Problem:
  (name, friend), age = rng.sample(_NAMES, 2), rng.randint(4, 30)
  if rng.random() < 0.5:
    n = rng.randint(2, 4)
    word, line, other = f'{n} times as old', f'{age} * {n} = {age * n}', age * n
  else:
    n = rng.randint(2, 25)
    word, line, other = f'{n} years older', f'{age} + {n} = {age + n}', age + n
  comparison = 'as' if 'times' in word else 'than'
  return (f'{name} is {age} years old. {friend} is {word} {comparison} {name}. How old are they '
          'together?', [line, f'{age} + {other} = {age + other}'], age + other)


def _reading(rng: random.Random) -> _Problem:
  name, daily, days = rng.choice(_NAMES), rng.randint(5, 40), rng.randint(2, 10)
  pages = daily * days + rng.randint(1, 200)
  return (f'A book has {pages} pages. {name} reads {daily} pages a day for {days} days. '
          'How many pages are left to read?',
          [f'{daily} * {days} = {daily * days}',
           f'{pages} - {daily * days} = {pages - daily * days}'], pages - daily * days)


def _sharing(rng: random.Random) -> _Problem:
  (name, friend), things = rng.sample(_NAMES, 2), rng.choice(_THINGS)
  people, each = rng.randint(2, 9), rng.randint(2, 20)
  first = rng.randint(1, people * each - 1)
  second = people * each - first
  return (f'{name} has {first} {things} and {friend} has {second}. They share them equally among '
          f'{people} people. How many does each get?',
          [f'{first} + {second} = {people * each}', f'{people * each} / {people} = {each}'], each)


_TEMPLATES: tuple[Callable[[random.Random], _Problem], ...] = (
    # The ledger is drawn three times as often: it varies the most.
    _ledger, _ledger, _ledger, _shopping, _change, _boxes, _journey, _savings, _ages, _reading,
    _sharing)
