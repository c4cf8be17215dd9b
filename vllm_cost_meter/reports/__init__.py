"""From facts to answers: allocation, statements, request rows, explanations. No SQL, no HTTP."""
