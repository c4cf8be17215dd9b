# cython: cdivision=True
"""The fair charge of each request in a step, by the cost model in use: its Shapley value.

The twin `game_py.py` explains the theory and has the same names. Decodes of one token are by far
the most requests of a step, and each costs a line: one multiplication for its weight, two for its
marginal cost.
"""

from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.string cimport memset

from csrc.curve cimport (
    Curve, CurveWork, Layers, Served, attention_of, curve_work_of, height, padded, read_of,
)
from csrc.growths cimport (
    ENUMERATED_MAX, LUMPS_MAX, Growths, enumerate_subsets, growth_at, is_lump, share_among_many,
)
from csrc.features cimport (
    FeatureCharges, FeatureWork, USUAL_KINDS, feature_charge, feature_saved, features_ns,
    fill_charges, has_features, is_any, no_charges, usual_kind,
)
from csrc.planes cimport Work, time_of, work_of
from csrc.requests cimport DECODE, ENCODER_SHIFT
from csrc.shapley cimport (
    LARGE_MAX, Large, Overlap, Sides, is_too_small, keep_large, solve_overlap, start_large,
)
from csrc.shares cimport Part
from csrc.terms cimport (
    DECODE_COMPUTE, FIXED, PREFILL, READ, SEQUENCE, TERMS, smaller,
)

cdef enum:
    WEIGHT_SUM = 0x40000000  # of a step's parts: half of what there is room for

cdef extern from *:
    """
    #define SMALLEST_NS 1e-9
    #define LARGEST_NS 9.2e18
    """
    const double SMALLEST_NS, LARGEST_NS

cdef struct StepModel:  # the published cost model as steps use it
    bint is_curve
    double compute[TERMS]
    double memory[TERMS]
    Curve curve
    Curve smooth
    Served served

cdef struct StepWork:  # what all requests of a step do, as each form sees it
    Work planes
    CurveWork curve
    FeatureWork features
    int64_t prefill_context

cdef struct Reads:  # what a decode reads, by its context
    Layers layers
    bint has_windows

cdef struct Line:
    double at_0
    double slope

cdef struct SolvedStep:
    uint32_t requests
    double total_ns
    double base_ns
    double sequence_ns
    double prefill_ns
    double last_prefill_ns
    bint has_features  # of its parts, and by the model
    double all_ns  # h of all tokens
    int64_t all_tokens
    Line c
    Line m
    FeatureCharges features
    Growths growths
    Overlap overlap

cdef struct Margins:
    Line c
    Line m
    double above_compute
    double above_memory
    double to_ns
    double usual_saved[USUAL_KINDS]  # without a decode of one token, of features
    bint is_alone
    Reads reads


cdef inline void solve_step(
    SolvedStep *game,
    const StepModel *model,
    const Part *parts,
    uint32_t count,
    uint32_t plain,
    const StepWork *work,
) noexcept nogil:
    """Solve the game of a step with at least one part; the first `plain` decode one token."""
    game.requests = count
    if model.is_curve:
        solve_by_curve(game, model, parts, count, plain, &work.curve, &work.features)
    else:
        solve_by_planes(game, model, parts, count, &work.planes)


cdef inline void solve_by_planes(
    SolvedStep *game, const StepModel *model, const Part *parts, uint32_t count, const Work *everyone
) noexcept nogil:
    cdef const double *compute = &model.compute[0]
    cdef const double *memory = &model.memory[0]
    cdef Sides sums = Sides(time_of(compute, everyone), time_of(memory, everyone))
    cdef Large large
    game.c = Line(compute[1] + compute[2], compute[3] + compute[4])
    game.m = Line(memory[1] + memory[2], memory[3] + memory[4])
    start_large(&large, sums, count)
    find_large(&large, game, model, parts, everyone.tokens > everyone.sequences)
    solve_overlap(&game.overlap, Sides(compute[0], memory[0]), sums, &large, count)
    game.total_ns = game.overlap.total_ns
    game.base_ns = game.overlap.base / count
    game.sequence_ns = game.prefill_ns = game.last_prefill_ns = game.all_ns = 0.0
    game.growths.token_ns = 0.0
    game.has_features = False
    no_charges(&game.features)


