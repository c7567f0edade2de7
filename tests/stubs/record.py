"""Records its name and arguments, as xpk and kubectl in the tests of launch/."""

import json
import os
import sys

with open(os.path.join(os.environ['STUB_CLOUD'], 'calls.jsonl'), 'a', encoding='utf-8') as calls:
  calls.write(json.dumps(sys.argv[1:]) + '\n')
