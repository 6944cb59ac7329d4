"""From recorded answers to training examples."""
