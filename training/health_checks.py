"""Early warnings of a GRPO run, from its log lines."""

from __future__ import annotations


class HealthChecks:
    """Early warnings: the known ways a run goes wrong, from its log lines. Each is said once, when it begins.

    calls: whether the policy has a choice to call.
    """

    def __init__(self, calls: bool = True):
        self.calls = calls
        self.lines: list[dict] = []
        self.said: set[str] = set()

    def __call__(self, line: dict) -> list[str]:
        self.lines.append(line)
        first, recent = self.lines[0], self.lines[-5:]
        if len(recent) < 5:
            return []

        def mean(name: str, lines=recent) -> float:
            return sum(x.get(name, 0.0) for x in lines) / len(lines)

        rising = mean("reward") - mean("reward", self.lines[:5])
        tests = {
            "calls": (self.calls and mean("call_rate") < 0.02, "the policy has stopped calling; is `use` above what a crop earns?"),
            "always": (mean("call_rate") > 0.98, "the policy calls always; is `use` too small, or are all labels HR?"),
            "dead": (mean("frac_zero_std") > 0.8, "over 80 % of the groups have equal rewards: they teach nothing"),
            "format": (mean("parse_fail") > 0.05, "over 5 % of the replies are malformed calls"),
            "kl": (mean("kl") > 1.0, "the policy is over 1 nat a token from its start; lower lr or raise beta"),
            "length": (
                mean("reply_tokens") > 2 * first.get("reply_tokens", 0) + 4 or mean("truncated") > 0.2,
                "replies grow or are cut by max_new_tokens: a reward that pays for length?",
            ),
            "hack": (
                rising > 0.2 and mean("answer_score") <= mean("answer_score", self.lines[:5]) and mean("cost_miss") >= mean("cost_miss", self.lines[:5]),
                "reward rises while answers do not get better and no costs of missing fall",
            ),
            "sampler": (mean("sampler_dlogp") > 0.1, "sampled and scored log-probabilities differ by over 0.1: numerical mismatch"),
        }  # fmt: skip
        new = [name for name, (broken, _) in tests.items() if broken and name not in self.said]
        self.said = {name for name, (broken, _) in tests.items() if broken}
        return [tests[name][1] for name in new]
