// A mixture of experts in one call, for ranks that hold the same tokens: the router's choice, where the placement table
// has the chosen experts, this rank's of them, the shared expert, and the sum of both, which is still to be reduced over
// the ranks. The parts are the functions that the layers' Python form calls one by one, so the results are the same.

#include <algorithm>
#include <cstdint>

#include "layer_parts.h"
#include "scratch.h"
#include "swiglu.h"
#include "tiles.h"

#ifdef REMUDA_TILES

extern "C" {

struct Expert;

void remuda_route(const uint16_t *hidden, const uint16_t *weight, int64_t num_tokens, int64_t hidden_size,
                  int64_t num_experts, int64_t k, int32_t scoring, int64_t *expert_ids, float *scores);
int64_t remuda_dispatch(const uint16_t *hidden, const int64_t *expert_ids, const float *scores, int64_t num_tokens,
                        int64_t k, int64_t hidden_size, int64_t first_expert, int64_t num_experts,
                        int32_t scales_inputs, int64_t *counts, int64_t *token_rows, float *pair_scores,
                        uint16_t *inputs);
void remuda_combine(const uint16_t *outputs, const int64_t *token_rows, const float *pair_scores, int64_t num_pairs,
                    int64_t num_tokens, int64_t hidden_size, uint16_t *combined);
int64_t remuda_experts_scratch_bytes(int64_t hidden_size, int64_t width);
void remuda_experts_bf16(const Expert *experts, int64_t num_experts, int64_t hidden_size, int64_t width,
                         const uint16_t *tokens, const int64_t *counts, uint16_t *outputs, uint8_t *scratch);
void remuda_experts_int8(const Expert *experts, int64_t num_experts, int64_t hidden_size, int64_t width,
                         const uint16_t *tokens, const int64_t *counts, uint16_t *outputs, uint8_t *scratch);

// engine/kernels/mixture.py has the same structure.

// router [num_experts, hidden_size]; scoring as in engine/kernels/routing.py. experts: what this rank's num_slots slots
// from first_slot hold, of `width`. The placement table (engine/parallel/expert_table.py): expert e has num_copies[e]
// copies, in the slots copies[e × most_copies …], which take turns from first_turn on; all of it is read again in every
// step. loads: [num_slots], is added to; may be null. shared_gate_up, shared_down: without weights where there is none.
struct Mixture {
    const uint16_t *router;
    const Expert *experts;
    const int64_t *num_copies, *copies;
    int64_t *loads;
    Matrix shared_gate_up, shared_down;
    int64_t hidden_size, width, num_experts, num_chosen, scoring, scales_inputs, is_int8, first_slot, num_slots,
        most_copies, first_turn;
};
}

namespace {

using namespace remuda;

thread_local Scratch small_parts, pair_inputs, pair_outputs, expert_space, shared_inner, shared_output;

// One after another in memory, for `num_pairs` pairs at most.
struct Pairs {
    int64_t *slots, *token_rows, *counts;
    float *scores, *pair_scores;

    Pairs(int64_t num_pairs, int64_t num_slots) {
        slots = reinterpret_cast<int64_t *>(small_parts.at_least(num_pairs * 24 + num_slots * 8));
        token_rows = slots + num_pairs;
        counts = token_rows + num_pairs;
        scores = reinterpret_cast<float *>(counts + num_slots);
        pair_scores = scores + num_pairs;
    }
};

uint16_t *numbers(Scratch &scratch, int64_t count) {
    return reinterpret_cast<uint16_t *>(scratch.at_least(count * static_cast<int64_t>(sizeof(uint16_t))));
}

// Experts to the slots that compute them, in place.
void look_up(const Mixture &m, int64_t *experts, int64_t num_tokens) {
    for (int64_t t = 0; t < num_tokens; t++) {
        for (int64_t k = 0; k < m.num_chosen; k++, experts++) {
            const int64_t copy = (m.first_turn + t + *experts) % m.num_copies[*experts];
            *experts = m.copies[*experts * m.most_copies + copy];
        }
    }
}

// output [num_tokens, hidden_size]: the routed experts' sum.
void add_routed(const Mixture &m, const uint16_t *tokens, uint16_t *output, int64_t num_tokens) {
    const int64_t most = num_tokens * m.num_chosen, size = m.hidden_size;
    const Pairs pairs(most, m.num_slots);
    remuda_route(tokens, m.router, num_tokens, size, m.num_experts, m.num_chosen, static_cast<int32_t>(m.scoring),
                 pairs.slots, pairs.scores);
    look_up(m, pairs.slots, num_tokens);
    uint16_t *inputs = numbers(pair_inputs, most * size), *outputs = numbers(pair_outputs, most * size);
    const int64_t num_pairs = remuda_dispatch(tokens, pairs.slots, pairs.scores, num_tokens, m.num_chosen, size,
                                              m.first_slot, m.num_slots, static_cast<int32_t>(m.scales_inputs),
                                              pairs.counts, pairs.token_rows, pairs.pair_scores, inputs);
    for (int64_t slot = 0; m.loads && slot < m.num_slots; slot++) m.loads[slot] += pairs.counts[slot];
    uint8_t *space = expert_space.at_least(remuda_experts_scratch_bytes(size, m.width));
    (m.is_int8 ? remuda_experts_int8 : remuda_experts_bf16)(m.experts, m.num_slots, size, m.width, inputs, pairs.counts,
                                                            outputs, space);
    remuda_combine(outputs, pairs.token_rows, m.scales_inputs ? nullptr : pairs.pair_scores, num_pairs, num_tokens,
                   size, output);
}

REMUDA_AMX void add(uint16_t *sums, const uint16_t *summands, int64_t count) {
    for (int64_t i = 0; i < count; i += 16) {
        auto *here = reinterpret_cast<__m256i *>(sums + i);
        const __m512 summand = widened(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(summands + i)));
        _mm256_storeu_si256(here, narrowed(_mm512_add_ps(widened(_mm256_loadu_si256(here)), summand)));
    }
}

}  // namespace

extern "C" {

// output [num_tokens, hidden_size], this rank's summand, of tokens, both bfloat16.
void remuda_mixture(const Mixture *mixture, const uint16_t *tokens, uint16_t *output, int64_t num_tokens) {
    const Mixture &m = *mixture;
    add_routed(m, tokens, output, num_tokens);
    if (!m.shared_gate_up.weights) return;
    uint16_t *gate_up = numbers(shared_inner, num_tokens * m.shared_gate_up.num_outputs);
    multiply(m.shared_gate_up, tokens, gate_up, num_tokens);
    // What the routed experts needed is free again.
    uint16_t *inner = numbers(pair_inputs, num_tokens * m.shared_down.num_inputs);
    remuda_silu_multiply(gate_up, inner, num_tokens, m.shared_down.num_inputs);
    uint16_t *shared = numbers(shared_output, num_tokens * m.hidden_size);
    multiply(m.shared_down, inner, shared, num_tokens);
    add(output, shared, num_tokens * m.hidden_size);
}
}

#endif
