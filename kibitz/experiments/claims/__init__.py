"""The published claims, one file each: a question, its arms, and the numbers that answer it."""
