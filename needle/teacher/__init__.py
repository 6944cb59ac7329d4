"""Teachers: where answers and next-token distributions come from. Each declares what it can give."""
