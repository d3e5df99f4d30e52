"""One of the processes that a launcher started: carries out several commands, one after another.

Starting processes takes much longer than training a tiny model in them.
"""

import json
import sys

from accelerate import PartialState

from sparsekit.cli.app import app

for words in json.loads(sys.argv[1]):
    app(words, standalone_mode=False)
    PartialState._reset_state()  # of processes that have parted
