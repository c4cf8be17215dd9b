"""Records that travel between the meter's parts: bills, snapshots, requests, energy.

All amounts are integers in the smallest useful unit. A name ends with its unit.
"""
