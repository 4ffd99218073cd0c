"""One tiny checkpoint and one small set of prompts for all runs."""

import json
from pathlib import Path

import pytest

from tests.tiny_checkpoints import make_checkpoint


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """Settings of a run of a few seconds; output_dir and steps are missing."""
    directory = tmp_path_factory.mktemp("end_to_end")
    model = make_checkpoint(directory / "model", "qwen2", tie_word_embeddings=True)
    return {
        "model": str(model),
        "dataset": str(_prompts(directory / "train.jsonl", 8)),
        "eval_dataset": str(_prompts(directory / "held_out.jsonl", 3)),
        "reward_functions": ("tests.end_to_end.rewards.vowels",),
        "group_size": 32,
        "lora_rank": 4,
        "prompts_per_step": 4,
        "num_generations": 4,
        "microbatch_size": 8,
        "max_prompt_length": 16,
        "max_completion_length": 8,
        "learning_rate": 1e-2,
        "eval_every": 3,
        "save_every": 2,
        "log_completions_every": 1,
        "tensorboard": False,
    }


def _prompts(path: Path, count: int) -> Path:
    rows = [{"prompt": f"question {number}", "answer": str(number)} for number in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
