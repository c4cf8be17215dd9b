"""The types of a cost model, for the native part and its twin alike: planes and models.

Apart from `cost_model_py.py`, so that an engine with the native part loads none of the twin.

Invariant: types only; nothing here computes.
"""

# A plane: coefficients of 1, tokens, sequences, products, context.
Plane = tuple[float, float, float, float, float]
Planes = tuple[Plane, Plane, Plane]  # compute, memory, one

# Version, form, planes, steps, errors of two planes and of one, variance explained.
Model = tuple[int, str, Planes, int, float, float, float]