cdef inline void solve_by_curve(
    SolvedStep *game,
    const StepModel *model,
    const Part *parts,
    uint32_t count,
    uint32_t plain,
    const CurveWork *everyone,
    const FeatureWork *features,
) noexcept nogil:
    cdef const double *curve = &model.curve.terms[0]
    cdef double prefill_ns = curve[PREFILL] if everyone.prefills else 0.0
    cdef double shared = curve[FIXED] + prefill_ns + curve[SEQUENCE] * everyone.sequences
    cdef Sides sums = attention_of(curve, everyone)
    cdef Large large
    shared += features_ns(curve, features)
    game.has_features = is_any(features)
    fill_charges(&game.features, curve, features)
    game.c = Line(0.0, curve[DECODE_COMPUTE])
    game.m = Line(0.0, curve[READ])
    start_large(&large, sums, count)
    find_large(&large, game, model, parts, everyone.prefills > 0)
    solve_overlap(&game.overlap, Sides(0.0, 0.0), sums, &large, count)
    game.growths.is_enumerated = count <= ENUMERATED_MAX
    game.growths.token_ns = 0.0
    game.all_tokens = everyone.tokens
    game.all_ns = height_of(model, everyone.tokens, count)
    if game.growths.is_enumerated:
        enumerate_subsets(&game.growths, &model.curve, &model.served, parts, count)
    else:
        share_among_many(
            &game.growths, &model.smooth, parts, count, plain, everyone.tokens
        )
    game.total_ns = shared + game.all_ns + game.overlap.total_ns
    game.base_ns = curve[FIXED] / count
    game.sequence_ns = curve[SEQUENCE]
    game.prefill_ns = prefill_ns / everyone.prefills if everyone.prefills else 0.0
    game.last_prefill_ns = prefill_ns if everyone.prefills == 1 else 0.0


cdef inline double height_of(
    const StepModel *model, int64_t tokens, uint32_t count
) noexcept nogil:
    """Return h of a step with so many requests at a number of tokens, 0 at fewer than none."""
    if count <= ENUMERATED_MAX:
        return height(&model.curve, <double>padded(&model.served, max(0, tokens)))
    return height(&model.smooth, <double>tokens)


cdef inline Sides sides_of(const StepModel *model, const Part *part) noexcept nogil:
    cdef Work work
    cdef CurveWork curve_work
    if model.is_curve:
        curve_work = curve_work_of(part, &model.served.layers)
        return attention_of(model.curve.terms, &curve_work)
    work = work_of(part)
    return Sides(time_of(model.compute, &work), time_of(model.memory, &work))


cdef inline void find_large(
    Large *large,
    const SolvedStep *game,
    const StepModel *model,
    const Part *parts,
    bint may_cross,
) noexcept nogil:
    cdef uint32_t k, smaller_context = 0  # that of a decode that is not kept
    cdef Reads reads = reads_of(model)
    cdef Line c = game.c, m = game.m
    cdef Sides own
    cdef double read
    if game.requests > LARGE_MAX and not may_cross:
        return
    for k in range(game.requests):
        if is_usual(game, &parts[k]):
            if parts[k].context <= smaller_context:
                continue
            read = decode_reads(&reads, &parts[k])
            own = Sides(c.at_0 + c.slope * read, m.at_0 + m.slope * read)
            if is_too_small(large, own.compute_ns + own.memory_ns):
                smaller_context = parts[k].context  # Most decodes need no arithmetic to see it.
                continue
        else:
            own = sides_of(model, &parts[k])
        keep_large(large, k, own)


cdef inline bint is_sound(const SolvedStep *game) noexcept nogil:
    return SMALLEST_NS < game.total_ns < LARGEST_NS


cdef inline bint is_usual(const SolvedStep *game, const Part *part) noexcept nogil:
    """Return whether a part is a decode of one token among many."""
    return (
        game.requests > ENUMERATED_MAX
        and part.tokens == 1
        and part.phase & DECODE
        and not part.phase >> ENCODER_SHIFT
    )


cdef inline Reads reads_of(const StepModel *model) noexcept nogil:
    cdef Reads reads
    reads.layers = model.served.layers
    reads.has_windows = model.is_curve and model.served.layers.windowed != 0.0
    if not model.is_curve:
        reads.layers.whole = 1.0
    return reads


cdef inline double decode_reads(const Reads *reads, const Part *part) noexcept nogil:
    """Return what the time of a decode of one token is a line of."""
    if reads.has_windows:
        return read_of(&reads.layers, 1, part.context)
    return reads.layers.whole * part.context


