# cython: cdivision=True
"""How wrong charges may be: what else the steps allow to think of the cost model, in charges.

The twin `charge_error_py.py` explains the theory and has the same names. `ChargeErrors` is plain
memory. A look costs as much as splitting the step once more, and is taken once in many steps.
"""

from libc.math cimport sqrt
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.string cimport memset

from csrc.curve cimport Served, smooth_curve, write_curve
from csrc.curve_fit cimport TOLD_STEPS, CurveFit
from csrc.game cimport SolvedStep, StepModel, StepWork, solve_step, weigh_game
from csrc.least_squares cimport NOISE, PIVOT_MIN
from csrc.requests cimport DECODE
from csrc.shares cimport Part
from csrc.terms cimport (
    CHARGE_KINDS, DECODE_COMPUTE, DECODE_KINDS, DECODE_KINDS_COUNT, FIT_TERMS, LORA,
    PREFILL_KINDS, PREFILL_KINDS_COUNT, READ, SLOPES, larger, smaller,
)

cdef enum:
    DRAWS = 16
    LOOK_EVERY = 32
    LOOK_AT_PREFILLS_EVERY = 8
    DRAWS_MIN = 8
    SIGNS_FACTOR = 1103515245
    SIGNS_SUMMAND = 12345
    SIGNS_SEED = 1
    FEATURE_SIGNS_SEED = 2

cdef extern from *:
    """
    #define LOOKS_KEPT 64.0
    """
    const double LOOKS_KEPT

cdef struct ChargeErrors:
    bint is_drawn
    StepModel others[DRAWS]
    double charged[DRAWS][CHARGE_KINDS]  # in ns, the mean of the looks
    double other[DRAWS][CHARGE_KINDS]
    int64_t looks[DRAWS][CHARGE_KINDS]
    int turn
    int since


cdef inline void forget_charge_errors(ChargeErrors *errors) noexcept nogil:
    """Know of no error, as the machine has changed."""
    memset(errors, 0, sizeof(ChargeErrors))


cdef inline void draw_others(
    ChargeErrors *errors, const CurveFit *curve, const Served *served, double deviation
) noexcept nogil:
    """Draw other models around a published one; `deviation` is that of its steps' errors."""
    cdef double noise = deviation / NOISE if deviation > NOISE else 1.0
    cdef double factor[FIT_TERMS][FIT_TERMS]
    cdef double scales[FIT_TERMS]
    cdef double drawn[FIT_TERMS]
    cdef uint64_t state = SIGNS_SEED, of_features = FEATURE_SIGNS_SEED
    cdef StepModel *model
    cdef int number, term
    factor_equations(curve, TOLD_STEPS * (noise * noise), factor, scales)
    for number in range(DRAWS):
        for term in range(FIT_TERMS):
            drawn[term] = next_sign(&of_features if LORA <= term < SLOPES else &state)
        solve_transposed(factor, drawn)
        for term in range(FIT_TERMS):
            drawn[term] = larger(
                0.0, curve.published[term] + NOISE * scales[term] * drawn[term]
            )
        drawn[DECODE_COMPUTE] = smaller(drawn[DECODE_COMPUTE], drawn[READ])
        model = &errors.others[number]
        model.is_curve = True
        model.served = served[0]
        write_curve(&model.curve, drawn, curve.chosen)
        smooth_curve(&model.smooth, &model.curve, served)
    errors.is_drawn = True


cdef inline double next_sign(uint64_t *state) noexcept nogil:
    state[0] = (state[0] * SIGNS_FACTOR + SIGNS_SUMMAND) & 0x7FFFFFFF
    return 1.0 if state[0] & 0x10000 else -1.0


cdef inline void factor_equations(
    const CurveFit *curve, double told, double[FIT_TERMS] *factor, double *scales
) noexcept nogil:
    """Write the Cholesky factor of a fit's equations, with a diagonal of 1, and the scales."""
    cdef double square, value
    cdef int i, j, k
    for i in range(FIT_TERMS):
        square = curve.moments[i][i] / told + curve.ridges[i]
        scales[i] = 1.0 / sqrt(square) if square > 0.0 else 0.0
    for i in range(FIT_TERMS):
        for j in range(i):
            value = curve.moments[i][j] / told * scales[i] * scales[j]
            for k in range(j):
                value -= factor[i][k] * factor[j][k]
            factor[i][j] = value / factor[j][j]
        value = 1.0
        for k in range(i):
            value -= factor[i][k] * factor[i][k]
        factor[i][i] = sqrt(larger(value, PIVOT_MIN))


