"""Short import path for configs: prompts with references, and their datasets. The code is in data/."""

from layerskip_recipes.data.commands import command_dataset, commands
from layerskip_recipes.data.function_calls import bfcl, bfcl_dataset
from layerskip_recipes.data.reference_tasks import (
    cnn_dm_language_modeling,
    cnn_dm_summarization,
    human_eval,
    jsonl,
    topv2,
    xsum_summarization,
)
from layerskip_recipes.data.replies import qa_dataset
from layerskip_recipes.data.standard_library import code_index, code_index_dataset

__all__ = [
    "bfcl",
    "bfcl_dataset",
    "cnn_dm_language_modeling",
    "cnn_dm_summarization",
    "code_index",
    "code_index_dataset",
    "command_dataset",
    "commands",
    "human_eval",
    "jsonl",
    "qa_dataset",
    "topv2",
    "xsum_summarization",
]
