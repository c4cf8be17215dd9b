"""Between Python and the memory of a fit: read its prior or an earlier fit, return what it learnt."""

from cpython.mem cimport PyMem_Calloc
from libc.stdint cimport int64_t, uint32_t

from csrc.charge_error cimport charge_error
from csrc.checks cimport coefficients_of
from csrc.curve cimport Served
from csrc.curve_fit cimport PARTS_MAX, CurvePrior
from csrc.fit cimport Fit, adopt, start_fit
from csrc.terms cimport CHARGE_KINDS, FIT_TERMS, KNOTS_COUNT, TERMS


cdef inline int read_prior(Fit *fit, object prior) except -1:
    """Start a fit with a prior. Raises ValueError if coefficients are none."""
    cdef double planes[2 * TERMS]
    cdef double heights[KNOTS_COUNT]
    cdef CurvePrior curve
    cdef int part
    coefficients_of(prior.planes, "StepMeter: planes", 2, TERMS, planes)
    coefficients_of((prior.served.experts.heights(),), "StepMeter: experts", 1, KNOTS_COUNT, heights)
    curve.count = len(prior.curve.parts)
    if not 0 < curve.count <= PARTS_MAX:
        raise ValueError(f"StepMeter: expected 1 to {PARTS_MAX} parts, got {curve.count}")
    for part in range(curve.count):
        given = prior.curve.parts[part]
        coefficients_of(
            (given.coefficients,), "StepMeter: a part", 1, FIT_TERMS, curve.parts[part].coefficients
        )
        curve.parts[part].scale = given.scale
        curve.parts[part].spread = given.spread
    coefficients_of((prior.curve.start,), "StepMeter: coefficients", 1, FIT_TERMS, curve.start)
    curve.counts_reading = prior.curve.counts_reading
    curve.has_ratio = prior.curve.has_ratio
    read_served(&fit.model.served, prior.served)
    fit.has_experts = prior.served.experts.number > 0
    start_fit(fit, planes, &curve, heights)
    return 0


cdef inline int adopt_earlier(
    Fit *fit, object planes, object coefficients, bint two_planes
) except -1:
    """Continue from an earlier fit. Raises ValueError for anything else."""
    cdef double checked[2 * TERMS]
    cdef double terms[FIT_TERMS]
    coefficients_of(planes, "StepMeter: planes", 2, TERMS, checked)
    coefficients_of((coefficients,), "StepMeter: coefficients", 1, FIT_TERMS, terms)
    adopt(fit, checked, terms, two_planes)
    return 0


cdef inline tuple fitted(const Fit *fit):
    """Return the planes and the curve as they are learnt now."""
    cdef int kind, k
    planes = [[fit.planes.working[kind][k] for k in range(TERMS)] for kind in range(2)]
    coefficients = [fit.curve.coefficients[k] for k in range(FIT_TERMS)]
    return tuple([tuple(plane) for plane in planes]), tuple(coefficients)


cdef inline tuple charge_errors_of(const Fit *fit):
    """Return the part by which charges of each kind may be off."""
    return tuple([charge_error(&fit.charge_errors, kind) for kind in range(CHARGE_KINDS)])


cdef inline int read_served(Served *served, object given) except -1:
    cdef uint32_t count = len(given.captured), k
    cdef int64_t *captured
    served.layers.whole = given.layers.whole
    served.layers.windowed = given.layers.windowed
    served.layers.window = given.layers.window
    if count == 0:
        return 0
    captured = <int64_t *>PyMem_Calloc(count, sizeof(int64_t))
    if captured == NULL:
        raise MemoryError
    for k in range(count):
        captured[k] = given.captured[k]
    served.captured = captured
    served.captured_count = count
    return 0
