"""Serve a model of random weights on this machine's GPU, metered, and measure what only that shows.

`model` writes the model, `machine` and `card` say what it runs on, `served` starts servers, `plan`
says how much of each part. Each part is a module: `energy` (under `mixed` traffic), `overlap` (a
test of the cost model's form), `books`, `throughput` (what does the meter cost?); the part `game`
(do bills agree with what was measured?) is that of `lab/validation/real_server`. `check` runs them
within a time; `findings`, `sections` and `page` say what they found.

Invariant: a figure was measured in this run or is not there.
"""
