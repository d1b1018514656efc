// Messages from one process to another of the same host, in order, through slots of memory that they share.
//
// The sender fills slot k mod n with piece k and publishes k + 1; the receiver copies it and publishes k + 1 on its own
// number, after which the slot may be filled again. So up to n pieces lie ready while the receiver computes, and the
// sender waits for it only then. Every message begins in a new slot, so that small ones touch little memory.

#include <cstdint>
#include <cstring>

#include "marks.h"
#include "turn.h"

namespace {

using remuda::kLine;
using remuda::Outcome;
using remuda::Turn;

constexpr int kOk = 0, kLate = -1, kGone = -2, kOtherSize = -3;

struct Link {
    uint8_t *area;  // written, read, then slots of one line and `slot_bytes` bytes each
    int64_t slot_bytes;
    int32_t num_slots;
    int32_t num_spins;
    int32_t pidfd;  // of the other process; -1: unknown
    uint32_t done;  // pieces that this process has sent or received
    int64_t timeout_ns;
    remuda::Marks *marks;
};

Turn *written(const Link *link) { return reinterpret_cast<Turn *>(link->area); }
Turn *read(const Link *link) { return reinterpret_cast<Turn *>(link->area) + 1; }

uint8_t *slot(const Link *link) {
    return link->area + 2 * kLine + (link->done % link->num_slots) * (kLine + link->slot_bytes);
}

int await(const Link *link, Turn *turn, uint32_t target) {
    switch (remuda::await_marked(turn, target, link->num_spins, link->pidfd, link->timeout_ns, link->marks, 1)) {
        case Outcome::kReached: return kOk;
        case Outcome::kLate: return kLate;
        default: return kGone;
    }
}

}  // namespace

extern "C" {

int64_t remuda_link_bytes(int32_t num_slots, int64_t slot_bytes) { return 2 * kLine + num_slots * (kLine + slot_bytes); }

int32_t remuda_link_send(Link *link, const uint8_t *message, int64_t num_bytes) {
    remuda::mark_operation(link->marks, remuda::Mark::kSend);
    for (int64_t first = 0; first < num_bytes; first += link->slot_bytes) {
        int64_t n = num_bytes - first < link->slot_bytes ? num_bytes - first : link->slot_bytes;
        if (int result = await(link, read(link), link->done + 1 - link->num_slots); result != kOk) return result;
        uint8_t *here = slot(link);
        std::memcpy(here, &num_bytes, sizeof num_bytes);
        std::memcpy(here + kLine, message + first, n);
        link->done++;
        remuda::mark_entered(link->marks);
        remuda::publish(written(link), link->done);
    }
    return kOk;
}

int32_t remuda_link_receive(Link *link, uint8_t *message, int64_t num_bytes) {
    remuda::mark_operation(link->marks, remuda::Mark::kReceive);
    for (int64_t first = 0; first < num_bytes; first += link->slot_bytes) {
        int64_t n = num_bytes - first < link->slot_bytes ? num_bytes - first : link->slot_bytes;
        if (int result = await(link, written(link), link->done + 1); result != kOk) return result;
        const uint8_t *here = slot(link);
        int64_t sent;
        std::memcpy(&sent, here, sizeof sent);
        if (sent != num_bytes) return kOtherSize;
        std::memcpy(message + first, here + kLine, n);
        link->done++;
        remuda::mark_entered(link->marks);
        remuda::publish(read(link), link->done);
    }
    return kOk;
}
}
