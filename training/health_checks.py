"""Warnings about a GRPO run, from its log lines."""

from __future__ import annotations

WINDOW = 5
"""Log lines that a check averages; no check is made before there are as many."""


class HealthChecks:
    """The known ways in which a GRPO run goes wrong. Each warning is given once, when its condition begins to hold.

    has_calls: whether the trained model has a choice to call; without one a call rate of 0 is no warning.
    """

    def __init__(self, has_calls: bool = True):
        self.has_calls = has_calls
        self.lines: list[dict] = []
        self.active: set[str] = set()

    def __call__(self, line: dict) -> list[str]:
        """A log line -> the warnings that are new with it."""
        self.lines.append(line)
        if len(self.lines) < WINDOW:
            return []

        def recent(name: str) -> float:
            return sum(x.get(name, 0.0) for x in self.lines[-WINDOW:]) / WINDOW

        def rise(name: str) -> float:
            return recent(name) - sum(x.get(name, 0.0) for x in self.lines[:WINDOW]) / WINDOW

        first_length = self.lines[0].get("reply_tokens", 0)
        conditions = {
            "the policy has stopped calling; is `use` above what a crop earns?": self.has_calls and recent("call_rate") < 0.02,
            "the policy calls always; is `use` too small, or are all labels HR?": recent("call_rate") > 0.98,
            "over 80 % of the groups have equal rewards: they teach nothing": recent("frac_zero_std") > 0.8,
            "over 5 % of the replies are malformed calls": recent("parse_fail") > 0.05,
            "the policy is over 1 nat a token from its start; lower lr or raise beta": recent("kl") > 1.0,
            "replies grow or are cut by max_new_tokens: a reward that pays for length?": (
                recent("reply_tokens") > 2 * first_length + 4 or recent("truncated") > 0.2
            ),
            "reward rises while answers do not get better and no costs of missing fall": (
                rise("reward") > 0.2 and rise("answer_score") <= 0 and rise("cost_miss") >= 0
            ),
            "sampled and scored log-probabilities differ by over 0.1: numerical mismatch": recent("sampler_dlogp") > 0.1,
        }
        before, self.active = self.active, {warning for warning, holds in conditions.items() if holds}
        return [warning for warning in conditions if warning in self.active - before]
