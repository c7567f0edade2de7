"""A Cloud of one folder, for the tests of launch/: it records every call, and plays slices of TPUs.

STUB_CLOUD holds: calls.jsonl (argv of every call); slices/NAME/state (states, one a line, the last
one stays); slices/NAME/NODE/HOST, a host's home, in which `ssh` really runs the command in bash.
Files that tests write: create_states (states that a new slice goes through), hosts (a number),
ssh_faults (one a line and ssh call: `before`, `after` or `ok`: a connection that breaks before the
command ran, or after it).
"""

import json
import os
import pathlib
import sys

CLOUD = pathlib.Path(os.environ['STUB_CLOUD'])


def fail(message, code=1):
  print(f'ERROR: (gcloud) {message}', file=sys.stderr)
  sys.exit(code)


def pop(path, default, keep_last=False):
  """The first line of a file of answers, which is thereby used up."""
  lines = path.read_text().split() if path.exists() else []
  if not lines:
    return default
  if len(lines) > 1 or not keep_last:
    path.write_text('\n'.join(lines[1:]))
  return lines[0]


def describe(path):
  state = pop(path, 'ABSENT', keep_last=True)
  if state == 'ABSENT':
    fail('NOT_FOUND: Resource was not found.')
  if state == 'UNKNOWN':
    fail('There was a problem refreshing your current auth tokens.')
  print(state)


def create(name, flags):
  slice_ = CLOUD / 'slices' / name
  if slice_.exists():
    fail('ALREADY_EXISTS')
  states = CLOUD / 'create_states'
  nodes = [flags['node-id']] if 'node-id' in flags else [
      f'{flags["node-prefix"]}-{index}' for index in range(int(flags['node-count']))]
  hosts = CLOUD / 'hosts'
  for node in nodes:
    for index in range(int(hosts.read_text()) if hosts.exists() else 1):
      (slice_ / node / f'{node}-w-{index}').mkdir(parents=True)
    (slice_ / node / 'state').write_text('READY')
  (slice_ / 'state').write_text(states.read_text() if states.exists() else 'ACTIVE')


def homes(node, worker):
  found = sorted(CLOUD.glob(f'slices/*/{node}/{node}-w-*'))
  if not found or worker == 'all':
    return found
  return [found[int(worker)]]


def ssh(node, flags):
  fault = pop(CLOUD / 'ssh_faults', 'ok')
  reached = homes(node, flags['worker'])
  if fault == 'before' or not reached:
    fail('[/usr/bin/ssh] exited with return code [255].', 255)
  code = 0
  import subprocess
  for home in reached:
    print(f'SSH: Attempting to connect to worker {home.name}...', file=sys.stderr)
    environment = dict(os.environ, HOME=str(home), STUB_HOST=home.name)
    done = subprocess.run(['bash', '-c', flags['command']], cwd=home, env=environment, check=False)
    code = code or done.returncode
  if fault == 'after':
    fail('[/usr/bin/ssh] exited with return code [255].', 255)
  sys.exit(code)


def scp(source, node):
  import shutil
  for home in homes(node, 'all'):
    shutil.copytree(source, home / pathlib.Path(source).name, dirs_exist_ok=True)


def main(argv):
  with open(CLOUD / 'calls.jsonl', 'a', encoding='utf-8') as calls:
    calls.write(json.dumps(['gcloud', *argv]) + '\n')
  words = [word for word in argv if not word.startswith('--')]
  flags = dict((word[2:] + '=').split('=', 1) for word in argv if word.startswith('--'))
  flags = {key: value.removesuffix('=') for key, value in flags.items()}
  assert words[:2] == ['compute', 'tpus'], argv
  match words[2:]:
    case ['queued-resources', 'describe', name]:
      describe(CLOUD / 'slices' / name / 'state')
    case ['tpu-vm', 'describe', node]:
      describe(next(iter(CLOUD.glob(f'slices/*/{node}/state')), CLOUD / 'none'))
    case ['queued-resources', 'create', name]:
      create(name, flags)
    case ['queued-resources', 'delete', name]:
      if not (CLOUD / 'slices' / name).exists():
        fail('NOT_FOUND: Resource was not found.')
      import shutil
      shutil.rmtree(CLOUD / 'slices' / name)
    case ['tpu-vm', 'ssh', node]:
      ssh(node, flags)
    case ['tpu-vm', 'scp', source, destination]:
      scp(source, destination.removesuffix(':'))
    case _:
      fail(f'no such command: {argv}', 2)


main(sys.argv[1:])
