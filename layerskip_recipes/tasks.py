"""Short import path for configs: prompts with references, and questions with answers. The code is in data/."""

from layerskip_recipes.data.reference_tasks import cnn_dm_language_modeling as cnn_dm_language_modeling
from layerskip_recipes.data.reference_tasks import cnn_dm_summarization as cnn_dm_summarization
from layerskip_recipes.data.reference_tasks import human_eval as human_eval
from layerskip_recipes.data.reference_tasks import jsonl as jsonl
from layerskip_recipes.data.reference_tasks import xsum_summarization as xsum_summarization
from layerskip_recipes.data.replies import qa_dataset as qa_dataset
from layerskip_recipes.data.replies import qa_prompts as qa_prompts
