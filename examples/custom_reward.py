"""A reward of your own: written, tried for hacks, then trained on.

By the command line:
abacist audit --reward_funcs default examples/custom_reward.py:shows_work
abacist train --reward_funcs default examples/custom_reward.py:shows_work
"""

from abacist import audit, load_problems, parse_reply
from abacist.task.reply import completion_text


def shows_work(completions, **columns):
    """0.2 where the reasoning holds an equation. Columns of the data come by their names."""
    replies = [parse_reply(completion_text(completion)) for completion in completions]
    return [0.2 if "=" in (reply.reasoning or "") else 0.0 for reply in replies]


if __name__ == "__main__":
    found = audit(["default", shows_work], load_problems("generated", limit=3))
    print(found)
    for finding in found.findings:
        print("-", finding.evidence)
    assert found.sound, "a hack earns what an honest solution does"
