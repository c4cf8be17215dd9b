"""Terms and sizes of the cost model, as `attribution/cost_model.py` has them; a test compares both."""

from libc.stdint cimport uint32_t

cdef enum:
    TERMS = 5  # of a plane: 1, tokens, sequences, products, context
    KNOTS_COUNT = 32
    RAMPS_COUNT = 25
    # Terms of a curve: the own ones, then a slope from each corner on.
    FIXED = 0
    PREFILL = 1
    SEQUENCE = 2
    PAIRS = 3
    PREFILL_COMPUTE = 4
    DECODE_COMPUTE = 5
    READ = 6
    # Features of requests: what any adds to a step, then what each of its units does.
    LORA = 7
    LORA_TOKEN = 8
    GUIDED = 9
    GUIDED_ROW = 10
    ENCODER = 11
    ENCODER_TOKEN = 12
    FEATURES = 6
    SLOPES = 13
    CURVE_TERMS = 45
    # Coefficients of a fit: the own terms, then a slope for each ramp, then one expert's reading.
    EXPERTS = 38
    FIT_TERMS = 39
    COLUMNS = 26  # of them belong to corners: ramps and experts
    # Kinds of charges: prefills by their tokens, then decodes by their context.
    PREFILL_KINDS_COUNT = 3
    DECODE_KINDS_COUNT = 2
    CHARGE_KINDS = 7

cdef extern from *:
    """
    static const double KNOTS[32] = {
        0, 1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256, 288, 320, 384, 448,
        512, 640, 768, 896, 1024, 1280, 1536, 1792, 2048, 4096, 8192, 16384,
    };
    static const double RAMPS[25] = {
        0, 8, 16, 32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 384, 448,
        512, 640, 768, 896, 1024, 1280, 1536, 1792, 2048, 4096,
    };
    static const uint32_t PREFILL_KINDS[3] = {32, 128, 512};
    static const uint32_t DECODE_KINDS[2] = {4096, 32768};
    """
    const uint32_t PREFILL_KINDS[PREFILL_KINDS_COUNT]
    const uint32_t DECODE_KINDS[DECODE_KINDS_COUNT]
    const double KNOTS[KNOTS_COUNT]
    const double RAMPS[RAMPS_COUNT]


cdef inline double larger(double a, double b) noexcept nogil:
    return b if b > a else a


cdef inline double smaller(double a, double b) noexcept nogil:
    return b if b < a else a
