"""Prompts with references by the path that configs name; the code is data/reference_tasks.py."""

from layerskip_recipes.data.reference_tasks import (
    cnn_dm_language_modeling,
    cnn_dm_summarization,
    human_eval,
    jsonl,
    topv2,
    xsum_summarization,
)

__all__ = ["cnn_dm_language_modeling", "cnn_dm_summarization", "human_eval", "jsonl", "topv2", "xsum_summarization"]
