// Memory of a thread that stays in its cache between calls.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

namespace remuda {

class Scratch {
  public:
    ~Scratch() { std::free(begin_); }
    // On a border of 64; what it held before is lost.
    uint8_t *at_least(int64_t num_bytes) {
        if (num_bytes > num_bytes_) {
            std::free(begin_);
            num_bytes_ = 0;
            begin_ = static_cast<uint8_t *>(std::aligned_alloc(64, (num_bytes + 63) / 64 * 64));
            if (begin_ == nullptr) throw std::bad_alloc();
            num_bytes_ = num_bytes;
        }
        return begin_;
    }

  private:
    uint8_t *begin_ = nullptr;
    int64_t num_bytes_ = 0;
};

}  // namespace remuda
