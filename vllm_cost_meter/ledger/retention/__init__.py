"""Drop the rows of old requests, and keep what they add up to: every sum stays as it was."""
