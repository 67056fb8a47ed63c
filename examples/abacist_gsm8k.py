"""Our problems and rewards as an environment of Prime Intellect's verifiers.

pip install . verifiers     # in a checkout of Abacist
PYTHONPATH=examples vf-eval abacist-gsm8k --env.agent.harness.id null --model MODEL …
"""

from abacist.delivery.neighbours.verifiers_taskset import AbacistTaskset

__all__ = ["AbacistTaskset"]
