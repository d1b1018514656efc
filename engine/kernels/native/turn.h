// A number in shared memory that one process raises and others wait for.
//
// Waiting: a short spin where ranks do not outnumber the cores, then a futex on the number. Every 50 ms of waiting it is
// asked whether the process that is waited for still lives (pidfd).

#pragma once

#include <atomic>
#include <cstdint>
#include <ctime>
#include <linux/futex.h>
#include <poll.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace remuda {

constexpr int64_t kLine = 64;
constexpr int64_t kSliceNs = 50'000'000;

struct alignas(kLine) Turn {
    std::atomic<uint32_t> published;
    std::atomic<uint32_t> waiting;  // processes that sleep until `published` changes
};
static_assert(sizeof(Turn) == kLine);
static_assert(std::atomic<uint32_t>::is_always_lock_free);

enum class Outcome { kReached, kLate, kGone };

inline int64_t now_ns() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1'000'000'000LL + now.tv_nsec;
}

inline bool is_gone(int32_t pidfd) {
    if (pidfd < 0) return false;
    pollfd entry{pidfd, POLLIN, 0};
    return poll(&entry, 1, 0) > 0;
}

inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

inline void publish(Turn *turn, uint32_t value) {
    turn->published.store(value, std::memory_order_seq_cst);
    if (turn->waiting.load(std::memory_order_seq_cst) != 0) {
        syscall(SYS_futex, &turn->published, FUTEX_WAKE, INT32_MAX, nullptr, nullptr, 0);
    }
}

// Whether `published` has reached `target`; the numbers may wrap around.
inline bool has_reached(uint32_t published, uint32_t target) { return static_cast<int32_t>(published - target) >= 0; }

// Until `turn` has reached `target`. `pidfd`: of the process that raises it; -1: unknown.
inline Outcome await(Turn *turn, uint32_t target, int num_spins, int32_t pidfd, int64_t timeout_ns) {
    for (int i = 0; i < num_spins; i++) {
        if (has_reached(turn->published.load(std::memory_order_acquire), target)) return Outcome::kReached;
        relax();
    }
    int64_t deadline = now_ns() + timeout_ns;
    turn->waiting.fetch_add(1, std::memory_order_seq_cst);
    Outcome result = Outcome::kReached;
    while (true) {
        uint32_t seen = turn->published.load(std::memory_order_seq_cst);
        if (has_reached(seen, target)) break;
        int64_t left = deadline - now_ns();
        if (left <= 0) {
            result = Outcome::kLate;
            break;
        }
        int64_t slice = left < kSliceNs ? left : kSliceNs;
        timespec span{slice / 1'000'000'000LL, slice % 1'000'000'000LL};
        syscall(SYS_futex, &turn->published, FUTEX_WAIT, seen, &span, nullptr, 0);
        if (!has_reached(turn->published.load(std::memory_order_acquire), target) && is_gone(pidfd)) {
            result = Outcome::kGone;
            break;
        }
    }
    turn->waiting.fetch_sub(1, std::memory_order_seq_cst);
    return result;
}

}  // namespace remuda
