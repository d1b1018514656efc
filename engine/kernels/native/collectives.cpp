// Collectives between ranks of one host, through memory that they share.
//
// Every rank has two buffers in the shared area. Operation k uses buffer k mod 2: a rank writes its values there, publishes
// the number k + 1, waits until all others have published it, and reads theirs. When it publishes k + 2 into the buffer of
// operation k, everybody has finished reading that one: each published k + 1 after it, and this rank has seen that.

#include <cstdint>
#include <cstring>

#include "marks.h"
#include "turn.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define REMUDA_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define REMUDA_CLONES
#endif

namespace {

using remuda::kLine;
using remuda::Mark;
using remuda::Turn;  // its number: operations that a rank has written

constexpr int kOk = 0;
// Failures are kLate - peer and kGone - peer.
constexpr int kLate = -1000;
constexpr int kGone = -2000;

struct Group {
    uint8_t *area;
    int64_t buffer_bytes;
    int32_t rank;
    int32_t size;
    int32_t num_spins;
    const int32_t *pidfds;  // of each rank; -1: unknown
    int64_t timeout_ns;
    uint32_t done;  // operations finished by this rank
    remuda::Marks *marks;
};

Turn *turn_of(const Group *group, int rank) { return reinterpret_cast<Turn *>(group->area) + rank; }

uint8_t *buffer_of(const Group *group, int rank, uint32_t operation) {
    int64_t index = 2 * rank + (operation & 1);
    return group->area + group->size * kLine + index * group->buffer_bytes;
}

int await_rank(Group *group, int peer) {
    uint32_t target = group->done + 1;
    switch (remuda::await_marked(turn_of(group, peer), target, group->num_spins, group->pidfds[peer], group->timeout_ns,
                                 group->marks, 0)) {
        case remuda::Outcome::kReached: return kOk;
        case remuda::Outcome::kLate: return kLate - peer;
        default: return kGone - peer;
    }
}

int await_all(Group *group) {
    for (int peer = 0; peer < group->size; peer++) {
        if (peer == group->rank) continue;
        if (int result = await_rank(group, peer); result != kOk) return result;
    }
    return kOk;
}

void publish(Group *group) {
    remuda::mark_entered(group->marks);
    remuda::publish(turn_of(group, group->rank), group->done + 1);
}

// Publish what stands in this rank's buffer and wait for all others.
int exchange(Group *group) {
    publish(group);
    return await_all(group);
}

float from_bf16(uint16_t value) {
    uint32_t bits = static_cast<uint32_t>(value) << 16;
    float wide;
    std::memcpy(&wide, &bits, 4);
    return wide;
}

// Round to nearest, ties to even; NaN stays NaN.
uint16_t to_bf16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    return static_cast<uint16_t>(value != value ? 0x7FC0 : rounded);
}

constexpr int64_t kTile = 512;

// Sums in the order of ranks, so that every rank has bitwise the same; bfloat16 is added in float32 and rounded once.
REMUDA_CLONES void sum_f32(const float *const *parts, int size, float *output, int64_t count) {
    for (int64_t first = 0; first < count; first += kTile) {
        int64_t n = count - first < kTile ? count - first : kTile;
        float sums[kTile];
        for (int64_t i = 0; i < n; i++) sums[i] = parts[0][first + i];
        for (int part = 1; part < size; part++) {
            const float *values = parts[part] + first;
            for (int64_t i = 0; i < n; i++) sums[i] += values[i];
        }
        std::memcpy(output + first, sums, n * sizeof(float));
    }
}

REMUDA_CLONES void sum_bf16(const uint16_t *const *parts, int size, uint16_t *output, int64_t count) {
    for (int64_t first = 0; first < count; first += kTile) {
        int64_t n = count - first < kTile ? count - first : kTile;
        float sums[kTile];
        for (int64_t i = 0; i < n; i++) sums[i] = from_bf16(parts[0][first + i]);
        for (int part = 1; part < size; part++) {
            const uint16_t *values = parts[part] + first;
            for (int64_t i = 0; i < n; i++) sums[i] += from_bf16(values[i]);
        }
        for (int64_t i = 0; i < n; i++) output[first + i] = to_bf16(sums[i]);
    }
}

