"""Short import path for configs: prompts with references, and their datasets. The code is in data/."""

from layerskip_recipes.data.commands import command_dataset as command_dataset
from layerskip_recipes.data.commands import commands as commands
from layerskip_recipes.data.function_calls import bfcl as bfcl
from layerskip_recipes.data.function_calls import bfcl_dataset as bfcl_dataset
from layerskip_recipes.data.reference_tasks import cnn_dm_language_modeling as cnn_dm_language_modeling
from layerskip_recipes.data.reference_tasks import cnn_dm_summarization as cnn_dm_summarization
from layerskip_recipes.data.reference_tasks import human_eval as human_eval
from layerskip_recipes.data.reference_tasks import jsonl as jsonl
from layerskip_recipes.data.reference_tasks import topv2 as topv2
from layerskip_recipes.data.reference_tasks import xsum_summarization as xsum_summarization
from layerskip_recipes.data.replies import qa_dataset as qa_dataset
from layerskip_recipes.data.standard_library import code_index as code_index
from layerskip_recipes.data.standard_library import code_index_dataset as code_index_dataset
