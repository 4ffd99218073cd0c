"""TensorBoard's event files, Weights & Biases, and the memory metrics."""

import importlib.util
import struct
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from tensorboardX.proto import event_pb2

from jgrpo.cli import resolve_config
from jgrpo.config import TrainConfig
from jgrpo.errors import UserError
from jgrpo.reporting import FRESH, Reporter, make_reporter, memory_metrics
from jgrpo.reporting.trackers import TensorBoard, WeightsAndBiases


def events(directory: Path) -> list[event_pb2.Event]:
    """Every event of the directory's files: records of length, checksum, bytes, checksum."""
    found = []
    for path in sorted(directory.iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            found.append(event_pb2.Event.FromString(data[at + 12 : at + 12 + length]))
            at += 16 + length
    return found


def test_tensorboard_gets_every_metric(config: TrainConfig):
    run_dir = Path(config.run.output_dir)
    reporter = Reporter([TensorBoard(run_dir)])
    reporter.start(config)
    reporter.log(1, {"reward": 0.5, "rewards/f/mean": 0.25})
    reporter.log(2, {"reward": 0.75})
    reporter.finish()
    values = [(e.step, v.tag, v.simple_value) for e in events(run_dir / "tensorboard") for v in e.summary.value]
    assert values == [(1, "reward", 0.5), (1, "rewards/f/mean", 0.25), (2, "reward", 0.75)]


def test_tensorboard_forgets_what_a_resumed_run_repeats(config: TrainConfig):
    run_dir = Path(config.run.output_dir)
    reporter = Reporter([TensorBoard(run_dir)])
    reporter.start(config, first_step=5)
    reporter.finish()
    start = event_pb2.SessionLog.START
    assert [e.step for e in events(run_dir / "tensorboard") if e.session_log.status == start] == [6]


def test_wandb_switched_on_but_missing_is_refused(config: TrainConfig, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with_wandb = resolve_config(overrides={"wandb": True, "output_dir": config.run.output_dir})
    with pytest.raises(UserError, match="pip install wandb"):
        make_reporter(with_wandb)
    assert list(Path(config.run.output_dir).iterdir()) == [Path(config.run.output_dir) / "config.yaml"]


def test_wandb_gets_config_and_metrics_and_continues_its_run(config: TrainConfig, monkeypatch: pytest.MonkeyPatch):
    started, logged = [], []

    def init(**arguments: object) -> SimpleNamespace:
        started.append(arguments)
        return SimpleNamespace(log=lambda values, step: logged.append((step, values)), finish=lambda: None)

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    for first_step in (FRESH, 1, FRESH):
        reporter = Reporter([WeightsAndBiases(Path(config.run.output_dir))])
        reporter.start(config, first_step=first_step)
        reporter.log(max(first_step, 0) + 1, {"reward": 0.5})
        reporter.finish()
    assert logged == [(1, {"reward": 0.5}), (2, {"reward": 0.5}), (1, {"reward": 0.5})]
    ids = [arguments["id"] for arguments in started]
    assert ids[0] == ids[1] != ids[2]
    assert started[0]["config"]["learning_rate"] == config.optimizer.learning_rate


def test_memory_of_a_device_with_statistics():
    device = SimpleNamespace(memory_stats=lambda: {"peak_bytes_in_use": 30, "bytes_in_use": 20, "num_allocs": 1})
    assert memory_metrics(device) == {"memory/peak_bytes": 30, "memory/in_use_bytes": 20}


def test_memory_of_the_process_on_a_cpu():
    (name, value), *others = memory_metrics().items()
    assert (name, others) == ("memory/host_peak_rss_bytes", [])
    assert 2e7 < value < 1e12
