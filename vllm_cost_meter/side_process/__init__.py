"""Side processes of an API server: what must not take time from serving runs in one of these.

`supervisor` starts one, watches it and starts it again; `entry` is the other end, in the side
process itself; `channel` carries questions and answers between them.
"""
