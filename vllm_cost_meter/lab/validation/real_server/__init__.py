"""Judge a split on a real server: run all coalitions of a few requests, and compare bills with
them.

`players` says who plays and how a burst is checked. `estimate` computes the Shapley value of
measured times, and its noise. `burst` sends the requests and reads their bills. `verdict` compares
the bills with what was measured. `session` starts a server, or takes one that runs, and plays the
rounds.

The game is one burst of requests that start in the same step of an engine with nothing else to do.
Each request says how many tokens it makes, so its steps are the first ones of the burst, however
long these take: step k has the same members in every run of a coalition, and a step of a smaller
coalition is that step without the others. The value v(S) is the time of all steps with only the
requests S, as the books have it. It is a sum over steps, and the Shapley value of a sum is the sum
of the Shapley values: so the value of the whole burst is what a true split, step by step, must
charge. Were lengths not fixed, or did prompts need more than one step, this would not hold; bursts
that ran otherwise are not counted.

Invariant: only bursts count whose bills prove who was in which step, and none of a time in which
the server worked for others.
"""
