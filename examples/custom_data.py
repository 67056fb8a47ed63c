"""Problems of your own: a file with a question and an answer in every row is enough.

By the command line: abacist train --dataset_name my_problems.jsonl
"""

import json

from abacist import load_problems

ROWS = [
    {"question": f"A shelf holds {n} books, and {n + 2} more come. How many?", "answer": 2 * n + 2}
    for n in range(1, 61)
]

with open("my_problems.jsonl", "w", encoding="utf-8") as file:
    file.writelines(json.dumps(row) + "\n" for row in ROWS)

# Every row is checked, and the file is cut by the hash of each row: what is held out stays out.
train = load_problems("my_problems.jsonl")
heldout = load_problems("my_problems.jsonl", split="heldout")
print(f"{len(train)} to train on, {len(heldout)} held out, for example:")
print(heldout[0].question, "->", heldout[0].answer)
