"""One HTML page that holds a whole run: verdict, curves, rollouts, and how to read them."""
