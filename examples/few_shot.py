"""Worked examples in every prompt, drawn from the training problems and never from the others.

By the command line: abacist train any --model_name_or_path MODEL --num_shots 4
"""

from abacist import load_problems
from abacist.task.prompts import build_messages, choose_shots

shots = choose_shots(load_problems("generated"), 2, seed=0)
problem = load_problems("generated", split="heldout", limit=1)[0]
for message in build_messages(problem.question, shots=shots):
    print(f"--- {message['role']}\n{message['content']}\n")
