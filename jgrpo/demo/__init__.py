"""The demo model that jgrpo ships: a Qwen2 checkpoint that solves Countdown, but seldom keeps searching."""

from pathlib import Path

MODEL_PATH = Path(__file__).parent / "model"
"""What the model name "demo" stands for."""
