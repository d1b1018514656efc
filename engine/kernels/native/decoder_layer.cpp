// A whole layer in one call, or its attention half: what the Python form does with a dozen or two, of which each costs
// more than the work of a few tokens is worth. The parts are the same functions, so the results are the same bit for bit.

#include <cstdint>

#include "layer_parts.h"
#include "swiglu.h"
#include "tiles.h"

#ifdef REMUDA_TILES

extern "C" {

struct Mixture;

void remuda_rotate_and_write(const uint16_t *query, int64_t query_stride, const uint16_t *key, int64_t key_stride,
                             const uint16_t *value, int64_t value_stride, const float *cosines, const float *sines,
                             const int64_t *slots, uint16_t *turned, uint16_t *key_cache, uint16_t *value_cache,
                             int64_t num_tokens, int64_t num_heads, int64_t num_kv_heads, int64_t head_dim,
                             int64_t interleaved);
void remuda_prompt_attention(const uint16_t *query, uint16_t *output, const uint16_t *keys, const uint16_t *values,
                             const int64_t *block_tables, int64_t table_width, const int64_t *rows,
                             const int64_t *tables, const int64_t *starts, const int64_t *counts, int64_t num_prompts,
                             int64_t chunk_size, int64_t window_size, int64_t block_size, int64_t num_kv_heads,
                             int64_t heads_per_kv_head, int64_t head_dim);
void remuda_decode_attention(const uint16_t *query, uint16_t *output, const uint16_t *keys, const uint16_t *values,
                             const int64_t *block_tables, int64_t table_width, const int64_t *rows,
                             const int64_t *tables, const int64_t *firsts, const int64_t *lasts, int64_t num_requests,
                             int64_t block_size, int64_t num_kv_heads, int64_t heads_per_kv_head, int64_t head_dim);

void remuda_mixture(const Mixture *mixture, const uint16_t *tokens, uint16_t *output, int64_t num_tokens);

// engine/kernels/decoder_layer.py has the same structures.

// Head numbers are this rank's. group: its tensor-parallel axis, null where it is alone. interleaved: how heads turn,
// where they do. normalizes_heads: queries and keys, after that; without weights. scales_queries: by the step's
// query_scales. gate_up, down and feed_forward_norm are of dense layers only.
struct Layer {
    Matrix qkv, output, gate_up, down;
    const uint16_t *attention_norm, *feed_forward_norm;
    Group *group;
    int64_t split_bytes, num_heads, num_kv_heads, head_dim, rotates, interleaved, normalizes_heads, scales_queries;
    float eps;
};

// What a step's tokens attend to in the layers of one KV group; see the two attention functions.
struct Attended {
    const int64_t *slots, *block_tables;
    int64_t table_width, block_size, chunk_size, window_size;
    const int64_t *prompt_rows, *prompt_tables, *prompt_starts, *prompt_counts;
    int64_t num_prompts;
    const int64_t *decode_rows, *decode_tables, *decode_firsts, *decode_lasts;
    int64_t num_decodes;
};

// Of one step, [num_tokens, width] each; cosines and sines [num_tokens, head_dim / 2], query_scales [num_tokens].
struct Buffers {
    uint16_t *normed, *qkv, *query, *attended, *gate_up, *inner;
    const float *cosines, *sines, *query_scales;
    int64_t num_tokens;
};
}

