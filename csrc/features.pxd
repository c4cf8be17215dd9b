# cython: cdivision=True
"""What only some requests of a step need: LoRA, an encoder, guided decoding.

The twin `features_py.py` explains the theory and has the same names. A part has its features in its
phase. Of a decode of one token there are four kinds, so what they pay is a table.
"""

from libc.stdint cimport int64_t, uint32_t
from libc.string cimport memset

from csrc.requests cimport DECODE, ENCODER_SHIFT, HAS_LORA, IS_GUIDED, TRAITS, TRAITS_SHIFT
from csrc.shares cimport Part
from csrc.terms cimport (
    ENCODER, ENCODER_TOKEN, FEATURES, GUIDED, GUIDED_ROW, LORA, LORA_TOKEN,
)

cdef enum:
    ENCODER_TOKENS_MAX = 0xFFFFFF
    KINDS = 3  # of features
    USUAL_KINDS = 4  # of decodes of one token

cdef struct FeatureWork:
    int64_t lora
    int64_t lora_tokens
    int64_t guided
    int64_t guided_rows
    int64_t encoders
    int64_t encoder_tokens

cdef struct FeatureCharges:
    double shared[KINDS]
    double last[KINDS]
    double own[KINDS]
    # Of decodes of one token, by `usual_kind`.
    double usual[USUAL_KINDS]
    double usual_saved[USUAL_KINDS]


cdef inline bint has_features(const Part *part) noexcept nogil:
    return part.phase >> TRAITS_SHIFT != 0


cdef inline bint is_any(const FeatureWork *work) noexcept nogil:
    return (work.lora | work.guided | work.encoders) != 0


cdef inline uint32_t usual_kind(const Part *part) noexcept nogil:
    return (part.phase & TRAITS) >> TRAITS_SHIFT


cdef inline uint32_t encoder_tokens_of(const Part *part) noexcept nogil:
    return part.phase >> ENCODER_SHIFT


cdef inline uint32_t guided_rows_of(const Part *part) noexcept nogil:
    return part.tokens if part.phase & DECODE else 1


cdef inline void add_traits(FeatureWork *total, const Part *part) noexcept nogil:
    """Add the features that a part has because its request has them."""
    if part.phase & HAS_LORA:
        total.lora += 1
        total.lora_tokens += part.tokens
    if part.phase & IS_GUIDED:
        total.guided += 1
        total.guided_rows += guided_rows_of(part)


cdef inline void write_amounts(double *amounts, const FeatureWork *work) noexcept nogil:
    amounts[0] = 1.0 if work.lora else 0.0
    amounts[1] = <double>work.lora_tokens
    amounts[2] = 1.0 if work.guided else 0.0
    amounts[3] = <double>work.guided_rows
    amounts[4] = 1.0 if work.encoders else 0.0
    amounts[5] = <double>work.encoder_tokens


cdef inline double features_ns(const double *curve, const FeatureWork *work) noexcept nogil:
    cdef double amounts[FEATURES]
    cdef double total = 0.0
    cdef int place
    if not is_any(work):
        return 0.0
    write_amounts(amounts, work)
    for place in range(FEATURES):
        total += curve[LORA + place] * amounts[place]
    return total


cdef inline void no_charges(FeatureCharges *charges) noexcept nogil:
    memset(charges, 0, sizeof(FeatureCharges))


cdef inline void fill_charges(
    FeatureCharges *charges, const double *curve, const FeatureWork *everyone
) noexcept nogil:
    cdef Part usual
    cdef int kind
    no_charges(charges)
    if not is_any(everyone):
        return
    share_once(charges, 0, curve[LORA], everyone.lora)
    share_once(charges, 1, curve[GUIDED], everyone.guided)
    share_once(charges, 2, curve[ENCODER], everyone.encoders)
    charges.own[0] = curve[LORA_TOKEN]
    charges.own[1] = curve[GUIDED_ROW]
    charges.own[2] = curve[ENCODER_TOKEN]
    for kind in range(USUAL_KINDS):
        usual = Part(0, 1, 0, DECODE | <uint32_t>kind << TRAITS_SHIFT)
        charges.usual[kind] = feature_charge(charges, &usual)
        charges.usual_saved[kind] = feature_saved(charges, &usual)


cdef inline void share_once(
    FeatureCharges *charges, int kind, double ns, int64_t count
) noexcept nogil:
    """Fill in what one feature adds as soon as one of `count` requests has it."""
    if count:
        charges.shared[kind] = ns / count
    if count == 1:
        charges.last[kind] = ns


cdef inline double feature_charge(const FeatureCharges *charges, const Part *part) noexcept nogil:
    """Return what a part pays of features."""
    return sum_of_features(charges, charges.shared, part)


cdef inline double feature_saved(const FeatureCharges *charges, const Part *part) noexcept nogil:
    """Return what the step would save of features without a part."""
    return sum_of_features(charges, charges.last, part)


cdef inline double sum_of_features(
    const FeatureCharges *charges, const double *once, const Part *part
) noexcept nogil:
    cdef double total = 0.0
    if part.phase & HAS_LORA:
        total += once[0] + charges.own[0] * part.tokens
    if part.phase & IS_GUIDED:
        total += once[1] + charges.own[1] * guided_rows_of(part)
    if encoder_tokens_of(part):
        total += once[2] + charges.own[2] * encoder_tokens_of(part)
    return total
