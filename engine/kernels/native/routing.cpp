// What surrounds the experts of a mixture: the router's choice, tokens sorted by expert, and their sums. bfloat16 with
// float32 arithmetic. For the CPUs that linear.cpp is for.
//
// T tokens, E experts in the model, K chosen for each token, N (token, expert) pairs of this rank, H hidden size.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "swiglu.h"
#include "tiles.h"

#ifdef REMUDA_TILES

namespace {

using namespace remuda;

constexpr int kStep = 16;  // numbers that are scaled and added together
constexpr int kGroup = 4;  // tokens, and experts, whose products are computed together

REMUDA_AMX inline __m512 load(const uint16_t *values) {
    return widened(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(values)));
}

REMUDA_AMX inline void store(uint16_t *target, __m512 values) {
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(target), narrowed(values));
}

REMUDA_AMX inline float to_bf16_and_back(float value) {
    return _mm512_cvtss_f32(rounded(_mm512_set1_ps(value)));
}

// logits [kTokens][stride] of kTokens tokens and kExperts experts. Each is added up in the same order whatever the two
// are.
template <int kTokens, int kExperts>
REMUDA_AMX void multiply(const uint16_t *tokens, const uint16_t *weights, int64_t hidden_size, float *logits,
                         int64_t stride) {
    __m512 sums[kTokens][kExperts];
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; t++) {
#pragma GCC unroll 4
        for (int e = 0; e < kExperts; e++) sums[t][e] = _mm512_setzero_ps();
    }
    for (int64_t k = 0; k < hidden_size; k += 2 * kStep) {
        __m512bh rows[kExperts];
#pragma GCC unroll 4
        for (int e = 0; e < kExperts; e++) {
            rows[e] = reinterpret_cast<__m512bh>(_mm512_loadu_si512(weights + e * hidden_size + k));
        }
#pragma GCC unroll 4
        for (int t = 0; t < kTokens; t++) {
            const __m512bh token = reinterpret_cast<__m512bh>(_mm512_loadu_si512(tokens + t * hidden_size + k));
#pragma GCC unroll 4
            for (int e = 0; e < kExperts; e++) sums[t][e] = _mm512_dpbf16_ps(sums[t][e], token, rows[e]);
        }
    }
    for (int t = 0; t < kTokens; t++) {
        for (int e = 0; e < kExperts; e++) logits[t * stride + e] = to_bf16_and_back(_mm512_reduce_add_ps(sums[t][e]));
    }
}

template <int kTokens>
REMUDA_AMX void multiply_all(const uint16_t *tokens, const uint16_t *weights, int64_t hidden_size, int64_t num_experts,
                             float *logits) {
    int64_t e = 0;
    for (; e + kGroup <= num_experts; e += kGroup) {
        multiply<kTokens, kGroup>(tokens, weights + e * hidden_size, hidden_size, logits + e, num_experts);
    }
    for (; e < num_experts; e++) {
        multiply<kTokens, 1>(tokens, weights + e * hidden_size, hidden_size, logits + e, num_experts);
    }
}

// The largest k of `values`, of which each NaN counts as infinite, in falling order; of equal ones the first.
void choose_largest(const float *values, int64_t num_values, int64_t k, std::vector<float> &keys, int64_t *chosen) {
    keys.resize(num_values);
    for (int64_t i = 0; i < num_values; i++) keys[i] = std::isnan(values[i]) ? INFINITY : values[i];
    for (int64_t c = 0; c < k; c++) {
        int64_t best = -1;
        for (int64_t i = 0; i < num_values; i++) {
            if (!std::isnan(keys[i]) && (best < 0 || keys[i] > keys[best])) best = i;
        }
        chosen[c] = best;
        keys[best] = NAN;  // taken
    }
}

enum Scoring : int32_t { kSigmoid = 0, kSoftmax = 1, kNormalizedSoftmax = 2 };

void score(const float *logits, int64_t num_experts, const int64_t *chosen, int64_t k, int32_t scoring, float *scores) {
    if (scoring == kSigmoid) {
        for (int64_t c = 0; c < k; c++) scores[c] = 1.0F / (1.0F + std::exp(-logits[chosen[c]]));
        return;
    }
    const float most = logits[chosen[0]];
    float total = 0.0F;
    for (int64_t e = 0; e < num_experts; e++) total += std::exp(logits[e] - most);
    float of_chosen = 0.0F;
    for (int64_t c = 0; c < k; c++) of_chosen += scores[c] = std::exp(logits[chosen[c]] - most) / total;
    if (scoring != kNormalizedSoftmax) return;
    for (int64_t c = 0; c < k; c++) scores[c] /= of_chosen;
}

}  // namespace

