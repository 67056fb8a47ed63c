"""What leaves the house: answers to a question now, exported models later."""
