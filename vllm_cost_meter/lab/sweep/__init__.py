"""A sweep: one running deployment, measured under several rates of arrivals.

`vllm bench serve`, the real client, sends Poisson arrivals of one shape at one rate after another
(`bench`); the side endpoint says what the GPUs cost and how busy they were meanwhile
(`side_client`); of each rate only a steady window counts (`steady`); `run` drives all that, and
`curve` is the file that comes of it, with the protocol by which it was measured.

Invariant: every number of a curve is of a window whose length stands beside it.
"""
