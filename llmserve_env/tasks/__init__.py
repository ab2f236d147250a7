"""Tasks: a cell, its traffic, what the agent may set and what its users' service is worth."""

from __future__ import annotations

from llmserve_env.tasks.seeds import EVALUATION_SEEDS, TRAINING_SEEDS
from llmserve_env.tasks.task import Task, list_tasks, load_task

__all__ = ["EVALUATION_SEEDS", "TRAINING_SEEDS", "Task", "list_tasks", "load_task"]
