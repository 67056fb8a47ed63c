"""What is learned: answers, the reply format, problems, prompts and rewards, in pure Python."""