constexpr int kMaxRanks = 64;

void sum(const Group *group, int64_t first, int64_t count, int element_bytes, uint8_t *output) {
    const void *parts[kMaxRanks];
    for (int rank = 0; rank < group->size; rank++) {
        parts[rank] = buffer_of(group, rank, group->done) + first * element_bytes;
    }
    if (element_bytes == 4) {
        sum_f32(reinterpret_cast<const float *const *>(parts), group->size, reinterpret_cast<float *>(output), count);
    } else {
        sum_bf16(reinterpret_cast<const uint16_t *const *>(parts), group->size, reinterpret_cast<uint16_t *>(output),
                 count);
    }
}

// Rows that go from every rank to every rank, in rounds: in each a rank's buffer begins with how many of its rows go to
// each rank in all, and then holds as many of them, ordered by receiver, as fit.
int64_t counts_bytes(const Group *group) { return (group->size * 8 + kLine - 1) / kLine * kLine; }

int64_t rows_per_round(const Group *group, int64_t row_bytes) {
    return (group->buffer_bytes - counts_bytes(group)) / row_bytes;
}

int64_t total_of(const int64_t *counts, int size) {
    int64_t total = 0;
    for (int rank = 0; rank < size; rank++) total += counts[rank];
    return total;
}

void write_round(const Group *group, const uint8_t *rows, const int64_t *counts, int64_t row_bytes, int64_t round) {
    uint8_t *buffer = buffer_of(group, group->rank, group->done);
    std::memcpy(buffer, counts, group->size * 8);
    int64_t most = rows_per_round(group, row_bytes), first = round * most;
    int64_t n = total_of(counts, group->size) - first;
    if (n > most) n = most;
    if (n > 0) std::memcpy(buffer + counts_bytes(group), rows + first * row_bytes, n * row_bytes);
}

}  // namespace