cdef inline uint64_t weigh_game(
    const SolvedStep *game,
    const StepModel *model,
    const Part *parts,
    uint32_t plain,
    uint32_t *weights,
) noexcept nogil:
    """Fill in the charge of each part as a weight. Return the sum of the weights.

    The first `plain` parts are usual ones, if there are many. If the model predicts no time, the
    sum is 0 and nothing is filled in.
    """
    cdef const Overlap *overlap = &game.overlap
    cdef uint64_t whole = 0
    cdef uint32_t k = 0, next_large = 0, seen = 0
    cdef double part = overlap.compute_part, rest = 1.0 - overlap.compute_part
    cdef double to_weight, charge, own, growth, at_0, slope
    cdef double at_0_of[USUAL_KINDS]
    cdef int kind
    cdef Sides sides
    cdef Reads reads = reads_of(model)
    cdef uint32_t count = game.requests
    cdef uint32_t large = overlap.places[0] if overlap.large_count else count
    if not is_sound(game):
        return 0
    to_weight = WEIGHT_SUM / game.total_ns
    own = game.sequence_ns + game.growths.token_ns
    for kind in range(USUAL_KINDS):
        if kind and not game.has_features:
            at_0_of[kind] = at_0_of[0]
            continue
        at_0_of[kind] = (
            game.base_ns
            + (own + game.features.usual[kind])
            + (part * game.c.at_0 + rest * game.m.at_0)
        ) * to_weight + 0.5
    slope = (part * game.c.slope + rest * game.m.slope) * to_weight
    if reads.has_windows or count <= ENUMERATED_MAX or game.has_features:
        plain = 0
    while k < count:
        # Nothing but a line for all usual parts up to the next large one.
        while k < min(plain, large):
            weights[k] = <uint32_t>(at_0_of[0] + slope * (reads.layers.whole * parts[k].context))
            whole += weights[k]
            k += 1
        if k == count:
            break
        if k != large and is_usual(game, &parts[k]):
            at_0 = at_0_of[usual_kind(&parts[k])]
            weights[k] = <uint32_t>(at_0 + slope * decode_reads(&reads, &parts[k]))
        else:
            growth = growth_of(game, model, parts, k, &seen)
            charge = game.base_ns + (game.sequence_ns + growth)
            if k == large:
                charge += overlap.charges[next_large]
                next_large += 1
                large = overlap.places[next_large] if next_large < overlap.large_count else count
            else:
                sides = sides_of(model, &parts[k])
                charge += part * sides.compute_ns + rest * sides.memory_ns
            if not parts[k].phase & DECODE:
                charge += game.prefill_ns
            if has_features(&parts[k]):
                charge += feature_charge(&game.features, &parts[k])
            weights[k] = <uint32_t>(charge * to_weight + 0.5)
        whole += weights[k]
        k += 1
    return whole


cdef inline double growth_of(
    const SolvedStep *game, const StepModel *model, const Part *parts, uint32_t place, uint32_t *seen
) noexcept nogil:
    """Return what a part gets of h. `seen` counts the lumps so far."""
    cdef const Growths *growths = &game.growths
    cdef double growth
    if not model.is_curve:
        return 0.0
    if growths.is_enumerated:
        return growths.parts[place]
    if not is_lump(&parts[place]):
        return growths.token_ns * parts[place].tokens
    if seen[0] < LUMPS_MAX:
        growth = growths.first[seen[0]]
    else:
        growth = growth_at(growths, &model.smooth, parts, place)
    seen[0] += 1
    return growth * growths.scale


cdef inline Margins start_margins(
    const SolvedStep *game, const StepModel *model, double total_ns
) noexcept nogil:
    cdef Margins margins
    cdef double gpu_ns = smaller(total_ns, LARGEST_NS), own
    cdef int kind
    memset(margins.usual_saved, 0, sizeof(margins.usual_saved))
    margins.is_alone = game.requests == 1
    margins.reads = reads_of(model)
    if margins.is_alone:
        margins.above_compute = margins.above_memory = margins.to_ns = 0.0
        margins.c = margins.m = Line(gpu_ns, 0.0)
        return margins
    margins.to_ns = gpu_ns / game.total_ns if is_sound(game) else 0.0
    margins.above_compute = game.overlap.total_ns - game.overlap.compute_ns
    margins.above_memory = game.overlap.total_ns - game.overlap.memory_ns
    for kind in range(USUAL_KINDS):
        margins.usual_saved[kind] = game.features.usual_saved[kind] * margins.to_ns
    own = game.sequence_ns + added_by(game, model, 1)
    margins.c = Line(
        (own + (margins.above_compute + game.c.at_0)) * margins.to_ns,
        game.c.slope * margins.to_ns,
    )
    margins.m = Line(
        (own + (margins.above_memory + game.m.at_0)) * margins.to_ns,
        game.m.slope * margins.to_ns,
    )
    return margins


cdef inline double added_by(
    const SolvedStep *game, const StepModel *model, int64_t tokens
) noexcept nogil:
    """Return what h would be less without so many tokens."""
    if not model.is_curve:
        return 0.0
    return game.all_ns - height_of(model, game.all_tokens - tokens, game.requests)


cdef inline double margin_of_usual(const Margins *margins, const Part *part) noexcept nogil:
    """Return the marginal cost of a decode of one token, in ns of the step."""
    cdef double read = decode_reads(&margins.reads, part)
    return smaller(
        margins.c.at_0 + margins.c.slope * read, margins.m.at_0 + margins.m.slope * read
    )


cdef inline double margin_of(
    const Margins *margins, const SolvedStep *game, const StepModel *model, const Part *part
) noexcept nogil:
    """Return the marginal cost of a part, in ns of the step."""
    cdef Sides sides
    cdef double added
    if margins.is_alone:
        return margins.c.at_0
    if is_usual(game, part):
        return margin_of_usual(margins, part) + margins.usual_saved[usual_kind(part)]
    sides = sides_of(model, part)
    added = game.sequence_ns + added_by(game, model, part.tokens)
    if not part.phase & DECODE:
        added += game.last_prefill_ns
    if has_features(part):
        added += feature_saved(&game.features, part)
    return margins.to_ns * (
        added
        + smaller(
            margins.above_compute + sides.compute_ns, margins.above_memory + sides.memory_ns
        )
    )
