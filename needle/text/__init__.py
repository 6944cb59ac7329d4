"""Examples as text and text as tokens."""