extern "C" {

// expert_ids and scores [T, K] of hidden [T, H] and the router's weight [E, H]; `scoring` as in
// engine/kernels/routing.py. H is a multiple of 32.
REMUDA_AMX void remuda_route(const uint16_t *hidden, const uint16_t *weight, int64_t num_tokens, int64_t hidden_size,
                             int64_t num_experts, int64_t k, int32_t scoring, int64_t *expert_ids, float *scores) {
    std::vector<float> logits(kGroup * num_experts), keys;
    for (int64_t first = 0; first < num_tokens;) {
        const uint16_t *tokens = hidden + first * hidden_size;
        const int64_t n = first + kGroup <= num_tokens ? kGroup : 1;
        if (n == kGroup) {
            multiply_all<kGroup>(tokens, weight, hidden_size, num_experts, logits.data());
        } else {
            multiply_all<1>(tokens, weight, hidden_size, num_experts, logits.data());
        }
        for (int64_t t = 0; t < n; t++, first++) {
            const float *of_token = logits.data() + t * num_experts;
            choose_largest(of_token, num_experts, k, keys, expert_ids + first * k);
            score(of_token, num_experts, expert_ids + first * k, k, scoring, scores + first * k);
        }
    }
}

// Sorts this rank's pairs by expert, and by token within one: `counts` [num_experts] of each of the experts from
// `first_expert`; for the N pairs the token's row in `token_rows`, its score in `pair_scores` and its numbers in
// `inputs` [N, H], multiplied by the score where `scales_inputs`. Returns N, at most T × K. H is a multiple of 16.
REMUDA_AMX int64_t remuda_dispatch(const uint16_t *hidden, const int64_t *expert_ids, const float *scores,
                                   int64_t num_tokens, int64_t k, int64_t hidden_size, int64_t first_expert,
                                   int64_t num_experts, int32_t scales_inputs, int64_t *counts, int64_t *token_rows,
                                   float *pair_scores, uint16_t *inputs) {
    std::memset(counts, 0, num_experts * sizeof(int64_t));
    for (int64_t pair = 0; pair < num_tokens * k; pair++) {
        const int64_t expert = expert_ids[pair] - first_expert;
        if (expert >= 0 && expert < num_experts) counts[expert]++;
    }
    std::vector<int64_t> next(num_experts);
    int64_t num_pairs = 0;
    for (int64_t e = 0; e < num_experts; e++) {
        next[e] = num_pairs;
        num_pairs += counts[e];
    }
    for (int64_t pair = 0; pair < num_tokens * k; pair++) {
        const int64_t expert = expert_ids[pair] - first_expert;
        if (expert < 0 || expert >= num_experts) continue;
        const int64_t at = next[expert]++;
        token_rows[at] = pair / k;
        pair_scores[at] = scores[pair];
        const uint16_t *from = hidden + pair / k * hidden_size;
        uint16_t *to = inputs + at * hidden_size;
        if (!scales_inputs) {
            std::memcpy(to, from, hidden_size * sizeof(uint16_t));
            continue;
        }
        const __m512 factor = _mm512_set1_ps(scores[pair]);
        for (int64_t i = 0; i < hidden_size; i += kStep) store(to + i, _mm512_mul_ps(load(from + i), factor));
    }
    return num_pairs;
}

// combined [T, H]: of outputs [N, H], each multiplied by its score where pair_scores is not null, the sum by token in
// the order of the pairs, rounded once. H is a multiple of 16.
REMUDA_AMX void remuda_combine(const uint16_t *outputs, const int64_t *token_rows, const float *pair_scores,
                               int64_t num_pairs, int64_t num_tokens, int64_t hidden_size, uint16_t *combined) {
    std::vector<int64_t> ends(num_tokens + 1), pairs(num_pairs);
    for (int64_t pair = 0; pair < num_pairs; pair++) ends[token_rows[pair] + 1]++;
    for (int64_t t = 0; t < num_tokens; t++) ends[t + 1] += ends[t];
    std::vector<int64_t> next(ends.begin(), ends.end() - 1);
    for (int64_t pair = 0; pair < num_pairs; pair++) pairs[next[token_rows[pair]]++] = pair;
    for (int64_t t = 0; t < num_tokens; t++, combined += hidden_size) {
        for (int64_t i = 0; i < hidden_size; i += kStep) {
            __m512 sum = _mm512_setzero_ps();
            for (int64_t p = ends[t]; p < ends[t + 1]; p++) {
                const __m512 factor = _mm512_set1_ps(pair_scores ? pair_scores[pairs[p]] : 1.0F);
                sum = _mm512_fmadd_ps(load(outputs + pairs[p] * hidden_size + i), factor, sum);
            }
            store(combined + i, sum);
        }
    }
}
}

#endif
