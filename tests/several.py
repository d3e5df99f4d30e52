"""One of the processes that a launcher started: carries out several commands, one after another.

Starting processes takes much longer than training a tiny model in them. They stay connected from
command to command; the tests that launch the command itself show that they part.
"""

import json
import sys

import torch.distributed

from sparsekit.cli.app import app

part = torch.distributed.destroy_process_group
torch.distributed.destroy_process_group = lambda: None
for words in json.loads(sys.argv[1]):
    app(words, standalone_mode=False)
part()
