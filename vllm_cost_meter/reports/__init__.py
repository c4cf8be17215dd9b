"""Reports from facts: allocation, statements, request rows, explanations. No SQL, no HTTP."""
