"""Each problem is said in words, and a healthy run is left in peace."""

import pytest

from jgrpo.reporting.diagnose import CHECKS, Watch, diagnose
from tests.reporting.conftest import metrics_of


def history(*changes: dict[str, float | None]) -> list[dict[str, float | None]]:
    return [{**metrics_of(step, 10), **change} for step, change in enumerate(changes, start=1)]


BROKEN = {
    "non_finite": {"loss": float("nan")},
    "no_reward": {"reward": None},
    "zero_variance": {"frac_reward_zero_std": 1.0},
    "zero_gradient": {"loss": 0.0, "grad_norm": 0.0},
    "zero_loss": {"loss": 1e-9, "grad_norm": 0.5},
    "truncated": {"completions/clipped_ratio": 1.0},
    "empty": {"completions/mean_length": 1.0},
    "kl_explosion": {"kl": 12.0},
    "sampler_gap": {"sampling/sampling_logp_difference/mean": 0.3},
}


@pytest.mark.parametrize("kind", BROKEN)
def test_each_problem_is_found_alone(kind: str):
    (finding,) = diagnose(history(*[BROKEN[kind]] * 3))
    assert finding.kind == kind
    assert finding.text.endswith(".")


def test_every_check_is_tested():
    assert len(CHECKS) == len(BROKEN)


def test_a_healthy_run_has_no_findings():
    assert diagnose(history({}, {}, {})) == []
    assert diagnose([]) == []
    assert diagnose([{"step": 0, "eval_accuracy": 0.2}]) == []


@pytest.mark.parametrize("kind", ["zero_variance", "zero_gradient", "truncated", "empty"])
def test_one_bad_step_is_chance(kind: str):
    assert diagnose(history(BROKEN[kind], BROKEN[kind])) == []
    assert diagnose(history(BROKEN[kind], {}, BROKEN[kind])) == []


def test_the_words_carry_the_number():
    (finding,) = diagnose(history(*[{"frac_reward_zero_std": 1.0, "reward": 0.0}] * 3))
    assert "no variance" in finding.text
    assert "(mean 0)" in finding.text
    (finding,) = diagnose(history({"kl": 12.0}))
    assert "12 nats" in finding.text


def test_a_finding_is_told_again_only_after_it_was_gone():
    watch = Watch()
    told = [len(watch.update(step)) for step in history({"kl": 5.0}, {"kl": 6.0}, {}, {"kl": 5.0})]
    assert told == [1, 0, 0, 1]
