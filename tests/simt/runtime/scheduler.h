// Runs the blocks of launches: some of them at a time, their threads in turns, in the order of `settings`.
#pragma once

#include <functional>

#include "grid.h"

namespace simt {

constexpr unsigned kMaxResidentBlocks = 128;

// Launches that share the device: their blocks start in turns, or in a random order. Throws std::runtime_error where a
// kernel is wrong.
void run(const std::vector<Launch>& launches);

// Of the current thread's launch.
void for_resident_blocks(const std::function<void(Block&)>& visit);

}  // namespace simt
