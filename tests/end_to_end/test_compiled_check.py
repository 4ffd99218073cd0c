"""The compiled programs' own figures, before step 0: they refuse a run, and they are the programs that the steps use."""

import jax
import pytest

from jgrpo.cli import resolve_config
from jgrpo.errors import UserError
from jgrpo.training import compiled_memory, loop
from jgrpo.training.compiled_memory import CompiledMemory
from jgrpo.training.guards import CompileCounter

GENEROUS = 10**12


def configured(tiny_run, output_dir, **changes):
    off = {"save_every": 0, "eval_every": 0, "log_completions_every": 0}
    return resolve_config(overrides={**tiny_run, "output_dir": str(output_dir), "steps": 2, **off, **changes})


def compilations(config):
    """Programs that a run compiles from scratch."""
    jax.clear_caches()
    counter = CompileCounter()
    loop.train(config)
    counter.close()
    return counter.count


@pytest.fixture
def figures(monkeypatch):
    """A device that states its memory; what the check found."""
    found, check = [], loop.check_compiled
    monkeypatch.setattr(loop, "device_limits", lambda: (GENEROUS, 10**6))
    monkeypatch.setattr(loop, "check_compiled", lambda *given: found.append(check(*given)))
    return found


@pytest.mark.parametrize(
    "changes",
    [{}, {"algorithm": "ppo", "rollout_weights": "bf16"}, {"rollout_weights": "int8", "kv_cache": "int8"}],
    ids=str,
)
def test_the_steps_use_the_programs_that_were_checked(tiny_run, tmp_path, figures, monkeypatch, changes):
    checked = compilations(configured(tiny_run, tmp_path / "checked", **changes))
    assert len(figures) == 1
    assert figures[0].rollout > 0
    assert figures[0].update > 0
    monkeypatch.setattr(loop, "device_limits", lambda: None)
    assert compilations(configured(tiny_run, tmp_path / "unchecked", **changes)) == checked
    assert len(figures) == 1


def test_a_run_that_its_programs_do_not_fit_is_refused(tiny_run, tmp_path, monkeypatch, capsys):
    """In one line, with both columns of the table, and before anything is written."""
    monkeypatch.setattr(loop, "device_limits", lambda: (2 * 10**6, 10**6))
    with pytest.raises(UserError, match=r"needs .* GB of 0.00 GB: .*\(by the compiled programs\)") as refused:
        loop.train(configured(tiny_run, tmp_path / "run", microbatch_size=16))
    assert "\n" not in str(refused.value)
    table = capsys.readouterr().err
    for word in ("planned GB", "compiled GB", "log-prob workspace", "resident", "update", "total"):
        assert word in table
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_where_memory_is_not_stated_nothing_is_checked():
    assert compiled_memory.device_limits() is None


def test_the_peak_is_the_larger_half():
    assert CompiledMemory(resident=5, rollout=2, update=3).total == 8
    assert CompiledMemory(resident=5, rollout=4, update=3).total == 9