namespace {

using remuda::multiply;

int32_t sum_over_ranks(const Layer &layer, uint16_t *values, int64_t count) {
    if (!layer.group) return 0;
    return remuda_all_reduce(layer.group, reinterpret_cast<uint8_t *>(values), count, sizeof *values, layer.split_bytes);
}

// What some models do to queries and keys after they have turned.
REMUDA_AMX void finish_heads(const Layer &layer, const Attended &seen, const Buffers &b, uint16_t *key_cache) {
    const int64_t query_size = layer.num_heads * layer.head_dim, kv_size = layer.num_kv_heads * layer.head_dim;
    if (layer.normalizes_heads) {
        remuda_rms_norm(b.query, nullptr, b.query, b.num_tokens * layer.num_heads, layer.head_dim, layer.eps);
        for (int64_t t = 0; t < b.num_tokens; t++) {
            uint16_t *keys = key_cache + seen.slots[t] * kv_size;
            remuda_rms_norm(keys, nullptr, keys, layer.num_kv_heads, layer.head_dim, layer.eps);
        }
    }
    for (int64_t t = 0; t < (layer.scales_queries ? b.num_tokens : 0); t++) {
        const __m512 scale = _mm512_set1_ps(b.query_scales[t]);
        for (int64_t i = 0; i < query_size; i += 16) {
            auto *here = reinterpret_cast<__m256i *>(b.query + t * query_size + i);
            _mm256_storeu_si256(here, remuda::narrowed(_mm512_mul_ps(remuda::widened(_mm256_loadu_si256(here)), scale)));
        }
    }
}

void attend(const Layer &layer, const Attended &seen, const Buffers &b, uint16_t *key_cache, uint16_t *value_cache) {
    const int64_t query_size = layer.num_heads * layer.head_dim, kv_size = layer.num_kv_heads * layer.head_dim;
    const int64_t stride = query_size + 2 * kv_size, heads_per_kv_head = layer.num_heads / layer.num_kv_heads;
    remuda_rotate_and_write(b.qkv, stride, b.qkv + query_size, stride, b.qkv + query_size + kv_size, stride,
                            layer.rotates ? b.cosines : nullptr, layer.rotates ? b.sines : nullptr, seen.slots, b.query,
                            key_cache, value_cache, b.num_tokens, layer.num_heads, layer.num_kv_heads, layer.head_dim,
                            layer.interleaved);
    finish_heads(layer, seen, b, key_cache);
    if (seen.num_prompts) {
        remuda_prompt_attention(b.query, b.attended, key_cache, value_cache, seen.block_tables, seen.table_width,
                                seen.prompt_rows, seen.prompt_tables, seen.prompt_starts, seen.prompt_counts,
                                seen.num_prompts, seen.chunk_size, seen.window_size, seen.block_size,
                                layer.num_kv_heads, heads_per_kv_head, layer.head_dim);
    }
    if (seen.num_decodes) {
        remuda_decode_attention(b.query, b.attended, key_cache, value_cache, seen.block_tables, seen.table_width,
                                seen.decode_rows, seen.decode_tables, seen.decode_firsts, seen.decode_lasts,
                                seen.num_decodes, seen.block_size, layer.num_kv_heads, heads_per_kv_head,
                                layer.head_dim);
    }
}
}

extern "C" {

// hidden [num_tokens, n] += update, where that is not null; output gets what attention gives, which is still to be added,
// and may be update. Returns what a failed collective returned, else 0.
int32_t remuda_attention_layer(const Layer *layer, const Attended *seen, const Buffers *b, uint16_t *hidden,
                               const uint16_t *update, uint16_t *output, uint16_t *key_cache, uint16_t *value_cache) {
    const int64_t num_tokens = b->num_tokens, size = layer->qkv.num_inputs;
    if (update) {
        remuda_add_rms_norm(hidden, update, layer->attention_norm, b->normed, num_tokens, size, layer->eps);
    } else {
        remuda_rms_norm(hidden, layer->attention_norm, b->normed, num_tokens, size, layer->eps);
    }
    multiply(layer->qkv, b->normed, b->qkv, num_tokens);
    attend(*layer, *seen, *b, key_cache, value_cache);
    multiply(layer->output, b->attended, output, num_tokens);
    return sum_over_ranks(*layer, output, num_tokens * size);
}

// The same with the dense feed-forward part: hidden gets what attention gives too, output what comes after it.
int32_t remuda_decoder_layer(const Layer *layer, const Attended *seen, const Buffers *b, uint16_t *hidden,
                             const uint16_t *update, uint16_t *output, uint16_t *key_cache, uint16_t *value_cache) {
    const int64_t num_tokens = b->num_tokens, size = layer->qkv.num_inputs;
    int32_t result = remuda_attention_layer(layer, seen, b, hidden, update, output, key_cache, value_cache);
    if (result) return result;
    remuda_add_rms_norm(hidden, output, layer->feed_forward_norm, b->normed, num_tokens, size, layer->eps);
    multiply(layer->gate_up, b->normed, b->gate_up, num_tokens);
    remuda_silu_multiply(b->gate_up, b->inner, num_tokens, layer->down.num_inputs);
    multiply(layer->down, b->inner, output, num_tokens);
    return sum_over_ranks(*layer, output, num_tokens * size);
}

// The same with a mixture of experts as feed-forward part.
int32_t remuda_mixture_layer(const Layer *layer, const Mixture *mixture, const Attended *seen, const Buffers *b,
                             uint16_t *hidden, const uint16_t *update, uint16_t *output, uint16_t *key_cache,
                             uint16_t *value_cache) {
    const int64_t num_tokens = b->num_tokens, size = layer->qkv.num_inputs;
    int32_t result = remuda_attention_layer(layer, seen, b, hidden, update, output, key_cache, value_cache);
    if (result) return result;
    remuda_add_rms_norm(hidden, output, layer->feed_forward_norm, b->normed, num_tokens, size, layer->eps);
    remuda_mixture(mixture, b->normed, output, num_tokens);
    return sum_over_ranks(*layer, output, num_tokens * size);
}
}

#endif
