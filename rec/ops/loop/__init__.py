"""The loop: events come in, answers know of them, what was shown is kept, and variants are compared."""
