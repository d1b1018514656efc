// A product of a block of weight rows by tokens on the tile unit, during which the next block is fetched and the one before
// is finished: reading, multiplying and what comes after go on together. Only where REMUDA_TILES is defined.
#pragma once

#include <cstdint>

#include "tile_kinds.h"
#include "tiles.h"

#ifdef REMUDA_TILES

namespace remuda {

constexpr int kTokenPair = 2 * kTileRows;  // tokens that are multiplied together
constexpr int kTileWords = kTileRows * kTileRows;

// Two times 16 rows of weights, each 16 one after another in memory.
struct Rows {
    const uint8_t *first, *second;
    int64_t bytes;  // of a row
};

// Fetches rows that are wanted soon, evenly over so many steps.
class Ahead {
  public:
    Ahead(const Rows *rows, int64_t num_steps) {
        if (rows == nullptr) return;
        const int64_t num_lines = kTileRows * rows->bytes / kTileBytes;
        first_ = rows->first;
        second_ = rows->second;
        end_ = first_ + num_lines * kTileBytes;
        lines_per_step_ = (num_lines + num_steps - 1) / num_steps;
    }
    REMUDA_AMX void step() {
        for (int64_t i = 0; i < lines_per_step_ && first_ < end_; i++, first_ += kTileBytes, second_ += kTileBytes) {
            _mm_prefetch(reinterpret_cast<const char *>(first_), _MM_HINT_T1);
            _mm_prefetch(reinterpret_cast<const char *>(second_), _MM_HINT_T1);
        }
    }

  private:
    const uint8_t *first_ = nullptr, *second_ = nullptr, *end_ = nullptr;
    int64_t lines_per_step_ = 0;
};

// Of both 16 rows with 16 tokens, and with 16 more: [16 rows][16 tokens] each.
struct alignas(64) Sums {
    int32_t tiles[4][kTileWords];

    int32_t *of(int block, int half) { return tiles[2 * block + half]; }
};

// Sums that are finished, in small tasks, while the next ones are computed. `Task` is called with the sums, the number of
// the first row, the block of tokens within the sums and in all, and the number of the task, of Task::kNum.
template <typename Task>
class Finishing {
  public:
    explicit Finishing(const Task &task) : task_(task) {}

    // For the sums of `num_blocks` blocks of tokens from `block` and rows from `row`. Those before become due.
    Sums &next(int64_t row, int block, int num_blocks, int64_t num_steps) {
        next_task_ = 0;
        num_tasks_ = num_new_blocks_ * Task::kNum;
        tasks_per_step_ = (num_tasks_ + num_steps - 1) / num_steps;
        row_ = new_row_;
        block_ = new_block_;
        new_row_ = row;
        new_block_ = block;
        num_new_blocks_ = num_blocks;
        due_ ^= 1;
        return sums_[due_ ^ 1];
    }
    REMUDA_AMX void step() {
        for (int64_t i = 0; i < tasks_per_step_ && next_task_ < num_tasks_; i++) run_task();
    }
    // All that is due.
    REMUDA_AMX void finish() {
        while (next_task_ < num_tasks_) run_task();
    }

  private:
    REMUDA_AMX void run_task() {
        const int block = next_task_ / Task::kNum;
        task_(sums_[due_], row_, block, block_ + block, next_task_ % Task::kNum);
        next_task_++;
    }

    Task task_;
    Sums sums_[2];
    int due_ = 0, next_task_ = 0, num_tasks_ = 0, block_ = 0, new_block_ = 0, num_new_blocks_ = 0;
    int64_t tasks_per_step_ = 0, row_ = 0, new_row_ = 0;
};

// `tokens` and what follows, if anything: 16 tokens each as the right operand, [bytes / 4][16 tokens][4 bytes].
template <typename Kind, bool kHasTwo, typename Task>
REMUDA_AMX inline void multiply(const Rows &rows, const uint8_t *tokens, Ahead &ahead, Finishing<Task> &finishing,
                                Sums &sums) {
    const uint8_t *left = tokens, *right = tokens + kTileRows * rows.bytes;
    finish_writes();
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (kHasTwo) {
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t k = 0; k < rows.bytes; k += kTileBytes) {
        ahead.step();
        _tile_loadd(4, rows.first + k, rows.bytes);
        _tile_loadd(5, rows.second + k, rows.bytes);
        _tile_loadd(6, left + k * kTileRows, kTileBytes);
        Kind::first_tokens();
        if constexpr (kHasTwo) {
            _tile_loadd(7, right + k * kTileRows, kTileBytes);
            Kind::second_tokens();
        }
        finishing.step();
    }
    finishing.finish();
    _tile_stored(0, sums.tiles[0], kTileBytes);
    _tile_stored(1, sums.tiles[1], kTileBytes);
    if constexpr (kHasTwo) {
        _tile_stored(2, sums.tiles[2], kTileBytes);
        _tile_stored(3, sums.tiles[3], kTileBytes);
    }
    finish_writes();
}

}  // namespace remuda

#endif