extern "C" {

int64_t remuda_area_bytes(int32_t size, int64_t buffer_bytes) { return size * kLine + 2 * size * buffer_bytes; }

int32_t remuda_max_ranks() { return kMaxRanks; }

// Sum of `count` float32 (element_bytes 4) or bfloat16 (2) values over the ranks, in place.
// Above `split_bytes` each rank adds up its part and the parts are exchanged; below, every rank adds up everything.
int32_t remuda_all_reduce(Group *group, uint8_t *values, int64_t count, int32_t element_bytes, int64_t split_bytes) {
    remuda::mark_operation(group->marks, Mark::kAllReduce);
    int64_t most = group->buffer_bytes / element_bytes;
    for (int64_t first = 0; first < count; first += most) {
        int64_t n = count - first < most ? count - first : most;
        uint8_t *here = values + first * element_bytes;
        std::memcpy(buffer_of(group, group->rank, group->done), here, n * element_bytes);
        if (int result = exchange(group); result != kOk) return result;
        if (n * element_bytes <= split_bytes) {
            sum(group, 0, n, element_bytes, here);
            group->done++;
            continue;
        }
        int64_t part = (n + group->size - 1) / group->size;
        auto start = [&](int rank) { return part * rank < n ? part * rank : n; };
        int64_t own = start(group->rank), own_count = start(group->rank + 1) - own;
        uint8_t *mine = buffer_of(group, group->rank, group->done + 1);
        sum(group, own, own_count, element_bytes, mine);
        group->done++;
        if (int result = exchange(group); result != kOk) return result;
        for (int rank = 0; rank < group->size; rank++) {
            std::memcpy(here + start(rank) * element_bytes, buffer_of(group, rank, group->done),
                        (start(rank + 1) - start(rank)) * element_bytes);
        }
        group->done++;
    }
    return kOk;
}

// Every rank gives `row_bytes` of each of `num_rows` rows; `output` [num_rows, size × row_bytes] is filled where it is
// not null. A row must fit into a buffer.
int32_t remuda_gather_rows(Group *group, const uint8_t *rows, int64_t num_rows, int64_t row_bytes, uint8_t *output) {
    remuda::mark_operation(group->marks, Mark::kGather);
    int64_t most = row_bytes ? group->buffer_bytes / row_bytes : num_rows;
    for (int64_t first = 0; first < num_rows; first += most) {
        int64_t n = num_rows - first < most ? num_rows - first : most;
        std::memcpy(buffer_of(group, group->rank, group->done), rows + first * row_bytes, n * row_bytes);
        if (int result = exchange(group); result != kOk) return result;
        for (int rank = 0; output && rank < group->size; rank++) {
            const uint8_t *source = buffer_of(group, rank, group->done);
            for (int64_t row = 0; row < n; row++) {
                std::memcpy(output + ((first + row) * group->size + rank) * row_bytes, source + row * row_bytes,
                            row_bytes);
            }
        }
        group->done++;
    }
    return kOk;
}

// Rank 0's bytes, on all.
int32_t remuda_broadcast(Group *group, uint8_t *values, int64_t num_bytes) {
    remuda::mark_operation(group->marks, Mark::kBroadcast);
    for (int64_t first = 0; first < num_bytes; first += group->buffer_bytes) {
        int64_t n = num_bytes - first < group->buffer_bytes ? num_bytes - first : group->buffer_bytes;
        if (group->rank == 0) std::memcpy(buffer_of(group, 0, group->done), values + first, n);
        if (int result = exchange(group); result != kOk) return result;
        if (group->rank != 0) std::memcpy(values + first, buffer_of(group, 0, group->done), n);
        group->done++;
    }
    return kOk;
}

// Rows [sum of counts, row_bytes], ordered by receiver, begin their way; counts [size]. A row must fit into a buffer. No
// other operation may come before remuda_await_counts and remuda_take_rows have ended this one.
void remuda_post_rows(Group *group, const uint8_t *rows, const int64_t *counts, int64_t row_bytes) {
    remuda::mark_operation(group->marks, Mark::kAllToAll);
    write_round(group, rows, counts, row_bytes, 0);
    publish(group);
}

// How many rows come from each rank: received [size].
int32_t remuda_await_counts(Group *group, int64_t *received) {
    if (int result = await_all(group); result != kOk) return result;
    for (int rank = 0; rank < group->size; rank++) {
        received[rank] = reinterpret_cast<const int64_t *>(buffer_of(group, rank, group->done))[group->rank];
    }
    return kOk;
}

// The rows from all ranks, ordered by sender. `rows`, `counts`: what was posted.
int32_t remuda_take_rows(Group *group, const uint8_t *rows, const int64_t *counts, int64_t row_bytes,
                         uint8_t *output) {
    int64_t most = rows_per_round(group, row_bytes), num_rounds = 1;
    int64_t starts[kMaxRanks], lengths[kMaxRanks];  // of this rank's rows among each sender's
    for (int rank = 0; rank < group->size; rank++) {
        auto sent = reinterpret_cast<const int64_t *>(buffer_of(group, rank, group->done));
        starts[rank] = total_of(sent, group->rank);
        lengths[rank] = sent[group->rank];
        int64_t rounds = (total_of(sent, group->size) + most - 1) / most;
        if (rounds > num_rounds) num_rounds = rounds;
    }
    for (int64_t round = 0; round < num_rounds; round++) {
        if (round > 0) {
            write_round(group, rows, counts, row_bytes, round);
            if (int result = exchange(group); result != kOk) return result;
        }
        uint8_t *target = output;
        for (int rank = 0; rank < group->size; rank++) {
            int64_t first = starts[rank] > round * most ? starts[rank] : round * most;
            int64_t end = starts[rank] + lengths[rank];
            if (end > (round + 1) * most) end = (round + 1) * most;
            const uint8_t *source = buffer_of(group, rank, group->done) + counts_bytes(group);
            if (end > first) {
                std::memcpy(target + (first - starts[rank]) * row_bytes, source + (first - round * most) * row_bytes,
                            (end - first) * row_bytes);
            }
            target += lengths[rank] * row_bytes;
        }
        group->done++;
    }
    return kOk;
}
}
