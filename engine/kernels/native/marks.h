// Where this rank is on one axis, in memory that other processes read (engine/progress.py): four words, each written by a
// single store. Null pointers are allowed everywhere: then nobody wants to know.

#pragma once

#include <atomic>
#include <cstdint>

#include "turn.h"

namespace remuda {

enum class Mark : uint64_t { kAllReduce = 16, kGather = 17, kBroadcast = 18, kAllToAll = 19, kSend = 20, kReceive = 21 };

struct Marks {
    std::atomic<uint64_t> entered, waits_in, since_ns, operation;
};
static_assert(sizeof(Marks) == 32);

inline void set(std::atomic<uint64_t> &word, uint64_t value) { word.store(value, std::memory_order_relaxed); }
inline uint64_t get(const std::atomic<uint64_t> &word) { return word.load(std::memory_order_relaxed); }

inline void mark_operation(Marks *marks, Mark operation) {
    if (marks) set(marks->operation, static_cast<uint64_t>(operation));
}

inline void mark_entered(Marks *marks) {
    if (marks) set(marks->entered, get(marks->entered) + 1);
}

// `ahead`: 0 in the collective that was entered last, 1 for the message after it.
inline void mark_waiting(Marks *marks, uint64_t ahead) {
    if (!marks) return;
    set(marks->since_ns, static_cast<uint64_t>(now_ns()));
    set(marks->waits_in, get(marks->entered) + ahead);
}

inline void mark_resumed(Marks *marks) {
    if (marks) set(marks->waits_in, 0);
}

// As `await` of turn.h; what does not have to wait is not marked.
inline Outcome await_marked(Turn *turn, uint32_t target, int num_spins, int32_t pidfd, int64_t timeout_ns, Marks *marks,
                            uint64_t ahead) {
    if (has_reached(turn->published.load(std::memory_order_acquire), target)) return Outcome::kReached;
    mark_waiting(marks, ahead);
    Outcome outcome = await(turn, target, num_spins, pidfd, timeout_ns);
    if (outcome == Outcome::kReached) mark_resumed(marks);
    return outcome;
}

}  // namespace remuda
