"""What commands import, for the process that they are forks of; see forks.py.

Not their entry modules, which are run, nor inductor, which starts threads.
"""

import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read at import

import matplotlib.figure  # noqa: F401
import numpy  # noqa: F401
import pytest  # noqa: F401
import scipy.io  # noqa: F401  # by datasets, when it reads a file
import torchtune._cli.tune  # noqa: F401

import layerskip_recipes.benchmark.recipe
import layerskip_recipes.cli.commands
import layerskip_recipes.evaluation.recipe
import layerskip_recipes.training.recipe  # noqa: F401
from layerskip_recipes.generation.stats import memory_bandwidth

# Each report measures the memory's speed: here by 8 MB instead of 256, which take a quarter of a second.
memory_bandwidth.__wrapped__.__defaults__ = (8, 3)
gc.freeze()  # a fork that ends looks through what it has made itself
