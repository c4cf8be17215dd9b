"""The values that travel through the meter: bills, snapshots, requests, energy.

All amounts are integers of the smallest useful unit, units last in names.
"""