cdef inline void solve_transposed(double[FIT_TERMS] *factor, double *found) noexcept nogil:
    """Replace `found` by x of L'x = found, for a lower triangle L."""
    cdef int i, k
    for i in range(FIT_TERMS - 1, -1, -1):
        for k in range(i + 1, FIT_TERMS):
            found[i] -= factor[k][i] * found[k]
        found[i] /= factor[i][i]


cdef inline void look_at_charges(
    ChargeErrors *errors,
    const Part *parts,
    uint32_t count,
    uint32_t plain,
    const StepWork *work,
    double total_ns,
    uint32_t *weights,
) noexcept nogil:
    """Split a step with these weights by another model too, if that is due; the weights are lost."""
    cdef int every = LOOK_AT_PREFILLS_EVERY if work.curve.prefills else LOOK_EVERY, kind
    cdef uint64_t charged[CHARGE_KINDS]
    cdef uint64_t other[CHARGE_KINDS]
    cdef uint64_t whole, other_whole
    cdef double share, other_share
    cdef SolvedStep game
    errors.since += 1
    if errors.since < every or count < 2 or not errors.is_drawn:
        return
    errors.since = 0
    whole = sum_kinds(charged, parts, count, weights)
    solve_step(&game, &errors.others[errors.turn], parts, count, plain, work)
    other_whole = weigh_game(&game, &errors.others[errors.turn], parts, plain, weights)
    if other_whole:
        sum_kinds(other, parts, count, weights)
        for kind in range(CHARGE_KINDS):
            if charged[kind]:
                share = <double>charged[kind] / <double>whole
                other_share = <double>other[kind] / <double>other_whole
                note_split(errors, kind, total_ns * share, total_ns * other_share)
    errors.turn = (errors.turn + 1) % DRAWS


cdef inline uint64_t sum_kinds(
    uint64_t *sums, const Part *parts, uint32_t count, const uint32_t *weights
) noexcept nogil:
    """Write the sum of the weights of each kind, and return that of all."""
    cdef uint64_t whole = 0
    cdef uint32_t k
    memset(sums, 0, CHARGE_KINDS * sizeof(uint64_t))
    for k in range(count):
        sums[charge_kind(&parts[k])] += weights[k]
        whole += weights[k]
    return whole


cdef inline int charge_kind(const Part *part) noexcept nogil:
    """Return the kind of a charge: prefills first, small ones before large ones."""
    cdef int kind = 0
    if part.phase & DECODE:
        while kind < DECODE_KINDS_COUNT and part.context > DECODE_KINDS[kind]:
            kind += 1
        return PREFILL_KINDS_COUNT + 1 + kind
    while kind < PREFILL_KINDS_COUNT and part.tokens > PREFILL_KINDS[kind]:
        kind += 1
    return kind


cdef inline void note_split(
    ChargeErrors *errors, int kind, double charged_ns, double other_ns
) noexcept nogil:
    cdef int number = errors.turn
    cdef double rate
    errors.looks[number][kind] += 1
    rate = 1.0 / smaller(<double>errors.looks[number][kind], LOOKS_KEPT)
    errors.charged[number][kind] += (charged_ns - errors.charged[number][kind]) * rate
    errors.other[number][kind] += (other_ns - errors.other[number][kind]) * rate


cdef inline double charge_error(const ChargeErrors *errors, int kind) noexcept nogil:
    """Return the part by which charges of a kind may be off."""
    cdef int number, draws = 0
    cdef double squares = 0.0, apart
    for number in range(DRAWS):
        if errors.charged[number][kind] > 0.0:
            apart = errors.other[number][kind] / errors.charged[number][kind] - 1.0
            squares += apart * apart
            draws += 1
    return smaller(2.0 * sqrt(squares / draws), 1.0) if draws >= DRAWS_MIN else 1.0
