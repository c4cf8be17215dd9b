"""Types of a cost model, shared by the native code and its Python twin: planes and models.

They stand apart from `cost_model_py.py` so that an engine with native code loads none of the twin.

Invariant: types only; nothing here computes.
"""

# A plane has one coefficient each for 1, tokens, sequences, products and context.
Plane = tuple[float, float, float, float, float]
Planes = tuple[Plane, Plane, Plane]  # compute, memory, one
# The coefficients of a curve: its terms and the slopes between its corners, as in `curve_py.py`.
TokenCurve = tuple[float, ...]

# (version, form, planes, steps, error of two planes, error of one plane, variance explained)
Model = tuple[int, str, Planes, int, float, float, float]
