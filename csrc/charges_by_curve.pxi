"""The charges of a step by a curve, for tests and whoever explains a step: no step takes this way."""

from csrc.curve cimport (
    CURVE_TERMS, CurveGame, Layers, margin_by_curve, solve_curve, weigh_curve,
)
from csrc.requests cimport DECODE


def charges_by_curve(object curve, list parts, tuple layers, object gpu_ns):
    """Return the weights and the marginal costs of a step's parts by a curve."""
    cdef double terms[CURVE_TERMS]
    cdef Layers seen = Layers(layers[0], layers[1], layers[2])
    cdef CurveGame game
    cdef uint32_t count = <uint32_t>len(parts), k
    cdef int term
    cdef Part *found = <Part *>PyMem_Malloc(max(1, count) * sizeof(Part))
    cdef uint32_t *weights = <uint32_t *>PyMem_Malloc(max(1, count) * sizeof(uint32_t))
    cdef list margins = []
    if found == NULL or weights == NULL:
        raise MemoryError
    try:
        for term in range(CURVE_TERMS):
            terms[term] = curve[term]
        for k in range(count):
            tokens, context, is_prefill = parts[k]
            found[k] = Part(k, tokens, context, PREFILL if is_prefill else DECODE)
        solve_curve(&game, terms, found, count, &seen)
        if weigh_curve(&game, terms, found, count, &seen, weights) == 0:
            for k in range(count):
                weights[k] = 0
        for k in range(count):
            margins.append(margin_by_curve(&game, terms, &found[k], &seen, gpu_ns))
        if count == 1:
            margins = [min(<double>gpu_ns, 9.2e18)]
        return [weights[k] for k in range(count)], margins
    finally:
        PyMem_Free(found)
        PyMem_Free(weights)
