"""What can these rewards be made to pay for? Asked before a GPU hour is spent."""
